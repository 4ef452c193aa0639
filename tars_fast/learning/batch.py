"""Steps 1 and 2: one batch of completions, sampled from the current policy, and what is known of its rewards before the update.

Answers are read in threads while other completions are still sampled; R_beh and async rewards are computed in threads while the
trainer's forward pass begins. R_rep needs hidden states, which only that forward pass has.

Shapes: N completions of a batch, ordered by question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.rewards.inputs import RewardInput, reward_inputs
from tars_fast.learning.rewards.references import choose_references
from tars_fast.learning.rewards.reward import LateValues, reward_values
from tars_fast.learning.rewards.total import Rewards, completion_rewards
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.speech_model import PreparedPrompt, SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, SampledCompletion, Sampling, decode_completions
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Completion, Modality, Prompt, Question, TrainingError, UserError


class UnusableBatchError(TrainingError):
    """A step has nothing to train on; model and optimiser are as sound as before."""


@dataclass
class Outcome:
    """What the rollouts of one question showed."""

    id: str
    num_completions: int
    num_tokens: int
    """Of all its completions."""
    speech: float | None = None
    """Accuracy of its spoken completions; None without an answer."""
    text: float | None = None
    """Accuracy of its written ones; None where there are none, too."""
    divergence: float | None = None
    """Mean over the tokens of its spoken completions, in nats; None where the objective computed none."""


@dataclass
class Rollout:
    """One batch of completions with all that is known before the forward pass."""

    questions: list[Question]
    """`Completion.question` counts them."""
    prompts: list[Prompt]
    """[N] the prompt of each completion."""
    written: list[Prompt]
    """The written prompt of each question."""
    spoken: list[PreparedPrompt]
    """The spoken prompt of each question, where the audio tower is trained and encodes it again; else empty."""
    completions: list[Completion]
    completion_rewards: dict[str, Tensor]
    """[N] by name those that are known before the forward pass, NaN where they do not apply."""
    references: list[int | None]
    """[N] the text completion that a speech completion is compared with."""
    late: dict[str, LateValues]
    """[N] by name those that may still be computed, R_beh among them."""
    groups_N: Tensor
    """int64 number of the (question, modality) group."""
    staleness: int = 0
    """Optimiser steps since the weights that sampled it."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Of each question, `Completion.question` counts them; behind them those of questions that others took the place of."""

    @property
    def num_tokens(self) -> int:
        """Unmasked completion tokens of the whole batch; truncated completions are masked out of the loss."""
        return sum(len(completion.token_ids) for completion in self.completions if not completion.truncated)

    @cached_property
    def reward_inputs(self) -> list[RewardInput]:
        """[N] what reward functions get of the completions."""
        return reward_inputs(self.completions, self.questions, self.references)


def micro_batches(rollout: Rollout, max_tokens: int) -> list[list[int]]:
    """Completions by number, whole questions together, so that every spoken completion is beside its reference.

    Questions are packed longest first, each into the first micro-batch that has room for it. One that is longer than
    `max_tokens` is alone in its micro-batch.
    """
    rows: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for number, completion in enumerate(rollout.completions):
        rows.setdefault(completion.question, []).append(number)
    for question, numbers in rows.items():
        prompts = {id(rollout.prompts[number]): len(rollout.prompts[number].token_ids) for number in numbers}
        sizes[question] = sum(prompts.values()) + sum(len(rollout.completions[number].token_ids) for number in numbers)
    packed: list[list[int]] = []
    tokens: list[int] = []
    for question in sorted(rows, key=lambda question: -sizes[question]):
        place = next((place for place, held in enumerate(tokens) if held + sizes[question] <= max_tokens), None)
        if place is None:
            packed.append([])
            tokens.append(0)
            place = -1
        packed[place] += rows[question]
        tokens[place] += sizes[question]
    return packed


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
    """Run the audio tower over a batch's recordings."""
    encoded = encode_speech(model, engine, batch.spoken, max_new_tokens)
    spoken = {place: prompt for place, prompt in enumerate(encoded) if isinstance(prompt, Prompt)}
    warnings = [
        f"item {question.id!r} is left out of this step: {prompt}"
        for question, prompt in zip(batch.questions, encoded, strict=True)
        if isinstance(prompt, UserError)
    ]
    written = iter(model.encode([batch.written[place] for place in spoken]))
    return EncodedBatch(list(spoken), [prompt for place in spoken for prompt in (spoken[place], next(written))], warnings)


