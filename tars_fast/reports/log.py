"""The log of a training run: a live table on the terminal, metrics.jsonl, samples.jsonl, and loggers."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tars_fast.learning.samples import SAMPLES
from tars_fast.reports.loggers import LoggedRun, Loggers
from tars_fast.support.console import PlainConsole, open_console, say
from tars_fast.support.files import append, write_atomically
from tars_fast.types import Question

_BY_MODALITY = (
    ("accuracy", "accuracy"),
    ("format", "format"),
    ("reward", "reward"),
    ("entropy (nats)", "entropy"),
    ("length (tokens)", "length"),
    ("cut off", "truncated"),
    ("groups that disagree", "disagreeing"),
)
_IN_ONE_LINE = (
    ("accuracy speech", "accuracy/speech"),
    ("text", "accuracy/text"),
    ("R_rep", "reward/representation"),
    ("R_beh", "reward/behaviour"),
    ("divergence", "divergence/speech"),
    ("written KL", "written_kl"),
    ("entropy", "entropy/speech"),
)
_OF_THE_STEP = (
    ("divergence from the teacher (nats)", "divergence/speech"),
    ("written answers' KL from the start (nats)", "written_kl"),
    ("R_rep", "reward/representation"),
    ("R_beh", "reward/behaviour"),
    ("clipped below", "clip/low"),
    ("clipped above", "clip/high"),
    ("|trainer - rollout| (nats)", "logprob_diff_mean"),
    ("gradient norm", "grad_norm"),
    ("learning rate", "learning_rate"),
)


def lines_until(path: Path, num_completed: int) -> Iterator[tuple[int, str]]:
    """(step, line) of a run that was interrupted; later steps are done again, and a line that was cut off is dropped."""
    if num_completed and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                step = json.loads(line)["step"]
                if step <= num_completed:
                    yield step, line


class RunLog:
    """Writes every step to metrics.jsonl and to loggers, and shows the latest step.

    Args:
        output_dir: the run's folder. None: nothing is written or printed, because another process does it.
        num_steps: number of steps of the whole run.
        num_completed: steps already done; later lines of an interrupted run are dropped.
        loggers: names of `LOGGERS`.
    """

    def __init__(self, output_dir: Path | None, num_steps: int, num_completed: int, loggers: Sequence[str] = ("tensorboard",)):
        self.console = PlainConsole(quiet=True) if output_dir is None else open_console()
        self._path: Path | None = None
        self._loggers: Loggers | None = None
        self._samples: Path | None = None
        if output_dir is not None:
            self._path, self._samples = output_dir / "metrics.jsonl", output_dir / SAMPLES
            kept = {step: line for step, line in lines_until(self._path, num_completed)}
            write_atomically(self._path, "".join(line + "\n" for line in kept.values()))
            if self._samples.exists():
                samples = [line + "\n" for _, line in lines_until(self._samples, num_completed)]
                write_atomically(self._samples, "".join(samples))
            if missing := [step for step in range(1, num_completed + 1) if step not in kept]:
                self.warn(f"{self._path} lacks {len(missing)} of {num_completed} steps, the first of them step {missing[0]}")
            self._loggers = Loggers(loggers, LoggedRun(output_dir, num_completed), self.warn)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
        )
        self._task = self._progress.add_task("steps", total=num_steps, completed=num_completed)
        self._live = Live(self._progress, console=self.console, refresh_per_second=2, transient=True)
        self._num_steps = num_steps
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> RunLog:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._live.stop()
        if self._loggers is not None:
            self._loggers.close()

    def write(self, metrics: Mapping[str, float]) -> None:
        """Record a step without showing it. Raises CannotWriteError."""
        if self._path is None or self._loggers is None:
            return
        append(self._path, json.dumps(metrics) + "\n")
        self._loggers.step(metrics)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Record and show a step; `metrics["step"]` counts from 1. Raises CannotWriteError."""
        if self._path is None:
            return
        self.write(metrics)
        for name, value in metrics.items():
            if name.startswith("seconds/"):
                self._seconds[name.removeprefix("seconds/")].append(value)
        self._progress.update(self._task, completed=metrics["step"])
        if self.console.is_terminal:
            self._live.update(Group(self._progress, *self._tables(metrics)))
        else:
            shown = [f"{title} {metrics[name]:.3f}" for title, name in _IN_ONE_LINE if name in metrics]
            self.say(f"step {metrics['step']}/{self._num_steps}  {'  '.join(shown)}  {metrics['seconds/step']:.1f} s")

    def samples(self, lines: Iterable[Mapping[str, Any]], questions: Iterable[Question]) -> None:
        """Record completions of a step, see `choose_samples`, and loggers the recordings of their questions.

        Raises:
            CannotWriteError: of samples.jsonl.
        """
        if self._samples is not None and self._loggers is not None:
            chosen = list(lines)
            append(self._samples, "".join(json.dumps(line) + "\n" for line in chosen))
            self._loggers.samples(chosen, questions)

    def median_seconds(self) -> dict[str, float]:
        """Median seconds a step of each phase, over the steps of this process."""
        return {name: statistics.median(values) for name, values in self._seconds.items()}

    def say(self, message: str) -> None:
        say(self.console, message)

    def warn(self, message: str) -> None:
        say(self.console, f"warning: {message}", colour="yellow")

    def _tables(self, metrics: Mapping[str, float]) -> Iterator[Table]:
        modalities = Table(box=None, pad_edge=False)
        for title in ("", "speech", "text"):
            modalities.add_column(title, justify="right" if title else "left", min_width=8)
        for title, name in _BY_MODALITY:
            values = (metrics.get(f"{name}/{modality}") for modality in ("speech", "text"))
            modalities.add_row(title, *("-" if value is None else f"{value:.4g}" for value in values))
        yield modalities
        rest = Table(box=None, pad_edge=False, show_header=False)
        rest.add_column("")
        rest.add_column("", justify="right")
        for title, name in _OF_THE_STEP:
            if name in metrics:
                rest.add_row(title, f"{metrics[name]:.4g}")
        for name, value in metrics.items():
            if name.startswith("seconds/"):
                rest.add_row(f"{name.removeprefix('seconds/')} (s)", f"{value:.2f}")
        yield rest
