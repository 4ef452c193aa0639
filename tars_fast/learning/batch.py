"""METHOD steps 1 and 2, all but R_rep: a step's completions, sampled from the current policy, and what their words earn.

What needs no weights runs in threads while the device works: the next batch is decoded, tokenised and turned into features
while this one is sampled and trained on; answers are read while other completions still run; R_beh is computed while the
trainer's forward pass begins.

Shapes: N completions of a batch, ordered by question.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.rewards import AnswerRewards, TextSimilarity, answer_rewards, behaviour_rewards, choose_references
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.speech_model import PreparedPrompt, SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, decode_completions
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Completion, Modality, Prompt, Question, TrainingError, UserError


class UnusableBatchError(TrainingError):
    """A step has nothing to train on; model and optimiser are as sound as before."""


@dataclass
class Rollout:
    """One batch of completions with all that is known before the forward pass."""

    prompts: list[Prompt]
    """[N] the prompt of each completion."""
    spoken: list[PreparedPrompt]
    """Of each question, where the tower is trained and hears again."""
    completions: list[Completion]
    answers: AnswerRewards
    references: list[int | None]
    """[N] the text completion that a speech completion is compared with."""
    behaviour: Future[Tensor]
    """R_beh [N], which may still be on its way."""
    groups_N: Tensor
    """int64 number of the (question, modality) group."""
    staleness: int = 0
    """Optimiser steps since the weights that sampled it."""

    @property
    def num_tokens(self) -> int:
        """Unmasked completion tokens of the whole batch; truncated completions are masked out of the loss."""
        return sum(len(completion.token_ids) for completion in self.completions if not completion.truncated)

    def __getstate__(self) -> dict[str, object]:
        # A future cannot be sent to another process; what came of it can.
        return vars(self) | {"behaviour": self.behaviour.result()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"behaviour": finished(state["behaviour"])})


def finished(value: Tensor) -> Future[Tensor]:
    """What stands for a computation whose result is there already."""
    future: Future[Tensor] = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of questions before the tower hears them."""

    questions: list[Question]
    spoken: list[PreparedPrompt | UserError]
    written: list[PreparedPrompt]


def prepare_batch(model: SpeechModel, questions: Sequence[Question]) -> PreparedBatch:
    """Decode, extract features, tokenise; needs no weights."""
    written = [model.prepare(question, Modality.TEXT) for question in questions]
    return PreparedBatch(list(questions), prepare_speech(model, questions), written)


def encode_batch(
    model: SpeechModel, engine: RolloutEngine, batch: PreparedBatch, max_new_tokens: int
) -> tuple[list[int], list[Prompt], list[str]]:
    """(questions that can be used, by number; spoken and written prompt of each in turn; what to say of the others).

    Raises:
        UnusableBatchError: no recording can be used.
    """
    encoded = encode_speech(model, engine, batch.spoken, max_new_tokens)
    spoken = {number: prompt for number, prompt in enumerate(encoded) if isinstance(prompt, Prompt)}
    kept = list(spoken)
    told = [
        f"item {question.id!r} is left out of this step: {prompt}"
        for question, prompt in zip(batch.questions, encoded, strict=True)
        if isinstance(prompt, UserError)
    ]
    if not kept:
        raise UnusableBatchError(
            f"no recording of this step could be used ({told[0]}); is the folder of --data still there? The last step is "
            "saved: put the recordings back and continue with --resume"
        )
    written = iter(model.encode([batch.written[number] for number in kept]))
    return kept, [prompt for number in kept for prompt in (spoken[number], next(written))], told


