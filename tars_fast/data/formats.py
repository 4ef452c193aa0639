"""The formats of data: which column holds what, and how a row is recognised.

A format is named after where it is published; others that write the same columns are read by it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase

from tars_fast.data.recordings import message_parts


@dataclass(frozen=True)
class Format:
    """How a kind of data writes an item."""

    name: str
    """What messages call it."""
    columns: Mapping[str, str]
    """Field of an item -> the column that holds it."""
    identifying_columns: frozenset[str]
    """A row that has all of these columns is in this format."""
    id_columns: tuple[str, ...]
    """Their values, joined by `_`, are the id; where a row lacks one of them, the id is a hash of the content."""
    audio: str = "audio"
    """The column in which its recordings are expected; see `recordings.AUDIO_COLUMNS` for where they are looked for."""
    answers_by_index: bool = False
    """An answer that is a number is the place of the right option, from 0."""
    lettered: bool = False
    """The question itself holds the options, on lines that begin with A., B., C."""
    about_audio: bool = False
    """The recording is what the question is about, see `Question.about_audio`."""
    open_answers: bool = False
    """Of lettered questions: one without options, whose answer is no letter, has the answer in words."""
    published: bool = True
    """The user cannot correct the data: options that are empty or stand twice are accepted."""
    unpack: Callable[[Mapping[str, object]], dict[str, object]] | None = None
    """From a row to columns that stand inside its values. Raises ValueError where they do not."""


def _unpack_labels(row: Mapping[str, object]) -> dict[str, object]:
    """ARC: options as {text, label}, whose labels may be A, B, C or 1, 2, 3; in the original files within the question."""
    question = row.get("question_stem", row.get("question"))
    options = row.get("choices")
    if isinstance(question, dict):
        options = question.get("choices", options)
        question = question.get("stem")
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {name: [option.get(name) for option in options] for name in ("text", "label")}
    texts, labels = (options.get(name) if isinstance(options, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise ValueError(f"'choices' must hold texts and as many labels, not {options!r:.80}")
    answer = row.get("answerKey")
    if answer in labels and labels.index(answer) < len(ascii_uppercase):
        answer = ascii_uppercase[labels.index(answer)]
    return {"question": question, "choices": texts, "answerKey": answer}


def _unpack_messages(row: Mapping[str, object]) -> dict[str, object]:
    """A chat of one question, with its options on lettered lines, and the answer as `solution` or as the assistant's turn."""
    messages = message_parts(row)
    asked = [text for role, text, _ in messages if role == "user"]
    said = [text for role, text, _ in messages if role == "assistant"]
    if len(asked) != 1:
        raise ValueError(f"'messages' holds {len(asked)} turns of a user; an item has one question")
    answer = row.get("solution", row.get("answer"))
    return {"question": asked[0].strip(), "answer": said[-1] if answer is None and said else answer}


def _unpack_query(row: Mapping[str, object]) -> dict[str, object]:
    query = row.get("query")
    return {"query": query.replace("<audio>", "") if isinstance(query, str) else query}


TRANSCRIPT_COLUMNS = ("transcript", "text", "sentence", "transcription")
"""Where corpora of transcribed speech have what a recording says."""


def _unpack_transcript(row: Mapping[str, object]) -> dict[str, object]:
    return {"transcript": next((row[column] for column in TRANSCRIPT_COLUMNS if not is_nothing(row.get(column))), None)}


RULES = ("bbh", "ifeval", "refusal")
"""VoiceBench's rules that an item can ask for, see `tars_fast.evaluation.scorers`."""
BBH_TASKS = ("sports_understanding", "hyperbaton", "navigate", "web_of_lies")
"""The tasks in VoiceBench's `bbh`, which an item's id names."""


def _unpack_task(row: Mapping[str, object]) -> dict[str, object]:
    """VoiceBench's `bbh`: one of two answers, which `src/evaluator/bbh.py` there reads by the task in the id."""
    reference = row.get("reference")
    task = next((task for task in BBH_TASKS if task in str(row.get("id"))), None)
    if task is None or not isinstance(reference, str):
        return {}
    answers = ["A", "B"] if task == "hyperbaton" else ["yes", "no"]
    answer = reference.strip().strip("()").lower()
    answer = answer.upper() if task == "hyperbaton" else answer
    return {"reference": answer, "answer_set": answers, "category": task, "rule": "bbh"}


def _unpack_instructions(row: Mapping[str, object]) -> dict[str, object]:
    """VoiceBench's `ifeval`: names of instructions, and for each its arguments, those that it has not as null."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
        raise ValueError(f"'kwargs' must hold arguments for each of 'instruction_id_list', not {arguments!r:.80}")
    given = [{name: value for name, value in (one or {}).items() if value} for one in arguments]
    pairs = zip(names, given, strict=True)
    return {"instructions": [(str(name), json.dumps(one, sort_keys=True)) for name, one in pairs], "rule": "ifeval"}


def is_nothing(value: object) -> bool:
    """Whether a row has no value in a column: NaN is what pandas writes there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


