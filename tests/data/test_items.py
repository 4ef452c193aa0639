"""Reading items: what a good row becomes, and what is said about a bad one."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from tars_fast.data.audio import decode
from tars_fast.data.items import load_questions, read_items, read_usable
from tars_fast.data.sources import stamp
from tars_fast.data.splits import data_fingerprint, without_leaks
from tars_fast.types import Question, UserError

LETTERED = {"id": "q1", "question": "Which is red?", "answer": "B", "options": ["grass", "blood", "snow"], "audio": "q1.wav"}
NAMED = {"id": "q2", "question": "How many?", "answer": "two", "answer_set": ["one", "two"], "audio": "spoken/q2.flac"}


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def test_reads_a_file(tmp_path):
    assert load_questions(write(tmp_path / "items.jsonl", LETTERED, "", NAMED)) == [
        Question("q1", "Which is red?\nA. grass\nB. blood\nC. snow", "B", ("A", "B", "C"), tmp_path / "q1.wav"),
        # The answer set is not shown.
        Question("q2", "How many?", "two", ("one", "two"), tmp_path / "spoken" / "q2.flac"),
    ]


def test_reads_the_only_jsonl_of_a_folder(tmp_path):
    path = write(tmp_path / "items.jsonl", LETTERED, NAMED)
    (tmp_path / "notes.txt").write_text("not items")
    assert load_questions(tmp_path) == load_questions(path)


def test_every_line_of_a_question_is_kept(tmp_path):
    text = "Anna has a cat.\nBen has a dog.\n\n  Who barks?"
    lettered, named = load_questions(
        write(tmp_path / "items.jsonl", LETTERED | {"question": text + "\n"}, NAMED | {"question": text})
    )
    assert lettered.text == text + "\nA. grass\nB. blood\nC. snow"
    assert named.text == text


def test_text_is_read_as_utf_8_and_numbers_as_text(tmp_path):
    item = NAMED | {"id": 7, "question": "Wie groß ist π?", "answer": 3, "answer_set": ["3", "4"]}
    path = write(tmp_path / "items.jsonl", json.dumps(item, ensure_ascii=False))
    assert load_questions(path) == [Question("7", "Wie groß ist π?", "3", ("3", "4"), tmp_path / "spoken" / "q2.flac")]


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        pytest.param('{"id": "q9", "question"', ["not JSON", "column 24"], id="broken JSON"),
        pytest.param('["q9"]', ["not a JSON object"], id="not an object"),
        pytest.param({"id": "q9"}, ["'question', 'answer', 'audio'", "an item is id,"], id="fields missing"),
        pytest.param(LETTERED | {"id": None}, ["'id'", "an item is id,"], id="no id"),
        pytest.param(
            LETTERED | {"id": "q9", "answer": True}, ["'answer' must be a text, not True (bool)"], id="answer is true"
        ),
        pytest.param(LETTERED | {"id": "q9", "answer": 1.5}, ["'answer' must be a text, not 1.5 (float)"], id="half a number"),
        pytest.param(
            LETTERED | {"id": "q9", "answer": ["A", "B"]}, ["'answer' must be a text, not ['A', 'B'] (list)"], id="two answers"
        ),
        pytest.param(LETTERED | {"id": "q9", "answer": math.nan}, ["'answer' missing or empty"], id="no answer, of pandas"),
        pytest.param(
            LETTERED | {"id": "q9", "question": " \n"},
            ["item 'q9'", "'question' missing or empty", "an item is id,"],
            id="empty question",
        ),
        pytest.param(LETTERED | {"id": "q9", "answer": "D"}, ["item 'q9'", "answer 'D'", "A, B, C"], id="no such letter"),
        pytest.param(LETTERED | {"id": "q9", "answer": "Blood"}, ["item 'q9'", "'Blood'", "A, B, C"], id="not the option"),
        pytest.param(NAMED | {"id": "q9", "answer": "three"}, ["item 'q9'", "'three'", "one, two"], id="not in the set"),
        pytest.param(NAMED | {"id": "q9", "answer": "Two"}, ["item 'q9'", "'Two'", "one, two"], id="other case"),
        pytest.param(
            LETTERED | {"id": "q9", "answer_set": ["A", "B"]}, ["item 'q9'", "give 'options'", "one of them"], id="both"
        ),
        pytest.param(LETTERED | {"id": "q9", "options": None}, ["item 'q9'", "give 'options'", "one of them"], id="neither"),
        pytest.param(LETTERED | {"id": "q9", "options": ["x"]}, ["item 'q9'", "2 to 26", "['x']"], id="one option"),
        pytest.param(LETTERED | {"id": "q9", "options": "grass"}, ["item 'q9'", "2 to 26", "'grass'"], id="options is a text"),
        pytest.param(LETTERED | {"id": "q9", "options": ["x", ""]}, ["item 'q9'", "2 to 26", "['x', '']"], id="empty option"),
        pytest.param(
            LETTERED | {"id": "q9", "options": ["x", 2]}, ["item 'q9'", "2 to 26", "['x', 2]"], id="option is a number"
        ),
        pytest.param(LETTERED | {"id": "q9", "options": ["x"] * 27}, ["item 'q9'", "2 to 26"], id="more options than letters"),
        pytest.param(
            NAMED | {"id": "q9", "answer_set": [f"answer {number}" for number in range(1001)]},
            ["item 'q9'", "'answer_set' must list 2 to 1000"],
            id="more answers than one pattern should hold",
        ),
        pytest.param(
            NAMED | {"id": "q9", "answer_set": ["two"] * 2}, ["item 'q9'", "'two' is listed twice", "remove one"], id="twice"
        ),
        pytest.param(LETTERED, ["id 'q1'", "already stands in line 1", "must be unique"], id="duplicate id"),
        pytest.param(NAMED | {"id": "q1"}, ["id 'q1'", "already stands in line 1"], id="duplicate id, another question"),
    ],
)
def test_bad_line_is_named(tmp_path, line, fragments):
    """Behind a good line and an empty one, so that the number is that of the line in the file."""
    path = write(tmp_path / "items.jsonl", LETTERED, "", line, NAMED)
    with pytest.raises(UserError) as caught:
        load_questions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message


@pytest.mark.parametrize("character", ["\ud83d", "\0"])
@pytest.mark.parametrize("field", ["id", "question", "answer", "options", "answer_set", "category", "transcript", "audio"])
def test_half_characters_and_nul_are_refused_in_every_field(tmp_path, field, character):
    """JSON can write both. No tokenizer takes the one, and the other ends a text for espeak-ng, and a file's name."""
    row = NAMED if field == "answer_set" else LETTERED
    value = ["x", f"y{character}"] if field in ("options", "answer_set") else f"x{character}"
    (item,) = read_items(write(tmp_path / "items.jsonl", row | {field: value}))
    name = repr(value if field == "id" else row["id"])
    place = f"the recording in {field!r}" if field == "audio" else repr(field)
    said = f"{tmp_path / 'items.jsonl'}, line 1: item {name}: {place} holds {character!r}, which no text can hold; correct it"
    assert str(item.error) == said
    said.encode()  # may be printed anywhere


