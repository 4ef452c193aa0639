"""What the policy writes in a step: a few of its completions, spoken beside written, with their rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tars_fast.learning.scored import ScoredRollout
from tars_fast.types import Modality

SAMPLES = "samples.jsonl"
NUM_QUESTIONS = 3
"""Of a step; the first ones of its batch, which is in random order."""


def choose_samples(scored: ScoredRollout, step: int) -> Iterator[dict[str, Any]]:
    """Lines of samples.jsonl: `step`, `id`, `question`, `answer`, and `speech` and `text`, None where nothing was sampled.

    Both hold `completion`, `truncated`, `reward` (R), `rewards` by name and `advantage`; what does not apply is left out. The
    written completion is the one that the spoken one was compared with, where there is one.

    Args:
        scored: a rollout after its updates.
        step: counts from 1.
    """
    completions, references = scored.rollout.completions, scored.rollout.references
    for number, question in enumerate(scored.rollout.questions[:NUM_QUESTIONS]):
        rows: dict[Modality, int] = {}
        for row, completion in enumerate(completions):
            if completion.question == number:
                rows.setdefault(completion.modality, row)
        reference = references[rows[Modality.SPEECH]]
        if reference is not None:
            rows[Modality.TEXT] = reference
        parts = {str(m): _describe(scored, rows[m]) if m in rows else None for m in Modality}
        yield {"step": step, "id": question.id, "question": question.text, "answer": question.reference, **parts}


def _describe(scored: ScoredRollout, row: int) -> dict[str, Any]:
    completion = scored.rollout.completions[row]
    rewards = {name: values_N[row].item() for name, values_N in scored.terms.items()}
    figures = {"reward": scored.rewards_N[row].item(), "advantage": scored.advantages_N[row].item()}
    known = {name: value for name, value in figures.items() if math.isfinite(value)}
    rewards = {name: value for name, value in rewards.items() if math.isfinite(value)}
    return {"completion": completion.text, "truncated": completion.truncated, **known, "rewards": rewards}
