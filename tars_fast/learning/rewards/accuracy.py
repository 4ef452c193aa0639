"""R_acc: whether the answer is right."""

from __future__ import annotations

from tars_fast.learning.rewards.answers import read_answer
from tars_fast.types import Completion, Question


def accuracy(completion: Completion, question: Question) -> float:
    """1 where the answer that can be read from the completion is the reference answer, else 0."""
    return float(question.is_right(read_answer(completion.text, question)))


def unparsed(completion: Completion, question: Question) -> float:
    """1 where no single answer can be read; such a completion has accuracy 0."""
    return float(read_answer(completion.text, question) is None)