def collect_rollout(
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    batch: PreparedBatch,
    config: RunConfig,
    step: int,
    timer: PhaseTimer,
    background: ThreadPoolExecutor,
    workers: Workers = ALONE,
) -> tuple[Rollout, list[str]]:
    """(rollout, what to say of questions left out of it).

    Args:
        batch: this process's share of the step's questions.
        background: threads for what needs no device.

    Raises:
        UnusableBatchError: no recording could be used.
    """
    with timer.phase("encode"), torch.no_grad():
        kept, prompts, left_out = encode_batch(model, engine, batch, config.max_new_tokens)
        questions = [batch.questions[number] for number in kept]
    asked = [question for question in range(len(questions)) for _ in Modality]

    def read(number: int, sampled: list[SampledCompletion]) -> tuple[list[Completion], AnswerRewards]:
        completions = decode_completions(model.prompts, prompts[number], asked[number], sampled)
        return completions, answer_rewards(completions, questions)

    seed = config.seed * 1_000_003 + step + workers.rank * 2**56
    sampling = Sampling(config.group_size // 2, config.max_new_tokens, config.temperature, seed)
    being_read: dict[int, Future[tuple[list[Completion], AnswerRewards]]] = {}
    with timer.phase("hand-over"):
        engine.wake_up()
    with timer.phase("rollout"):
        engine.sample(
            prompts, sampling, lambda number, sampled: being_read.update({number: background.submit(read, number, sampled)})
        )
    if not config.rollout_ahead:
        with timer.phase("hand-over"):
            engine.release_memory()
    with timer.phase("reward"):
        read_prompts = [being_read[number].result() for number in range(len(prompts))]
        completions = [completion for group, _ in read_prompts for completion in group]
        answers = AnswerRewards.joined([rewards for _, rewards in read_prompts])
        drawing = f"{config.seed} {step}" if workers.is_first else f"{config.seed} {step} {workers.rank}"
        references = choose_references(completions, answers.accuracy, random.Random(drawing))
        wanted = references if config.behaviour_weight else [None] * len(completions)
        behaviour = background.submit(behaviour_rewards, completions, wanted, text_similarity)
    rollout = Rollout(
        prompts=[prompt for prompt in prompts for _ in range(sampling.num_completions)],
        spoken=[one for number in kept if isinstance(one := batch.spoken[number], PreparedPrompt)]
        if model.audio_is_trained
        else [],
        completions=completions,
        answers=answers,
        references=references,
        behaviour=behaviour,
        groups_N=group_indices([c.question for c in completions], [c.modality for c in completions]),
    )
    return rollout, left_out


def background_threads(number: int) -> ThreadPoolExecutor:
    """Threads whose torch operations take one core each.

    Each would else have a team of OpenMP threads of its own, which wait by spinning, on the cores that the trainer needs.
    """
    num_cores = torch.get_num_threads()
    started = threading.Barrier(number + 1)

    def take_one_core() -> None:
        # A thread takes torch's setting over when it first asks for it; later it changes its own.
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
class Taken:
    """What a step gets to train on."""

    rollout: Rollout | None = None
    warnings: list[str] = field(default_factory=list)
    unusable: UnusableBatchError | None = None
    """Why there is no rollout."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, of sampling that went on beside an earlier step."""


class RolloutSource(AbstractContextManager[Any]):
    """The rollouts of a run, in order; a context manager, because threads work for it.

    With `--rollout-ahead 1` the next one is sampled from the moment this one is taken until `wait` returns; the weights must
    not change in between.
    """

    def __init__(
        self,
        model: SpeechModel,
        engine: RolloutEngine,
        text_similarity: TextSimilarity,
        training: Sequence[Question],
        config: RunConfig,
        workers: Workers,
    ):
        self._model = model
        self._engine = engine
        self._text_similarity = text_similarity
        self._training = training
        self._config = config
        self._workers = workers
        self._prepared: dict[int, Future[PreparedBatch]] = {}
        self._sampled: dict[int, Future[Taken]] = {}
        # One for the whole run: what a stream has allocated serves that stream only.
        self._stream = torch.cuda.Stream() if config.rollout_ahead and model.device.type == "cuda" else None
        self._threads = ExitStack()
        self._background = self._threads.enter_context(background_threads(2))
        self._sampler = self._threads.enter_context(ThreadPoolExecutor(1, "sampler"))

    def __exit__(self, *_exception: object) -> None:
        futures: list[Future[Any]] = [*self._prepared.values(), *self._sampled.values()]
        for future in futures:
            future.cancel()
        if not all(future.done() for future in self._sampled.values()):
            self._engine.stop()
        self._threads.close()

    def take(self, step: int, timer: PhaseTimer) -> Taken:
        """This process's share of a step's rollout.

        Raises:
            TrainingError: sampling failed.
        """
        if step in self._sampled:
            with timer.phase("rollout"):
                taken = self._sampled.pop(step).result()
            if taken.rollout is not None:
                taken.rollout.staleness = self._config.updates_per_rollout
        else:
            taken = self._sample(step, timer)
        if self._config.rollout_ahead and step + 1 < self._config.num_steps:
            weights_written = None if self._stream is None else torch.cuda.current_stream().record_event()
            self._sampled[step + 1] = self._sampler.submit(self._sample_beside, step + 1, weights_written)
        return taken

    def wait(self) -> None:
        """Until nothing is sampled from the weights any more."""
        for future in self._sampled.values():
            # Raises in `take` what went wrong.
            future.exception()

    def _sample_beside(self, step: int, weights_written: torch.cuda.Event | None) -> Taken:
        timer = PhaseTimer(self._model.device)
        with torch.cuda.stream(self._stream):
            if weights_written is not None:
                weights_written.wait()
            taken = self._sample(step, timer)
        taken.seconds = timer.take()
        return taken

    def _sample(self, step: int, timer: PhaseTimer) -> Taken:
        with timer.phase("encode"):
            batch = self._prepare(step).result()
        if step + 1 < self._config.num_steps:
            self._prepare(step + 1)
        del self._prepared[step]
        arguments = (self._model, self._engine, self._text_similarity, batch, self._config, step, timer)
        try:
            return Taken(*collect_rollout(*arguments, self._background, self._workers))
        except UnusableBatchError as error:
            return Taken(unusable=error)

    def _prepare(self, step: int) -> Future[PreparedBatch]:
        if step not in self._prepared:
            batch = batch_of_step(len(self._training), self._config.questions_per_step, step, self._config.seed)
            questions = [self._training[number] for number in self._workers.share(batch)]
            self._prepared[step] = self._background.submit(prepare_batch, self._model, questions)
        return self._prepared[step]


def batch_of_step(num_questions: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which questions step `step` trains on: shuffled epochs laid end to end, a pure function of its arguments.

    Needs no state, so that a resumed run sees what an unbroken one would have seen.
    """
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_questions)
        chosen.append((epoch, place))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_questions) for epoch, _ in chosen}
    return [int(orders[epoch][place]) for epoch, place in chosen]