@dataclass(frozen=True)
class SampledGroup:
    """The completions of one prompt."""

    prompt: Prompt
    completions: list[Completion]
    rewards: dict[str, Tensor]
    """[completions] of `completion_rewards`."""


@dataclass(frozen=True)
class SampledQuestion:
    """The completions of one question."""

    question: Question
    spoken: PreparedPrompt | None
    """Where the audio tower is trained and encodes it again; else None."""
    written: Prompt
    groups: list[SampledGroup]
    """Spoken and, where the objective samples written completions, written."""
    references: list[int | None] = field(default_factory=list)
    """Of each completion, counted within the question; see `choose_references`."""

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    @property
    def num_tokens(self) -> int:
        """That the trainer's forward pass has: of its prompts, each once, and completions."""
        prompts = sum(len(group.prompt.token_ids) for group in self.groups)
        return prompts + sum(len(completion.token_ids) for completion in self.completions)

    @property
    def disagrees(self) -> bool:
        """Whether R_acc differs within a group, as DAPO asks of what it trains on; true without an answer."""
        accuracies = [group.rewards["accuracy"] for group in self.groups]
        return not self.question.has_answer or any(bool((accuracy != accuracy[0]).any()) for accuracy in accuracies)

    def outcome(self) -> Outcome:
        graded = self.groups if self.question.has_answer else []
        accuracies = [group.rewards["accuracy"].mean().item() for group in graded]
        num_tokens = sum(len(completion.token_ids) for completion in self.completions)
        return Outcome(self.question.id, len(self.completions), num_tokens, *accuracies)


def completions_of(sampled: Sequence[SampledQuestion]) -> list[Completion]:
    """[N] those of all questions, `Completion.question` counts these."""
    return [
        replace(completion, question=number) for number, question in enumerate(sampled) for completion in question.completions
    ]


