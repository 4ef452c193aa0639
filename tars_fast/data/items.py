"""Spoken questions from rows of any known format, splits by id, leaks, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from tars_fast.data.sources import Row, read_rows
from tars_fast.types import Question, Recording, UserError

ASSETS = Path(__file__).parents[1] / "assets" / "spoken-arithmetic"
TRAINING_DATA = ASSETS / "training.parquet"
VALIDATION_DATA = ASSETS / "validation.parquet"
HELD_OUT_DATA = ASSETS / "held_out.parquet"
BUNDLED = "pocket"
"""What commands call the bundled data, like the bundled model: to train on the training items, else the held-out ones."""


def or_bundled(source: str | None, bundled: Path) -> str:
    """`source`, or `bundled` where `source` is None or `BUNDLED`."""
    return str(bundled) if source in (None, BUNDLED) else source


@dataclass(frozen=True)
class Format:
    """One way in which questions are written down."""

    columns: Mapping[str, str]
    """Field of an item -> the column that holds it."""
    marks: frozenset[str]
    """Columns by which it is known."""
    id_columns: tuple[str, ...]
    """Their values, joined, are the id; where the data has no such column, the id comes from the content."""
    answers_by_index: bool = False
    """The answer is the place of the right option, counted from 0."""
    lettered: bool = False
    """The question holds its options, on lines that begin with A., B., C."""
    published: bool = True
    """The reader cannot correct it: options that are empty or stand twice are taken as they are."""


OWN = Format(
    {name: name for name in ("question", "answer", "options", "answer_set", "category", "transcript")},
    marks=frozenset({"question", "answer"}),
    id_columns=("id",),
    published=False,
)
VOICEBENCH = Format(
    {"question": "prompt", "answer": "reference", "category": "category", "transcript": "prompt"},
    marks=frozenset({"prompt", "reference"}),
    id_columns=("src", "question_id"),
    lettered=True,
)
TARS = Format(
    {
        "question": "question",
        "answer": "answer_index",
        "options": "options",
        "category": "category",
        "transcript": "prompt_for_tts",
    },
    marks=frozenset({"question", "options", "answer_index"}),
    id_columns=("key",),
    answers_by_index=True,
)
MMLU = Format(
    {"question": "question", "answer": "answer", "options": "choices", "category": "subject", "transcript": "transcript"},
    marks=frozenset({"question", "choices", "answer"}),
    id_columns=("id",),
    answers_by_index=True,
)
FORMATS = (VOICEBENCH, TARS, MMLU, OWN)
"""The first whose marks are all there is taken."""


@dataclass(frozen=True)
class Item:
    """One row of a source, good or bad."""

    place: str
    """What messages call it: source, and line or row."""
    fields: Mapping[str, object]
    """Written as a jsonl line has them, without the recording; empty where there is no question."""
    audio: Recording | None
    question: Question | None
    """None where the row is no item."""
    error: UserError | None
    """What is wrong with it; an item whose id stands twice has this and its question."""
    published: bool
    """In a format that the reader cannot correct."""


@dataclass(frozen=True)
class UsableItem(Item):
    """A row that is an item."""

    question: Question


_INSTRUCTION = re.compile(r"\s*What is the answer to the above multiple choice question\?.*", re.DOTALL)
"""VoiceBench's, behind the options of every item."""
_OPTION = re.compile(r"\s*(?:option\s+)?\(?([A-Za-z])[.:)]+(?:\s+|$)", re.IGNORECASE)
"""`A. `, `(a) `, `Option A: ` at the beginning of a line."""


def split_options(text: str) -> tuple[str, list[str]]:
    """(what is asked, the options lettered under it); no options where there are not at least A and B.

    The last lines that count A, B, C are the options: statements numbered I., II. and earlier lists stay in the question.
    """
    lines = _INSTRUCTION.sub("", text).split("\n")
    lists: list[list[int]] = []
    for number, line in enumerate(lines):
        found = _OPTION.match(line)
        letter = found[1].upper() if found else ""
        if letter == "A":
            lists.append([number])
        elif lists and letter == ascii_uppercase[len(lists[-1]) % 26]:
            lists[-1].append(number)
    lists = [starts for starts in lists if len(starts) > 1]
    if not lists:
        return "\n".join(lines).strip(), []
    starts = lists[-1]
    options = ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return "\n".join(lines[: starts[0]]).strip(), [_OPTION.sub("", option, count=1).strip() for option in options]


