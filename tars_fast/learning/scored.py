"""A rollout with its rewards and advantages, as far as they are known, and which of its completions have a gradient.

Shapes: N completions of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tars_fast.learning.advantages import centred_advantages, disagreeing_groups, scaled_in_groups
from tars_fast.learning.batch import Rollout
from tars_fast.learning.rewards.total import total_reward, unknown_alignment


@dataclass
class ScoredRollout:
    """What the forward passes over a rollout add to it."""

    rollout: Rollout
    weights: Mapping[str, float]
    """Of the terms of the reward, see `reward_weights`."""
    always_N: Tensor
    """bool: completions with a gradient whatever their advantage, for KL, an entropy bonus, or distillation."""
    rewarded_N: Tensor
    """bool: completions whose rewards make an advantage, where they were not cut off."""
    step: int = 0
    """Steps that were completed before it."""
    scaling: str = "none"
    """Of the terms of the reward, see `scaled_in_groups`."""
    terms: dict[str, Tensor] = field(init=False)
    """[N] every term of the reward by name; NaN where it is not known yet, or never will be for want of an answer."""
    rewards_N: Tensor = field(init=False)
    """R, NaN where a term of it is not known."""
    advantages_N: Tensor = field(init=False)
    """0 until `record_rewards`."""
    trained_N: Tensor = field(init=False)
    """bool: whether the last update had a backward pass through it."""
    logprobs: list[Tensor] = field(init=False)
    """[N] log-probabilities of each completion's tokens under the weights before the first update ("old"). The policy loss
    leaves 0 for masked tokens, those of truncated completions."""
    entropies: list[Tensor] = field(init=False)
    """[N] of the distributions that these tokens were sampled from, in nats."""
    ref_logprobs: list[Tensor] = field(init=False)
    """[N] log-probabilities under the model before training, of completions with a gradient and where KL is wanted."""
    divergences: list[Tensor] = field(init=False)
    """[N] of each token of a distilled completion from the teacher's distribution, in nats; empty for others. Where feedback is
    an advantage it is the estimate log p - log q."""
    num_updates: int = field(init=False, default=0)
    """Optimiser steps on it so far."""

    def __post_init__(self) -> None:
        num_completions = len(self.rollout.completions)
        self.terms = self.rollout.completion_rewards | unknown_alignment(self.rollout.references)
        self.rewards_N = total_reward(self.terms, self.weights)
        self.advantages_N = torch.zeros(num_completions)
        self.trained_N = torch.zeros(num_completions, dtype=torch.bool)
        self.logprobs = [torch.empty(0)] * num_completions
        self.entropies = [torch.empty(0)] * num_completions
        self.ref_logprobs = [torch.empty(0)] * num_completions
        self.divergences = [torch.empty(0)] * num_completions

    @property
    def is_first_update(self) -> bool:
        """Whether no optimiser step was taken on it so far."""
        return self.num_updates == 0

    def record_rewards(self, rows: Sequence[int], representation_N: Tensor) -> None:
        """Complete the rewards of these completions, and centre them within their groups.

        Args:
            rows: completions of complete questions only.
            representation_N: R_rep of these completions.
        """
        self.terms["representation"][rows] = representation_N
        self.terms["behaviour"][rows] = self.rollout.behaviour.result()[rows]
        terms = {name: self.terms[name][rows] for name in self.weights}
        groups_N = self.rollout.groups_N[rows].unique(return_inverse=True)[1]
        self.rewards_N[rows] = total_reward(terms, self.weights)
        counted = {name: scaled_in_groups(values_N, groups_N, self.scaling) for name, values_N in terms.items()}
        advantages_N = centred_advantages(total_reward(counted, self.weights), groups_N)
        # Where nothing is rewarded, R may be unknown.
        self.advantages_N[rows] = advantages_N.where(self.rewarded_N[rows], 0.0)

    @cached_property
    def _kept_N(self) -> Tensor:
        """bool: completions that were not cut off; those that were are masked out of the policy loss."""
        return torch.tensor([not completion.truncated for completion in self.rollout.completions])

    @cached_property
    def may_have_gradient(self) -> list[bool]:
        """[N] whether a completion's group can have a gradient, as known before the first update.

        Either its rewards differ or are not all known yet and one of its completions was not cut off, or one always has one.
        """
        groups_N = self.rollout.groups_N
        # Terms that are scaled may differ where their sum does not.
        compared = [self.rewards_N] if self.scaling == "none" else [self.terms[name] for name in self.weights]
        is_open_G = torch.stack([disagreeing_groups(values_N.nan_to_num(), groups_N) for values_N in compared]).any(0)
        is_open_G[groups_N[self.rewards_N.isnan()]] = True
        rewarded = groups_N[self._kept_N & self.rewarded_N & is_open_G[groups_N]]
        return torch.isin(groups_N, torch.cat([rewarded, groups_N[self.always_N]])).tolist()

    def rows_with_gradient(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose group has an advantage in a completion not cut off, or a completion that always has a gradient;
        needs their rewards."""
        if not rows:
            return []
        rows = list(rows)
        groups_N = self.rollout.groups_N[rows]
        with_gradient = groups_N[((self.advantages_N[rows] != 0) & self._kept_N[rows]) | self.always_N[rows]].unique()
        return [row for row, has in zip(rows, torch.isin(groups_N, with_gradient).tolist(), strict=True) if has]
