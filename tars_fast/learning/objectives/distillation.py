"""On-policy distillation across modalities: the model that is given the written prompt scores, token by token, what the model
that is given the recording has written (docs/method.md; CORD, arXiv 2601.16547; X-OPD, arXiv 2603.24596).

The teacher costs one packed forward pass without gradient, of which its final states are kept until the micro-batch is done. As
a loss the distributions are compared whole, from two streams of states by the fused kernel; as an advantage only
log-probabilities of the sampled tokens are. The anchor takes the same completions behind the written prompt a second time, with
gradient, and holds them to the model before training.

Shapes: N completions, T tokens of distilled completions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tars_kernels import linear_distillation_loss
from tars_kernels.divergence import DistillationLoss, DistillationSettings
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import centred_advantages
from tars_fast.learning.batch import Rollout
from tars_fast.learning.objectives.policy_gradient import logprobs_of
from tars_fast.learning.objectives.references import ReferenceName, References
from tars_fast.learning.passes import Counts, ForwardPass
from tars_fast.learning.scored import ScoredRollout
from tars_fast.models.speech_model import PackedBatch, SpeechModel
from tars_fast.types import Modality

CORD_WEIGHTS: DistillationSettings = {"top_tokens": 20, "top_weight": 2.0, "decay": 2.0}
"""CORD: a completion's 20 tokens of largest divergence count twice, times a weight that falls from 2 to 1 along it."""


def distilled_rows(rollout: Rollout, *, truncated: bool) -> list[bool]:
    """[N] which completions a distillation trains on: spoken ones, those that were cut off only if `truncated`."""
    return [c.modality is Modality.SPEECH and (truncated or not c.truncated) for c in rollout.completions]


@dataclass(frozen=True)
class TeacherStates:
    """Spoken completions behind their written prompts, as the teacher sees them."""

    rows: list[int]
    """[N] which completions of the rollout."""
    packed: PackedBatch
    """Written prompts, each once, and these completions."""
    hidden_TD: Tensor
    """The teacher's states that predict their tokens."""
    start_TD: Tensor | None
    """Those of the model before training, where the anchor asks for them."""


