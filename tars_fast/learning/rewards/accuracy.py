"""R_acc: whether the answer is right."""

from __future__ import annotations

from tars_fast.learning.rewards.answers import read_answer
from tars_fast.learning.rewards.inputs import RewardInput


def accuracy(completions: list[RewardInput]) -> list[float | None]:
    """1 where the answer that can be read from the completion is right, else 0; None where no rule can grade the item."""
    return [
        float(one.question.is_right(read_answer(one.text, one.question))) if one.question.has_answer else None
        for one in completions
    ]


def unparsed(completions: list[RewardInput]) -> list[float | None]:
    """1 where no single answer can be read; such a completion has accuracy 0."""
    return [float(read_answer(one.text, one.question) is None) if one.question.has_answer else None for one in completions]
