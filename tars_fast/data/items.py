"""Rows of any known format become items: a question with its answers and its recording, or what is wrong with the row."""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from tars_fast.data.formats import RULES, Format, is_nothing, nearest_format, unanswered_format
from tars_fast.data.sources import NO_TEXT, Row, read_rows
from tars_fast.support.text import fold_answer
from tars_fast.types import Question, Recording, Turn, UserError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"pocket": ASSETS / "spoken-arithmetic", "pocket-hard": ASSETS / "spoken-arithmetic-hard"}
"""Folders of the bundled data by their name on the command line, which is that of the model that learns them. `train --data`
takes the training items, `--eval-data`, `evaluate` and `analyse` take the held-out ones, all take `NAME@PART`."""
_PARTS = ("training", "validation", "held_out", "held_out_neural")
"""The last has the held-out questions in a neural voice; pocket alone has it."""
TRAINING_DATA, VALIDATION_DATA, HELD_OUT_DATA = (BUNDLED["pocket"] / f"{part}.parquet" for part in _PARTS[:3])


def bundled_name(source: str | Path | None) -> str | None:
    """The name of the bundled data that `source` names, None where it names other data or none."""
    name = str(source or "").partition("@")[0]
    return name if name in BUNDLED else None


def or_bundled(source: str | Path | None, part: Literal["training", "validation", "held_out"], default: str = "pocket") -> str:
    """`source`, or the file of the bundled data that it names.

    Args:
        part: of bundled data that are named without one.
        default: name of the bundled data that are meant where `source` is None.

    Raises:
        UserError: the bundled data have no such part.
    """
    source = str(source or default)
    name = bundled_name(source)
    if name is None:
        return source
    split = source.partition("@")[2] or part
    paths = {part: path for part in _PARTS if (path := BUNDLED[name] / f"{part}.parquet").is_file()}
    if split not in paths:
        raise UserError(f"data {source}: has no split {split!r}; it has {', '.join(paths)}")
    return str(paths[split])


@dataclass(frozen=True)
class Item:
    """One row of a source, good or bad."""

    place: str
    """What messages call it: source, and line or row."""
    fields: Mapping[str, object]
    """The columns of a jsonl line, without the recording; empty where there is no question."""
    audio: Recording | None
    question: Question | None
    """None where the row cannot be read as one."""
    error: UserError | None
    """What is wrong with the row; an item whose id stands twice has an error and a question."""
    published: bool
    """See `Format.published`."""


@dataclass(frozen=True)
class UsableItem(Item):
    """A row that can be used: it has a question, and no error."""

    question: Question


_MOST_ANSWERS = 1000
"""Of an `answer_set`: all of them stand in one pattern that completions are searched with. Options end with the letters."""
_INSTRUCTION = re.compile(r"\s*What is the answer to the above multiple choice question\?.*", re.DOTALL)
"""What VoiceBench writes behind the options of every item."""
_OPTION = re.compile(r"\s*(?:option\s+)?\(?([A-Za-z])[.:)]+(?:\s+|$)", re.IGNORECASE)
"""`A. `, `(a) `, `Option A: ` at the beginning of a line."""


def split_options(text: str) -> tuple[str, list[str]]:
    """Take a question apart whose options stand under it on lines that begin with A., B., C.

    The last such list is the options: statements numbered I., II. and earlier lists stay in the question.

    Returns:
        (the question without its options, the options without their letters); no options where there are not at least two.
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
    """As `split_options`, but lettered lines are options only where the answers are their letters or their texts."""
    stem, options = split_options(question.text)
    if set(question.choices) in (set(ascii_uppercase[: len(options)]), set(options)):
        return stem, options
    return question.text, []


@dataclass(frozen=True)
class _Columns:
    """The values of a row under the names of an item's fields."""

    row: str
    """What messages call the row: its place, and its id where it has one."""
    format: Format
    values: Mapping[str, object]
    texts: Mapping[str, str]
    """Those of `values` that are texts or whole numbers, as texts without spaces around them."""
    has_id: bool
    """False where the row lacks a column of the id, which is then a hash of the content."""


