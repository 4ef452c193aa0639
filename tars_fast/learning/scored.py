"""A rollout with its rewards and advantages, as far as they are known, and which of its completions have a gradient.

Shapes: N completions of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tars_fast.learning.advantages import centred_advantages, disagreeing_groups
from tars_fast.learning.batch import Rollout
from tars_fast.learning.rewards.total import total_reward, unknown_alignment


@dataclass
class ScoredRollout:
    """What the forward passes over a rollout add to it."""

    rollout: Rollout
    weights: Mapping[str, float]
    """Of the terms of the reward, see `reward_weights`."""
    is_regularised: bool = False
    """KL or an entropy bonus gives every completion that was not cut off a gradient, whatever its advantage."""
    terms: dict[str, Tensor] = field(init=False)
    """[N] every term of the reward by name; NaN where it is not known yet."""
    rewards_N: Tensor = field(init=False)
    """R, NaN where a term of it is not known yet."""
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
        rewards_N = total_reward({name: values_N[rows] for name, values_N in self.terms.items()}, self.weights)
        groups_N = self.rollout.groups_N[rows].unique(return_inverse=True)[1]
        self.rewards_N[rows] = rewards_N
        self.advantages_N[rows] = centred_advantages(rewards_N, groups_N)

    @cached_property
    def may_have_gradient(self) -> list[bool]:
        """[N] whether a completion's group can have a gradient: its rewards differ, are not all known yet, or do not matter,
        and it has a completion that was not cut off (those that were are masked out of the loss). As known before the first
        update."""
        groups_N = self.rollout.groups_N
        is_open_G = disagreeing_groups(self.rewards_N.nan_to_num(), groups_N)
        is_open_G[groups_N[self.rewards_N.isnan()]] = True
        is_open_G |= self.is_regularised
        kept_N = torch.tensor([not completion.truncated for completion in self.rollout.completions])
        return (is_open_G[groups_N] & torch.isin(groups_N, groups_N[kept_N])).tolist()

    def rows_with_gradient(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose group has an advantage, or KL or entropy, in a completion not cut off; needs their rewards."""
        if not rows:
            return []
        groups_N = self.rollout.groups_N[list(rows)]
        kept_N = torch.tensor([not self.rollout.completions[row].truncated for row in rows])
        with_gradient = groups_N[((self.advantages_N[list(rows)] != 0) | self.is_regularised) & kept_N].unique()
        return [row for row, has in zip(rows, torch.isin(groups_N, with_gradient).tolist(), strict=True) if has]