def shown_options(question: Question) -> tuple[str, list[str]]:
    """As `split_options`; lettered lines that are not what is answered belong to what is asked."""
    asked, options = split_options(question.text)
    if set(question.choices) in (set(ascii_uppercase[: len(options)]), set(options)):
        return asked, options
    return question.text, []


def _parse_row(row: Row, kind: Format, spoken: bool, copies: Counter[str]) -> tuple[dict[str, object], Question]:
    """Its fields as a jsonl line has them, and the question they are.

    `copies` counts the rows of the same content that have no id of their own.

    Raises:
        UserError: the first thing that is wrong with it.
    """
    if row.error is not None:
        raise row.error
    if not isinstance(row.values, dict):
        raise UserError(
            f"{row.place}: {row.values!r:.80} is not a JSON object; an item is {{id, question, answer, audio, options}}"
        )
    values = {name: row.values.get(column) for name, column in kind.columns.items()}
    ids = [row.values[column] for column in kind.id_columns if column in row.values]
    has_id = len(ids) == len(kind.id_columns)
    if has_id:
        values["id"] = ids[0] if len(ids) == 1 else "_".join(map(str, ids))
    texts = {name: str(value).strip() for name, value in values.items() if type(value) in (str, int)}
    item = f"{row.place}: item {texts['id']!r}" if texts.get("id") else row.place
    needed = {"id": kind.id_columns[0]} if has_id else {}
    needed |= {name: kind.columns[name] for name in ("question", "answer")}
    empty = [column for name, column in needed.items() if not texts.get(name)]
    if spoken and row.audio is None:
        empty.append("audio")
    if empty:
        raise UserError(
            f"{item}: {', '.join(map(repr, empty))} missing or empty; an item is id, question, answer, audio, options"
        )
    for name in ("category", "transcript"):
        if values[name] is not None and name not in texts:
            raise UserError(f"{item}: {kind.columns[name]!r} must be a text, not {values[name]!r:.80}")
    listed, shown = _possible_answers(values, kind, item)
    choices = tuple(ascii_uppercase[: len(listed)] if shown else listed)
    answer = texts["answer"]
    if kind.answers_by_index:
        letters = {str(index): letter for index, letter in enumerate(choices)}
        if answer not in letters:
            raise UserError(
                f"{item}: {kind.columns['answer']!r} is {answer}, not 0 to {len(choices) - 1}, the place of the right option "
                "counted from 0"
            )
        answer = letters[answer]
    if answer not in choices:
        by_option = dict(zip(listed, choices, strict=True)) if shown else {}
        remedy = f"give its letter, {by_option[answer]!r}" if answer in by_option else "correct it or the list"
        raise UserError(f"{item}: answer {answer!r} is none of {', '.join(choices)}; {remedy}")
    lettered = [f"{letter}. {option}".rstrip() for letter, option in zip(choices, listed, strict=True)] if shown else []
    text = "\n".join([texts["question"], *lettered])
    if not has_id:
        content = hashlib.sha256(json.dumps([text, choices, answer]).encode()).hexdigest()[:16]
        copies[content] += 1
        texts["id"] = content if copies[content] == 1 else f"{content}-{copies[content]}"
    category = texts.get("category") or row.split
    transcript = texts.get("transcript") or None
    # Published options that are empty or stand twice would be refused as one's own; inside the question they are not.
    apart = shown and all(listed) and len(set(listed)) == len(listed)
    fields: dict[str, object] = {"id": texts["id"]}
    fields |= {"question": texts["question"], "options": listed} if apart else {"question": text, "answer_set": list(choices)}
    fields |= {"answer": answer} | ({"category": category} if category else {})
    return fields, Question(texts["id"], text, answer, choices, row.audio if spoken else None, category, transcript)