@dataclass(frozen=True)
class _Answers:
    """The possible answers of an item."""

    listed: list[str]
    """As the row lists them."""
    are_options: bool
    """They are lettered, and the letters are the answers; else they are the answers."""
    are_shown: bool = False
    """The question itself holds them."""

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(self.listed)] if self.are_options else self.listed)

    def lettered(self) -> list[str]:
        """The lines under the question."""
        pairs = zip(self.choices, self.listed, strict=True) if self.are_options and not self.are_shown else ()
        return [f"{letter}. {option}".rstrip() for letter, option in pairs]


def _parse_row(
    row: Row, format: Format, spoken: bool, answered: bool, copies: Counter[str]
) -> tuple[dict[str, object], Question]:
    """Make an item of a row.

    Args:
        spoken: it needs a recording; otherwise its recording is left out.
        answered: it needs an answer.
        copies: number of rows so far for each hash of a content that is an id.

    Returns:
        (`Item.fields`, the question).

    Raises:
        UserError: the first thing that is wrong with the row.
    """
    columns = _read_columns(row, format)
    open_answer = _open_answer(columns, row)
    _check_columns(columns, row if spoken else None, answered and not open_answer.is_gradable)
    if open_answer.is_gradable or not (answered or _lists_answers(columns)):
        answers = _Answers([], are_options=False)
    else:
        answers = _possible_answers(columns)
    answer = _right_answer(columns, answers) if columns.texts.get("answer") and answers.listed else ""
    text = "\n".join([columns.texts["question"], *answers.lettered()])
    turns = _turns(columns, row, spoken=spoken)
    content: list[object] = [text, answers.choices, answer, *([open_answer.accepted] if open_answer.accepted else [])]
    question = Question(
        id=columns.texts["id"] if columns.has_id else _id_of_content(content, copies),
        text=text,
        answer=answer,
        choices=answers.choices,
        audio=row.audio if spoken else None,
        category=columns.texts.get("category") or row.split,
        transcript=columns.texts.get("transcript") or None,
        answer_text=open_answer.accepted,
        answer_number=open_answer.number,
        rubric=open_answer.rubric,
        rule=open_answer.rule,
        instructions=open_answer.instructions,
        turns=turns,
        about_audio=spoken and _about_audio(columns),
    )
    question = dataclasses.replace(question, same_as_answer=_same_as_answer(question))
    return _fields(columns, answers, question), question


@dataclass(frozen=True)
class _OpenAnswer:
    """What grades completions of a question without choices."""

    accepted: tuple[str, ...] = ()
    number: float | None = None
    rubric: str = ""
    rule: str = ""
    instructions: tuple[tuple[str, str], ...] = ()

    @property
    def is_gradable(self) -> bool:
        return bool(self.accepted or self.rubric or self.rule not in ("", "bbh")) or self.number is not None


def _open_answer(columns: _Columns, row: Row) -> _OpenAnswer:
    """Raises UserError where one of its fields is none, or stands beside possible answers."""
    values, format = columns.values, columns.format
    rule = columns.texts.get("rule", "")
    if rule not in ("", *RULES):
        raise UserError(f"{columns.row}: 'rule' is {rule!r:.80}, none of {', '.join(RULES)}; correct it")
    if not rule and format.name.startswith("VoiceBench") and re.search(r"\badvbench\b", row.source):
        # Its columns are those of other open questions.
        rule = "refusal"
    accepted = values.get("answer_text")
    shown = columns.texts.get("answer", "")
    if format.open_answers and len(shown) > 1 and values.get("answer_set") is None:
        accepted = None if split_options(columns.texts.get("question", ""))[1] else shown
    listed = accepted if isinstance(accepted, list) else [] if accepted is None else [accepted]
    texts = [_as_text(one) for one in listed]
    if not all(texts) or (isinstance(accepted, list) and not accepted):
        raise UserError(f"{columns.row}: 'answer_text' must be a text or a list of texts, not {accepted!r:.80}")
    rubric = values.get("rubric")
    if rubric is not None and not (isinstance(rubric, str) and rubric.strip()):
        raise UserError(f"{columns.row}: 'rubric' must be a text, not {rubric!r:.80} ({type(rubric).__name__})")
    number = _number(columns)
    found = _OpenAnswer(
        tuple(text for text in texts if text),
        number,
        (rubric or "").strip(),
        rule,
        _instructions(columns),
    )
    beside = next((name for name in ("options", "answer_set") if values.get(name) is not None), None)
    if found.is_gradable and beside is not None and not format.published:
        raise UserError(f"{columns.row}: has {beside!r} and an answer in words, a number or a rubric; leave one of the two out")
    return found if beside is None or rule == "bbh" else _OpenAnswer()


