"""The policy gradient: clipped asymmetric loss on the advantages of rewards (docs/method.md; DAPO, arXiv 2503.14476).

Shapes: N completions, T completion tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tars_kernels import PolicyLoss, linear_logprob, linear_policy_loss
from tars_kernels.objective import PRESETS, ObjectiveSettings
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.objectives.references import References
from tars_fast.learning.passes import Counts, ForwardPass
from tars_fast.learning.scored import ScoredRollout
from tars_fast.models.speech_model import PackedBatch, SpeechModel


def logprobs_of(
    model: SpeechModel, hidden_TD: Tensor, packed: PackedBatch, temperature: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[T] log-probabilities and entropies of completion tokens, in nats.

    Args:
        weight: [V, D] of another head than the model's.
    """
    logprobs_T, entropies_T = linear_logprob(
        hidden_TD,
        model.head if weight is None else weight,
        packed.targets,
        bias=model.head_bias,
        temperature=temperature,
        group=model.head_group,
        return_entropy=True,
    )
    return logprobs_T, entropies_T


@dataclass(frozen=True)
class PolicyGradient:
    """The loss of completions with an advantage."""

    model: SpeechModel
    config: RunConfig
    references: References

    def loss(
        self, scored: ScoredRollout, states: ForwardPass, counts: Counts, advantages_T: Tensor | None = None
    ) -> PolicyLoss:
        """The part of a step's loss that these completions contribute, each completion's advantage being its tokens'.

        Args:
            advantages_T: of each token, in the place of the completions' ones.
        """
        objective = self._objective(scored, states, counts)
        advantages = scored.advantages_N[states.rows].to(self.model.device)
        if advantages_T is not None:
            advantages = advantages_T
            objective["advantage_level"] = "token"
        return linear_policy_loss(
            states.hidden_TD,
            self.model.head,
            states.packed.targets,
            advantages,
            bias=self.model.head_bias,
            temperature=self.config.temperature,
            group=self.model.head_group,
            **objective,
        )

    def _objective(self, scored: ScoredRollout, states: ForwardPass, counts: Counts) -> ObjectiveSettings:
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
            "num_tokens": counts.num_tokens,
        }
        normalise = PRESETS[config.loss_type].normalise
        if normalise == "constant":
            settings["constant"] = counts.num_completions * config.max_new_tokens
        elif normalise != "token-mean":
            settings["num_sequences"] = counts.num_completions
        return settings

    @torch.no_grad()
    def _reference_logprobs(self, scored: ScoredRollout, states: ForwardPass) -> Tensor | None:
        """[T] of the model before training, found in the first update of a rollout; None where KL is not wanted."""
        if self.config.kl_coef == 0:
            return None
        if scored.is_first_update:
            with self.references.using("frozen"):
                hidden_TD = self.model.forward(states.packed)
                logprobs_T, _ = logprobs_of(self.model, hidden_TD, states.packed, self.config.temperature)
            for row, logprobs in zip(states.rows, logprobs_T.split(states.packed.completion_lengths), strict=True):
                scored.ref_logprobs[row] = logprobs
        return torch.cat([scored.ref_logprobs[row] for row in states.rows])
