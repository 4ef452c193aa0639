"""Steps 2 to 5 on one rollout: packed forward passes, R_rep, the loss, its backward pass and the optimiser's step.

Every token goes through one forward pass an update, which gives its log-probability and entropy and, pooled by hooks while the
layers run, R_rep. Groups of which it is known before that pass that their completions all earn the same cannot have an
advantage: they go through it without gradients and have no backward pass.

Shapes: N completions of a rollout or micro-batch, T completion tokens, L layers that R_rep looks at, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from tars_kernels import LayerPooler, PolicyLoss
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.batch import Rollout, micro_batches
from tars_fast.learning.gradients import GradientSum
from tars_fast.learning.metrics import BackwardPass, check_agreement, token_metrics, token_sums
from tars_fast.learning.objectives.distillation import Distillation, TeacherStates, distilled_rows
from tars_fast.learning.objectives.policy_gradient import PolicyGradient, logprobs_of
from tars_fast.learning.objectives.references import References
from tars_fast.learning.objectives.watch import WrittenWatch
from tars_fast.learning.passes import Counts, ForwardPass, MicroBatch
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.rewards.representation import RunningMeans
from tars_fast.learning.rewards.reward import reward_values
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.scored import ScoredRollout
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.architecture import find_layers
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Modality, Prompt, TrainingError


@dataclass
class Learner:
    """The policy in training: what an update of it needs."""

    model: SpeechModel
    optimizer: torch.optim.Optimizer
    config: RunConfig
    workers: Workers = ALONE
    """All processes with rollouts of this step, whose gradients are summed."""
    made_references: InitVar[References | None] = None
    """None: they are made of the model as it is."""
    made_rewards: InitVar[Rewards | None] = None
    """None: those of `config`."""
    rewards: Rewards = field(init=False)
    references: References = field(init=False)
    gradients: GradientSum = field(init=False)
    timer: PhaseTimer = field(init=False)
    counts: Counts = field(init=False, default=Counts(0, 0, 0))
    """Of this step's rollouts."""
    policy_gradient: PolicyGradient = field(init=False)
    distillation: Distillation | None = field(init=False, default=None)
    """None where the objective distils nothing."""
    watch: WrittenWatch | None = field(init=False, default=None)
    """None where nobody asks for it."""

    def __post_init__(self, made_references: References | None, made_rewards: Rewards | None) -> None:
        self.rewards = made_rewards or Rewards(self.config)
        self.timer = PhaseTimer(self.model.device)
        self.gradients = GradientSum(self.optimizer, self.workers)
        self.references = made_references or References(self.model, self.config)
        self.policy_gradient = PolicyGradient(self.model, self.config, self.references)
        if self.config.parts.distils:
            self.distillation = Distillation(self.model, self.config, self.references)

    @property
    def means(self) -> RunningMeans | None:
        """None where R_rep compares states as they are."""
        return self.rewards.means

    def extra(self) -> dict[str, object]:
        """What a checkpoint holds of it beside weights and optimiser."""
        own: dict[str, object] = {} if self.watch is None else {"watch": self.watch.state()}
        if self.means is not None:
            own["means"] = self.means.means
        return self.references.state() | own

    def load_extra(self, extra: Mapping[str, Any]) -> None:
        """Go on from what `extra` returned. Raises LookupError, ValueError or RuntimeError where it is of another run."""
        self.references.load_state(extra)
        if self.means is not None:
            self.means.means = extra["means"]
        if self.config.steps_between_looks:
            self.watch = WrittenWatch.from_state(extra["watch"])

    def written_kl(self, step: int) -> dict[str, float]:
        """How far written answers have moved, where it is time to look; no figure where it is not."""
        config = self.config
        if self.watch is None or step % config.steps_between_looks:
            return {}
        # Of the first process, whose completions are those of the checkpoint.
        return {"written_kl": self.workers.gather(self.watch.divergence(self.model, config.temperature))[0]}

    def begin_rollout(self, rollout: Rollout | None, step: int = 0) -> ScoredRollout | None:
        """A rollout with the rewards that are known before its forward pass; None where this process has none.

        Counts the tokens and completions of all processes, by which the loss is normalised.

        Args:
            step: steps that were completed before.
        """
        config = self.config
        distilled: list[bool] = []
        own = (0, 0, 0)
        if rollout is not None:
            distilled = [False] * len(rollout.completions)
            if self.distillation is not None:
                distilled = distilled_rows(rollout, truncated=config.distil_truncated)
            chosen = zip(rollout.completions, distilled, strict=True)
            num_distilled = sum(len(completion.token_ids) for completion, is_distilled in chosen if is_distilled)
            own = (rollout.num_tokens, len(rollout.completions), num_distilled)
        self.counts = Counts(*(sum(count) for count in zip(*self.workers.gather(own), strict=True)))
        if rollout is None:
            return None
        is_regularised = config.kl_coef != 0 or config.entropy_coef != 0
        always = [
            is_distilled or (is_regularised and not completion.truncated)
            for completion, is_distilled in zip(rollout.completions, distilled, strict=True)
        ]
        rewarded = [
            config.parts.has_policy_gradient or (config.samples_text and completion.modality is Modality.TEXT)
            for completion in rollout.completions
        ]
        return ScoredRollout(rollout, self.rewards, config, torch.tensor(always), torch.tensor(rewarded), step)

    def start_update(self, scored: ScoredRollout | None) -> None:
        """Forget the gradients of the last update."""
        self.optimizer.zero_grad(set_to_none=True)
        if scored is not None:
            scored.trained_N.zero_()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of the update in which processes that share one model's weights wait for each other."""
        with self.timer.phase(name), self.model.together():
            yield

    def micro_batches(self, scored: ScoredRollout) -> list[list[int]]:
        """[N] numbers of completions, whole questions, as many as `--tokens-per-micro-batch` has room for."""
        return micro_batches(scored.rollout, self.config.tokens_per_micro_batch)

    def teacher_states(self, scored: ScoredRollout, rows: Sequence[int]) -> TeacherStates | None:
        """What the teacher makes of the completions `rows`; before their own pass, which keeps more memory."""
        if self.distillation is None:
            return None
        with self._phase("teacher"):
            return self.distillation.teacher_states(scored.rollout, rows)

    def forward(self, scored: ScoredRollout, rows: Sequence[int]) -> MicroBatch:
        """Hidden states of the completions `rows`, which are whole questions.

        In the first update of a rollout of all of them, pooled for R_rep where there is anything to compare, in a graph where
        a gradient is possible. In a later update rewards and old log-probabilities are known, and only completions with a
        gradient are needed.
        """
        if not scored.is_first_update:
            rows = scored.rows_with_gradient(rows)
            return MicroBatch(None, self._forward(scored.rollout, rows, None) if rows else None)
        pooler = None
        if self.rewards.of_states:
            layers = self.model.language_model.layers
            pooler = LayerPooler(layers, self.model.language_model.norm, layers=self._pooled_layers)
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
        with self._phase("forward"):
            packed = model.pack(prompts, completions, routed=True)
            if pooler is None:
                return ForwardPass(rows, packed, model.forward(packed), None)
            with pooler.pooling(packed.cu_seqlens, positions=packed.positions):
                hidden_TD = model.forward(packed)
            return ForwardPass(rows, packed, hidden_TD, pooler.pooled)

    @cached_property
    def _pooled_layers(self) -> list[int]:
        """Layers that any reward looks at, in order."""
        return sorted({layer for reward in self.rewards.of_states for layer in self._find_layers(reward.needs.layers)})

    def _find_layers(self, given: str) -> range:
        num_layers = len(self.model.language_model.layers)
        return find_layers(given, num_layers) or range(num_layers)

    def _chosen(self, pooled_LND: Tensor, given: str) -> Tensor:
        """Of the pooled layers those that `given` names."""
        wanted = self._find_layers(given)
        places = [place for place, layer in enumerate(self._pooled_layers) if layer in wanted]
        return pooled_LND if len(places) == len(pooled_LND) else pooled_LND[places]

    def complete_rewards(self, scored: ScoredRollout, batch: MicroBatch) -> None:
        """Add what comes of pooled states, of whole questions; with it their rewards and advantages are known."""
        with self.timer.phase("reward"), torch.no_grad():
            rows = [row for states in batch.passes for row in states.rows]
            places = {row: place for place, row in enumerate(rows)}
            rollout = scored.rollout
            completions = [rollout.completions[row] for row in rows]
            of_row = rollout.references
            references = [None if (reference := of_row[row]) is None else places[reference] for row in rows]
            pooled = [part.pooled_LND for part in batch.passes if part.pooled_LND is not None]
            of_states = {}
            if pooled:
                pooled_LND = torch.cat(pooled, dim=1)
                if self.means is not None:
                    is_speech_N = torch.tensor([one.modality is Modality.SPEECH for one in completions])
                    self.means.add(self._chosen(pooled_LND, self.config.representation_layers), is_speech_N)
                for reward in self.rewards.of_states:
                    states = self._chosen(pooled_LND, reward.needs.layers).unbind(1)
                    inputs = reward_inputs(completions, rollout.questions, references, states)
                    of_states[reward.name] = reward_values(reward, inputs)
            scored.record_rewards(rows, of_states)

    def backward(
        self, scored: ScoredRollout, batch: MicroBatch, teacher: TeacherStates | None = None, *, is_last: bool = False
    ) -> list[BackwardPass]:
        """Loss and backward pass of the completions that have a gradient; an empty list where none has one.

        The first update of a rollout records the log-probabilities of all its completions, the "old" ones of later ones.

        Args:
            is_last: whether nothing is added to the gradients of this update after it, so that they may be sent meanwhile.
        """
        trained = batch.with_gradient
        if trained is not None and not scored.rows_with_gradient(trained.rows):
            trained = None
        if scored.is_first_update:
            for states in batch.passes:
                if states is not trained or not self.config.has_policy_loss:
                    self._record_logprobs(scored, states)
        return [] if trained is None else [self._backward(scored, trained, teacher, is_last=is_last)]

    @torch.no_grad()
    def _record_logprobs(self, scored: ScoredRollout, states: ForwardPass) -> None:
        with self._phase("forward"):
            logprobs_T, entropies_T = logprobs_of(self.model, states.hidden_TD, states.packed, self.config.temperature)
        _record(scored, states, logprobs_T, entropies_T)

    def _backward(
        self, scored: ScoredRollout, states: ForwardPass, teacher: TeacherStates | None, *, is_last: bool
    ) -> BackwardPass:
        policy: PolicyLoss | None = None
        is_anchored = teacher is not None and teacher.start_TD is not None
        terms: list[Tensor] = []
        with self._phase("forward"):
            if self.config.has_policy_loss:
                advantages_T = None
                if self.distillation is not None and not self.config.has_divergence_loss:
                    advantages_T = self.distillation.advantages(scored, states, teacher)
                policy = self.policy_gradient.loss(scored, states, self.counts, advantages_T)
                terms.append(policy.loss)
            if self.distillation is not None and self.config.has_divergence_loss and teacher is not None:
                terms.append(self.distillation.loss(scored, states, teacher, self.counts))
            loss = torch.stack(terms).sum()
        with self._phase("backward"), self.gradients.sent_while_they_come(is_last and not is_anchored):
            loss.backward()
        loss = loss.detach()
        if policy is not None:
            if scored.is_first_update:
                _record(scored, states, policy.logprobs, policy.entropy)
            policy = replace(policy, loss=policy.loss.detach())
        anchor_sum: Tensor | None = None
        if self.distillation is not None and teacher is not None and is_anchored:
            with self._phase("forward"):
                anchor, anchor_sum = self.distillation.anchor_loss(teacher, self.counts)
            with self._phase("backward"), self.gradients.sent_while_they_come(is_last):
                anchor.backward()
            loss = loss + anchor.detach()
        scored.trained_N[states.rows] = True
        completions = [scored.rollout.completions[row] for row in states.rows]
        num_tokens = sum(len(completion.token_ids) for completion in completions if not completion.truncated)
        return BackwardPass(loss, policy, num_tokens, anchor_sum)

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
            self.gradients.finish()
            grad_norm = self._clip_gradients()
            metrics = self._token_metrics(scored, losses) | self._routing_metrics() | {"grad_norm": grad_norm.item()}
            self._check(metrics, scored)
            if self.counts.num_tokens or self.counts.num_distilled:
                with self.workers.together() if self.gradients.is_sharded else nullcontext():
                    self.optimizer.step()
                self.references.follow()
        if self.means is not None:
            # Nothing was added since where this is a later update.
            self.means.finish_step(self.workers)
        if scored is not None:
            scored.num_updates += 1
        return metrics

    def _clip_gradients(self) -> Tensor:
        """Hold the gradients to `--max-grad-norm`; returns their norm before, that of all processes' parts."""
        parallel = self.model.parallel
        if parallel is None:
            return self.gradients.clip(self.config.max_grad_norm)
        return parallel.clip_gradients(self.model.module, self.config.max_grad_norm)

    def _token_metrics(self, scored: ScoredRollout | None, losses: Sequence[BackwardPass]) -> dict[str, float]:
        """Of all processes."""
        sums = self.workers.gather(None if scored is None else token_sums(losses, scored))
        metrics = token_metrics([part for part in sums if part is not None])
        unknown = {"kl"} if self.config.kl_coef == 0 else set()
        if not self.config.has_policy_loss:
            unknown |= {"clip/low", "clip/high"}
        if self.distillation is None:
            unknown.add("divergence/speech")
        if not self.config.anchors_by_kl:
            unknown.add("divergence/text")
        if not self.config.samples_text:
            unknown.add("entropy/text")
        return {name: value for name, value in metrics.items() if name not in unknown}

    def _routing_metrics(self) -> dict[str, float]:
        """Share of tokens that would go through other experts than the engine sent them through, in all layers and in each; of
        all processes. Nothing where the engine says none."""
        routing = self.model.routing
        if routing is None:
            return {}
        counts = torch.tensor(self.workers.gather(routing.take_counts())).sum(0)
        if not counts[:, 1].sum():
            return {}
        differ, known = counts.sum(0).tolist()
        shares = (counts[:, 0] / counts[:, 1]).tolist()
        by_layer = {f"other_experts/layer_{layer}": share for layer, share in zip(routing.layers, shares, strict=True)}
        return {"other_experts": differ / known} | by_layer

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


def _record(scored: ScoredRollout, states: ForwardPass, logprobs_T: Tensor, entropies_T: Tensor) -> None:
    lengths = states.packed.completion_lengths
    for row, logprobs, entropies in zip(states.rows, logprobs_T.split(lengths), entropies_T.split(lengths), strict=True):
        scored.logprobs[row], scored.entropies[row] = logprobs, entropies