def _instructions(columns: _Columns) -> tuple[tuple[str, str], ...]:
    listed = columns.values.get("instructions")
    pairs: Any = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    try:
        found = tuple((name, arguments) for name, arguments in pairs)
        are_right = all(isinstance(name, str) and isinstance(json.loads(arguments), dict) for name, arguments in found)
    except (TypeError, ValueError):
        are_right = False
    if not are_right:
        raise UserError(f"{columns.row}: 'instructions' must list [name, arguments as a JSON object], not {listed!r:.80}")
    return found


def _number(columns: _Columns) -> float | None:
    value = columns.values.get("answer_number")
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{columns.row}: 'answer_number' must be a number, not {value!r:.80} ({type(value).__name__})")
    return number


def _about_audio(columns: _Columns) -> bool:
    value = columns.values.get("about_audio")
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{columns.row}: 'about_audio' must be true or false, not {value!r:.80}")
    return columns.format.about_audio or bool(value)


def _turns(columns: _Columns, row: Row, *, spoken: bool) -> tuple[Turn, ...]:
    """The conversation before the question. Raises UserError where an entry is no turn."""
    listed = columns.values.get("turns")
    if listed is None:
        return ()
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise UserError(f"{columns.row}: 'turns' must list {{role, text, audio}}, not {listed!r:.80}")
    if spoken and row.turn_fault is not None:
        raise UserError(f"{columns.row}: {row.turn_fault}")
    turns: list[Turn] = []
    for number, turn in enumerate(listed, start=1):
        name = f"{columns.row}: turn {number}"
        role, text = turn.get("role"), _as_text(turn.get("text"))
        if role not in ("user", "assistant"):
            raise UserError(f"{name}: 'role' must be user or assistant, not {role!r:.80}")
        if not text or NO_TEXT.search(text):
            raise UserError(f"{name}: has no 'text', which the written prompt needs; give what is said in it")
        recordings = row.turn_audio[number - 1] if spoken and row.turn_audio else ()
        if recordings and role != "user":
            raise UserError(f"{name}: has a recording, and is the model's own; give its text alone")
        turns.append(Turn(role, text, recordings))
    return tuple(turns)


def _same_as_answer(question: Question) -> tuple[str, ...]:
    """See `Question.same_as_answer`."""
    options = shown_options(question)[1]
    if not question.answer or question.answer not in ascii_uppercase[: len(options)]:
        return ()
    right = options[ascii_uppercase.index(question.answer)]
    same = (letter for letter, option in zip(ascii_uppercase, options, strict=False) if option == right)
    return tuple(letter for letter in same if letter != question.answer)


def _without_nan(value: object) -> object:
    return None if is_nothing(value) else value


def _as_text(value: object) -> str | None:
    """A text, or a whole number as one; None of anything else."""
    if isinstance(value, float) and value.is_integer():
        # pandas makes floats of a column of integers where a row has none.
        value = int(value)
    return str(value).strip() if type(value) in (str, int) else None


def _read_columns(row: Row, format: Format) -> _Columns:
    if row.error is not None:
        raise row.error
    if not isinstance(row.values, dict):
        raise UserError(
            f"{row.place}: {row.values!r:.80} is not a JSON object; an item is {{id, question, answer, audio, options}}"
        )
    held = row.values
    if format.unpack is not None:
        try:
            held = held | format.unpack(held)
        except ValueError as error:
            raise UserError(f"{row.place}: {error}; see the formats in docs/data.md") from error
    values = {name: _without_nan(held.get(column)) for name, column in format.columns.items()}
    if isinstance(values["answer"], list) and len(values["answer"]) == 1:
        values["answer"] = values["answer"][0]
    ids = [_without_nan(held[column]) for column in format.id_columns if column in held]
    has_id = len(ids) == len(format.id_columns)
    if has_id:
        values["id"] = ids[0] if len(ids) == 1 else "_".join(_as_text(value) or str(value) for value in ids)
    texts = {name: text for name, value in values.items() if (text := _as_text(value)) is not None}
    name = f"{row.place}: item {texts['id']!r:.80}" if texts.get("id") else row.place
    for field, value in values.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and (found := NO_TEXT.search(part)):
                column = format.columns.get(field, format.id_columns[0])
                raise UserError(f"{name}: {column!r} holds {found[0]!r}, which no text can hold; correct it")
    return _Columns(name, format, values, texts, has_id)