_CHOICES = {"question": "question", "answer": "answer", "options": "choices"}
OWN = Format(
    "one's own",
    {
        name: name
        for name in (
            "question",
            "answer",
            "options",
            "answer_set",
            "answer_text",
            "answer_number",
            "rubric",
            "turns",
            "about_audio",
            "rule",
            "instructions",
            "category",
            "transcript",
        )
    },
    identifying_columns=frozenset({"question", "answer"}),
    id_columns=("id",),
    published=False,
)
_VOICEBENCH = {"question": "prompt", "answer": "reference", "category": "category", "transcript": "prompt", "rule": "rule"}
_VOICEBENCH |= {name: name for name in ("answer_set", "answer_text", "instructions")}
FORMATS = (
    Format(
        "VoiceBench's ifeval",
        _VOICEBENCH,
        identifying_columns=frozenset({"prompt", "instruction_id_list", "kwargs"}),
        id_columns=("key",),
        unpack=_unpack_instructions,
    ),
    Format(
        "VoiceBench's bbh",
        _VOICEBENCH,
        identifying_columns=frozenset({"prompt", "reference", "id"}),
        id_columns=("id",),
        lettered=True,
        open_answers=True,
        unpack=_unpack_task,
    ),
    Format(
        "VoiceBench",
        _VOICEBENCH,
        identifying_columns=frozenset({"prompt", "reference"}),
        id_columns=("src", "question_id"),
        lettered=True,
        open_answers=True,
    ),
    Format(
        "VoiceBench's open questions",
        _VOICEBENCH,
        identifying_columns=frozenset({"prompt"}),
        id_columns=("id",),
    ),
    Format(
        "TARS",
        {
            "question": "question",
            "answer": "answer_index",
            "options": "options",
            "category": "category",
            "transcript": "prompt_for_tts",
        },
        identifying_columns=frozenset({"question", "options", "answer_index"}),
        id_columns=("key",),
        answers_by_index=True,
    ),
    Format(
        "AVQA and R1-AQA",
        {"question": "question_text", "answer": "answer", "options": "multi_choice", "category": "question_type"},
        identifying_columns=frozenset({"question_text", "multi_choice", "answer"}),
        id_columns=("id",),
        audio="audio_path",
        about_audio=True,
        answers_by_index=True,
    ),
    Format(
        "ARC",
        {"question": "question", "answer": "answerKey", "options": "choices"},
        identifying_columns=frozenset({"answerKey"}),
        id_columns=("id",),
        unpack=_unpack_labels,
    ),
    Format(
        "MMAU",
        _CHOICES | {"category": "task"},
        identifying_columns=frozenset({"question", "choices", "answer", "task"}),
        id_columns=("id",),
        audio="audio_id",
        about_audio=True,
        answers_by_index=True,
    ),
    Format(
        "AudioMCQ",
        _CHOICES | {"category": "source_dataset"},
        identifying_columns=frozenset({"question", "choices", "answer", "source_dataset"}),
        id_columns=("source_dataset", "id"),
        audio="audio_path",
        about_audio=True,
        answers_by_index=True,
    ),
    Format(
        "MMLU",
        _CHOICES | {"category": "subject", "transcript": "transcript"},
        identifying_columns=frozenset({"question", "choices", "answer"}),
        id_columns=("id",),
        answers_by_index=True,
    ),
    Format(
        "chat messages",
        {"question": "question", "answer": "answer", "category": "category", "transcript": "transcript"},
        identifying_columns=frozenset({"messages"}),
        id_columns=("id",),
        audio="audios",
        lettered=True,
        published=False,
        unpack=_unpack_messages,
    ),
    Format(
        "query and response",
        {"question": "query", "answer": "response", "category": "category", "transcript": "transcript"},
        identifying_columns=frozenset({"query", "response"}),
        id_columns=("id",),
        audio="audios",
        lettered=True,
        published=False,
        unpack=_unpack_query,
    ),
    OWN,
)
"""A row is read in the first format whose identifying columns it has."""

TRANSCRIBED_SPEECH = Format(
    "transcribed speech",
    {**OWN.columns, "question": "transcript"},
    identifying_columns=frozenset(),
    id_columns=("id",),
    unpack=_unpack_transcript,
)
"""A recording and what it says, which is the written prompt: for objectives that need no answers."""

_OF_ALL = OWN.columns.keys() | {"id", "audio"}


def unanswered_format(row: Mapping[str, object]) -> Format | None:
    """The format of a row without an answer; None where it has one, or neither a question nor a transcript."""
    columns = {column for column, value in row.items() if not is_nothing(value) and value != ""}
    if not columns.isdisjoint(format.columns["answer"] for format in FORMATS):
        return None
    for format in FORMATS:
        needed = format.identifying_columns - {format.columns["answer"]}
        has_question = "question" not in columns or format.columns["question"] == "question"
        if needed <= columns and needed - _OF_ALL and has_question:
            return format
    if "question" in columns:
        return OWN
    return None if columns.isdisjoint(TRANSCRIPT_COLUMNS) else TRANSCRIBED_SPEECH


def nearest_format(columns: Mapping[str, object]) -> tuple[Format, list[str]]:
    """The format of a row, or the one that it lacks the smallest share of.

    Args:
        columns: of the row, by name.

    Returns:
        (the format, its identifying columns that the row lacks). Rows that have columns of no other format are one's own, which
        lack nothing here: what is missing there is told with the field.
    """

    def share_present(format: Format) -> float:
        if not columns.keys() & format.identifying_columns - _OF_ALL:
            return 0.0
        return len(columns.keys() & format.identifying_columns) / len(format.identifying_columns)

    for format in FORMATS:
        if format.identifying_columns <= columns.keys():
            return format, []
    nearest = max(FORMATS, key=share_present)
    if not share_present(nearest):
        return OWN, []
    return nearest, sorted(nearest.identifying_columns - columns.keys())
