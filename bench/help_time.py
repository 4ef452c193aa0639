"""Seconds until `python -m tars_fast.train --help` has answered, beside another checkout of the project.

    python bench/help_time.py --other PATH --json bench/results/help_time_cpu.json

Both take turns. CPU seconds do not depend on other work of the machine, wall seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tars_fast.support.provenance import provenance

HERE = Path(__file__).parents[1]


def answer(checkout: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    environment = os.environ | {"PYTHONPATH": f"{checkout / 'kernels'}{os.pathsep}{checkout}"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tars_fast.train", "--help"],
        env=environment,
        cwd=checkout,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    checkouts = {"this": HERE, "other": options.other.resolve()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    # The first round writes bytecode and fills the disk's cache.
    for number in range(options.rounds + 1):
        for name, checkout in checkouts.items():
            measured = answer(checkout)
            if number:
                seconds[name].append(measured)
    report: dict[str, object] = {"command": "python -m tars_fast.train --help", "rounds": options.rounds}
    for name, checkout in checkouts.items():
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
        )
        wall, cpu = (statistics.median(values) for values in zip(*seconds[name], strict=True))
        report[name] = {"commit": commit.stdout.strip(), "wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
    report |= {name: value for name, value in provenance().items() if name != "commit"}
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
