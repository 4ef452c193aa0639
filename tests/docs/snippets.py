"""What the documentation shows to be typed: its blocks of code, the test markers before them, and a page as one script.

A marker is an HTML comment before a block, which readers of the page do not see. Several may follow one another:

    <!-- test: skip REASON -->            the block is only parsed; REASON begins with one of `REASONS`
    <!-- test: skip `TEXT` REASON -->     so are those of its commands that contain TEXT
    <!-- test: --num-steps 1 ... -->      settings added to each command of the block that has them
    <!-- test: replace OLD by NEW -->     in the code that is run
    <!-- test: first CODE -->             run before the block, in its language; may go over several lines
    <!-- test: last CODE -->              run behind it
    <!-- test: continue -->               a Python block that goes on where the page's last one ended; they are run as one
    <!-- test: file NAME -->              the block is the content of a file of that name

A block without a marker is run as it stands. All blocks of a page are one script, run in one new folder that looks like a
checkout: variables, functions and files are there for the blocks that follow.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for folder in ("docs", "examples") for page in sorted((ROOT / folder).rglob("*.md"))]

SHELL = {"bash", "console"}
LANGUAGES = SHELL | {"python", "json", "text", "mermaid", "yaml", "toml", "bibtex"}
REASONS = ("needs a GPU", "needs the hub", "needs vLLM", "takes ", "changes the machine", "installs ", "is no ")
NOT_RUN = ("pip", "pytest", "pre-commit", "apt-get", "source", "git")
"""Commands that set a machine up or start the tests themselves: parsed, and done by CI in environments of its own."""


def parse_markdown(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


@dataclass
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Of its opening fence, counted from 1."""
    language: str
    code: str
    skip: str = ""
    """Why it is only parsed."""
    skipped_commands: list[str] = field(default_factory=list)
    settings: list[list[str]] = field(default_factory=list)
    """Each is a flag with its values."""
    replacements: list[tuple[str, str]] = field(default_factory=list)
    first: str = ""
    last: str = ""
    continues: bool = False
    file: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @cached_property
    def command_text(self) -> str:
        """A shell block's commands, each on one line: what a prompt stands before, where there are prompts."""
        lines = self.code.splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return re.sub(r"\\\n\s*", "", "\n".join(lines))

    @property
    def output(self) -> str:
        """What a console block shows of its commands' output."""
        return "".join(f"{line}\n" for line in self.code.splitlines() if not line.startswith("$ "))

    def read_marker(self, marker: str) -> None:
        kind, rest = re.fullmatch(r"(\S+)\s?(.*)", marker, re.DOTALL).groups()
        if marker.startswith("--"):
            self.settings += [shlex.split(group) for group in re.split(r"\s+(?=--)", marker)]
        elif kind == "skip":
            text, reason = re.fullmatch(r"(?:`([^`]+)`\s+)?(.*)", rest, re.DOTALL).groups()
            assert reason.startswith(REASONS), f"{self}: reason {reason!r} begins with none of {REASONS}"
            # Where vLLM is installed its commands are run.
            if reason != "needs vLLM" or find_spec("vllm") is None:
                if text is None:
                    self.skip = reason
                else:
                    assert text in self.command_text, f"{self}: no command contains {text!r}, which the marker skips"
                    self.skipped_commands.append(text)
        elif kind == "replace":
            old, separator, new = rest.partition(" by ")
            assert separator, f"{self}: write `replace OLD by NEW`, not {marker!r}"
            assert old in self.code, f"{self}: {old!r} is not there to be replaced"
            self.replacements.append((old, new))
        elif kind == "first":
            self.first += f"{dedent(rest)}\n"
        elif kind == "last":
            self.last += f"{dedent(rest)}\n"
        elif marker == "continue":
            self.continues = True
        elif kind == "file":
            self.file = rest
        else:
            raise AssertionError(f"{self}: unknown marker {marker!r}")

    def run_text(self) -> str:
        """The code as it is run."""
        code = self.code
        if self.language in SHELL:
            lines = self.command_text.splitlines()
            code = "\n".join(":" if any(text in line for text in self.skipped_commands) else line for line in lines)
        for old, new in self.replacements:
            code = code.replace(old, new)
        return code


