"""A short training run, in a process of its own, for the scripts that make trouble."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from items import first_items

from tars_fast.data.items import TRAINING_DATA, VALIDATION_DATA


def make_data(folder: Path) -> Path:
    """Write sixteen items to train on and four to evaluate on into `folder`."""
    first_items(TRAINING_DATA, 16, folder / "training")
    first_items(VALIDATION_DATA, 4, folder / "evaluation")
    return folder


def settings_of(folder: Path, num_steps: int) -> list[str]:
    """The command line of a run of so many tiny steps on the data in `folder`, without the run's own folder."""
    settings = ["--data", str(folder / "training"), "--eval-data", str(folder / "evaluation"), "--eval-samples", "0"]
    settings += ["--num-steps", str(num_steps), "--questions-per-step", "2", "--group-size", "4", "--device", "cpu"]
    # As many as free memory holds by default, which other processes change.
    return [*settings, "--tokens-per-micro-batch", "4096"]


def start(settings: list[str], log: Path) -> BaseProcess:
    """`python -m tars_fast.train` with these settings, forked from a process that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tars_fast.train"])
    process = context.Process(target=_train, args=(settings, log))
    process.start()
    return process


def _train(settings: list[str], log: Path) -> None:
    from tars_fast import train

    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["train", *settings]
    sys.exit(train.main())


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Everything in metrics.jsonl but the clock."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.startswith("seconds/")} for line in lines]
