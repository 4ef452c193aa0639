"""R_fmt: whether the completion is written as the answer format asks."""

from __future__ import annotations

from tars_fast.learning.rewards.answers import keeps_format
from tars_fast.types import Completion, Question


def answer_format(completion: Completion, question: Question) -> float:
    """1 where the whole completion is, by default, `<think>...</think> <answer>... The answer is X ...</answer>`, else 0."""
    return float(keeps_format(completion.text, question))
