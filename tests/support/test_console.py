"""Names and texts from outside arrive on the terminal as they are: they are no markup, and command neither it nor us."""

from __future__ import annotations

import ast
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from tars_fast.evaluation.figures import OVERALL, change_since, overall, report
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult
from tars_fast.evaluation.scorers import Reading
from tars_fast.reports.log import RunLog
from tars_fast.reports.tables import print_evaluation
from tars_fast.support.cli import run_command
from tars_fast.support.console import PlainConsole, say
from tars_fast.support.progress import item_progress
from tars_fast.types import TrainingError, UserError

PACKAGE = Path(__file__).parents[2] / "tars_fast"
HOSTILE = ["[/b]", "x[bold]y", "[red]", "[link=file:///etc]z[/link]", "[/]", "\\[b]", ":warning:", "{task}", "{0.x}"]
"""What rich's markup, its pictures and `str.format` would each read as their own."""


def console_to(file: io.TextIOBase, **settings) -> PlainConsole:
    return PlainConsole(file=file, width=200, **settings)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_texts_are_shown_as_they_are(name, is_terminal):
    file = io.StringIO()
    console = console_to(file, force_terminal=is_terminal, color_system=None)
    say(console, f"to {name}", colour="red")
    table = Table(title=f"of {name}")
    table.add_column(f"in {name}")
    table.add_row(f"cell {name}")
    console.print(table)
    with item_progress(console, 2, what=f"items, {name}") as advance:
        advance(2)
    shown = file.getvalue()
    for text in ("to", "of", "in", "cell", "items,"):
        assert f"{text} {name}" in shown


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_nothing_commands_the_terminal_or_has_no_character_there(encoding):
    binary = io.BytesIO()
    console = console_to(io.TextIOWrapper(binary, encoding=encoding))
    table = Table()
    table.add_column("\u7c7b\u522b")
    table.add_row("a\x1b[2Jb\x9b1mc\rd\ud83de")
    console.print(table)
    say(console, "a\x1b]0;title\x07b \u7c7b\u522b\udcff\ttab")
    console.file.flush()
    shown = binary.getvalue().decode(encoding)
    assert set(map(ord, shown)) & {*range(32), *range(127, 160)} <= {9, 10}
    assert r"a\x1b[2Jb\x9b1mc\x0dd\ud83de" in shown
    assert r"a\x1b]0;title\x07b " in shown
    assert ("\u7c7b\u522b" in shown) == (encoding == "utf-8")


@pytest.mark.parametrize("name", HOSTILE)
def test_an_evaluation_is_printed_whatever_its_names_are(name):
    def answered(correct: bool) -> Answered:
        return Answered("", False, {"strict": Reading("A", False, correct)}, None)

    results = [
        ItemResult(name, f"{name} {n}", name, "?", "A", Evaluated(answered(n < 2), answered(True), 1.0, (1.0,), None), None)
        for n in range(3)
    ]
    results.append(dataclasses.replace(results[0], id=f"{name} failed", evaluated=None, failed=f"why {name}"))
    made = report(results, 1.0) | {"change": change_since(results, results)}
    file = io.StringIO()
    print_evaluation(console_to(file), {name: made, OVERALL: overall(results, 1.0)})
    shown = file.getvalue()
    for line in (f"{name}: by category, %", f"{name}: 1 failed, counted by no figure:", f"  {name} failed: why {name}"):
        assert line in shown


@pytest.mark.parametrize("name", HOSTILE)
def test_the_log_of_a_run_says_what_it_is_told(tmp_path, capsys, name):
    log = RunLog(tmp_path, 1, 0)
    log.say(f"written to {name}")
    log.warn(f"item {name} is left out")
    assert capsys.readouterr().out.splitlines() == [f"written to {name}", f"warning: item {name} is left out"]


def test_every_console_is_a_plain_one():
    """So that nobody has to think of it where something is printed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            f"{node.module}.{name.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
        } | {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        if path.name != "console.py":
            assert not imported & {"rich", "rich.print", "rich.console.Console", "rich.get_console"}, path
        assert not any(name.startswith(("rich.markup", "rich.prompt")) for name in imported), path
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "TextColumn" and not is_constant(call):
                assert any(word.arg == "markup" and word.value.value is False for word in call.keywords), path


def is_constant(call: ast.Call) -> bool:
    return isinstance(call.args[0], ast.Constant) and "{" not in call.args[0].value


@dataclasses.dataclass
class Config:
    """No settings."""


@pytest.mark.parametrize(("kind", "lead", "status"), [(UserError, "error", 2), (TrainingError, "stopped", 1)])
def test_an_error_is_one_line_whatever_it_names(kind, lead, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])

    def fail(_config: Config) -> int:
        raise kind("recording [/b]\x1b[2J\r\nb.wav: no such file")

    assert run_command(fail, Config, "x") == status
    assert capsys.readouterr().err == rf"{lead}: recording [/b]\x1b[2J\x0d\nb.wav: no such file" + "\n"


SAYS_A_PATH = """
import sys
from dataclasses import dataclass
from tars_fast.support.cli import run_command

@dataclass
class Config:
    output_dir: str

sys.exit(run_command(lambda config: print(f"written to {config.output_dir}") or 0, Config, "x"))
"""


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", b"a\\udcff\xe7\xb1\xbb"), ("ascii", rb"a\udcff\u7c7b")])
def test_a_path_that_the_terminal_has_no_characters_for_ends_no_command(encoding, shown):
    done = subprocess.run(
        [sys.executable, "-c", SAYS_A_PATH, "--output-dir", b"a\xff\xe7\xb1\xbb"],
        env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, b"written to " + shown), done.stderr
