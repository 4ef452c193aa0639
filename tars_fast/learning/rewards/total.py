"""R: the terms of the reward and their weights. Shapes: N completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.rewards.accuracy import accuracy, unparsed
from tars_fast.learning.rewards.format import answer_format
from tars_fast.types import Completion, Question


class TextReward(NamedTuple):
    """A reward that follows from what a completion says."""

    function: Callable[[Completion, Question], float]
    weight: float
    """0: the value is logged, and is no part of R."""


TEXT_REWARDS = {
    "accuracy": TextReward(accuracy, 1.0),
    "format": TextReward(answer_format, 0.5),
    "unparsed": TextReward(unparsed, 0.0),
}
"""`R_base = R_acc + 0.5 R_fmt`, and whatever is added here."""
ALIGNMENT_REWARDS = ("representation", "behaviour")
"""R_rep and R_beh, of speech completions that have a reference; 0 for all others."""


def text_rewards(completions: Sequence[Completion], questions: Sequence[Question]) -> dict[str, Tensor]:
    """[N] fp32 by name in `TEXT_REWARDS`; `completion.question` counts within `questions`."""
    return {
        name: torch.tensor([float(reward.function(completion, questions[completion.question])) for completion in completions])
        for name, reward in TEXT_REWARDS.items()
    }


def reward_weights(config: RunConfig) -> dict[str, float]:
    """Weight of every term of R that has one, by name."""
    weights = {name: reward.weight for name, reward in TEXT_REWARDS.items()}
    weights |= {"representation": config.representation_weight, "behaviour": config.behaviour_weight}
    return {name: weight for name, weight in weights.items() if weight}


def unknown_alignment(references: Sequence[int | None]) -> dict[str, Tensor]:
    """[N] R_rep and R_beh before anything was compared: 0 without a reference, else NaN: not known yet."""
    values_N = torch.tensor([0.0 if reference is None else torch.nan for reference in references])
    return {name: values_N.clone() for name in ALIGNMENT_REWARDS}


def total_reward(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """[N] `R = sum over terms of weight * term`; NaN where a term that counts is not known yet."""
    (total_N, *others) = (weight * terms[name] for name, weight in weights.items())
    for other_N in others:
        total_N = total_N + other_N
    return total_N
