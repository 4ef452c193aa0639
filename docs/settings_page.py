"""Make the page of every command's settings, `reference/settings.md`, from what prints `--help`; a hook of mkdocs."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import warnings
from dataclasses import dataclass
from typing import Any

PAGE = "reference/settings.md"
COMMANDS = ("train", "evaluate", "analyse", "ablate", "prepare", "export", "plan", "pocket")


@dataclass
class Setting:
    flags: str
    """`--dry-run, --no-dry-run`."""
    values: str
    """What may be given, empty for a switch."""
    meaning: str
    default: str
    """As `--help` has it: "default: 0.2", "repeatable" or "required"."""


def config_of(command: str) -> type:
    """The dataclass that a command's flags are made from."""
    return getattr(importlib.import_module(f"tars_fast.{command}"), f"{command.capitalize()}Config")


def settings_of(command: str) -> list[Setting]:
    """Every setting of a command, in the order of `--help`."""
    import tyro

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        # The only public way to tyro's texts; deprecated without another one in its place.
        parser = tyro.extras.get_parser(config_of(command))
    settings = []
    for action in parser._actions:
        text = " ".join((action.help or "").split())
        if "--help" not in action.option_strings:
            meaning, default = re.fullmatch(r"(.*) \((required|repeatable|default: .*)\)", text).groups()
            settings.append(Setting(", ".join(action.option_strings), action.metavar or "", meaning, default))
    return settings


def _escape(text: str) -> str:
    """As Markdown shows it unchanged in a cell of a table."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(text, quote=False)).replace("|", "&#124;")


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Made from the code, as `--help` is. With `None` as default, the text says what it stands for.",
        "",
    ]
    for command in COMMANDS:
        about = inspect.getdoc(config_of(command))
        lines += [f"## {command}", "", f"`python -m tars_fast.{command}`: {_escape(' '.join(about.split()))}", ""]
        lines += ["| setting | meaning |", "|---|---|"]
        for setting in settings_of(command):
            given = f"`{setting.flags}` {_escape(setting.values)}".rstrip()
            lines.append(f"| {given} | {_escape(setting.meaning)} *({_escape(setting.default)})* |")
        lines.append("")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=settings_page()))
    return files