def test_whole_characters_and_long_texts_are_taken(tmp_path):
    text = "😀 ﻿ " + "ü" * 5000
    row = LETTERED | {"id": text, "question": text, "options": [text, "x"], "category": text, "transcript": text}
    assert load_questions(write(tmp_path / "items.jsonl", row))[0].id == text


def test_a_number_of_thousands_of_digits_is_no_json(tmp_path):
    path = write(tmp_path / "items.jsonl", '{"id": ' + "1" * 4301 + "}")
    with pytest.raises(UserError, match=r"line 1: not JSON \(Exceeds the limit"):
        load_questions(path)


def test_long_values_are_shortened_in_messages(tmp_path):
    for wrong in (
        {"answer": "x" * 400_000},
        {"options": ["x" * 400_000, "y"], "answer": "Z"},
        {"id": "x" * 9999, "answer": "Z"},
    ):
        with pytest.raises(UserError) as caught:
            load_questions(write(tmp_path / "items.jsonl", LETTERED | wrong))
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "source", ["x" * 300, "x" * 300 + ".jsonl", "x" * 300 + "/y", "x" * 300 + ".parquet", "a\0b", "\ud83d.jsonl"]
)
def test_names_that_no_file_can_have(source):
    with pytest.raises(UserError, match=r"^data .*: cannot be read \(.*\); give a "):
        load_questions(source)


