"""The held-out questions of the bundled model `pocket` in Joe's voice: `python examples/smol/speak_pocket.py --output-dir DIR`.

`pocket@held_out_neural` was made by it, of the same problems in the same order as `pocket@held_out`, with the same margins
and encoding. Only the voice is of another kind: a neural one, where all that pocket has heard is from espeak-ng. Left to
himself Joe takes half as long again as espeak-ng does; he is told to hurry, so that it is a sixth.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from voices import speak

from tars_fast.data.arithmetic import TASKS, Problem, with_margins
from tars_fast.pocket import write_part
from tars_fast.support.cli import as_paths, run_command

PACES = (0.63, 0.87)
"""Shares of his own length; espeak-ng's recordings vary as much."""


@dataclass(frozen=True)
class SpeakConfig:
    """Speak the held-out questions of pocket in a neural voice."""

    output_dir: Path
    """Receives held_out_neural.parquet."""
    seed: int = 0
    """Of paces and margins."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir")


def say(problems: Iterable[Problem], seed: int) -> Iterator[tuple[Problem, np.ndarray, str]]:
    """Each problem, its [samples] float32 at 16 kHz, and the voice's name."""
    rng = random.Random(seed)
    for problem in problems:
        wave, rate = speak(problem.question, rng.uniform(*PACES))
        yield problem, with_margins(wave, rate, rng), "joe"


def run(config: SpeakConfig) -> int:
    task = TASKS["pocket"]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    spoken = list(say(task.split_problems().held_out, config.seed))
    write_part(config.output_dir / "held_out_neural.parquet", task, spoken)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run, SpeakConfig, "python examples/smol/speak_pocket.py"))
