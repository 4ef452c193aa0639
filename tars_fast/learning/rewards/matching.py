"""Rewards of open answers by rule: exact and numeric match, and a regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tars_fast.learning.rewards.answers import numbers_in, read_answer
from tars_fast.learning.rewards.inputs import RewardInput
from tars_fast.types import Question


def exact_match(completions: list[RewardInput]) -> list[float | None]:
    """1 where what the completion states is an accepted answer but for case, punctuation and articles, else 0.

    None where the item has no accepted answer in words.
    """

    def matches(one: RewardInput) -> float | None:
        question = one.question
        accepted = {question.answer, *question.same_as_answer, *question.answer_text} - {""}
        return float(read_answer(one.text, question) in accepted) if accepted else None

    return [matches(one) for one in completions]


def expected_number(question: Question) -> float | None:
    """The answer as a number, where it is one."""
    if question.answer_number is not None:
        return question.answer_number
    numbers = numbers_in(question.reference)
    return numbers[0] if len(numbers) == 1 else None


@dataclass(frozen=True, eq=False)
class NumericMatch:
    """1 where the one number that a completion states is right within a tolerance, else 0; None for items without a number."""

    tolerance: float
    """Relative to the right number; of 0 absolute."""

    def __call__(self, completions: list[RewardInput]) -> list[float | None]:
        return [self._matches(one) for one in completions]

    def _matches(self, one: RewardInput) -> float | None:
        expected = expected_number(one.question)
        if expected is None:
            return None
        stated = read_answer(one.text, one.question)
        numbers = numbers_in(stated) if stated is not None else []
        allowed = self.tolerance * (abs(expected) or 1.0)
        return float(len(numbers) == 1 and abs(numbers[0] - expected) <= allowed)


@dataclass(frozen=True, eq=False)
class PatternMatch:
    """1 where a regular expression is found in the completion, else 0; `.` takes line ends too."""

    pattern: re.Pattern[str]

    def __call__(self, completions: list[RewardInput]) -> list[float]:
        return [float(self.pattern.search(one.text) is not None) for one in completions]
