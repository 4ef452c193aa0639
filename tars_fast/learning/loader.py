"""The rollouts of a run, in order, and what prepares them while the device is busy with something else.

The next batch is decoded, tokenised and turned into features in threads while this one is sampled and trained on. With
`--rollout-ahead 1` the next batch is also sampled while this one trains.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from tars_fast.config import RunConfig
from tars_fast.learning.balance import QuestionExchange, even_shares
from tars_fast.learning.batch import PreparedBatch, Rollout, RolloutCollector, UnusableBatchError, prepare_batch
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.selection import Selection
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Question


def background_threads(number: int) -> ThreadPoolExecutor:
    """Threads whose torch operations take one core each.

    Otherwise each would have a team of OpenMP threads of its own, which wait by spinning on the cores that the trainer needs.
    """
    num_cores = torch.get_num_threads()
    started = threading.Barrier(number + 1)

    def take_one_core() -> None:
        # torch copies the process's setting to a thread at the thread's first call; afterwards the thread changes its own.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    executor = ThreadPoolExecutor(number, "background")
    for _ in range(number):
        executor.submit(take_one_core)
    started.wait()
    torch.set_num_threads(num_cores)
    return executor


@dataclass
class LoadedRollout:
    """What a step gets to train on."""

    rollout: Rollout | None = None
    """None where no recording of this process's share could be used."""
    warnings: list[str] = field(default_factory=list)
    failure: UnusableBatchError | None = None
    """Why there is no rollout."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, of sampling that went on beside an earlier step."""


class RolloutLoader(AbstractContextManager[Any]):
    """The rollouts of a run, in order; a context manager, because threads work for it.

    With `--rollout-ahead 1` the next rollout is sampled from the moment this one is taken until `finish_sampling` returns; the
    weights must not change in between.
    """

    def __init__(
        self,
        model: SpeechModel,
        engine: RolloutEngine,
        rewards: Rewards,
        selection: Selection,
        config: RunConfig,
        workers: Workers = ALONE,
    ):
        self._model = model
        self._engine = engine
        self._selection = selection
        self._config = config
        self._workers = workers
        self._prepared: dict[int, Future[PreparedBatch]] = {}
        self._sampled: dict[int, Future[LoadedRollout]] = {}
        # One stream for the whole run: memory that a stream has allocated serves that stream only.
        self._stream = torch.cuda.Stream() if config.rollout_ahead and model.device.type == "cuda" else None
        self._threads = ExitStack()
        self._background = self._threads.enter_context(background_threads(2))
        self._sampler = self._threads.enter_context(ThreadPoolExecutor(1, "sampler"))
        exchange = None
        if workers.size > 1:
            # Sampling ahead exchanges in a thread of its own.
            by_id = {question.id: question for question in selection.questions}
            exchange = QuestionExchange(model, by_id, workers.beside("sampling"))
        self._collector = RolloutCollector(model, engine, rewards, config, self._background, workers, exchange)

    def __exit__(self, *_exception: object) -> None:
        futures: list[Future[Any]] = [*self._prepared.values(), *self._sampled.values()]
        for future in futures:
            future.cancel()
        if not all(future.done() for future in self._sampled.values()):
            self._engine.stop()
        self._threads.close()

    def next_batch(self, step: int, timer: PhaseTimer) -> LoadedRollout:
        """This process's share of a step's rollout.

        Raises:
            TrainingError: sampling failed.
        """
        self._selection.plan(step)
        if step in self._sampled:
            with timer.phase("rollout"):
                loaded = self._sampled.pop(step).result()
            if loaded.rollout is not None:
                loaded.rollout.staleness = self._config.updates_per_rollout
        else:
            loaded = self._sample(step, timer)
        if self._config.rollout_ahead and step + 1 < self._config.num_steps:
            weights_written = None if self._stream is None else torch.cuda.current_stream().record_event()
            self._sampled[step + 1] = self._sampler.submit(self._sample_beside, step + 1, weights_written)
        return loaded

    def finish_sampling(self) -> None:
        """Block until nothing is sampled from the weights any more."""
        for future in self._sampled.values():
            # `next_batch` raises what went wrong.
            future.exception()

    def _sample_beside(self, step: int, weights_written: torch.cuda.Event | None) -> LoadedRollout:
        timer = PhaseTimer(self._model.device)
        with torch.cuda.stream(self._stream):
            if weights_written is not None:
                weights_written.wait()
            loaded = self._sample(step, timer)
        loaded.seconds = timer.take()
        return loaded

    def _sample(self, step: int, timer: PhaseTimer) -> LoadedRollout:
        with timer.phase("encode"):
            batch = self._prepare(step).result()
        if step + 1 < self._config.num_steps:
            self._prepare(step + 1)
        del self._prepared[step]
        try:
            reserve = self._questions(self._selection.reserve(step))
            return LoadedRollout(*self._collector.collect(batch, step, timer, reserve))
        except UnusableBatchError as error:
            return LoadedRollout(failure=error)

    def _prepare(self, step: int) -> Future[PreparedBatch]:
        if step not in self._prepared:
            questions = self._questions(self._selection.batch(step))
            self._prepared[step] = self._background.submit(prepare_batch, self._model, questions)
        return self._prepared[step]

    def _questions(self, numbers: list[int]) -> list[Question]:
        """This process's share of these questions."""
        tokens = [self._selection.prompt_tokens[number] for number in numbers]
        share = even_shares(tokens, self._workers.size)[self._workers.rank]
        return [self._selection.questions[numbers[place]] for place in share]