def _check_columns(columns: _Columns, spoken: Row | None, answered: bool) -> None:
    """Raises UserError where a field that every item needs is missing, or one that it may have is no text.

    Args:
        spoken: the row of an item that needs a recording.
        answered: it needs an answer.
    """
    names = columns.format.columns
    needed = {"id": columns.format.id_columns[0]} if columns.has_id else {}
    needed |= {name: names[name] for name in ("question", "answer")}
    for name, column in (needed | {name: names[name] for name in ("category", "transcript") if name in names}).items():
        value = columns.values[name]
        if value is not None and name not in columns.texts:
            raise UserError(f"{columns.row}: {column!r} must be a text, not {value!r:.80} ({type(value).__name__})")
    if spoken is not None and spoken.audio_fault is not None:
        raise UserError(f"{columns.row}: the recording in {spoken.audio_column!r} {spoken.audio_fault}")
    if not answered:
        del needed["answer"]
        if not columns.texts.get("question") and not columns.texts.get("answer"):
            raise UserError(
                f"{columns.row}: has neither a question nor a transcript to be its written prompt; give 'question', or what "
                "the recording says as 'transcript'"
            )
    empty = [column for name, column in needed.items() if not columns.texts.get(name)]
    if spoken is not None and spoken.audio is None:
        empty.append(columns.format.audio)
    if empty:
        raise UserError(
            f"{columns.row}: {', '.join(map(repr, empty))} missing or empty; an item is id, question, answer, audio, options"
        )


def _lists_answers(columns: _Columns) -> bool:
    """Whether an item that needs no answer has possible ones; an open question, which may have an answer, has none."""
    if columns.format.lettered and columns.values.get("answer_set") is None:
        return bool(split_options(columns.texts["question"])[1])
    listed = (columns.values.get("options"), columns.values.get("answer_set"))
    return bool(columns.texts.get("answer")) or any(value is not None for value in listed)


def _possible_answers(columns: _Columns) -> _Answers:
    format = columns.format
    if format.lettered and columns.values.get("answer_set") is None:
        shown = split_options(columns.texts["question"])[1]
        if not shown:
            raise UserError(
                f"{columns.row}: {format.columns['question']!r} holds no options (lines that begin with A., B., ...); only "
                "answers that are given can be scored"
            )
        return _Answers(shown[: len(ascii_uppercase)], are_options=True, are_shown=True)
    options, answer_set = columns.values.get("options"), columns.values.get("answer_set")
    if "answer_set" not in format.columns and options is None:
        raise UserError(f"{columns.row}: {format.columns['options']!r} missing or empty; {format.name} has the options there")
    if (options is None) == (answer_set is None):
        raise UserError(
            f"{columns.row}: give 'options' (lettered and shown in the prompt) or 'answer_set' (not shown), one of them"
        )
    listed = options if answer_set is None else answer_set
    if format.published and isinstance(listed, str):
        listed = _written_list(listed)
    if format.published and isinstance(listed, list):
        listed = [option if (text := _as_text(option)) is None else text for option in listed]
    most = len(ascii_uppercase) if answer_set is None else _MOST_ANSWERS
    if (
        not isinstance(listed, list)
        or not 2 <= len(listed) <= most
        or not all(isinstance(option, str) and (option.strip() or format.published) for option in listed)
    ):
        column = format.columns["options"] if answer_set is None else "answer_set"
        raise UserError(f"{columns.row}: {column!r} must list 2 to {most} non-empty texts, not {listed!r:.80}")
    listed = [option.strip() for option in listed]
    # Words said in answer are compared without regard to case, so "Yes" and "yes" would be one.
    folded = [option if answer_set is None else fold_answer(option) for option in listed]
    twice = sorted(option for option, times in Counter(folded).items() if times > 1)
    if twice and not format.published:
        raise UserError(f"{columns.row}: {twice[0]!r:.80} is listed twice among the possible answers; remove one")
    return _Answers(listed, are_options=answer_set is None)


