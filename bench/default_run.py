"""Seconds of the README's first command, from the shell to the summary: `python bench/default_run.py --output FILE`.

Further flags are handed to the command.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tars_fast.support.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tars_fast.train", *flags, "--output-dir", folder], check=True)
        seconds = time.perf_counter() - started
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        evaluation = json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf-8"))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = [json.loads(line) for line in lines]
    report = provenance() | {
        "command": shlex.join(["python", "-m", "tars_fast.train", *flags]),
        "seconds_command_to_summary": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "median_seconds_per_step": {
            name.removeprefix("seconds/"): round(statistics.median(step[name] for step in steps), 4)
            for name in steps[0]
            if name.startswith("seconds/")
        },
        "mean_without_backward": {
            modality: round(statistics.mean(step[f"without_backward/{modality}"] for step in steps), 3)
            for modality in ("speech", "text")
            if f"without_backward/{modality}" in steps[0]
        },
    }
    arguments.output.write_text(json.dumps(report | evaluation, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