def test_ids_are_compared_as_text(tmp_path):
    with pytest.raises(UserError, match="line 2: id '1' already stands in line 1"):
        load_questions(write(tmp_path / "items.jsonl", NAMED | {"id": 1}, NAMED | {"id": "1"}))


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UserError, match=r"data .*absent\.jsonl: cannot be read .*; give a jsonl file or a folder"):
        load_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"data .*: holds neither a jsonl file nor a dataset; name the file with the items"):
        load_questions(tmp_path)
    with pytest.raises(UserError, match=r"data .*blank\.jsonl: holds no items"):
        load_questions(write(tmp_path / "blank.jsonl", "", "  "))
    write(tmp_path / "items.jsonl", NAMED)
    with pytest.raises(UserError, match=r"data .*: holds 2 jsonl files; name the one to read"):
        load_questions(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"id": "größe"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"data .*latin\.jsonl: cannot be read .*utf-8.*; save it as UTF-8"):
        load_questions(tmp_path / "latin.jsonl")


def test_separators_inside_json_text_do_not_end_a_line(tmp_path):
    text = "What is\u2028two\u0085plus two?"
    line = json.dumps(NAMED | {"question": text}, ensure_ascii=False)
    assert load_questions(write(tmp_path / "items.jsonl", line))[0].text == text


def test_spaces_around_answers_do_not_matter(tmp_path):
    (item,) = load_questions(write(tmp_path / "items.jsonl", NAMED | {"answer_set": ["one ", " two"], "answer": " two "}))
    assert (item.choices, item.answer) == (("one", "two"), "two")
    (item,) = load_questions(write(tmp_path / "items.jsonl", LETTERED | {"options": ["pH", "Ph", "PH"]}))
    assert item.text.endswith("A. pH\nB. Ph\nC. PH")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LETTERED).encode() + b"\r\n" + json.dumps(NAMED).encode() + b"\r\n")
    assert [item.id for item in load_questions(path)] == ["q1", "q2"]


@pytest.mark.parametrize("wrong", [{"options": [" ", "x", "y"]}, {"options": ["xx", "xx ", "y"]}, {"id": True}, {"id": " "}])
def test_near_empty_and_repeated_values_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="line 1"):
        load_questions(write(tmp_path / "items.jsonl", LETTERED | wrong))


