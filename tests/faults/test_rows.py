"""Rows of random nonsense: an item or one line that names the row, never a traceback.

The rows are near to those that are read (their columns, with values that are nearly right), because wholly random ones end at
the first check.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tars_fast.data.formats import FORMATS
from tars_fast.data.items import read_items, read_usable
from tars_fast.data.quality import inspect_item
from tars_fast.data.recordings import AUDIO_COLUMNS
from tars_fast.data.splits import data_fingerprint, without_leaks
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.prepare import recording_name, spoken_form
from tars_fast.support.text import visible
from tars_fast.types import UserError


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, (0.3 * np.sin(np.arange(4000))).astype(np.float32), 16_000, format="WAV")
    return file.getvalue()


WAV = wav()
WAV64 = base64.b64encode(WAV).decode()
COLUMNS = sorted(
    {"id", "messages", "solution", "extra", *AUDIO_COLUMNS}
    | {column for format in FORMATS for column in (*format.columns.values(), *format.identifying_columns, *format.id_columns)}
)
# Half a character, NUL, line separators, right-to-left, what is longer in another case, markup, control tokens, placeholders.
ODD = [
    "\ud83d",
    "\0",
    "\u2028",
    "\u202e",
    "İ",
    "ß",
    "[/b]",
    "<|AUDIO|>",
    "<|im_end|>",
    "<audio>",
    "\x1b[2J",
    "A. x\nB. y",
    "é\n",
]
TEXTS = st.one_of(
    st.sampled_from(["", " ", "A", "B", "0", "1", "x", "y", "q?", "A. x\nB. y\nC. x", "The answer is B.", "ok.wav", *ODD]),
    st.sampled_from(ODD),
    st.text(st.characters(exclude_categories=()), max_size=8),
    st.builds("".join, st.lists(st.sampled_from([*ODD, "A", " ", "x"]), max_size=5)),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 2**63, 10**4000, 1.0, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, True, False]),
    st.integers(-30, 30),
)
PATHS = st.sampled_from(["ok.wav", "cut.wav", "empty.wav", ".", "..", "/", "/dev/null", "x" * 300, "fifo", "%00"])
RECORDINGS = st.one_of(
    PATHS,
    st.sampled_from(
        [WAV64, f"data:audio/wav;base64,{WAV64}", "data:,", "data:x;base64,é", "https://x.org/a.wav", "file:///a", "://"]
    ),
    st.fixed_dictionaries({}, optional={"bytes": st.sampled_from([WAV64, None, 3]), "path": PATHS, "data": TEXTS}),
    st.fixed_dictionaries({"array": st.lists(NUMBERS, max_size=4)}, optional={"sampling_rate": NUMBERS}),
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS, RECORDINGS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXTS), inner, max_size=4)
    ),
    max_leaves=8,
)
OPTIONS = st.one_of(
    st.lists(TEXTS, min_size=2, max_size=4),
    st.sampled_from(
        [["x", "y"], ["x", "x", "y"], "['x', 'y']", "[", "(" * 500, ["x"] * 30, {"text": ["x", "y"], "label": ["A", "B"]}]
    ),
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "audio", "input_audio", "audio_url", 3])},
    optional={
        "text": TEXTS,
        "audio": RECORDINGS,
        "audio_url": st.one_of(RECORDINGS, st.fixed_dictionaries({"url": RECORDINGS})),
    },
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 3])},
        optional={"content": st.one_of(TEXTS, st.lists(PARTS, max_size=3), JSON)},
    ),
    max_size=3,
)
VALUES = {"messages": MESSAGES, "options": OPTIONS, "choices": OPTIONS, "multi_choice": OPTIONS, "answer_set": OPTIONS}
VALUES |= dict.fromkeys(AUDIO_COLUMNS, RECORDINGS)
# What makes an item of a row.
GOOD = {"options": ["x", "y"], "choices": ["x", "y"], "multi_choice": ["x", "y"], "answer_set": None, "audios": ["ok.wav"]}
GOOD |= {"prompt": "q?\nA. x\nB. y", "query": "q?\nA. x\nB. y", "reference": "B", "response": "B", "answerKey": "B"}
GOOD |= {"answer": "B", "answer_index": 1, "audio": "ok.wav", "audio_path": "ok.wav", "audio_id": "ok.wav"}
GOOD |= {"messages": [{"role": "user", "content": "q?\nA. x\nB. y"}, {"role": "assistant", "content": "B"}]}


@st.composite
def rows(draw: st.DrawFn) -> object:
    """A row of some format, of which some columns are missing and some hold anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    format = draw(st.sampled_from(FORMATS))
    columns = {*format.columns.values(), *format.id_columns, draw(st.sampled_from([format.audio, "audio"]))}
    columns |= format.identifying_columns | set(draw(st.lists(st.sampled_from(COLUMNS), max_size=2)))
    row = {column: GOOD.get(column, "x") for column in sorted(columns)}
    for column in draw(st.lists(st.sampled_from(sorted(columns)), max_size=3)):
        likely = VALUES.get(column, TEXTS)
        kind = draw(st.integers(0, 7))
        row[column] = draw({0: JSON, 1: NUMBERS, 2: st.none()}.get(kind, likely if kind < 6 else TEXTS))
        if kind == 2 and draw(st.booleans()):
            del row[column]
    return row


