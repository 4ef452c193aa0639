"""Spoken question answering: jsonl files with the recordings beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from tars_fast.types import Question, UserError

ASSETS = Path(__file__).parent / "assets" / "spoken-arithmetic"
TRAINING_DATA = ASSETS / "training.jsonl"
VALIDATION_DATA = ASSETS / "validation.jsonl"
HELD_OUT_DATA = ASSETS / "held_out.jsonl"


def _parse_item(record: object, place: str, folder: Path) -> Question:
    if not isinstance(record, dict):
        raise UserError(f"{place}: {record!r:.80} is not a JSON object; an item is {{id, question, answer, audio, options}}")
    values = {key: record.get(key) for key in ("id", "question", "answer", "audio")}
    texts = {key: str(value).strip() for key, value in values.items() if type(value) in (str, int)}
    empty = [key for key in values if not texts.get(key)]
    item = f"{place}: item {texts['id']!r}" if texts.get("id") else place
    if empty:
        raise UserError(
            f"{item}: {', '.join(map(repr, empty))} missing or empty; an item is id, question, answer, audio, options"
        )
    options, answer_set = record.get("options"), record.get("answer_set")
    if (options is None) == (answer_set is None):
        raise UserError(f"{item}: give 'options' (lettered and shown in the prompt) or 'answer_set' (not shown), one of them")
    listed = options if answer_set is None else answer_set
    if not isinstance(listed, list) or not 2 <= len(listed) <= 26 or not all(isinstance(o, str) and o.strip() for o in listed):
        raise UserError(f"{item}: 'options' or 'answer_set' must list 2 to 26 non-empty texts, not {listed!r:.80}")
    listed = [option.strip() for option in listed]
    # Words said in answer are compared without regard to case, so "Yes" and "yes" would be one.
    folded = [option if len(option) == 1 or answer_set is None else option.casefold() for option in listed]
    twice = sorted({option for option in folded if folded.count(option) > 1})
    if twice:
        raise UserError(f"{item}: {twice[0]!r} is listed twice among the possible answers; remove one")
    if answer_set is None:
        choices = tuple(ascii_uppercase[: len(listed)])
        lettered = (f"{letter}. {option}" for letter, option in zip(choices, listed, strict=True))
        question = "\n".join([texts["question"], *lettered])
    else:
        choices = tuple(listed)
        question = texts["question"]
    if texts["answer"] not in choices:
        raise UserError(f"{item}: answer {texts['answer']!r} is none of {', '.join(choices)}; correct it or the list")
    return Question(texts["id"], question, texts["answer"], choices, folder / texts["audio"])


def load_questions(source: Path) -> list[Question]:
    """Read a jsonl file, or the one jsonl file of a folder.

    Each line: `id`, `question`, `answer`, `audio` (path relative to the file), and either `options` (shown in the prompt as
    lettered lines; `answer` is a letter) or `answer_set` (possible answers, not shown; `answer` is one of them).

    Raises:
        UserError: nothing readable there, a broken line, a duplicate id, an answer out of range.
    """
    if source.is_dir():
        found = sorted(source.glob("*.jsonl"))
        if len(found) != 1:
            raise UserError(f"data {source}: holds {len(found)} jsonl files; name the one to read")
        source = found[0]
    try:
        # Not splitlines(): JSON text may hold U+2028 and its like.
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data {source}: cannot be read ({error}); give a jsonl file or a folder that holds one") from error
    questions: list[Question] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error}); write one object a line") from error
        question = _parse_item(record, place, source.parent)
        if question.id in places:
            raise UserError(f"{place}: id {question.id!r} already stands in line {places[question.id]}; ids must be unique")
        places[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"data {source}: holds no items; write one JSON object a line")
    return questions


def _normalised(question: Question) -> str:
    # Signs stay: "3 + 4" and "3 - 4" are two questions.
    return re.sub(r"[\s.,;:!?\"'()]+", " ", question.text).casefold().strip()


def split_by_id(questions: Sequence[Question], held_out_fraction: float) -> tuple[list[Question], list[Question]]:
    """(training, held-out) by a hash of the id: an item stays on its side whatever is reordered.

    Items that ask the same, as several recordings of one question do, go by the least of their ids, to one side.
    """
    least_ids: dict[str, str] = {}
    for question in questions:
        text = _normalised(question)
        least_ids[text] = min(question.id, least_ids.get(text, question.id))

    def position(question: Question) -> float:
        least = least_ids[_normalised(question)]
        return int.from_bytes(hashlib.sha256(least.encode(errors="surrogatepass")).digest()[:8]) / 2**64

    training = [question for question in questions if position(question) >= held_out_fraction]
    held_out = [question for question in questions if position(question) < held_out_fraction]
    if not training or not held_out:
        raise UserError(f"{len(questions)} items leave nothing to train or to evaluate on; give --eval-data")
    return training, held_out


def check_leaks(training: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Raises UserError where an evaluation item is also a training item, by id or by text, case and punctuation aside."""

    ids = {question.id for question in training}
    texts = {_normalised(question): question.id for question in training}
    for question in held_out:
        if question.id in ids:
            raise UserError(f"item {question.id!r} is in both training and evaluation data; remove it from one")
        if _normalised(question) in texts:
            raise UserError(
                f"evaluation item {question.id!r} asks what training item {texts[_normalised(question)]!r} asks; remove one"
            )


def batch_of_step(num_questions: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which questions step `step` trains on: shuffled epochs laid end to end, a pure function of its arguments.

    Needs no state, so that a resumed run sees what an unbroken one would have seen.
    """
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_questions)
        chosen.append((epoch, place))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_questions) for epoch, _ in chosen}
    return [int(orders[epoch][place]) for epoch, place in chosen]