def test_a_bad_row_of_ones_own_is_never_left_out(tmp_path):
    path = write(tmp_path / "items.jsonl", LETTERED, NAMED | {"answer": "three"})
    with pytest.raises(UserError, match="line 2: item 'q2': answer 'three' is none of"):
        read_usable(path)
    with pytest.raises(UserError, match="holds no items"):
        read_usable(write(tmp_path / "blank.jsonl", ""))
    items, left_out = read_usable(write(tmp_path / "items.jsonl", LETTERED, NAMED))
    assert ([item.question for item in items], left_out) == (load_questions(tmp_path / "items.jsonl"), None)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (LETTERED | {"answer": "blood"}, "B"),
        (LETTERED | {"answer": ["B"]}, "B"),
        (LETTERED | {"options": ["B", "A"], "answer": "B"}, "B"),  # the letter first
        (NAMED | {"answer_set": ["1", "2"], "answer": 2.0}, "2"),
        (LETTERED | {"id": 7.0, "category": math.nan, "transcript": math.nan}, "B"),
        ({"question": "q", "choices": ["x", "y"], "answer": 1.0, "audio": "a"}, "B"),
        ({"question": "q", "choices": ["x", "y", "y"], "answer": "y", "audio": "a"}, "B"),
        ({"question": "q", "choices": ["1", "0"], "answer": 0, "audio": "a"}, "A"),  # a number is a place
        ({"question": "q", "choices": ["1", "0"], "answer": "0", "audio": "a"}, "B"),  # a text is an option's
        ({"question": "q", "choices": ["x", "y"], "answer": "1", "audio": "a"}, "B"),
        ({"question": "q", "choices": [1, 0], "answer": "0", "audio": "a"}, "B"),
    ],
)
def test_answers_that_can_mean_one_thing_only_are_taken(tmp_path, row, answer):
    (question,) = load_questions(write(tmp_path / "items.jsonl", row))
    assert (question.answer, question.category, question.transcript) == (answer, "", None)
    assert ".0" not in question.id


def sound(rate: int = 16_000) -> tuple[np.ndarray, bytes]:
    """(samples, the same as a file)."""
    wave = (0.3 * np.sin(np.arange(rate))).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
    return wave, file.getvalue()


WAVE, FILE = sound()
TEXT = base64.b64encode(FILE).decode()


