"""Settings as a command line, through tyro: written, parsed, and what is wrong with it in one line."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints
from unittest import mock

from tars_fast.types import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

NO_KIND = {bool: "neither true nor false", int: "no whole number", float: "no number", str: "no text", Path: "no path"}
"""What is wrong with a value, by the kind of its setting."""
WRITERS = {"data_fingerprint": "train", "evaluation": "evaluate"}
"""The command that has written a config.json, by the entry that only its files have."""


def flag_of(setting: str) -> str:
    """The command line's name of a setting."""
    return f"--{setting.replace('_', '-')}"


def setting_of(argument: str) -> str:
    """The setting that an argument of the command line names, however it is written; empty where it is a value."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else ""


def given_settings(config_class: type[DataclassInstance], arguments: Sequence[str]) -> list[str]:
    """The settings that a command line names, unknown ones too; `--no-x` names x."""
    known = {field.name for field in dataclasses.fields(config_class)}
    names = [setting_of(argument) for argument in arguments]
    return [base if (base := name.removeprefix("no_")) in known else name for name in names if name]


def no_setting(name: str, config_class: type[DataclassInstance], program: str, shown: Callable[[str], str] = str) -> str:
    """What is said of a setting that `program` has not.

    Args:
        shown: writes a setting as the user does.
    """
    nearest = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(config_class)], n=1)
    hint = f"do you mean {shown(nearest[0])}?" if nearest else f"see {program} --help"
    return f"{shown(name)}: no setting of {program}; {hint}"


def as_arguments(config_class: type[DataclassInstance], settings: Mapping[str, str]) -> list[str]:
    """Write settings as the command line of the command that has `config_class`."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    arguments = []
    for name, value in settings.items():
        flag = flag_of(name)
        if kinds[name] == "bool" and value.lower() in ("true", "false"):
            arguments.append(flag if value.lower() == "true" else flag.replace("--", "--no-", 1))
        elif kinds[name] == "bool | None":
            arguments.append(f"{flag}={value.capitalize()}")
        elif kinds[name].startswith("tuple"):
            arguments += [flag, *value.split()]
        else:
            # A text may begin with -.
            arguments.append(f"{flag}={value}")
    return arguments


def parse_arguments(origin: str, config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Parse the command line that another command, `program`, will be started with.

    Args:
        origin: the flag that the arguments come from, for messages.

    Raises:
        UserError: `program` would not take them.
    """
    import tyro

    try:
        # What tyro prints itself takes many lines.
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            return tyro.cli(config_class, args=list(arguments))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except SystemExit as error:
        raise UserError(f"{origin}: no value that {program} takes; see its --help") from error


def in_a_file(program: str) -> str:
    """What `--help` says of files of settings."""
    own = ", or the config.json that it has written" if program.rpartition(".")[2] in WRITERS.values() else ""
    return (
        f"Settings may stand in a file, YAML or TOML{own}, as --config FILE; flags win over it. --print-config prints all "
        "settings as such a file, and ends."
    )


def parse(config_class: type[Config], arguments: Sequence[str], program: str, default: Any = None) -> Config:
    """As `tyro.cli`, but with errors of one line. Raises UserError, or SystemExit after `--help`.

    Args:
        default: a `config_class` whose values take the place of its own defaults; `tyro.MISSING` are those that must be given.
    """
    import tyro

    description = f"{(config_class.__doc__ or '').strip()}\n\n{in_a_file(program)}"
    try:
        with redirect_stderr(StringIO()):
            return tyro.cli(config_class, prog=program, args=list(arguments), default=default, description=description)
    except SystemExit as error:
        if not error.code:
            raise
    given = given_settings(config_class, arguments)
    values = {field.name: field.default for field in dataclasses.fields(config_class)} | (vars(default) if default else {})
    unknown = [name for name in given if name not in values]
    if unknown:
        raise UserError(no_setting(unknown[0], config_class, program, flag_of))
    needed = [name for name, value in values.items() if value is dataclasses.MISSING or value is tyro.MISSING]
    missing = [flag_of(name) for name in needed if name not in given]
    if missing:
        raise UserError(f"{', '.join(missing)}: must be given; see {program} --help")
    raise UserError(f"{_reason_of_tyro(config_class, arguments, program)}; see {program} --help")


def _reason_of_tyro(config_class: type[Config], arguments: Sequence[str], program: str) -> str:
    """What tyro writes in a box of several lines about a value that it does not take, in one line."""
    import tyro

    output = StringIO()
    # Wide enough that nothing is broken between lines.
    with mock.patch.dict(os.environ, COLUMNS="9999"), redirect_stderr(output), redirect_stdout(output), suppress(SystemExit):
        tyro.cli(config_class, prog=program, args=list(arguments))
    # A title, a line, and what is wrong; some terminals get a box around them.
    lines = [stripped for line in output.getvalue().splitlines() if (stripped := line.strip("╭╮╰╯│─-+| "))]
    reason = lines[1].rstrip(".") if len(lines) > 1 else "no command line that it takes"
    value = re.match(r"Error parsing (--[\w-]+): [^'\"]*(['\"].*['\"])", reason)
    if value is None:
        return reason
    kind: Any = get_type_hints(config_class)[setting_of(value[1])]
    while get_args(kind):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    return f"{value[1]}: {value[2]} is {NO_KIND[kind]}"
