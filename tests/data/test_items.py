"""Reading items: what a good row becomes, and what is said about a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tars_fast.data.items import load_questions, read_items, read_usable
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
        pytest.param(LETTERED | {"id": "q9", "audio": ["a"]}, ["'audio'", "an item is id,"], id="audio is a list"),
        pytest.param(
            LETTERED | {"id": "q9", "question": " \n"},
            ["item 'q9'", "'question' missing or empty", "an item is id,"],
            id="empty question",
        ),
        pytest.param(LETTERED | {"id": "q9", "answer": "D"}, ["item 'q9'", "answer 'D'", "A, B, C"], id="no such letter"),
        pytest.param(LETTERED | {"id": "q9", "answer": "blood"}, ["item 'q9'", "'blood'", "A, B, C"], id="not the letter"),
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
    said = f"{tmp_path / 'items.jsonl'}, line 1: item {name}: {field!r} holds {character!r}, which no text can hold; correct it"
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
    with pytest.raises(UserError, match=r"data .*: holds 0 jsonl files; name the one to read"):
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


def test_an_option_given_in_words_is_answered_with_its_letter(tmp_path):
    write(
        tmp_path / "items.jsonl",
        {"id": "q", "question": "Two plus two?", "options": ["Four", "Five"], "answer": "Four"} | {"audio": "q.wav"},
    )
    with pytest.raises(UserError, match=r"answer 'Four' is none of A, B; give its letter, 'A'"):
        load_questions(tmp_path)