def _written_list(text: str) -> object:
    """What Python's or JSON's text of a list says; the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


_STATED = re.compile(
    r"(?:.*\banswer(?: is|:))?\s*(?:option\s+)?[(\[]?(?P<letter>[A-Z])[)\]]?\s*(?:[.:)]\s*(?P<text>.*))?",
    re.IGNORECASE | re.DOTALL,
)
"""`B`, `(B)`, `B. blood`, `The answer is B.`"""
_BLOCK = re.compile(r".*<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


def _stated_letter(answer: str, answers: _Answers) -> str | None:
    """The letter that a written-out answer means, as an assistant's turn has it."""
    block = _BLOCK.match(answer)
    stated = (block[1] if block else answer.rpartition("</think>")[2]).strip()
    by_text = dict(zip(answers.listed[::-1], answers.choices[::-1], strict=True))
    if stated in answers.choices or stated in by_text:
        return stated if stated in answers.choices else by_text[stated]
    found = _STATED.fullmatch(stated)
    letter = found["letter"].upper() if found else ""
    if found is None or letter not in answers.choices:
        return None
    text = (found["text"] or "").strip()
    return letter if not text or text.rstrip(".") == answers.listed[answers.choices.index(letter)].rstrip(".") else None


def _right_answer(columns: _Columns, answers: _Answers) -> str:
    """One of `answers.choices`."""
    answer, format = columns.texts["answer"], columns.format
    # Where options stand twice, the first of them.
    by_text = dict(zip(answers.listed[::-1], answers.choices[::-1], strict=True)) if answers.are_options else {}
    by_index = {str(index): letter for index, letter in enumerate(answers.choices)} if format.answers_by_index else {}
    letters = {choice: choice for choice in answers.choices}
    # A number is a place, a text that is an option's is that option; so "2" of the options 1, 2 and 3 is no place.
    if isinstance(columns.values["answer"], str):
        found = (by_text | letters if not format.answers_by_index else by_index | letters | by_text).get(answer)
    else:
        found = (by_text | letters | by_index).get(answer)
    if found is None and answers.are_options and format.published | format.lettered:
        found = _stated_letter(answer, answers)
    if found is not None:
        return found
    if by_index and answer.lstrip("-").isdecimal():
        raise UserError(
            f"{columns.row}: {format.columns['answer']!r} is {columns.values['answer']!r:.80}, not 0 to "
            f"{len(answers.choices) - 1}, the place of the right option counted from 0"
        )
    raise UserError(
        f"{columns.row}: answer {answer!r:.80} is none of {', '.join(answers.choices):.300}; correct it or the list"
    )


def _id_of_content(parts: list[object], copies: Counter[str]) -> str:
    content = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    copies[content] += 1
    return content if copies[content] == 1 else f"{content}-{copies[content]}"


def _fields(columns: _Columns, answers: _Answers, question: Question) -> dict[str, object]:
    """See `Item.fields`."""
    listed = answers.listed
    # Options that are empty or stand twice are accepted of published data only; inside the question they are accepted anywhere.
    apart = answers.are_options and not answers.are_shown and all(listed) and len(set(listed)) == len(listed)
    fields: dict[str, object] = {"id": question.id, "question": question.text}
    if apart:
        fields |= {"question": columns.texts["question"], "options": listed}
    elif question.choices:
        fields["answer_set"] = list(question.choices)
    known: dict[str, object] = {"answer": question.answer, "category": question.category}
    known |= {"answer_text": list(question.answer_text), "rubric": question.rubric}
    known |= {"rule": question.rule, "instructions": question.instructions}
    known |= {"turns": [_turn_fields(turn) for turn in question.turns], "about_audio": question.about_audio}
    fields |= {name: value for name, value in known.items() if value}
    return fields if question.answer_number is None else fields | {"answer_number": question.answer_number}


