"""Steps 2 to 5 on one rollout: packed forward passes, R_rep, the policy loss, its backward pass and the optimiser's step.

Every token goes through one forward pass an update, which gives its log-probability and entropy and, pooled by hooks while the
layers run, R_rep. Groups of which it is known before that pass that their completions all earn the same cannot have an
advantage: they go through it without gradients and have no backward pass.

Shapes: N completions of a rollout or micro-batch, T completion tokens, L layers that R_rep looks at, D hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tars_kernels import LayerPooler, linear_logprob, linear_policy_loss
from tars_kernels.objective import PRESETS, ObjectiveSettings
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.batch import Rollout
from tars_fast.learning.metrics import BackwardPass, check_agreement, token_metrics, token_sums
from tars_fast.learning.rewards.representation import representation_rewards
from tars_fast.learning.rewards.total import reward_weights
from tars_fast.learning.scored import ScoredRollout
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.adapters import adapter_off
from tars_fast.models.architecture import find_layers
from tars_fast.models.speech_model import PackedBatch, SpeechModel
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Modality, Prompt, TrainingError


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
class ForwardPass:
    """One packed forward pass over some completions of a rollout."""

    rows: list[int]
    """[N] which completions."""
    packed: PackedBatch
    hidden_TD: Tensor
    """Last hidden states at the positions that predict completion tokens; with a gradient where it was enabled."""
    pooled_LND: Tensor | None
    """Mean hidden states of each completion, where R_rep was asked for."""


@dataclass(frozen=True)
class MicroBatch:
    """The forward passes over one micro-batch."""

    without_gradient: ForwardPass | None
    """Of completions that cannot have a gradient."""
    with_gradient: ForwardPass | None
    """Of all others, in a graph."""

    @property
    def passes(self) -> list[ForwardPass]:
        return [states for states in (self.without_gradient, self.with_gradient) if states is not None]


@dataclass
class Learner:
    """The policy in training: what an update of it needs."""

    model: SpeechModel
    optimizer: torch.optim.Optimizer
    config: RunConfig
    workers: Workers = ALONE
    """All processes with rollouts of this step, whose gradients are summed."""
    timer: PhaseTimer = field(init=False)
    num_tokens: int = field(init=False, default=0)
    """Unmasked completion tokens of this step's rollouts, of all processes."""
    num_completions: int = field(init=False, default=0)
    """Completions of them."""

    def __post_init__(self) -> None:
        self.timer = PhaseTimer(self.model.device)

    def begin_rollout(self, rollout: Rollout | None) -> ScoredRollout | None:
        """A rollout with the rewards that are known before its forward pass; None where this process has none.

        Counts the tokens and completions of all processes, by which the loss is normalised.
        """
        counts = self.workers.gather((0, 0) if rollout is None else (rollout.num_tokens, len(rollout.completions)))
        self.num_tokens, self.num_completions = (sum(count) for count in zip(*counts, strict=True))
        is_regularised = self.config.kl_coef != 0 or self.config.entropy_coef != 0
        return None if rollout is None else ScoredRollout(rollout, reward_weights(self.config), is_regularised)

    def start_update(self, scored: ScoredRollout | None) -> None:
        """Forget the gradients of the last update."""
        self.optimizer.zero_grad(set_to_none=True)
        if scored is not None:
            scored.trained_N.zero_()

    def micro_batches(self, scored: ScoredRollout) -> list[list[int]]:
        """[N] numbers of completions, whole questions, as many as `--tokens-per-micro-batch` has room for."""
        return micro_batches(scored.rollout, self.config.tokens_per_micro_batch)

    def forward(self, scored: ScoredRollout, rows: Sequence[int]) -> MicroBatch:
        """Hidden states of the completions `rows`, which are whole questions.

        In the first update of a rollout of all of them, pooled for R_rep, in a graph where a gradient is possible. In a later
        update rewards and old log-probabilities are known, and only completions with a gradient are needed.
        """
        if not scored.is_first_update:
            rows = scored.rows_with_gradient(rows)
            return MicroBatch(None, self._forward(scored.rollout, rows, None) if rows else None)
        layers = self.model.language_model.layers
        chosen = find_layers(self.config.representation_layers, len(layers))
        pooler = LayerPooler(layers, self.model.language_model.norm, layers=chosen)
        closed, opened = ([row for row in rows if scored.may_have_gradient[row] is wanted] for wanted in (False, True))
        with torch.no_grad():
            without_gradient = self._forward(scored.rollout, closed, pooler) if closed else None
        return MicroBatch(without_gradient, self._forward(scored.rollout, opened, pooler) if opened else None)

    def _forward(self, rollout: Rollout, rows: list[int], pooler: LayerPooler | None) -> ForwardPass:
        model = self.model
        prompts, completions = [rollout.prompts[row] for row in rows], [rollout.completions[row] for row in rows]
        # A tower in training encodes again where the loss needs its gradient, or the rollout was encoded with older weights.
        if model.audio_is_trained and (torch.is_grad_enabled() or rollout.staleness):
            with self.timer.phase("encode"):
                prompts = reencode_audio(model, rollout, rows)
        with self.timer.phase("forward"):
            packed = model.pack(prompts, completions)
            if pooler is None:
                return ForwardPass(rows, packed, model.forward(packed), None)
            with pooler.pooling(packed.cu_seqlens, positions=packed.positions):
                hidden_TD = model.forward(packed)
            return ForwardPass(rows, packed, hidden_TD, pooler.pooled)

    def complete_rewards(self, scored: ScoredRollout, batch: MicroBatch) -> None:
        """Add R_rep, from the pooled states of whole questions; with it their rewards and advantages are known."""
        with self.timer.phase("reward"), torch.no_grad():
            rows = [row for states in batch.passes for row in states.rows]
            places = {row: place for place, row in enumerate(rows)}
            of_row = scored.rollout.references
            references = [None if (reference := of_row[row]) is None else places[reference] for row in rows]
            pooled_LND = torch.cat([states.pooled_LND for states in batch.passes if states.pooled_LND is not None], dim=1)
            scored.record_rewards(rows, representation_rewards(pooled_LND, references).cpu())

    def backward(self, scored: ScoredRollout, batch: MicroBatch) -> list[BackwardPass]:
        """Policy loss and backward pass of the completions that have a gradient; an empty list where none has one.

        The first update of a rollout records the log-probabilities of all its completions, the "old" ones of later ones.
        """
        trained = batch.with_gradient
        if trained is not None and not scored.rows_with_gradient(trained.rows):
            trained = None
        if scored.is_first_update:
            for states in batch.passes:
                if states is not trained:
                    self._record_logprobs(scored, states)
        return [] if trained is None else [self._backward(scored, trained)]

    @torch.no_grad()
    def _record_logprobs(self, scored: ScoredRollout, states: ForwardPass) -> None:
        with self.timer.phase("forward"):
            logprobs_T, entropies_T = self._logprobs(states.hidden_TD, states.packed)
        _record(scored, states, logprobs_T, entropies_T)

    def _logprobs(self, hidden_TD: Tensor, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        """[T] log-probabilities and entropies."""
        logprobs_T, entropies_T = linear_logprob(
            hidden_TD,
            self.model.head,
            packed.targets,
            bias=self.model.suppressed_bias,
            temperature=self.config.temperature,
            return_entropy=True,
        )
        return logprobs_T, entropies_T

    @torch.no_grad()
    def _reference_logprobs(self, scored: ScoredRollout, states: ForwardPass) -> Tensor | None:
        """[T] of the model before training, found in the first update of a rollout; None where KL is not wanted."""
        if self.config.kl_coef == 0:
            return None
        if scored.is_first_update:
            with self.timer.phase("forward"), adapter_off(self.model.module):
                logprobs_T, _ = self._logprobs(self.model.forward(states.packed), states.packed)
            for row, logprobs in zip(states.rows, logprobs_T.split(_lengths(states)), strict=True):
                scored.ref_logprobs[row] = logprobs
        return torch.cat([scored.ref_logprobs[row] for row in states.rows])

    def _objective(self, scored: ScoredRollout, states: ForwardPass) -> ObjectiveSettings:
        """What the loss takes beside the advantages; divided by counts of all processes' tokens and completions."""
        config, rows, device = self.config, states.rows, self.model.device
        completions = [scored.rollout.completions[row] for row in rows]
        settings: ObjectiveSettings = {
            "advantage_level": "sequence",
            "cu_seqlens": states.packed.cu_seqlens,
            # None: the pass itself has them, so the probability ratio is 1.
            "old_logprobs": None if scored.is_first_update else torch.cat([scored.logprobs[row] for row in rows]),
            "rollout_logprobs": torch.tensor([x for c in completions for x in c.rollout_logprobs], device=device),
            "ref_logprobs": self._reference_logprobs(scored, states),
            # Overlong filtering: a truncated completion has no gradient.
            "mask": torch.tensor([not c.truncated for c in completions for _ in c.token_ids], device=device),
            "loss_type": config.loss_type,
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "importance_cap": config.importance_cap,
            "importance_mode": config.importance_mode,
            "importance_level": config.importance_level,
            "kl_coef": config.kl_coef,
            "entropy_coef": config.entropy_coef,
            "num_tokens": self.num_tokens,
        }
        normalise = PRESETS[config.loss_type].normalise
        if normalise == "constant":
            settings["constant"] = self.num_completions * config.max_new_tokens
        elif normalise != "token-mean":
            settings["num_sequences"] = self.num_completions
        return settings

    def _backward(self, scored: ScoredRollout, states: ForwardPass) -> BackwardPass:
        rows = states.rows
        objective = self._objective(scored, states)
        with self.timer.phase("forward"):
            loss = linear_policy_loss(
                states.hidden_TD,
                self.model.head,
                states.packed.targets,
                scored.advantages_N[rows].to(self.model.device),
                bias=self.model.suppressed_bias,
                temperature=self.config.temperature,
                **objective,
            )
        with self.timer.phase("backward"):
            loss.loss.backward()
        if scored.is_first_update:
            _record(scored, states, loss.logprobs, loss.entropy)
        scored.trained_N[rows] = True
        completions = [scored.rollout.completions[row] for row in rows]
        num_tokens = sum(len(completion.token_ids) for completion in completions if not completion.truncated)
        return BackwardPass(dataclasses.replace(loss, loss=loss.loss.detach()), num_tokens)

    def optimizer_step(
        self, scored: ScoredRollout | None, losses: Sequence[BackwardPass], finish_sampling: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Sum the gradients of all processes, clip them, check them, and change the weights; returns this update's metrics.

        Args:
            losses: of this process's backward passes.
            finish_sampling: with `--rollout-ahead` blocks until the sampler has stopped reading the weights.

        Raises:
            TrainingError: trainer and engine disagree, or loss or gradient is not finite; the weights are as they were.
        """
        with self.timer.phase("rollout"):
            finish_sampling()
        with self.timer.phase("optimiser"):
            parameters = self.model.trainable_parameters()
            for parameter in parameters:
                # Missing gradients become 0, so that momentum and weight decay act in every process alike.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.workers.sum_gradients(parameters)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
            metrics = self._token_metrics(scored, losses) | {"grad_norm": grad_norm.item()}
            self._check(metrics, scored)
            if self.num_tokens:
                self.optimizer.step()
        if scored is not None:
            scored.num_updates += 1
        return metrics

    def _token_metrics(self, scored: ScoredRollout | None, losses: Sequence[BackwardPass]) -> dict[str, float]:
        """Of all processes."""
        sums = self.workers.gather(None if scored is None else token_sums(losses, scored))
        metrics = token_metrics([part for part in sums if part is not None])
        if self.config.kl_coef == 0:
            del metrics["kl"]
        return metrics

    def _check(self, metrics: Mapping[str, float], scored: ScoredRollout | None) -> None:
        """Raises TrainingError where a figure is not finite, or trainer and engine disagree on a rollout of these weights."""
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "logprob_diff_mean")):
            raise TrainingError(
                f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not finite; lower --learning-rate; "
                "the last checkpoint, if there is one, is good"
            )
        if not any(self.workers.gather(0 if scored is None else scored.rollout.staleness)):
            check_agreement(metrics, self.config, self.model.module.dtype)


def reencode_audio(model: SpeechModel, rollout: Rollout, rows: Sequence[int]) -> list[Prompt]:
    """The prompts of these completions with audio embeddings of the tower as it is now."""
    completions = [rollout.completions[row] for row in rows]
    numbers = sorted({completion.question for completion in completions if completion.modality is Modality.SPEECH})
    by_number = dict(zip(numbers, model.encode([rollout.spoken[number] for number in numbers]), strict=True))
    return [
        by_number[completion.question] if completion.modality is Modality.SPEECH else rollout.prompts[row]
        for row, completion in zip(rows, completions, strict=True)
    ]


def _lengths(states: ForwardPass) -> list[int]:
    """[N] tokens of its completions."""
    return [length for group in states.packed.groups.completion_lengths for length in group]


def _record(scored: ScoredRollout, states: ForwardPass, logprobs_T: Tensor, entropies_T: Tensor) -> None:
    lengths = _lengths(states)
    for row, logprobs, entropies in zip(states.rows, logprobs_T.split(lengths), entropies_T.split(lengths), strict=True):
        scored.logprobs[row], scored.entropies[row] = logprobs, entropies
