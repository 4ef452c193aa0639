"""Shares of several processes by tokens: recordings and completions differ tenfold, and a step lasts as long as the slowest.

Before sampling only prompts are known: each process gets as many questions as the others, of about as many prompt tokens
(`even_shares`). After it the lengths of completions are known: whole questions, with their prompts, completions, references and
rewards, go from processes with more tokens than others to those with fewer, as few as that takes (`balancing_moves`). All
processes work out the same moves, from lengths that they gather. Loss and metrics are sums over all processes, so that it
does not matter which of them trains on a question.

What travels is what sampling has made: token ids, log-probabilities, rewards, and the audio embeddings, which are as large as
the recording is long (5.4 MB for 30 s at the width of a 7B model, in bfloat16). To encode a recording again takes its file, its
features and a pass of the audio tower, and would give other bits than the rollout's where the batch is another. Only where the
tower is trained, and encodes again anyway, the recording is read again. Rewards in background begin where a question ends up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from tars_fast.learning.batch import SampledGroup, SampledQuestion
from tars_fast.learning.workers import Workers
from tars_fast.models.speech_model import PreparedPrompt, SpeechModel
from tars_fast.rollout.encode import prepare_speech
from tars_fast.types import Prompt, Question, TrainingError, UserError

TOLERANCE = 0.02
"""Of the mean: a process with so many tokens above it gives none away; moves would cost more than they save."""
_Numbered = tuple[int, int]
"""Rank of the process that has sampled a question, and the question's place there."""


def even_shares(tokens: Sequence[int], num_shares: int) -> list[list[int]]:
    """Places of `tokens` for each share, in order: as many as can be alike, of tokens as even as longest first makes them.

    In rounds of one question a share, the longest of a round to the share with the fewest tokens (Graham 1969, held to equal
    numbers, because an engine's time goes by the completions in flight first).
    """
    if num_shares == 1:
        return [list(range(len(tokens)))]
    order = sorted(range(len(tokens)), key=lambda place: -tokens[place])
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for start in range(0, len(order), num_shares):
        emptiest = sorted(range(num_shares), key=lambda share: loads[share])
        for place, share in zip(order[start : start + num_shares], emptiest, strict=False):
            shares[share].append(place)
            loads[share] += tokens[place]
    return [sorted(share) for share in shares]


class Move(NamedTuple):
    """A question that another process trains on than has sampled it."""

    source: int
    """Rank of the process that has sampled it."""
    place: int
    """Among the questions of that process."""
    target: int
    """Rank of the process that trains on it."""


def balancing_moves(tokens: Sequence[Sequence[int]]) -> list[Move]:
    """Which questions change the process, so that the largest number of tokens of one process gets small.

    In turn the process with the most tokens gives a question to the one with the fewest, or swaps one with it, such that the
    two come as close together as can be; where none can, to the next one. It ends where the most are within `TOLERANCE` of the
    mean, or can become no fewer. A process that has questions keeps one.

    Args:
        tokens: by rank those of each of the process's questions.
    """
    held = [{(rank, place): count for place, count in enumerate(counts)} for rank, counts in enumerate(tokens)]
    loads = np.array([sum(counts) for counts in tokens])
    enough = (1 + TOLERANCE) * loads.mean()
    while True:
        source = int(loads.argmax())
        if loads[source] <= enough:
            break
        for target in loads.argsort(kind="stable").tolist():
            change = _best_change(held[source], held[target], int(loads[source] - loads[target]))
            if change is not None:
                break
        else:
            break
        given, taken = change
        difference = held[source][given]
        held[target][given] = held[source].pop(given)
        if taken is not None:
            difference -= held[target][taken]
            held[source][taken] = held[target].pop(taken)
        loads[source] -= difference
        loads[target] += difference
    ends = {question: rank for rank, questions in enumerate(held) for question in questions}
    return [Move(*question, rank) for question, rank in sorted(ends.items()) if question[0] != rank]


def _best_change(
    held: Mapping[_Numbered, int], other: Mapping[_Numbered, int], gap: int
) -> tuple[_Numbered, _Numbered | None] | None:
    """(question to give, question to take for it or None) that brings two processes, `gap` tokens apart, closest together; None
    where none does. A swap has to do better than any gift."""
    changes: list[tuple[_Numbered, _Numbered | None, int]] = [(given, None, count) for given, count in held.items()]
    changes += [(given, taken, held[given] - count) for given in held for taken, count in other.items()]
    possible = [change for change in changes if 0 < change[2] < gap]
    if not possible:
        return None
    return min(possible, key=lambda change: abs(change[2] - gap / 2))[:2]


@dataclass(frozen=True)
class _Parcel:
    """A sampled question on its way to another process, which has the item itself."""

    id: str
    written: Prompt
    groups: list[SampledGroup]
    references: list[int | None]


@dataclass(frozen=True)
class QuestionExchange:
    """Moves sampled questions between processes."""

    model: SpeechModel
    questions: Mapping[str, Question]
    """Every item of the run by its id."""
    workers: Workers
    """With a channel for the thread that samples."""

    def __call__(self, sampled: Sequence[SampledQuestion]) -> list[SampledQuestion]:
        """The questions that this process trains on: its own that stay, then others' by rank; waits for all processes."""
        moves = balancing_moves(self.workers.gather([question.num_tokens for question in sampled]))
        if not moves:
            return list(sampled)
        given: dict[int, list[_Parcel]] = {}
        leaving = [move for move in moves if move.source == self.workers.rank]
        for move in leaving:
            given.setdefault(move.target, []).append(self._pack(sampled[move.place]))
        received = self.workers.exchange(given, {(move.source, move.target) for move in moves})
        gone = {move.place for move in leaving}
        staying = [question for place, question in enumerate(sampled) if place not in gone]
        return staying + self._unpack([parcel for _, parcels in sorted(received.items()) for parcel in parcels])

    def _pack(self, sampled: SampledQuestion) -> _Parcel:
        groups = [replace(group, prompt=_on(group.prompt, torch.device("cpu"))) for group in sampled.groups]
        return _Parcel(sampled.question.id, sampled.written, groups, sampled.references)

    def _unpack(self, parcels: Sequence[_Parcel]) -> list[SampledQuestion]:
        questions = [self.questions[parcel.id] for parcel in parcels]
        spoken: list[PreparedPrompt | None] = [None] * len(parcels)
        if self.model.audio_is_trained:
            prepared = prepare_speech(self.model, questions)
            if errors := [prompt for prompt in prepared if isinstance(prompt, UserError)]:
                raise TrainingError(f"another process could read what this one cannot: {errors[0]}")
            spoken = [prompt for prompt in prepared if isinstance(prompt, PreparedPrompt)]
        device = self.model.device
        return [
            SampledQuestion(
                question,
                again,
                parcel.written,
                [replace(group, prompt=_on(group.prompt, device)) for group in parcel.groups],
                parcel.references,
            )
            for question, again, parcel in zip(questions, spoken, parcels, strict=True)
        ]


def _on(prompt: Prompt, device: torch.device) -> Prompt:
    # A view would take the whole of what the audio tower has encoded with it.
    return replace(prompt, audio_clips=tuple(clip.to(device, copy=True) for clip in prompt.audio_clips))
