"""R: the terms of the reward and their weights. Shapes: N completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tars_fast.config import RunConfig
from tars_fast.learning.rewards.accuracy import accuracy, unparsed
from tars_fast.learning.rewards.format import answer_format
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import Completion, Question, TrainingError


class CompletionReward(NamedTuple):
    """A reward of one completion by itself."""

    function: Callable[[Completion, Question], float]
    weight: float
    """0: the value is logged, and is no part of R."""


COMPLETION_REWARDS = {
    "accuracy": CompletionReward(accuracy, 1.0),
    "format": CompletionReward(answer_format, 0.5),
    "unparsed": CompletionReward(unparsed, 0.0),
}
"""`R_base = R_acc + 0.5 R_fmt`, and whatever is added here; of questions with an answer only."""
ALIGNMENT_REWARDS = ("representation", "behaviour")
"""R_rep and R_beh, of speech completions that have a reference; 0 for all others."""


def completion_rewards(completions: Sequence[Completion], questions: Sequence[Question]) -> dict[str, Tensor]:
    """[N] fp32 by name in `COMPLETION_REWARDS`; NaN where the question has no answer.

    Args:
        questions: `completion.question` is an index into them.

    Raises:
        TrainingError: a reward is NaN or infinite, or its function raised something; the message names it, the item and the
            completion.
    """
    rewards = {}
    for name, reward in COMPLETION_REWARDS.items():
        values = []
        for completion in completions:
            question = questions[completion.question]
            if not question.has_answer:
                values.append(math.nan)
                continue
            try:
                value = float(reward.function(completion, question))
            # `sys.exit` too, which would end the run without a word.
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    raise
                raise TrainingError(
                    f"reward {name!r} raised {error!r:.200} for a completion of item {question.id!r}: {completion.text!r:.200}"
                ) from error
            if not math.isfinite(value):
                raise TrainingError(
                    f"reward {name!r} is {value} for a completion of item {question.id!r}: {completion.text!r:.200}"
                )
            values.append(value)
        rewards[name] = torch.tensor(values)
    return rewards


def reward_weights(config: RunConfig) -> dict[str, float]:
    """Weight of every term of R that has one, by name; of R_base where no reward is trained on, so that it can be looked at."""
    objective = config.parts
    weights: dict[str, float] = {}
    if objective.uses_rewards or not objective.has_policy_gradient:
        weights |= {name: reward.weight for name, reward in COMPLETION_REWARDS.items()}
    if objective.uses_alignment:
        weights |= {"representation": config.representation_weight, "behaviour": config.behaviour_weight}
    if objective.uses_agreement:
        weights["agreement"] = 1.0
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
