"""Steps 1 and 2: one batch of completions, sampled from the current policy, and what is known of its rewards before the update.

Answers are read in threads while other completions are still sampled; R_beh is computed in a thread while the trainer's forward
pass begins. R_rep needs hidden states, which only that forward pass has.

Shapes: N completions of a batch, ordered by question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.rewards.agreement import agreement_rewards
from tars_fast.learning.rewards.behaviour import TextSimilarity, behaviour_rewards
from tars_fast.learning.rewards.references import choose_references
from tars_fast.learning.rewards.total import completion_rewards, reward_weights
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
    written: list[Prompt]
    """The written prompt of each question."""
    spoken: list[PreparedPrompt]
    """The spoken prompt of each question, where the audio tower is trained and encodes it again; else empty."""
    completions: list[Completion]
    completion_rewards: dict[str, Tensor]
    """[N] by name in `COMPLETION_REWARDS`, and `agreement` where the objective asks for it."""
    references: list[int | None]
    """[N] the text completion that a speech completion is compared with."""
    behaviour: Future[Tensor]
    """R_beh [N], which may still be computed."""
    groups_N: Tensor
    """int64 number of the (question, modality) group."""
    staleness: int = 0
    """Optimiser steps since the weights that sampled it."""

    @property
    def num_tokens(self) -> int:
        """Unmasked completion tokens of the whole batch; truncated completions are masked out of the loss."""
        return sum(len(completion.token_ids) for completion in self.completions if not completion.truncated)

    def __getstate__(self) -> dict[str, object]:
        # A future cannot be sent to another process; its result can.
        return vars(self) | {"behaviour": self.behaviour.result()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"behaviour": completed(state["behaviour"])})


def completed(value: Tensor) -> Future[Tensor]:
    """An already completed Future."""
    future: Future[Tensor] = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of questions before the audio tower encodes their recordings."""

    questions: list[Question]
    spoken: list[PreparedPrompt | UserError]
    written: list[PreparedPrompt]


def prepare_batch(model: SpeechModel, questions: Sequence[Question]) -> PreparedBatch:
    """Decode recordings, extract features, tokenise; needs no weights."""
    written = [model.prepare(question, Modality.TEXT) for question in questions]
    return PreparedBatch(list(questions), prepare_speech(model, questions), written)


@dataclass(frozen=True)
class EncodedBatch:
    """The questions of a batch that can be used, and both prompts of each."""

    usable: list[int]
    """Places of these questions in the prepared batch."""
    prompts: list[Prompt]
    """Spoken and written prompt of each usable question in turn."""
    warnings: list[str]
    """Why each of the other questions was left out."""


def encode_batch(model: SpeechModel, engine: RolloutEngine, batch: PreparedBatch, max_new_tokens: int) -> EncodedBatch:
    """Run the audio tower over a batch's recordings.

    Raises:
        UnusableBatchError: no recording can be used.
    """
    encoded = encode_speech(model, engine, batch.spoken, max_new_tokens)
    spoken = {place: prompt for place, prompt in enumerate(encoded) if isinstance(prompt, Prompt)}
    warnings = [
        f"item {question.id!r} is left out of this step: {prompt}"
        for question, prompt in zip(batch.questions, encoded, strict=True)
        if isinstance(prompt, UserError)
    ]
    if not spoken:
        raise UnusableBatchError(
            f"no recording of this step could be used ({warnings[0]}); is the folder of --data still there? The last step is "
            "saved: put the recordings back and continue with --resume"
        )
    written = iter(model.encode([batch.written[place] for place in spoken]))
    return EncodedBatch(list(spoken), [prompt for place in spoken for prompt in (spoken[place], next(written))], warnings)


@dataclass(frozen=True)
class RolloutCollector:
    """Samples rollouts and computes the rewards that need no forward pass of the trainer."""

    model: SpeechModel
    engine: RolloutEngine
    text_similarity: TextSimilarity
    config: RunConfig
    background: ThreadPoolExecutor
    """Threads for what needs no device."""
    workers: Workers = ALONE

    def collect(self, batch: PreparedBatch, step: int, timer: PhaseTimer) -> tuple[Rollout, list[str]]:
        """(rollout, warnings about questions left out of it).

        Args:
            batch: this process's share of the step's questions.

        Raises:
            UnusableBatchError: no recording could be used.
        """
        config = self.config
        with timer.phase("encode"), torch.no_grad():
            encoded = encode_batch(self.model, self.engine, batch, config.max_new_tokens)
        prompts, questions = encoded.prompts, [batch.questions[place] for place in encoded.usable]
        written = prompts[1::2]
        if not config.samples_text:
            prompts = prompts[::2]
        sampled = self._sample(prompts, questions, step, timer)
        with timer.phase("reward"):
            completions = [completion for group, _ in sampled for completion in group]
            rewards = {name: torch.cat([values[name] for _, values in sampled]) for name in sampled[0][1]}
            if config.parts.uses_agreement:
                rewards["agreement"] = agreement_rewards(completions, questions)
            references = choose_references(completions, rewards["accuracy"], self._random(step))
            compared = references if "behaviour" in reward_weights(config) else [None] * len(completions)
            behaviour = self.background.submit(behaviour_rewards, completions, compared, self.text_similarity)
        spoken = [prompt for place in encoded.usable if isinstance(prompt := batch.spoken[place], PreparedPrompt)]
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(config.group_size // 2)],
            written=written,
            spoken=spoken if self.model.audio_is_trained else [],
            completions=completions,
            completion_rewards=rewards,
            references=references,
            behaviour=behaviour,
            groups_N=group_indices([c.question for c in completions], [c.modality for c in completions]),
        )
        return rollout, encoded.warnings

    def _sample(
        self, prompts: Sequence[Prompt], questions: Sequence[Question], step: int, timer: PhaseTimer
    ) -> list[tuple[list[Completion], dict[str, Tensor]]]:
        """Completions of each prompt and their rewards; `prompts` are those of the questions in turn, as many of each."""
        config = self.config
        seed = config.seed * 1_000_003 + step + self.workers.rank * 2**56
        sampling = Sampling(config.group_size // 2, config.max_new_tokens, config.temperature, seed)
        prompts_per_question = len(prompts) // len(questions)
        scored: dict[int, Future[tuple[list[Completion], dict[str, Tensor]]]] = {}

        def score(number: int, sampled: list[SampledCompletion]) -> tuple[list[Completion], dict[str, Tensor]]:
            completions = decode_completions(self.model.prompts, prompts[number], number // prompts_per_question, sampled)
            return completions, completion_rewards(completions, questions)

        def on_sampled(number: int, sampled: list[SampledCompletion]) -> None:
            scored[number] = self.background.submit(score, number, sampled)

        with timer.phase("hand-over"):
            self.engine.wake_up()
        with timer.phase("rollout"):
            self.engine.sample(prompts, sampling, on_sampled)
        if not config.rollout_ahead:
            with timer.phase("hand-over"):
                self.engine.release_memory()
        with timer.phase("reward"):
            return [scored[number].result() for number in range(len(prompts))]

    def _random(self, step: int) -> random.Random:
        """Draws the references of a step; alone as always, each further process its own."""
        seed = f"{self.config.seed} {step}"
        return random.Random(seed if self.workers.is_first else f"{seed} {self.workers.rank}")
