"""Where the metrics of a run go besides metrics.jsonl: TensorBoard's files, Weights & Biases, trackio.

Metrics come once a step, completions where there are samples of them. A logger that fails is warned of once and left out from
then on; the run goes on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.support.requirements import in_order, installed, supported
from tars_fast.types import Question, UserError

_PROJECT = "tars_fast"
_COLUMNS = ("step", "id", "question", "answer", "speech", "speech R", "text", "text R")
_CURVES = {"speech": "speech_accuracy", "text": "text_accuracy"}


@dataclass(frozen=True)
class LoggedRun:
    """What a logger has to know of a run."""

    output_dir: Path
    num_completed: int
    """Steps that were done before; what was logged of later ones no longer counts."""

    def settings(self) -> dict[str, Any]:
        """The content of config.json."""
        return json.loads((self.output_dir / "config.json").read_text(encoding="utf-8"))


class Logger(ABC):
    """Where metrics and samples go; may raise whatever it likes."""

    @abstractmethod
    def step(self, metrics: Mapping[str, float]) -> None:
        """Add a step's metrics; `metrics["step"]` counts from 1, and is 0 before training."""

    @abstractmethod
    def samples(self, rows: Sequence[Sequence[Any]], recordings: Mapping[str, np.ndarray]) -> None:
        """Add completions.

        Args:
            rows: a table with `_COLUMNS`; all of one step.
            recordings: [T] at 16 kHz, by the id of their question.
        """

    @abstractmethod
    def close(self) -> None:
        """End it, with all that was added."""


class TensorBoard(Logger):
    """A file of events in the run's folder `tensorboard`, complete after each step.

    torch's `SummaryWriter` writes now and then, in a thread of its own, whose error over a full disk is a traceback.
    """

    def __init__(self, run: LoggedRun):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        # Values of this and later steps in earlier files no longer count.
        first_step = run.num_completed + 1 if run.num_completed else 0
        folder = run.output_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{first_step}"
        self._file = (folder / name).open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        names = {title: f"validation/{name}" for title, name in _CURVES.items()}
        curves = {title: ["Margin", [name, f"{name}/low", f"{name}/high"]] for title, name in names.items()}
        self._add(summary=summary.custom_scalars({"validation accuracy, with 95 % interval": curves}))

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def step(self, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=int(metrics["step"]), summary=Summary(value=values))

    def samples(self, rows: Sequence[Sequence[Any]], recordings: Mapping[str, np.ndarray]) -> None:
        from torch.utils.tensorboard import summary

        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *([_as_cell(cell) for cell in row] for row in rows)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        step = rows[0][0]
        self._add(step=step, summary=summary.text("samples", table))
        for number, waveform in enumerate(recordings.values(), 1):
            self._add(step=step, summary=summary.audio(f"recordings/{number}", waveform, SAMPLE_RATE))

    def close(self) -> None:
        self._file.close()


def _as_cell(value: object) -> str:
    """Of a table in Markdown, in which a completion's tags and lines are text."""
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(sign, shown)
    return text


class WandbLogger(Logger):
    """A run of Weights & Biases, or of a package with its interface; the environment's settings of the package hold."""

    def __init__(self, run: LoggedRun):
        import wandb

        folder = run.output_dir / "wandb"
        # Its folders are called run-<time>-<id>, offline ones offline-run-<time>-<id>.
        earlier = sorted(path.name for path in folder.glob("*run-*-*")) if run.num_completed else []
        self._package = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.output_dir.name,
            id=earlier[-1].rpartition("-")[2] if earlier else None,
            resume="allow",
            dir=run.output_dir,
            config=run.settings(),
            # It would stand between the run's live table and the terminal.
            settings=wandb.Settings(console="off"),
        )
        # Steps that a resumed run does again are allowed so.
        self._run.define_metric("*", step_metric="step")

    def step(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def samples(self, rows: Sequence[Sequence[Any]], recordings: Mapping[str, np.ndarray]) -> None:
        step = rows[0][0]
        table = self._package.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])
        self._run.log({"step": step, "samples": table, **_players(self._package, recordings)})

    def close(self) -> None:
        self._run.finish()


class TrackioLogger(Logger):
    """A run of trackio, in its folder on this machine, or where its environment says."""

    def __init__(self, run: LoggedRun):
        import trackio

        self._package = trackio
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        resume = "allow" if run.num_completed else "never"
        self._run = trackio.init(project=project, name=run.output_dir.name, resume=resume, config=run.settings())

    def step(self, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def samples(self, rows: Sequence[Sequence[Any]], recordings: Mapping[str, np.ndarray]) -> None:
        table = self._package.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])
        self._run.log({"samples": table, **_players(self._package, recordings)}, step=rows[0][0])

    def close(self) -> None:
        self._run.finish()


def _players(package: Any, recordings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        f"recordings/{number}": package.Audio(waveform, caption=name, sample_rate=SAMPLE_RATE)
        for number, (name, waveform) in enumerate(recordings.items(), 1)
    }


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}
"""By their name for `--log`, which is that of their package."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError where the package of one of them is not installed."""
    for name in names:
        if installed(name) is None:
            package = f"{name}{in_order(supported('log')[name])}"
            raise UserError(f"--log {name}: {name} is not installed; pip install '{package}', or leave it out of --log")


class Loggers:
    """All loggers of a run, none of which can end it."""

    def __init__(self, names: Sequence[str], run: LoggedRun, warn: Callable[[str], None]):
        self._warn = warn
        self._loggers: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            with self._left_out_if_it_fails(name):
                self._loggers[name] = LOGGERS[name](run)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        # Code of others, which may raise anything, over a network, an account, a disk; some of it ends the process.
        except (Exception, SystemExit) as error:
            self._warn(f"--log {name}: {type(error).__name__}: {str(error).strip():.300}; it is left out from here on")
            if (logger := self._loggers.pop(name, None)) is not None:
                with suppress(Exception, SystemExit):
                    logger.close()

    def _each(self, work: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            with self._left_out_if_it_fails(name):
                work(logger)

    def step(self, metrics: Mapping[str, float]) -> None:
        """See `Logger.step`."""
        self._each(lambda logger: logger.step(metrics))

    def samples(self, lines: Sequence[Mapping[str, Any]], questions: Iterable[Question]) -> None:
        """Pass lines of samples.jsonl on, of one step, with the recordings of their questions."""
        if not self._loggers or not lines:
            return
        recordings, rows = {}, []
        audio = {question.id: question.audio for question in questions}
        for line in lines:
            recording = audio[line["id"]]
            if recording is not None:
                with suppress(UserError, OSError):
                    recordings[line["id"]] = decode(recording)
            parts = [line[modality] or {} for modality in ("speech", "text")]
            written = [part.get(name) for part in parts for name in ("completion", "reward")]
            rows.append([line["step"], line["id"], line["question"], line["answer"], *written])
        self._each(lambda logger: logger.samples(rows, recordings))

    def close(self) -> None:
        """End all of them."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()
