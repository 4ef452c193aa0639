"""The page of settings says what every command's --help says."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from itertools import pairwise

import pytest
from settings_page import COMMANDS, settings_page
from snippets import ROOT, parse_markdown

from tars_fast.support.command_line import in_a_file


@cache
def read_page() -> tuple[dict[str, str], dict[str, list[list[str]]]]:
    """What the page says of each command, and the rows of its table, as a reader sees them."""
    descriptions: dict[str, str] = {}
    rows: dict[str, list[list[str]]] = {}
    for opening, token in pairwise(parse_markdown(settings_page())):
        text = "".join(child.content for child in token.children or ())
        if opening.tag == "h2" and token.type == "inline":
            rows[text] = table = []
        elif opening.type == "paragraph_open" and rows:
            descriptions[text.partition(":")[0].rpartition(".")[2]] = text.partition(": ")[2]
        elif opening.type == "tr_open":
            table.append([])
        elif opening.type == "td_open":
            table[-1].append(text)
    return descriptions, {command: [row for row in table if row] for command, table in rows.items()}


def test_every_command_is_on_the_page():
    _, settings = read_page()
    with_flags = {path.stem for path in (ROOT / "tars_fast").glob("*.py") if "run_command(" in path.read_text(encoding="utf-8")}
    assert set(settings) == set(COMMANDS) == with_flags


@pytest.mark.parametrize("command", COMMANDS)
def test_page_and_help_say_the_same(command, monkeypatch, capsys):
    descriptions, settings = read_page()
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"tars_fast.{command}").main()
    # Frames are drawn in lines, or in spaces and dashes.
    words = " ".join(re.sub(r"[│╭╮╰╯─]|-{4,}", " ", capsys.readouterr().out).split())
    about, left = words.split(" options -h, --help show this help message and exit ")
    assert ("config.json" in about) == (command in ("train", "evaluate"))
    assert about.endswith(f"{descriptions[command]} {in_a_file(f'python -m tars_fast.{command}')}")
    for cells in settings[command]:
        said = " ".join(cells)
        assert said in left
        left = left.replace(said, "", 1)
    assert not left.strip()
