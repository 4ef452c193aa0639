"""A rollout with its rewards and advantages, as far as they are known, and which of its completions have a gradient.

Shapes: N completions of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import advantages_of, disagreeing_groups, scaled_in_groups, with_group_means
from tars_fast.learning.batch import Rollout
from tars_fast.learning.rewards.reward import known_before
from tars_fast.learning.rewards.total import Rewards, total_reward


@dataclass
class ScoredRollout:
    """What the forward passes over a rollout add to it."""

    rollout: Rollout
    rewards: InitVar[Rewards]
    config: InitVar[RunConfig]
    always_N: Tensor
    """bool: completions with a gradient whatever their advantage, for KL, an entropy bonus, or distillation."""
    rewarded_N: Tensor
    """bool: completions whose rewards make an advantage, where they were not cut off."""
    step: int = 0
    """Steps that were completed before it."""
    weights: Mapping[str, float] = field(init=False)
    """Of the terms of the reward, see `reward_weights`."""
    centred_N: Tensor = field(init=False)
    """int64 number of the group that a completion's reward is centred in."""
    terms: dict[str, Tensor] = field(init=False)
    """[N] every reward by name, see `Rewards`; NaN where it does not apply, or is not known yet."""
    pending_N: Tensor = field(init=False)
    """bool: whether a term of R is not known yet."""
    rewards_N: Tensor = field(init=False)
    """R, NaN where a term of it is not known yet, or none applies."""
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

    def __post_init__(self, rewards: Rewards, config: RunConfig) -> None:
        rollout, num_completions = self.rollout, len(self.rollout.completions)
        self._scaling, self._advantage = config.reward_scaling, config.advantage
        self.weights = rewards.weights
        self.centred_N = rollout.groups_N
        if config.centre_within == "question":
            self.centred_N = torch.tensor([one.question for one in rollout.completions]).unique(return_inverse=True)[1]
        self._in_background = [reward.name for reward in rewards.in_background]
        self.terms = dict(rollout.completion_rewards)
        self.pending_N = torch.zeros(num_completions, dtype=torch.bool)
        for reward in rewards.late:
            self.terms[reward.name], places = known_before(reward, rollout.reward_inputs)
            if reward.weight:
                self.pending_N[places] = True
        self.rewards_N = total_reward(self.terms, self.weights).where(~self.pending_N, torch.nan)
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

    def record_rewards(self, rows: Sequence[int], of_states: Mapping[str, Tensor]) -> None:
        """Complete the rewards of these completions, and make advantages of them within their groups.

        Args:
            rows: completions of complete questions only.
            of_states: rewards of these completions, by name, that the forward pass made known.

        Raises:
            TrainingError: a reward that was computed meanwhile failed.
        """
        for name in self._in_background:
            self.terms[name][rows] = self.rollout.late[name].of(rows)
        for name, values in of_states.items():
            self.terms[name][rows] = values
        self.pending_N[rows] = False
        terms = {name: self.terms[name][rows] for name in self.weights}
        groups_N = self.centred_N[rows].unique(return_inverse=True)[1]
        self.rewards_N[rows] = total_reward(terms, self.weights)
        counted = {name: self._counted(values_N, groups_N) for name, values_N in terms.items()}
        advantages_N = advantages_of(total_reward(counted, self.weights), groups_N, self._advantage)
        # Where nothing is rewarded, or no reward applies, R is unknown.
        self.advantages_N[rows] = advantages_N.where(self.rewarded_N[rows] & ~self.rewards_N[rows].isnan(), 0.0)

    def _counted(self, values_N: Tensor, groups_N: Tensor) -> Tensor:
        """A term as it counts in R within these groups: where it does not apply it makes no difference."""
        return scaled_in_groups(with_group_means(values_N, groups_N), groups_N, self._scaling)

    @cached_property
    def _kept_N(self) -> Tensor:
        """bool: completions that were not cut off; those that were are masked out of the policy loss."""
        return torch.tensor([not completion.truncated for completion in self.rollout.completions])

    @cached_property
    def may_have_gradient(self) -> list[bool]:
        """[N] whether a completion's group can have a gradient, as known before the first update.

        Either its rewards differ or are not all known yet and one of its completions was not cut off, or one always has one.
        """
        groups_N = self.centred_N
        terms = {name: with_group_means(self.terms[name], groups_N) for name in self.weights}
        # Terms that are scaled may differ where their sum does not.
        compared = [total_reward(terms, self.weights)] if self._scaling == "none" else list(terms.values())
        is_open_G = torch.stack([disagreeing_groups(values_N, groups_N) for values_N in compared]).any(0)
        is_open_G[groups_N[self.pending_N]] = True
        rewarded = groups_N[self._kept_N & self.rewarded_N & is_open_G[groups_N]]
        return torch.isin(groups_N, torch.cat([rewarded, groups_N[self.always_N]])).tolist()

    def rows_with_gradient(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose group has an advantage in a completion not cut off, or a completion that always has a gradient;
        needs their rewards."""
        if not rows:
            return []
        rows = list(rows)
        groups_N = self.centred_N[rows]
        with_gradient = groups_N[((self.advantages_N[rows] != 0) & self._kept_N[rows]) | self.always_N[rows]].unique()
        return [row for row, has in zip(rows, torch.isin(groups_N, with_gradient).tolist(), strict=True) if has]