LINES = st.one_of(
    rows().map(lambda row: json.dumps(row)),
    rows().map(lambda row: json.dumps(row)[:-3]),
    st.sampled_from(["[" * 5000, '{"a":' * 5000, "1" * 5000, "NaN", "\ufeff{}", "{}}", '{"id": "a", "id": "b"}']),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import os

    folder = tmp_path_factory.mktemp("rows")
    (folder / "ok.wav").write_bytes(WAV)
    (folder / "cut.wav").write_bytes(WAV[: len(WAV) // 3])
    (folder / "empty.wav").touch()
    os.mkfifo(folder / "fifo")
    return folder


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    return load_prompt_format(PRESETS["pocket"], PRESETS["pocket"].source)


def one_line(error: object) -> None:
    said = visible(str(error))
    said.encode()
    assert len(said) < 3000, said
    # As `cli` prints it.
    assert "\n" not in " ".join(said.splitlines())


def read(path: Path, prompts: PromptFormat) -> Iterator[str]:
    """All that commands do with rows before a model answers: --check, training, evaluation, and preparing."""
    for item in read_items(path):
        inspection = inspect_item(item, 4.0)
        for finding in inspection.findings:
            one_line(finding.detail)
            yield finding.problem
        if item.question is not None and inspection.usable:
            yield "usable"
    for spoken in (True, False):
        try:
            usable, left_out = read_usable(path, spoken=spoken)
        except UserError as error:
            one_line(error)
            continue
        one_line(left_out)
        for item in usable:
            json.dumps(item.fields).encode()
            recording_name(item.question.id, spoken_form(item))
        questions = [item.question for item in usable]
        data_fingerprint(questions)
        assert without_leaks(questions, questions) == []
        if spoken:
            for size in prompts.prompt_sizes([item.question for item in usable], 8):
                if isinstance(size, UserError):
                    one_line(size)


def check(path: Path, prompts: PromptFormat, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    try:
        list(read(path, prompts))
    except UserError as error:
        one_line(error)


COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=80, derandomize=True, **COMMON)
@given(st.lists(LINES, min_size=1, max_size=4))
def test_nonsense_never_gives_a_traceback(folder, prompts, lines):
    check(folder / "items.jsonl", prompts, lines)


@pytest.mark.slow
@settings(max_examples=300, **COMMON)
@given(st.lists(LINES, min_size=1, max_size=4))
def test_much_nonsense_never_gives_a_traceback(folder, prompts, lines):
    check(folder / "items.jsonl", prompts, lines)


def test_the_rows_are_near_enough_to_be_read(folder, prompts):
    """Nonsense that is always refused at the first look would show nothing."""
    wanted = {"usable", "bad item", "unreadable"}
    seen: set[str] = set()

    # Which rows come first is another with every release of hypothesis.
    @settings(max_examples=1000, derandomize=True, **COMMON)
    @given(LINES)
    def look(line: str) -> None:
        if seen >= wanted:
            return
        path = folder / "items.jsonl"
        path.write_text(line, encoding="utf-8", errors="surrogatepass")
        seen.update(read(path, prompts))

    look()
    assert seen >= wanted
