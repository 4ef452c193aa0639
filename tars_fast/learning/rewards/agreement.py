"""Agreement of a spoken completion's answer with the written ones of the same question, which needs no reference answer.

CORD (arXiv 2601.16547) judges agreement by a model; here an answer is one of the choices, and the most frequent written one
counts. Shapes: N completions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tars_fast.learning.rewards.answers import read_answer
from tars_fast.types import Completion, Modality, Question


def agreement_rewards(completions: Sequence[Completion], questions: Sequence[Question]) -> Tensor:
    """[N] 1 where a spoken completion names the choice that most written ones of its question name, else 0.

    0 for written completions, where no written one names a choice, and where two choices are named equally often.
    """
    named = [read_answer(c.text, questions[c.question]) for c in completions]
    votes: dict[int, Counter[str]] = {}
    for completion, choice in zip(completions, named, strict=True):
        if completion.modality is Modality.TEXT and choice is not None:
            votes.setdefault(completion.question, Counter())[choice] += 1
    winners = {}
    for question, counter in votes.items():
        (choice, most), *others = counter.most_common(2)
        if not others or others[0][1] < most:
            winners[question] = choice
    return torch.tensor(
        [
            float(c.modality is Modality.SPEECH and choice is not None and winners.get(c.question) == choice)
            for c, choice in zip(completions, named, strict=True)
        ]
    )
