"""TARS beside plain GRPO on identical data, steps and seeds: `python bench/arms.py --output bench/results/arms_cpu.json`.

Runs the default training command for every arm and seed, and writes before / after figures with paired 95 % intervals over the
held-out items, the difference between the arms, and the seconds of each phase; beside the JSON a PNG with the learning curves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from curves import FIGURES, compare, draw

ARMS = {
    "tars": [],
    "grpo": ["--representation-weight", "0", "--behaviour-weight", "0"],
}


def run_arm(arm: str, seed: int, folder: Path, threads: int, extra: list[str]) -> dict[str, object]:
    output_dir = folder / f"{arm}-{seed}"
    command = [sys.executable, "-m", "tars_fast.train", "--seed", str(seed), "--output-dir", str(output_dir)]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, *ARMS[arm], *extra], check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    evaluation = json.loads((output_dir / "evaluation.json").read_text())
    steps = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    phases = [name for name in steps[0] if name.startswith("seconds/")]
    result: dict[str, object] = {
        "command": " ".join(["python", *command[1:], *ARMS[arm], *extra]),
        "arm": arm,
        "seed": seed,
        "num_steps": len(steps),
        "seconds_command_to_summary": round(seconds, 1),
        "median_seconds_per_step": {
            phase.removeprefix("seconds/"): round(statistics.median(step[phase] for step in steps), 3) for phase in phases
        },
    }
    for part in ("before", "after", "change"):
        kept = [name for name in evaluation[part] if name.removesuffix("_ci95") in (*FIGURES, "mrr", "behaviour_similarity")]
        result[part] = {name: evaluation[part][name] for name in kept}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/arms"), help="where the runs write")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    arguments, extra = parser.parse_known_args()
    cases = [(arm, seed) for seed in arguments.seeds for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda case: run_arm(*case, arguments.folder, arguments.threads, extra), cases))
    runs_of = {arm.upper(): [arguments.folder / f"{arm}-{seed}" for seed in arguments.seeds] for arm in ARMS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    report = {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs_side_by_side": arguments.jobs,
        "threads_per_run": arguments.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "tars_minus_grpo_after": compare(runs_of["GRPO"], runs_of["TARS"]),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    draw(runs_of, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
