"""The written completion that a spoken one is compared with, by R_rep and by R_beh."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from tars_fast.types import Completion, Modality


def choose_references(completions: Sequence[Completion], accuracy_N: Tensor, rng: random.Random) -> list[int | None]:
    """For each speech completion a *correct* text completion of the *same question*, drawn at random.

    Returns:
        N entries, indices into `completions`; None for text completions, for truncated speech completions, and where no
        finished text completion of the question is correct.
    """
    correct: dict[int, list[int]] = {}
    for index, completion in enumerate(completions):
        if completion.modality is Modality.TEXT and accuracy_N[index] == 1 and not completion.truncated:
            correct.setdefault(completion.question, []).append(index)

    def choose(completion: Completion) -> int | None:
        if completion.modality is not Modality.SPEECH or completion.truncated or completion.question not in correct:
            return None
        return rng.choice(correct[completion.question])

    return [choose(completion) for completion in completions]
