"""Checkpoints of a run, written in the background by all its processes, and what they agree on after each step.

At a save every process copies what it has to write into host memory, which takes as much of it as the checkpoint has bytes, and
a thread writes the copy while training goes on. Of processes that have parts of the weights the first collects all parts as
it copies. The folder is called `checkpoint-<steps>` once all processes have told, in what they exchange after each step
anyway, that theirs is on disk: no thread waits for another process. One checkpoint is written at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from tars_fast.config import RunConfig
from tars_fast.learning.best import BestStep
from tars_fast.learning.optimizer import is_sharded, optimizer_state
from tars_fast.learning.selection import Selection
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import is_under_torchrun
from tars_fast.models.checkpoint import CheckpointPart, PendingCheckpoint, fault_of, remove_outdated
from tars_fast.support.files import CannotWriteError, partial_of
from tars_fast.types import TrainingError, UserError


class Stop(IntEnum):
    """Whether a run is to end after the step; where processes were told different things, the largest counts."""

    NO = 0
    INTERRUPTED = 1
    PREEMPTED = 2
    """The machine is wanted back; the same command is to be started again."""


@dataclass(frozen=True)
class _Told:
    """What one process tells all others after a step."""

    stop: Stop = Stop.NO
    is_due: bool = False
    is_written: bool = True
    failure: str | None = None


class Saver:
    """The checkpoints of one run; all processes call its methods at the same places.

    Args:
        best: its step's checkpoint is kept.
    """

    def __init__(self, config: RunConfig, learner: Learner, selection: Selection, best: BestStep):
        self._config, self._learner, self._selection, self._best = config, learner, selection, best
        self._pending: PendingCheckpoint | None = None
        self._last_save = time.monotonic()
        self._kept_step: int | None = None
        self._torchrun = os.getppid() if is_under_torchrun() else None

    def agree(self, stop: Stop) -> tuple[Stop, bool, int | None]:
        """(whether the run is to end, whether `--save-minutes` have passed, the steps of a checkpoint that has become whole).

        Args:
            stop: what this process was told.

        Raises:
            CannotWriteError: in all processes, where one could not write its part; the last checkpoint is good.
        """
        # Nobody would end a process whose torchrun was killed; another one may have been started in its place.
        if self._torchrun not in (None, os.getppid()):
            stop = max(stop, Stop.INTERRUPTED)
        # Of the first process alone: clocks differ.
        is_due = bool(self._config.save_minutes) and time.monotonic() - self._last_save >= 60 * self._config.save_minutes
        told = self._learner.workers.gather_all(_Told(stop, is_due, *self._progress(wait=False)))
        return max(one.stop for one in told), told[0].is_due, self._settle(told)

    def start(self, num_completed: int) -> None:
        """Begin to write a checkpoint, which all processes must agree on; none may be in the making, see `finish`.

        Raises:
            TrainingError: the weights are not finite, or the processes' ones differ; the last checkpoint is good.
        """
        learner, model = self._learner, self._learner.model
        trained = model.trainable_by_name()
        is_finite = all(parameter.isfinite().all() for parameter in trained.values())
        workers = learner.workers
        if not all(workers.gather_all(is_finite)):
            raise TrainingError(
                "the weights are not finite; lower --learning-rate; the last checkpoint, if there is one, is good"
            )
        workers.check_same(model.same_everywhere())
        self._last_save, self._kept_step = time.monotonic(), self._best.step
        shard = (workers.rank, workers.size) if is_sharded(learner.optimizer) else (0, 1)
        if workers.rank and shard == (0, 1):
            # All that there is to write is the first process's.
            return
        own = optimizer_state(learner.optimizer, trained)
        extra = learner.extra() | self._selection.extra() | self._best.extra()
        part = CheckpointPart.copy(num_completed, model if workers.rank == 0 else None, own, shard, extra)
        if workers.tensor_rank:
            # The first one has collected it.
            return
        self._pending = PendingCheckpoint(self._config.output_dir, part, model)
        if workers.is_first:
            self._selection.write(self._config.output_dir)

    def finish(self) -> int | None:
        """Wait for the checkpoint that is being written, in all processes; returns its steps.

        Raises:
            CannotWriteError: see `agree`.
        """
        return self._settle(self._learner.workers.gather_all(_Told(Stop.NO, False, *self._progress(wait=True))))

    def close(self) -> None:
        """Keep the checkpoint that is being written where a run ends by an error; other processes may be gone."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        failure = pending.failure()
        if not self._learner.workers.is_first:
            return
        if failure is None and fault_of(partial_of(pending.target)) is None:
            with suppress(UserError):
                self._complete(pending)
        else:
            pending.discard()

    def _progress(self, *, wait: bool) -> tuple[bool, str | None]:
        """(whether this process has written its part, why it could not)."""
        pending = self._pending
        if pending is None:
            return True, None
        if not (wait or pending.is_written):
            return False, None
        failure = pending.failure()
        if failure is not None and not isinstance(failure, CannotWriteError):
            raise failure
        return True, None if failure is None else str(failure)

    def _settle(self, told: Sequence[_Told]) -> int | None:
        """Complete the checkpoint where every process has written its part; returns its steps."""
        workers = self._learner.workers
        failures = [one.failure for one in told if one.failure is not None]
        if failures:
            pending, self._pending = self._pending, None
            if pending is not None:
                pending.failure()
            # Nobody writes any more.
            workers.gather(None)
            if pending is not None and workers.is_first:
                pending.discard()
            raise CannotWriteError(failures[0])
        if self._pending is None or not all(one.is_written for one in told):
            return None
        pending, self._pending = self._pending, None
        if workers.is_first:
            self._complete(pending)
        return pending.num_completed

    def _complete(self, pending: PendingCheckpoint) -> None:
        pending.complete()
        remove_outdated(self._config.output_dir, self._config.keep_checkpoints, self._kept_step)