@pytest.mark.parametrize(
    "audio",
    [
        {"path": "q1.wav"},
        {"path": "q1.wav", "bytes": None},
        ["q1.wav"],
        [{"array": WAVE.tolist(), "sampling_rate": 16_000}],
        {"array": [WAVE.tolist()], "sampling_rate": 16_000.0, "path": "gone.wav"},
        {"bytes": TEXT, "path": "gone.wav"},
        {"data": TEXT, "format": "wav"},
        TEXT,
        "\n".join(textwrap.wrap(TEXT, 76)),
        f"data:audio/wav;base64,{TEXT}",
        "file:{folder}/q1.wav",
    ],
    ids=lambda audio: str(audio)[:30],
)
def test_recordings_inside_a_line(tmp_path, audio):
    (tmp_path / "q1.wav").write_bytes(FILE)
    audio = audio.replace("file:{folder}", f"file://{tmp_path}") if isinstance(audio, str) else audio
    path = write(tmp_path / "items.jsonl", LETTERED | {"audio": audio}, NAMED | {"audio": audio})
    first, second = load_questions(path)
    np.testing.assert_array_equal(decode(first.audio), WAVE)
    assert len(str(first.audio)) < 200
    assert stamp(first.audio) == stamp(second.audio)
    assert hash(first.audio) == hash(load_questions(path)[0].audio)


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        ("https://x.org/a.wav", "is a URL, which is not fetched (https://x.org/a.wav); download it and give its path"),
        ("s3://b/a.wav", "is a URL, which is not fetched (s3://b/a.wav); download it and give its path"),
        (["a.wav", "b.wav"], "is a list of 2; an item has one recording"),
        ([0.1] * 400_000, "is a list of 400000 numbers without their rate; give {array, sampling_rate}, or a path"),
        ({"array": [0.1]}, "holds an array whose sampling_rate is None; give it in Hz"),
        ({"array": [0.1], "sampling_rate": "16k"}, "holds an array whose sampling_rate is '16k'; give it in Hz"),
        ({"array": ["x"], "sampling_rate": 16_000}, "holds an array that is no list of numbers"),
        ({"array": [10**400], "sampling_rate": 16_000}, "holds an array that is no list of numbers"),
        ({"array": [[0.1]] * 9, "sampling_rate": 16_000}, "holds an array of shape (9, 1); give the samples of one channel"),
        ({"wave": [0.1]}, "has 'wave'; give {bytes}, {path} or {array, sampling_rate}"),
        (True, "is True (bool), not a path or a recording"),
        (5, "is 5 (int), not a path or a recording"),
        ("data:audio/wav;base64,?", "is a data: URI that is not base64 (Only base64 data is allowed)"),
        ("x" * 400_000, f"is a text of 400000 characters, neither a path nor base64 of a recording ('{'x' * 40}'...)"),
        ("a\nb.wav", r"is 'a\nb.wav', a path with a line break; rename the file"),
        ("", "missing or empty; an item is id, question, answer, audio, options"),
        ([], "missing or empty; an item is id, question, answer, audio, options"),
        ({"bytes": None, "path": None}, "missing or empty; an item is id, question, answer, audio, options"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_that_are_no_recordings_are_named(tmp_path, audio, said):
    with pytest.raises(UserError) as caught:
        load_questions(write(tmp_path / "items.jsonl", LETTERED | {"audio": audio}))
    place = "'audio'" if said.startswith("missing") else "the recording in 'audio'"
    assert str(caught.value) == f"{tmp_path / 'items.jsonl'}, line 1: item 'q1': {place} {said}"
    assert load_questions(write(tmp_path / "items.jsonl", LETTERED | {"audio": audio}), spoken=False)[0].audio is None


TRANSCRIPT = "Good morning."
OPTIONS = {"options": ["grass", "blood"]}
UNANSWERED = {
    "a question": ({"question": "Who?"}, "Who?", ()),
    "another format's column": ({"question": "Who?", "prompt": "Say it."}, "Who?", ()),
    "an empty answer": ({"question": "Who?", "answer": "", "options": None}, "Who?", ()),
    "options": ({"question": "Which?", "answer": None} | OPTIONS, "Which?\nA. grass\nB. blood", ("A", "B")),
    "an answer set": ({"question": "Who?", "answer_set": ["I", "you"]}, "Who?", ("I", "you")),
    "transcript": ({"transcript": TRANSCRIPT}, TRANSCRIPT, ()),
    "LibriSpeech": ({"text": TRANSCRIPT, "speaker_id": 5, "chapter_id": 7}, TRANSCRIPT, ()),
    "Common Voice": ({"sentence": TRANSCRIPT, "client_id": "x", "locale": "en", "up_votes": 2}, TRANSCRIPT, ()),
    "NeMo": ({"audio": None, "audio_filepath": "q.wav", "duration": 1.5, "text": TRANSCRIPT}, TRANSCRIPT, ()),
    "columns of questions": ({"question": None, "answer": math.nan, "transcription": TRANSCRIPT}, TRANSCRIPT, ()),
    "VoiceBench": ({"prompt": "Why?\nSay it."}, "Why?\nSay it.", ()),
    "MMLU": ({"question": "Which?", "choices": ["grass", "blood"]}, "Which?\nA. grass\nB. blood", ("A", "B")),
    "chat": ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, "Why?", ()),
    "query": ({"query": "<audio>Which?\nA. grass\nB. blood"}, "Which?\nA. grass\nB. blood", ("A", "B")),
}


@pytest.mark.parametrize("kind", UNANSWERED)
def test_items_without_an_answer_are_read_where_none_is_needed(tmp_path, kind):
    row, text, choices = UNANSWERED[kind]
    path = write(tmp_path / "items.jsonl", {"id": "q", "audio": "q.wav"} | row)
    (question,) = load_questions(path, answered=False)
    assert (question.text, question.choices, question.answer, question.has_answer) == (text, choices, "", False)
    assert question.audio == tmp_path / "q.wav"
    assert question.transcript == (text if text == TRANSCRIPT or kind.startswith("VoiceBench") else None)
    with pytest.raises(UserError, match=r"missing or empty|fits no format|holds no options"):
        load_questions(path)
    # What `prepare` writes of it says the same.
    ((item,), _) = read_usable(path, answered=False)
    (again,) = load_questions(write(tmp_path / "again.jsonl", {**item.fields, "audio": "q.wav"}), answered=False)
    assert (again.id, again.text, again.choices, again.answer) == (question.id, text, choices, "")


