"""docs/troubleshooting.md has every line with which a command ends, and none that no command says any more."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from messages import FIELD, SAID_BEHIND, find_messages, find_texts
from snippets import ROOT, parse_markdown

PAGE = ROOT / "docs" / "troubleshooting.md"
CUT = f" {FIELD}"
"""A row that ends like this is the beginning of a longer message."""
SHORTEST_CUT = 100
PASSED_ON = {f"error: {FIELD}", f"error: --engine vllm: {FIELD}", f"error: --tensor-parallel {FIELD}: {FIELD}"}
"""The message is another one, which is found where it is made."""


@cache
def read_rows() -> dict[str, list[tuple[str, ...]]]:
    """Rows of each section's table, by heading; code without its backticks."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for opening, token in pairwise(parse_markdown(PAGE.read_text(encoding="utf-8"))):
        if opening.type == "heading_open":
            sections[token.content] = rows = []
        elif opening.type == "tr_open":
            rows.append(())
        elif opening.type == "td_open":
            rows[-1] += (token.content,)
    return {heading: [row for row in rows if row] for heading, rows in sections.items()}


def is_row_of(row: str, message: str) -> bool:
    return row == message or (row.endswith(CUT) and len(row) > SHORTEST_CUT and message.startswith(row.removesuffix(CUT)))


def compare(rows: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """(messages without a row, with the place that says them; rows of messages that are there no more)."""
    messages = dict(find_messages(folder))
    missing = [f"{place}: {message}" for message, place in messages.items() if not any(is_row_of(row, message) for row in rows)]
    return missing, [row for row in rows if not any(is_row_of(row, message) for message in messages)]


def test_every_message_has_a_row_and_every_row_a_message():
    rows = [row[0].strip("`") for row in read_rows()["Every message"]]
    assert len(rows) == len(set(rows)), "a message has two rows"
    missing, gone = compare([*rows, *PASSED_ON], ROOT / "tars_fast")
    assert not missing, "\n".join([f"no row in {PAGE.name} for", *missing])
    assert not gone, "\n".join([f"rows in {PAGE.name} of no message", *gone])


def test_functions_that_say_why_something_is_refused_are_there():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tars_fast").rglob("*.py"))
    assert [name for name in SAID_BEHIND if f"def {name}(" not in source] == []


def test_every_row_says_cause_and_remedy():
    for section in ("Every message", "Status 1 without such a line"):
        for row in read_rows()[section]:
            assert len(row) == 3, row
            assert all(row), row


def test_other_endings_are_what_commands_print():
    texts = find_texts(ROOT / "tars_fast")
    for message, *_ in read_rows()["Status 1 without such a line"]:
        assert any(message.strip("`") in text for text in texts), f"no command prints {message}"


SOURCE = """
from tars_fast.types import TrainingError, UserError

REMEDY = "wait"


class SlowError(TrainingError):
    pass


def load(path, kind, error):
    if kind:
        raise UserError(f"--data {path}: is {kind}" f"{error}; " + REMEDY)
    raise SlowError(f"too slow; {REMEDY}")


def missing(extra):
    return f"{extra} is not installed" if extra else None


def refusal(prompt):
    return f"{prompt} is empty"
"""


@pytest.mark.parametrize(
    ("rows", "num_missing", "num_gone"),
    [
        (["error: --data …: is …; wait", "stopped: too slow; wait", "error: item …: … is empty"], 0, 0),
        (["error: --data …: is …; wait", "stopped: too slow; wait"], 1, 0),
        (["error: --data …: is …; wait", "stopped: too slow; hurry", "error: item …: … is empty"], 1, 1),
        (["error: --data …", "stopped: too slow; wait", "error: item …: … is empty"], 1, 1),
    ],
    ids=["all", "one missing", "one changed", "a beginning that says too little"],
)
def test_what_is_missing_and_what_is_gone_is_found(tmp_path, rows, num_missing, num_gone):
    (tmp_path / "module.py").write_text(SOURCE)
    missing, gone = compare(rows, tmp_path)
    assert (len(missing), len(gone)) == (num_missing, num_gone)