@dataclass(frozen=True)
class Distillation:
    """The term of the loss that a teacher's distributions make."""

    model: SpeechModel
    config: RunConfig
    references: References

    def weight_at(self, step: int) -> float:
        """Of the term in the loss, by completed steps."""
        config = self.config
        remaining = 1.0 - step / config.num_steps if config.distil_schedule == "linear" else 1.0
        return config.distil_weight * remaining

    def teacher_states(self, rollout: Rollout, rows: Sequence[int]) -> TeacherStates | None:
        """The teacher's pass over those completions among `rows` that are distilled; None where none is."""
        chosen = distilled_rows(rollout, truncated=self.config.distil_truncated)
        rows = [row for row in rows if chosen[row]]
        if not rows:
            return None
        completions = [rollout.completions[row] for row in rows]
        packed = self.model.pack([rollout.written[completion.question] for completion in completions], completions)
        teacher_TD = self._states(self.config.teacher, packed)
        start_TD = None
        if self.config.anchors_by_kl:
            start_TD = teacher_TD if self.config.teacher == "frozen" else self._states("frozen", packed)
        return TeacherStates(rows, packed, teacher_TD, start_TD)

    def _states(self, name: ReferenceName, packed: PackedBatch) -> Tensor:
        with self.references.using(name):
            return self.model.forward(packed)

    def advantages(self, scored: ScoredRollout, states: ForwardPass, teacher: TeacherStates | None) -> Tensor:
        """Advantages of all tokens of `states`, of rewards and of the teacher's feedback.

        A token's is its completion's plus weight x (log q - log p), p the probability that it was sampled with, q the
        teacher's; with `--distil-as sequence` the mean of these over its completion, centred within the group.
        """
        device, lengths = self.model.device, states.packed.completion_lengths
        # Copied to the device once: each copy waits for it.
        advantages_T = scored.advantages_N[states.rows].repeat_interleave(torch.tensor(lengths)).to(device)
        if teacher is None:
            return advantages_T
        gaps_T = self._feedback(scored, teacher)
        lengths = teacher.packed.completion_lengths
        gaps = gaps_T.split(lengths)
        for row, gap_T in zip(teacher.rows, gaps, strict=True):
            scored.divergences[row] = -gap_T
        if self.config.distil_as == "sequence":
            groups_N = scored.rollout.groups_N[teacher.rows].unique(return_inverse=True)[1]
            means_N = centred_advantages(torch.stack([gap_T.mean() for gap_T in gaps]).cpu(), groups_N)
            gaps_T = means_N.repeat_interleave(torch.tensor(lengths)).to(device)
        return advantages_T.index_add(0, self._places(states, teacher).to(device), self.weight_at(scored.step) * gaps_T)

    @torch.no_grad()
    def _feedback(self, scored: ScoredRollout, teacher: TeacherStates) -> Tensor:
        """[T] log q - log p of the distilled tokens."""
        head = self.references.head(self.config.teacher)
        logprobs_T, _ = logprobs_of(self.model, teacher.hidden_TD, teacher.packed, self.config.temperature, head)
        own = [logprob for row in teacher.rows for logprob in scored.rollout.completions[row].rollout_logprobs]
        return logprobs_T - torch.tensor(own, device=logprobs_T.device)

    def _places(self, states: ForwardPass, teacher: TeacherStates) -> Tensor:
        """[T] where distilled tokens are among those of a forward pass, on the CPU: a mask would have to be asked."""
        taught = set(teacher.rows)
        lengths = zip(states.rows, states.packed.completion_lengths, strict=True)
        return torch.tensor([row in taught for row, length in lengths for _ in range(length)]).nonzero()[:, 0]

    def loss(self, scored: ScoredRollout, states: ForwardPass, teacher: TeacherStates, counts: Counts) -> Tensor:
        """The divergence of the spoken from the written prompt's distributions, over all distilled tokens of the step."""
        hidden_TD = states.hidden_TD
        if teacher.rows != states.rows:
            hidden_TD = hidden_TD[self._places(states, teacher).to(hidden_TD.device)]
        settings: DistillationSettings = {"divergence": self.config.distil_divergence, "beta": self.config.distil_beta}
        if self.config.parts.weighs_tokens:
            settings |= CORD_WEIGHTS | {"cu_seqlens": teacher.packed.cu_seqlens}
        result = self._compare(
            hidden_TD, teacher.hidden_TD, self.config.teacher, settings | {"num_tokens": counts.num_distilled}
        )
        for row, values in zip(teacher.rows, result.divergences.detach().split(teacher.packed.completion_lengths), strict=True):
            scored.divergences[row] = values
        return self.weight_at(scored.step) * result.loss

    def anchor_loss(self, teacher: TeacherStates, counts: Counts) -> tuple[Tensor, Tensor]:
        """(loss, sum of divergences) of the same completions behind their written prompts from the model before training."""
        assert teacher.start_TD is not None
        settings: DistillationSettings = {"divergence": "forward_kl", "num_tokens": counts.num_distilled}
        result = self._compare(self.model.forward(teacher.packed), teacher.start_TD, "frozen", settings)
        return self.config.text_anchor_weight * result.loss, result.divergences.detach().sum()

    def _compare(
        self, hidden_TD: Tensor, teacher_TD: Tensor, teacher: ReferenceName, settings: DistillationSettings
    ) -> DistillationLoss:
        bias = self.model.head_bias
        return linear_distillation_loss(
            hidden_TD,
            teacher_TD,
            self.model.head,
            bias=bias,
            teacher_weight=self.references.head(teacher),
            temperature=self.config.temperature,
            group=self.model.head_group,
            **settings | {"teacher_bias": bias},
        )
