"""R_fmt: whether the completion has the form that the system prompt asks for."""

from __future__ import annotations

from tars_fast.learning.rewards.answers import has_format
from tars_fast.types import Completion, Question


def answer_format(completion: Completion, question: Question) -> float:
    """1 where the whole completion is `<think>...</think> <answer>... The answer is X ...</answer>`, else 0."""
    return float(has_format(completion.text, question.choices))