def _turn_fields(turn: Turn) -> dict[str, object]:
    """A turn as a jsonl line has it; a recording that is no file by itself is written out."""
    audio = [
        str(recording.resolve())
        if isinstance(recording, Path)
        else f"data:audio/wav;base64,{base64.b64encode(recording.read_bytes()).decode()}"
        for recording in turn.recordings
    ]
    return {"role": turn.role, "text": turn.text} | ({"audio": audio} if audio else {})


def read_items(source: str | Path, *, spoken: bool = True, answered: bool = True) -> Iterator[Item]:
    """Read every row of a source, good or bad.

    Args:
        source: see `load_questions`.
        spoken: items need a recording; otherwise recordings are left out.
        answered: items need an answer; otherwise also questions without one, and recordings with a transcript alone, are good.

    Raises:
        UserError: there is nothing to read, or `source` does not say which split it means.
    """
    first: dict[str, str] = {}
    copies: Counter[str] = Counter()
    for row in read_rows(str(source)):
        columns = row.values if isinstance(row.values, dict) else {}
        unanswered = None if answered else unanswered_format(columns)
        format, lacking = nearest_format(columns) if unanswered is None else (unanswered, [])
        try:
            if lacking:
                missing = ", ".join(map(repr, lacking))
                raise UserError(f"{row.place}: fits no format; {format.name} is nearest, of which it lacks {missing}")
            fields, question = _parse_row(row, format, spoken, answered, copies)
        except UserError as error:
            yield Item(row.place, {}, row.audio, None, error, format.published)
            continue
        if question.id in first:
            repeated = UserError(
                f"{row.place}: id {question.id!r:.80} already stands in {first[question.id]}; ids must be unique"
            )
            yield Item(row.place, fields, row.audio, question, repeated, format.published)
        else:
            first[question.id] = row.where
            yield UsableItem(row.place, fields, row.audio, question, None, format.published)


def load_questions(source: str | Path, *, spoken: bool = True, answered: bool = True) -> list[Question]:
    """Read the items of a source, all of which must be good.

    Args:
        source: a jsonl file or a folder with one, whose lines are `id`, `question`, `answer`, `audio` (see `take_recording`;
            paths are relative to the file), either `options` (shown in the prompt as lettered lines; `answer` is a letter or
            an option's text) or `answer_set` (possible answers, not shown; `answer` is one of them), or in the place of these
            `answer_text`, `answer_number` or `rubric`, and optionally `turns`, `category` and `transcript`; a json file that is
            one list; a parquet file, a folder of them, a folder written by `save_to_disk`, or a dataset of the hub,
            `owner/name[:configuration]`, the last three with `@split` behind them where one of several is meant; or one of
            `sources.SHORT_NAMES`; in any of `formats.FORMATS`.
        spoken: items need a recording; otherwise recordings are left out.
        answered: see `read_items`.

    Raises:
        UserError: there is nothing to read, or the first bad row.
    """
    questions = []
    for item in read_items(source, spoken=spoken, answered=answered):
        if isinstance(item, UsableItem):
            questions.append(item.question)
        elif item.error is not None:
            raise item.error
    if not questions:
        raise _no_items(source)
    return questions


def _no_items(source: str | Path) -> UserError:
    return UserError(f"data {source}: holds no items; an item is id, question, answer, audio, options")


def read_usable(source: str | Path, *, spoken: bool = True, answered: bool = True) -> tuple[list[UsableItem], str | None]:
    """Read the good items of a source; bad rows of published data, which the user cannot correct, are left out.

    For training and for synthesis only: an evaluation without some of its items would have other figures.

    Args:
        source: see `load_questions`.
        spoken: items need a recording; otherwise recordings are left out.
        answered: see `read_items`.

    Returns:
        (items, a line that says how many rows were left out and what is wrong with the first, or None).

    Raises:
        UserError: there is no good item, or the first bad row of the user's own data.
    """
    usable: list[UsableItem] = []
    errors: list[UserError] = []
    for item in read_items(source, spoken=spoken, answered=answered):
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