@dataclass(frozen=True)
class RolloutCollector:
    """Samples rollouts and computes the rewards that need no forward pass of the trainer."""

    model: SpeechModel
    engine: RolloutEngine
    rewards: Rewards
    config: RunConfig
    background: ThreadPoolExecutor
    """Threads for what needs no device."""
    workers: Workers = ALONE
    exchange: Callable[[Sequence[SampledQuestion]], list[SampledQuestion]] | None = None
    """Gives questions to processes with fewer tokens, and takes theirs; None: each trains on what it has sampled."""

    def collect(
        self, batch: PreparedBatch, step: int, timer: PhaseTimer, reserve: Sequence[Question] = ()
    ) -> tuple[Rollout, list[str]]:
        """(rollout, warnings about questions left out of it).

        Args:
            batch: this process's share of the step's questions.
            reserve: with `--max-redraws` the questions that in turn take the place of those whose completions are all right
                or all wrong, spoken and written; where it is used up, these stay.

        Raises:
            UnusableBatchError: no recording could be used, and no other process gave a question.
        """
        config = self.config
        sampled, warnings = self._sample_questions(batch, step, 0, timer)
        num_wanted = len(sampled)
        waiting = list(reserve)
        for redraw in range(1, config.max_redraws + 1):
            num_missing = num_wanted - sum(question.disagrees for question in sampled)
            if not num_missing or not waiting:
                break
            drawn, waiting = waiting[:num_missing], waiting[num_missing:]
            prepared = self.background.submit(prepare_batch, self.model, drawn).result()
            more, left_out = self._sample_questions(prepared, step, redraw, timer)
            sampled, warnings = sampled + more, warnings + left_out
        # Stable: questions stay in the order in which they were drawn.
        by_use = sorted(sampled, key=lambda question: not question.disagrees) if len(sampled) > num_wanted else sampled
        kept = self._with_references(by_use[:num_wanted], step)
        if self.exchange is not None:
            with timer.phase("exchange"):
                kept = self.exchange(kept)
        if not kept:
            raise UnusableBatchError(
                f"no recording of this step could be used ({warnings[0]}); is the folder of --data still there? The last step "
                "is saved: put the recordings back and continue with --resume"
            )
        return self._rollout(kept, by_use[num_wanted:], timer), warnings

    def _with_references(self, sampled: Sequence[SampledQuestion], step: int) -> list[SampledQuestion]:
        """Drawn where they were sampled, so that they are the same wherever they are trained on."""
        completions = completions_of(sampled)
        accuracies = [group.rewards["accuracy"] for question in sampled for group in question.groups]
        if not completions:
            return []
        references = iter(choose_references(completions, torch.cat(accuracies), self._random(step)))
        first, chosen = 0, []
        for question in sampled:
            own = [None if (reference := next(references)) is None else reference - first for _ in question.completions]
            first += len(own)
            chosen.append(replace(question, references=own))
        return chosen

    def _rollout(self, kept: Sequence[SampledQuestion], dropped: Sequence[SampledQuestion], timer: PhaseTimer) -> Rollout:
        with timer.phase("reward"):
            completions = completions_of(kept)
            groups = [group for question in kept for group in question.groups]
            firsts = accumulate((len(question.completions) for question in kept[:-1]), initial=0)
            rollout = Rollout(
                questions=[question.question for question in kept],
                prompts=[group.prompt for group in groups for _ in group.completions],
                written=[question.written for question in kept],
                spoken=[question.spoken for question in kept if question.spoken is not None],
                completions=completions,
                completion_rewards={name: torch.cat([group.rewards[name] for group in groups]) for name in groups[0].rewards},
                references=[
                    None if reference is None else first + reference
                    for first, question in zip(firsts, kept, strict=True)
                    for reference in question.references
                ],
                late={},
                groups_N=group_indices([c.question for c in completions], [c.modality for c in completions]),
                outcomes=[question.outcome() for question in (*kept, *dropped)],
            )
            inputs = rollout.reward_inputs
            # Those first that take long, and first what the update needs first.
            rows = [row for rows in micro_batches(rollout, self.config.tokens_per_micro_batch) for row in rows]
            for reward in self.rewards.in_background:
                rollout.late[reward.name] = self.rewards.begin(reward, inputs, rows, self.background)
            for reward in self.rewards.known:
                rollout.completion_rewards[reward.name] = reward_values(reward, inputs)
        return rollout

    def _sample_questions(
        self, batch: PreparedBatch, step: int, redraw: int, timer: PhaseTimer
    ) -> tuple[list[SampledQuestion], list[str]]:
        """(the questions of a batch whose recordings can be used, why the others cannot)."""
        with timer.phase("encode"), torch.no_grad():
            encoded = encode_batch(self.model, self.engine, batch, self.config.max_new_tokens)
        if not encoded.usable:
            return [], encoded.warnings
        questions = [batch.questions[place] for place in encoded.usable]
        seed = self.config.seed * 1_000_003 + step + redraw * 2**48 + self.workers.rank * 2**56
        step_by = len(Modality) if self.config.samples_text else 1
        prompts = encoded.prompts if self.config.samples_text else encoded.prompts[::2]
        groups = self._sample(prompts, questions, seed, timer)
        groups_of = [groups[start : start + step_by] for start in range(0, len(groups), step_by)]
        prepared = [prompt for place in encoded.usable if isinstance(prompt := batch.spoken[place], PreparedPrompt)]
        spoken = prepared if self.model.audio_is_trained else [None] * len(prepared)
        parts = zip(questions, spoken, encoded.prompts[1::2], groups_of, strict=True)
        return [SampledQuestion(*part) for part in parts], encoded.warnings

    def _sample(
        self, prompts: Sequence[Prompt], questions: Sequence[Question], seed: int, timer: PhaseTimer
    ) -> list[SampledGroup]:
        """Completions of each prompt and their rewards; `prompts` are those of the questions in turn, as many of each."""
        config = self.config
        sampling = Sampling(config.group_size // 2, config.max_new_tokens, config.temperature, seed)
        prompts_per_question = len(prompts) // len(questions)
        scored: dict[int, Future[SampledGroup]] = {}

        def score(number: int, sampled: list[SampledCompletion]) -> SampledGroup:
            completions = decode_completions(self.model.prompts, prompts[number], number // prompts_per_question, sampled)
            return SampledGroup(prompts[number], completions, completion_rewards(completions, questions))

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
        return random.Random(f"{seed} {self.workers.rank}" if self.workers.rank else seed)