TURNS = [
    {"role": "user", "text": "Two numbers come.", "audio": ["q.wav", {"array": [0.0, 0.5] * 500, "sampling_rate": 8000}]},
    {"role": "assistant", "text": "I listen."},
]
OPEN = {"id": "q", "question": "What is their sum?", "audio": "q.wav"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"answer_text": "five"}, {"answer_text": ("five",), "reference": "five"}),
        ({"answer_text": ["five", 5]}, {"answer_text": ("five", "5")}),
        ({"answer_number": 5}, {"answer_number": 5.0, "reference": "5"}),
        (
            {"answer_number": "-0.25", "answer_text": ["a quarter less"]},
            {"answer_number": -0.25, "reference": "a quarter less"},
        ),
        ({"rubric": "Is it polite?"}, {"rubric": "Is it polite?", "has_answer": False}),
        ({"answer_text": "five", "about_audio": True}, {"about_audio": True}),
    ],
)
def test_open_questions_are_read(tmp_path, fields, expected):
    path = write(tmp_path / "items.jsonl", OPEN | fields)
    (question,) = load_questions(path)
    assert {"choices": (), "is_open": True, "turns": ()} | expected == {
        field: getattr(question, field) for field in ("choices", "is_open", "turns", *expected)
    }
    ((item,), _) = read_usable(path)
    (again,) = load_questions(write(tmp_path / "again.jsonl", {**item.fields, "audio": "q.wav"}))
    assert again == question
    # Its answer is part of the data's fingerprint, and that of questions with choices is what it was.
    other = load_questions(write(tmp_path / "other.jsonl", OPEN | {"answer_text": "six"}))
    assert data_fingerprint([question]) != data_fingerprint(other)
    known = "f19bf28da82ade3008206a2b303e5f3adf01d824fcdf8c8244d2520bc07731fb"
    assert data_fingerprint([Question("1", "Which?", "A", ("A", "B"))]) == known


