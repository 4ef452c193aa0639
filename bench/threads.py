"""Seconds a step by how long OpenMP threads spin, on idle cores and beside other work: `python bench/threads.py --output FILE`.

Each measurement is the default run, `python -m tars_fast.train`, in a process of its own, ended after a few steps. Settings
alternate within a round. The other work, as many endless loops as there are cores, begins when the run trains; the step it
begins in is not counted. Other work can make a step so slow that none ends within `--limit` seconds: the time is then that
limit, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tars_fast.support.provenance import provenance

SETTINGS = {"default": {"GOMP_SPINCOUNT": "300000"}, "chosen": {}}
"""libgomp's default, and what `tars_fast` sets."""
_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
_WARM_UP = 2
"""First steps that are not counted, because they still load and allocate."""


@dataclass
class Timed:
    """Seconds of the steps measured with one setting under one load."""

    seconds: list[float] = field(default_factory=list)
    is_bound: bool = False
    """Whether a run completed no step within its limit, which is then counted as one step."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def busy(num_loops: int) -> Iterator[None]:
    """Run so many processes that compute without a pause, inside the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def time_steps(setting: dict[str, str], num_loops: int, num_steps: int, limit: float, timed: Timed) -> None:
    """Run once, and add its steps to `timed`."""
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES} | setting
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"

        def wait_for(num_lines: int, seconds: float) -> list[float]:
            deadline = time.monotonic() + seconds
            while True:
                lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
                if len(lines) >= num_lines or time.monotonic() > deadline:
                    return [json.loads(line)["seconds/step"] for line in lines]
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended with status {process.returncode}")
                time.sleep(0.2)

        command = [sys.executable, "-m", "tars_fast.train", "--device", "cpu", "--output-dir", folder]
        command += ["--eval-items", "1", "--eval-samples", "0"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            begun = len(wait_for(_WARM_UP, 300))
            with busy(num_loops):
                skipped = begun + (1 if num_loops else 0)
                steps = wait_for(skipped + num_steps, limit)[skipped:]
        finally:
            process.kill()
            process.wait()
    timed.seconds += steps or [limit]
    timed.is_bound |= not steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=VALUE,...", help="further settings to measure")
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one run, once it trains")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    settings = SETTINGS | {text: dict(part.split("=", 1) for part in text.split(",")) for text in arguments.also}
    num_loops = {"idle": 0, "busy": os.cpu_count() or 1}
    timed = {load: {name: Timed() for name in settings} for load in num_loops}
    for number in range(arguments.rounds):
        for load, loops in num_loops.items():
            for name, setting in settings.items():
                time_steps(setting, loops, arguments.num_steps, arguments.limit, timed[load][name])
                print(f"round {number + 1}, {load}, {name}: median {timed[load][name].median:.2f} s so far", flush=True)
    results = {
        name: {
            "environment": setting,
            "seconds_idle": timed["idle"][name].seconds,
            "seconds_busy": timed["busy"][name].seconds,
            "median_idle": timed["idle"][name].median,
            "median_busy": timed["busy"][name].median,
            "busy_is_at_least": timed["busy"][name].is_bound,
            "idle_over_default": timed["idle"][name].median / timed["idle"]["default"].median,
            "busy_over_idle": timed["busy"][name].median / timed["idle"][name].median,
        }
        for name, setting in settings.items()
    }
    report = provenance() | {"num_loops": num_loops["busy"], "results": results}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
