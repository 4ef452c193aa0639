"""Splits by a hash of the id, leaks (items in both training and evaluation data), and the fingerprint of a set of items."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from tars_fast.data.items import shown_options
from tars_fast.support.text import fold_case
from tars_fast.types import Question, UserError


def _normalised(question: Question) -> str:
    """A text that two items share where they ask the same, whatever the letters and the order of their options."""
    stem, options = shown_options(question)
    # Signs stay: "3 + 4" and "3 - 4" are two questions.
    # What is said before the question, and what the question is about, are part of what is asked.
    around = [turn.text for turn in question.turns] + ([str(question.audio)] if question.about_audio else [])
    plain = [
        re.sub(r"[\s.,;:!?\"'()\u2018\u2019\u201c\u201d]+", " ", fold_case(part)).strip() for part in (stem, *options, *around)
    ]
    return "\n".join([plain[0], *sorted(plain[1:])])


def _position(item_id: str) -> float:
    """A hash between 0 and 1."""
    return int.from_bytes(hashlib.sha256(item_id.encode(errors="surrogatepass")).digest()[:8]) / 2**64


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Leave out items that ask what an earlier one asks, case and punctuation aside."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(_normalised(question), question)
    return list(first.values())


def choose_by_id(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Choose at most `count` items by a hash of their ids, and leave them in their order; None: all."""
    ranked = sorted(range(len(questions)), key=lambda number: _position(questions[number].id))
    return [questions[number] for number in sorted(ranked[:count])]


def split_by_id(
    questions: Sequence[Question], held_out_fraction: float, flag: str = "--eval-data"
) -> tuple[list[Question], list[Question]]:
    """Split items by a hash of the id, so that an item stays on its side whatever is reordered or added.

    Items that ask the same, as several recordings of one question do, go to one side, by the least of their ids.

    Args:
        flag: what else names held-out items, for the message.

    Returns:
        (training, held-out items), each in their order.

    Raises:
        UserError: one of them would be empty.
    """
    least_ids: dict[str, str] = {}
    for question in questions:
        text = _normalised(question)
        least_ids[text] = min(question.id, least_ids.get(text, question.id))

    def position(question: Question) -> float:
        return _position(least_ids[_normalised(question)])

    training = [question for question in questions if position(question) >= held_out_fraction]
    held_out = [question for question in questions if position(question) < held_out_fraction]
    if not training or not held_out:
        raise UserError(f"{len(questions)} items leave nothing to train or to evaluate on; give {flag}")
    return training, held_out


_REMEDY = "remove it from one, or leave it out of training with --disjoint-from"


def without_leaks(questions: Sequence[Question], others: Sequence[Question]) -> list[Question]:
    """Leave out the items that are among `others` too, by id or by text, case and punctuation aside."""
    ids = {question.id for question in others}
    texts = {_normalised(question) for question in others}
    return [question for question in questions if question.id not in ids and _normalised(question) not in texts]


def check_leaks(training: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Raise UserError where an evaluation item is also a training item, by id or by text, case and punctuation aside."""
    ids = {question.id for question in training}
    texts = {_normalised(question): question.id for question in training}
    for question in held_out:
        if question.id in ids:
            raise UserError(f"item {question.id!r} is in both training and evaluation data; {_REMEDY}")
        if _normalised(question) in texts:
            raise UserError(
                f"evaluation item {question.id!r} asks what training item {texts[_normalised(question)]!r} asks; {_REMEDY}"
            )


def data_fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 over ids, texts, answers and earlier turns, in order, the same on every machine; see `recordings_fingerprint`."""
    digest = hashlib.sha256()
    for question in questions:
        parts: list[object] = [question.id, question.text, question.answer, question.choices]
        # Only where there is one, so that the fingerprint of questions with choices stays.
        others = (question.answer_text, question.answer_number, question.rubric, question.instructions)
        said = [(turn.role, turn.text) for turn in question.turns]
        if any(other not in ((), None, "") for other in (*others, said or None)):
            parts += [*others, said]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()
