"""Agreement of a spoken completion's answer with the written ones of the same question, which needs no reference answer.

CORD (arXiv 2601.16547) judges agreement by a model; here an answer is one of the choices, and the most frequent written one
counts.
"""

from __future__ import annotations

from collections import Counter

from tars_fast.learning.rewards.answers import read_answer
from tars_fast.learning.rewards.inputs import RewardInput
from tars_fast.types import Modality


def agreement(completions: list[RewardInput]) -> list[float | None]:
    """1 where a spoken completion names the choice that most written ones of its question name, else 0.

    0 where no written one names a choice, and where two choices are named equally often. None for written completions.
    """
    named = {one: read_answer(one.text, one.question) for one in completions}

    def agrees(one: RewardInput) -> bool:
        if named[one] is None:
            return False
        votes = Counter(named[other] for other in one.others if other.modality is Modality.TEXT)
        del votes[None]
        ranked = votes.most_common(2)
        return bool(ranked) and ranked[0][0] == named[one] and (len(ranked) == 1 or ranked[1][1] < ranked[0][1])

    return [float(agrees(one)) if one.modality is Modality.SPEECH else None for one in completions]