def read_blocks(page: Path) -> list[Block]:
    """A page's fenced blocks with their markers. Raises AssertionError for a marker that means nothing."""
    blocks, markers = [], []
    for token in parse_markdown(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (comment := re.fullmatch(r"<!-- test: (.*?)\s*-->\s*", token.content, re.DOTALL)):
            markers.append(comment[1])
        elif token.type == "fence":
            language = token.info.split()[0] if token.info else ""
            if language == "text" and token.content.startswith("$ "):
                language = "console"
            block = Block(page, token.map[0] + 1, language, token.content)
            for marker in markers:
                block.read_marker(marker)
            blocks.append(block)
            markers = []
        else:
            assert not markers, f"{page.name}:{token.map[0] + 1}: a test marker stands before something that is no code"
            assert token.type != "code_block" or "```" not in token.content, f"{page.name}: a fence too far indented to be read"
    assert not markers, f"{page.name}: a test marker stands before nothing"
    return blocks


def settings_for(block: Block, flags: dict[str, set[str]]) -> dict[str, str]:
    """What is added to each command of a block, by name. `flags` holds the flags of each command that is in it.

    Raises AssertionError for a setting that none of them has.
    """
    for setting in block.settings:
        assert any(setting[0] in known for known in flags.values()), f"{block}: no command has the marker's {setting[0]}"
    return {
        command: shlex.join(word for setting in block.settings if setting[0] in known for word in setting)
        for command, known in flags.items()
    }


def write_script(blocks: list[Block], settings: list[dict[str, str]], folder: Path) -> Path:
    """A page as one script of bash, in a folder of its own, which also holds its Python blocks and files.

    Args:
        settings: of each block, see `settings_for`.
    """
    lines = ["set -euo pipefail", *(f"{name}() {{ :; }}" for name in NOT_RUN)]
    python_code = ""
    for number, (block, added) in enumerate(zip(blocks, settings, strict=True)):
        lines.append(f"echo '=== {block}'")
        content = folder / f"{number}"
        if block.file:
            content.write_text(block.code)
            lines.append(f"cp {shlex.quote(str(content))} {shlex.quote(block.file)}")
        elif block.skip:
            continue
        elif block.language == "python":
            python_code = (python_code if block.continues else "") + block.first + block.run_text() + block.last
            following = next((later for later in blocks[number + 1 :] if later.language == "python"), None)
            if following is None or not following.continues:
                content.write_text(python_code)
                lines.append(f'"$PYTHON" {shlex.quote(str(content))}')
        elif block.language in SHELL:
            cases = " ".join(f'*" -m tars_fast.{name} "*) set -- "$@" {words} ;;' for name, words in added.items() if words)
            lines.append(f'with_settings() {{ case " $* " in {cases} *) ;; esac; "$PYTHON" "$@"; }}')
            lines.append('python() { with_settings "$@"; }')
            lines.append('torchrun() { with_settings -m torch.distributed.run "$@"; }')
            lines.append(block.first)
            if block.language == "console":
                content.write_text(block.output)
                lines.append(f"diff {shlex.quote(str(content))} <(\n{block.run_text()}\n)")
            else:
                lines.append(block.run_text())
            lines.append(block.last)
    script = folder / "page.sh"
    script.write_text("\n".join(lines) + "\n")
    return script


def check_json(block: Block) -> None:
    """A block of JSON is one value, or one a line. Raises ValueError."""
    try:
        json.loads(block.code)
    except json.JSONDecodeError:
        for line in block.code.splitlines():
            json.loads(line)


def check_python(code: str, *, may_be_absent: bool, written: Collection[str] = ()) -> None:
    """Compile it and import what it imports, but for modules that the page has `written` itself.

    Args:
        may_be_absent: packages that are not installed pass, since the code is not run.

    Raises SyntaxError or ImportError.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module in written or (may_be_absent and find_spec(module.partition(".")[0]) is None):
                continue
            imported = importlib.import_module(module)
            if name is not None and not hasattr(imported, name):
                importlib.import_module(f"{module}.{name}")
