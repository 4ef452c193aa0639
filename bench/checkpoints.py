"""Cost a step of checkpoints, in the background and waited for: `python bench/checkpoints.py --output FILE`.

Two processes (gloo, CPU) train the bundled model. Pairs of steps come in threes, in an order drawn anew each time: without a
checkpoint, with one between them that is written in the background, and with one that the run waits for. Beside the time of the
pair stands the time that the training loop spends in saving alone, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tars_fast.config import TrainConfig
from tars_fast.learning.loader import RolloutLoader
from tars_fast.learning.run import open_run
from tars_fast.learning.saving import Stop
from tars_fast.learning.workers import join_workers
from tars_fast.support.files import write_atomically
from tars_fast.support.provenance import provenance
from tars_fast.train import update_policy

MODES = ("none", "background", "waited for")
PROCESSES = 2


def measure(output_dir: Path, num_rounds: int) -> dict[str, object]:
    """Seconds of two steps by mode, of the first process, and bytes of a checkpoint."""
    settings = {"questions_per_step": 4, "group_size": 4, "eval_items": 2, "eval_samples": 0, "device": "cpu"}
    config = TrainConfig(output_dir=output_dir, num_steps=6 * num_rounds + 2, save_every=10_000, **settings)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    waiting: dict[str, list[float]] = {mode: [] for mode in MODES[1:]}
    rng = random.Random(0)
    with join_workers() as workers, open_run(config, workers) as run:
        learner, saver = run.learner, run.saver
        with RolloutLoader(run.model, run.engine, learner.rewards, run.selection, run.config, workers) as loader:
            step = 0

            def train() -> None:
                nonlocal step
                scored = learner.begin_rollout(loader.next_batch(step, learner.timer).rollout, step)
                update_policy(learner, scored)
                learner.optimizer.zero_grad(set_to_none=True)
                saver.agree(Stop.NO)
                step += 1

            train()
            for _ in range(num_rounds):
                for mode in rng.sample(MODES, len(MODES)):
                    started = time.perf_counter()
                    train()
                    saving = time.perf_counter()
                    if mode != "none":
                        saver.start(step)
                    if mode == "waited for":
                        saver.finish()
                    if mode != "none":
                        waiting[mode].append(time.perf_counter() - saving)
                    train()
                    seconds[mode].append(time.perf_counter() - started)
                    saver.finish()
        checkpoint = max(output_dir.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {
        "seconds_of_two_steps": seconds,
        "seconds_in_saving": waiting,
        "checkpoint_bytes": num_bytes,
        "is_first": workers.is_first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
            arguments = ["--rounds", str(given.rounds), "--output", str(given.output), "--folder", folder]
            subprocess.run([*launcher, __file__, *arguments], check=True)
        return
    measured = measure(given.folder / "run", given.rounds)
    if not measured.pop("is_first"):
        return
    medians, saving = (
        {mode: statistics.median(values) for mode, values in measured[name].items()}
        for name in ("seconds_of_two_steps", "seconds_in_saving")
    )
    report = provenance() | {
        "command": f"python bench/checkpoints.py --rounds {given.rounds} --output FILE",
        "processes": PROCESSES,
        "load_average": os.getloadavg(),
        "median_seconds_of_two_steps": medians,
        "median_seconds_in_saving": saving,
    }
    write_atomically(given.output, json.dumps(report | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
