"""Splits by id, and items that are in two of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from tars_fast.data.items import shown_options
from tars_fast.types import Question, UserError


def _normalised(question: Question) -> str:
    """Equal where the same is asked, however the options are lettered and in whatever order."""
    asked, options = shown_options(question)
    # Signs stay: "3 + 4" and "3 - 4" are two questions.
    plain = [re.sub(r"[\s.,;:!?\"'()\u2018\u2019\u201c\u201d]+", " ", part).casefold().strip() for part in (asked, *options)]
    return "\n".join([plain[0], *sorted(plain[1:])])


def _position(item_id: str) -> float:
    """A hash between 0 and 1."""
    return int.from_bytes(hashlib.sha256(item_id.encode(errors="surrogatepass")).digest()[:8]) / 2**64


def choose_by_id(questions: Sequence[Question], count: int | None) -> list[Question]:
    """At most `count` items in their order, chosen by a hash of their ids; None: all."""
    ranked = sorted(range(len(questions)), key=lambda number: _position(questions[number].id))
    return [questions[number] for number in sorted(ranked[:count])]


def split_by_id(questions: Sequence[Question], held_out_fraction: float) -> tuple[list[Question], list[Question]]:
    """(training, held-out) by a hash of the id: an item stays on its side whatever is reordered.

    Items that ask the same, as several recordings of one question do, go by the least of their ids, to one side.
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
        raise UserError(f"{len(questions)} items leave nothing to train or to evaluate on; give --eval-data")
    return training, held_out


_REMEDY = "remove it from one, or leave it out of training with --disjoint-from"


def without_leaks(questions: Sequence[Question], others: Sequence[Question]) -> list[Question]:
    """Those that are not among `others`, by id or by text, case and punctuation aside."""
    ids = {question.id for question in others}
    texts = {_normalised(question) for question in others}
    return [question for question in questions if question.id not in ids and _normalised(question) not in texts]


def check_leaks(training: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Raises UserError where an evaluation item is also a training item, by id or by text, case and punctuation aside."""
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
    """SHA-256 over ids, texts, answers and answer sets, in order, the same on every machine; see `recordings_fingerprint`."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.text, question.answer, question.choices]).encode())
    return digest.hexdigest()
