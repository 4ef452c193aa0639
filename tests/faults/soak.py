"""Train for thousands of tiny steps and watch what grows: `python tests/faults/soak.py --steps 2000 --output FILE`.

Memory, threads, open files and the size of the folder are looked at after each tenth of the run. What may grow: metrics.jsonl
and TensorBoard's events, by the same amount each step. Two checkpoints stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
from runs import make_data, settings_of, start

from tars_fast.support.files import write_atomically
from tars_fast.support.provenance import provenance

GROWING = ("metrics.jsonl", "tensorboard")
"""Files and folders of a run that grow with its steps."""


def num_bytes(path: Path) -> int:
    """Size of a file, or of everything in a folder."""
    return path.stat().st_size if path.is_file() else sum(part.stat().st_size for part in path.rglob("*") if part.is_file())


def look(process: psutil.Process, run: Path) -> dict[str, int]:
    """What a training process holds now."""
    with process.oneshot():
        held = {"rss": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}
    parts = {path.name: num_bytes(path) for path in run.iterdir()}
    held["growing_bytes"] = sum(parts.get(name, 0) for name in GROWING)
    held["other_bytes"] = sum(size for name, size in parts.items() if name not in GROWING and not name.endswith(".partial"))
    return held | {"checkpoints": sum(name.startswith("checkpoint-") and name[-1].isdigit() for name in parts)}


def soak(folder: Path, num_steps: int, save_every: int) -> tuple[list[str], list[dict[str, int]]]:
    """(settings of the run, what it held after each tenth of the steps).

    Raises:
        AssertionError: the run failed.
    """
    run, log = folder / "run", folder / "log.txt"
    # So small a batch teaches nothing in so many steps; at the usual rate it ruins the policy.
    settings = [*settings_of(make_data(folder), num_steps), "--save-every", str(save_every), "--learning-rate", "1e-6"]
    started = start([*settings, "--output-dir", str(run)], log)
    process, marks = psutil.Process(started.pid), []
    while started.is_alive():
        time.sleep(0.5)
        metrics = run / "metrics.jsonl"
        step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if step > len(marks) * num_steps / 10 and step < num_steps and started.is_alive():
            marks.append({"step": step} | look(process, run))
    started.join()
    assert started.exitcode == 0, log.read_text()[-3000:]
    return settings, marks


def growth(marks: list[dict[str, int]], name: str) -> int:
    """How much more there is of something at the end than after three tenths of the run, when all is loaded and cached."""
    return marks[-1][name] - marks[3][name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings, marks = soak(Path(folder), given.steps, given.save_every)
    growing_steps = marks[-1]["step"] - marks[3]["step"]
    report = provenance() | {
        "command": f"python tests/faults/soak.py --steps {given.steps} --save-every {given.save_every} --output FILE",
        "train": "python -m tars_fast.train " + " ".join(settings).replace(folder, "DATA"),
        "growth_of_the_last_seven_tenths": {
            name: growth(marks, name) for name in ("rss", "threads", "files", "other_bytes", "checkpoints")
        },
        "bytes_a_step_of_metrics_and_events": round(growth(marks, "growing_bytes") / growing_steps, 1),
        "marks": marks,
    }
    write_atomically(given.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
