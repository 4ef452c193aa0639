"""R_fmt: whether the completion is written as the answer format asks."""

from __future__ import annotations

from tars_fast.learning.rewards.answers import keeps_format
from tars_fast.learning.rewards.inputs import RewardInput


def answer_format(completions: list[RewardInput]) -> list[float | None]:
    """1 where the whole completion is, by default, `<think>...</think> <answer>... The answer is X ...</answer>`, else 0.

    None where no rule can grade the item.
    """
    return [float(keeps_format(one.text, one.question)) if one.question.has_answer else None for one in completions]
