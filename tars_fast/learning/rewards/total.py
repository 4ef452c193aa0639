"""R: the rewards of a run, their weights and their sum. Shapes: N completions, G groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from tars_fast.config import RewardName, RunConfig
from tars_fast.learning.rewards.accuracy import accuracy, unparsed
from tars_fast.learning.rewards.agreement import agreement
from tars_fast.learning.rewards.behaviour import Behaviour, HashedNgrams, TextSimilarity
from tars_fast.learning.rewards.format import answer_format
from tars_fast.learning.rewards.inputs import Needs, RewardInput, reward_inputs
from tars_fast.learning.rewards.judge import find_judge
from tars_fast.learning.rewards.matching import NumericMatch, PatternMatch, exact_match
from tars_fast.learning.rewards.overlong import SoftOverlong
from tars_fast.learning.rewards.representation import Representation, RunningMeans
from tars_fast.learning.rewards.reward import AsyncCalls, LateValues, Reward, reward_values
from tars_fast.support.cli import load_function
from tars_fast.types import Completion, Question, UserError

COMPLETION_REWARDS = (
    Reward("accuracy", accuracy, is_early=True),
    Reward("format", answer_format, is_early=True),
    Reward("unparsed", unparsed, weight=0.0, is_early=True),
)
"""Of each answer by itself; weights are settings."""
RESERVED_NAMES = {
    *("reward", "length", "truncated", "is_speech", "without_reference", "trained", "group", "centred", "staleness"),
    *("entropy", "disagreeing", "without_backward", "divergence", "sampled", "selection", "deviation", "not_applicable"),
    *("validation", "clip", "seconds", "beside", "heartbeat"),
    *("accuracy", "format", "unparsed", "representation", "behaviour", "agreement"),
}
"""Names that a reward of a user's own may not have, because another figure of metrics.jsonl has them."""


def completion_rewards(completions: Sequence[Completion], questions: Sequence[Question]) -> dict[str, Tensor]:
    """[N] fp32 by name in `COMPLETION_REWARDS`; NaN where no rule can grade the question.

    Args:
        questions: `completion.question` is an index into them.
    """
    inputs = reward_inputs(completions, questions)
    return {reward.name: reward_values(reward, inputs) for reward in COMPLETION_REWARDS}


def reward_weights(config: RunConfig) -> dict[str, float]:
    """Weight of every term of R that has one, by name; of R_base where no reward is trained on, so that it can be looked at."""
    objective = config.parts
    weights: dict[str, float] = {}
    if objective.uses_rewards or not objective.has_policy_gradient:
        weights |= {"accuracy": config.accuracy_weight, "format": config.format_weight}
    if objective.uses_alignment:
        weights |= {"representation": config.representation_weight, "behaviour": config.behaviour_weight}
    if objective.uses_agreement:
        weights["agreement"] = 1.0
    weights |= {own.name: own.weight for own in config.own_rewards}
    return {name: weight for name, weight in weights.items() if weight}


@dataclass(frozen=True)
class OwnRewards:
    """The rewards that `--reward` names."""

    rewards: list[Reward]
    calls: AsyncCalls
    """What calls those that are async."""

    def close(self) -> None:
        """Stop calls that are under way."""
        self.calls.close()


def load_own_rewards(config: RunConfig) -> OwnRewards:
    """Import what `--reward` names.

    Raises:
        UserError: one of them cannot be imported, or has the name of another figure.
    """
    names = [own.name for own in config.own_rewards]
    for own in config.own_rewards:
        if own.name in RESERVED_NAMES:
            raise UserError(f"--reward {own.source}: {own.name!r} is the name of another metric; rename the function")
        if names.count(own.name) > 1:
            raise UserError(f"--reward {own.source}: two rewards are called {own.name!r}; rename one of the functions")
    rewards = [_load_reward(own, config) for own in config.own_rewards]
    return OwnRewards(rewards, AsyncCalls(config.reward_concurrency, config.reward_timeout))


def _load_reward(own: RewardName, config: RunConfig) -> Reward:
    if own.source == "exact":
        return Reward(own.name, exact_match, own.weight)
    if own.source == "numeric":
        return Reward(own.name, NumericMatch(config.numeric_tolerance), own.weight)
    if own.source == "pattern":
        return Reward(own.name, PatternMatch(re.compile(config.reward_pattern or "", re.DOTALL)), own.weight)
    if own.source == "overlong":
        buffer = config.overlong_tokens or max(1, config.max_new_tokens // 5)
        if buffer > config.max_new_tokens:
            raise UserError(
                f"--overlong-tokens {buffer}: more than --max-new-tokens {config.max_new_tokens}, which would punish every "
                "completion; lower it"
            )
        return Reward(own.name, SoftOverlong(config.max_new_tokens, buffer), own.weight)
    if own.source == "judge":
        judge = find_judge(config)
        assert judge is not None, "settings without its address are refused"
        return Reward(own.name, judge, own.weight)
    return Reward(own.name, load_function("--reward", own.source), own.weight)


class Rewards:
    """Every reward of a run, by when it is known.

    What is trained on, skipped and logged follows from this list.

    Args:
        text_similarity: of R_beh; None: hashed n-grams.
        own: what `load_own_rewards` gives; None: it is called.
    """

    def __init__(self, config: RunConfig, text_similarity: TextSimilarity | None = None, own: OwnRewards | None = None) -> None:
        weights = reward_weights(config)
        self.weights: Mapping[str, float] = weights
        """Of the terms of R by name, none of them 0."""
        self.means = RunningMeans() if config.representation_centre else None
        """Of R_rep; None where it compares states as they are."""
        self.own = own or load_own_rewards(config)
        # In front of a user's own, which might change the states that they are given.
        others = []
        if config.parts.uses_agreement:
            others.append(Reward("agreement", agreement))
        if config.samples_text:
            representation = Representation(Needs(config.representation_layers, reference=True), self.means)
            others.append(Reward("representation", representation, weights.get("representation", 0.0)))
        if "behaviour" in weights:
            others.append(Reward("behaviour", Behaviour(text_similarity or HashedNgrams()), weights["behaviour"]))
        others += self.own.rewards
        self.known: list[Reward] = [reward for reward in others if not reward.is_late]
        """Known before the forward pass, beside those of `completion_rewards`."""
        self.in_background: list[Reward] = [reward for reward in others if reward.in_background]
        """Computed beside it."""
        self.of_states: list[Reward] = [reward for reward in others if reward.needs.layers]
        """Computed from the states that it gives."""

    @property
    def late(self) -> list[Reward]:
        """Those whose values are not known before the forward pass."""
        return self.in_background + self.of_states

    def begin(self, reward: Reward, inputs: Sequence[RewardInput], order: Sequence[int], background: Executor) -> LateValues:
        """Start to compute one of `in_background`; `order`: places of `inputs`, in which calls are made."""
        if reward.is_async:
            return self.own.calls.begin(reward, inputs, order)
        return LateValues([background.submit(reward_values, reward, inputs)])


def total_reward(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """[N] `R = sum over terms of weight * term`, where a term that is NaN, because it does not apply, adds nothing.

    NaN where no term applies.
    """
    (total_N, *others) = (weight * terms[name].nan_to_num(0.0) for name, weight in weights.items())
    for other_N in others:
        total_N = total_N + other_N
    applies_N = torch.stack([~terms[name].isnan() for name in weights]).any(0)
    return total_N.where(applies_N, torch.nan)