def _possible_answers(values: Mapping[str, object], kind: Format, item: str) -> tuple[list[str], bool]:
    """(the answers, whether they are options still to be lettered and shown)."""
    if kind.lettered:
        letters = list(ascii_uppercase[: len(split_options(str(values["question"]))[1])])
        if not letters:
            raise UserError(
                f"{item}: {kind.columns['question']!r} holds no options (lines that begin with A., B., ...); only answers that "
                "are given can be scored"
            )
        return letters, False
    options, answer_set = values["options"], values.get("answer_set")
    if (options is None) == (answer_set is None):
        raise UserError(f"{item}: give 'options' (lettered and shown in the prompt) or 'answer_set' (not shown), one of them")
    listed = options if answer_set is None else answer_set
    if (
        not isinstance(listed, list)
        or not 2 <= len(listed) <= 26
        or not all(isinstance(option, str) and (option.strip() or kind.published) for option in listed)
    ):
        raise UserError(f"{item}: 'options' or 'answer_set' must list 2 to 26 non-empty texts, not {listed!r:.80}")
    listed = [option.strip() for option in listed]
    # Words said in answer are compared without regard to case, so "Yes" and "yes" would be one.
    folded = [option if len(option) == 1 or answer_set is None else option.casefold() for option in listed]
    twice = sorted({option for option in folded if folded.count(option) > 1})
    if twice and not kind.published:
        raise UserError(f"{item}: {twice[0]!r} is listed twice among the possible answers; remove one")
    return listed, answer_set is None


def read_items(source: str | Path, *, spoken: bool = True) -> Iterator[Item]:
    """Every row of a source, good or bad.

    Args:
        source: see `load_questions`.
        spoken: items need a recording; otherwise recordings are left out.

    Raises:
        UserError: nothing readable there, or it does not say which split it means.
    """
    first: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for row in read_rows(str(source)):
        columns = row.values if isinstance(row.values, dict) else {}
        kind = next((kind for kind in FORMATS if kind.marks <= columns.keys()), OWN)
        try:
            fields, question = _parse_row(row, kind, spoken, copies)
        except UserError as error:
            yield Item(row.place, {}, row.audio, None, error, kind.published)
            continue
        if question.id in first:
            repeated = UserError(f"{row.place}: id {question.id!r} already stands in {first[question.id]}; ids must be unique")
            yield Item(row.place, fields, row.audio, question, repeated, kind.published)
        else:
            first[question.id] = row.where
            yield UsableItem(row.place, fields, row.audio, question, None, kind.published)


def load_questions(source: str | Path, *, spoken: bool = True) -> list[Question]:
    """Read items from wherever they are.

    Args:
        source: a jsonl file or a folder with one, whose lines are `id`, `question`, `answer`, `audio` (path relative to the
            file), either `options` (shown in the prompt as lettered lines; `answer` is a letter) or `answer_set` (possible
            answers, not shown; `answer` is one of them), and optionally `category` and `transcript`; a parquet file, a folder
            of them, a folder written by `save_to_disk`, or a dataset of the hub, `owner/name[:configuration]`, in any of
            `FORMATS`, the last three with `@split` behind them where one of several is meant; or `mmsu`, `obqa`.
        spoken: items need a recording; otherwise recordings are left out.

    Raises:
        UserError: nothing readable there, or the first row that is no item.
    """
    questions = []
    for item in read_items(source, spoken=spoken):
        if isinstance(item, UsableItem):
            questions.append(item.question)
        elif item.error is not None:
            raise item.error
    if not questions:
        raise _no_items(source)
    return questions


def _no_items(source: str | Path) -> UserError:
    return UserError(f"data {source}: holds no items; an item is id, question, answer, audio, options")


def read_usable(source: str | Path, *, spoken: bool = True) -> tuple[list[UsableItem], str | None]:
    """(items, what to say of rows that were left out): published data, which nobody can correct, go on without bad rows.

    For training and for speaking only: an evaluation that left items out would be another one.

    Args:
        source: see `load_questions`.
        spoken: items need a recording; otherwise recordings are left out.

    Raises:
        UserError: nothing usable there, or the first bad row of one's own format.
    """
    usable: list[UsableItem] = []
    errors: list[UserError] = []
    for item in read_items(source, spoken=spoken):
        if isinstance(item, UsableItem):
            usable.append(item)
        elif item.error is not None:
            if not item.published:
                raise item.error
            errors.append(item.error)
    if not usable:
        raise errors[0] if errors else _no_items(source)
    total = len(usable) + len(errors)
    return usable, f"data {source}: {len(errors)} of {total} rows left out, the first: {errors[0]}" if errors else None