def test_turns_are_read_with_their_recordings(tmp_path):
    """From a jsonl file, and from parquet, whose recordings are read when they are needed."""
    path = write(tmp_path / "items.jsonl", OPEN | {"answer_number": 5, "turns": TURNS})
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600, np.float32), 16_000, format="WAV")
    (tmp_path / "q.wav").write_bytes(file.getvalue())
    rows = [json.loads(path.read_text())]
    rows[0]["turns"][0]["audio"] = [{"bytes": file.getvalue(), "path": None}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    for source, different in ((path, 2), (tmp_path / "items.parquet", 3)):
        (question,) = load_questions(source)
        assert [(turn.role, turn.text, len(turn.recordings)) for turn in question.turns] == [
            ("user", "Two numbers come.", 2),
            ("assistant", "I listen.", 0),
        ]
        assert (len(question.recordings), len(set(question.recordings))) == (3, different)
        assert all(len(decode(recording)) > 0 for recording in question.recordings)
        (written,) = load_questions(source, spoken=False)
        assert [turn.recordings for turn in written.turns] == [(), ()]
    # What is said before is part of what is asked.
    alone = load_questions(write(tmp_path / "alone.jsonl", OPEN | {"id": "r", "answer_number": 5}))
    assert without_leaks(alone, [question]) == alone
    assert data_fingerprint([question]) != data_fingerprint([dataclasses.replace(question, turns=())])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer_text": []}, "'answer_text' must be a text or a list of texts, not []"),
        ({"answer_text": ["x", ""]}, "'answer_text' must be a text or a list of texts"),
        ({"answer_number": "five"}, "'answer_number' must be a number, not 'five' (str)"),
        ({"answer_number": True}, "'answer_number' must be a number, not True (bool)"),
        ({"answer_number": 1e999}, "'answer_number' must be a number, not inf (float)"),
        ({"rubric": 3}, "'rubric' must be a text, not 3 (int)"),
        ({"instructions": "x"}, "'instructions' must list [name, arguments as a JSON object], not 'x'"),
        ({"instructions": [["a", "[]"]]}, "'instructions' must list [name, arguments as a JSON object], not [['a', '[]']]"),
        ({"rule": "guess"}, "'rule' is 'guess', none of bbh, ifeval, refusal; correct it"),
        ({"answer_text": "x", "about_audio": "yes"}, "'about_audio' must be true or false, not 'yes'"),
        ({"answer_text": "x", "options": ["x", "y"]}, "has 'options' and an answer in words, a number or a rubric"),
        ({"answer_text": "x", "turns": "hello"}, "'turns' must list {role, text, audio}, not 'hello'"),
        ({"answer_text": "x", "turns": [{"role": "system", "text": "x"}]}, "turn 1: 'role' must be user or assistant"),
        ({"answer_text": "x", "turns": [{"role": "user", "audio": "q.wav"}]}, "turn 1: has no 'text', which the written"),
        (
            {"answer_text": "x", "turns": [TURNS[1] | {"audio": "q.wav"}]},
            "turn 1: has a recording, and is the model's own; give its text alone",
        ),
        (
            {"answer_text": "x", "turns": [TURNS[0] | {"audio": "http://x/y.wav"}]},
            "turn 1: the recording in 'audio' is a URL, which is not fetched",
        ),
    ],
)
def test_what_an_open_question_lacks_is_named(tmp_path, fields, said):
    (item,) = read_items(write(tmp_path / "items.jsonl", OPEN | fields))
    assert f"item 'q': {said}" in str(item.error)
    assert "\n" not in str(item.error)


def test_items_with_and_without_an_answer_may_stand_in_one_file(tmp_path):
    spoken_twice = {"audio": "x.wav", "sentence": TRANSCRIPT}
    path = write(tmp_path / "items.jsonl", LETTERED, spoken_twice, spoken_twice | {"audio": "y.wav"})
    labelled, *others = load_questions(path, answered=False)
    assert [labelled] == load_questions(write(tmp_path / "labelled.jsonl", LETTERED))
    assert len({question.id for question in others}) == 2, "the same sentence by two speakers"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"audio": "q.wav"}, "item 'q': has neither a question nor a transcript to be its written prompt; give 'question'"),
        ({"audio": "q.wav", "text": " "}, "item 'q': has neither a question nor a transcript"),
        ({"text": TRANSCRIPT}, "item 'q': 'audio' missing or empty"),
        ({"question": "Who?"}, "item 'q': 'audio' missing or empty"),
        ({"audio": "q.wav", "text": ["x"]}, "item 'q': 'transcript' must be a text, not ['x'] (list)"),
        ({"audio": "q.wav", "question": "Who?", "answer": "I"}, "item 'q': give 'options' (lettered"),
        ({"audio": "q.wav", "question": "Who?", "answer": True}, "item 'q': 'answer' must be a text, not True"),
        (LETTERED | {"answer": "D"}, "answer 'D' is none of A, B, C"),
        (LETTERED | {"answer": None, "answer_set": ["x", "y"]}, "give 'options' (lettered"),
        (LETTERED | {"answer": None, "options": ["x"]}, "'options' must list 2 to 26"),
        (LETTERED | {"question": ""}, "'question' missing or empty; an item is id, question, answer"),
    ],
)
def test_what_an_item_lacks_beside_an_answer_is_named(tmp_path, row, said):
    (item,) = read_items(write(tmp_path / "items.jsonl", {"id": "q"} | row), answered=False)
    assert said in str(item.error)
