"""Settings as a command line, through tyro: written, parsed, and what is wrong with it in one line."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from typing import TYPE_CHECKING, TypeVar
from unittest import mock

from tars_fast.types import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")


def flag_of(setting: str) -> str:
    """The command line's name of a setting."""
    return f"--{setting.replace('_', '-')}"


def as_arguments(config_class: type[DataclassInstance], settings: Mapping[str, str]) -> list[str]:
    """Write settings as the command line of the command that has `config_class`."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
    arguments = []
    for name, value in settings.items():
        flag = flag_of(name)
        if kinds[name] == "bool" and value.lower() in ("true", "false"):
            arguments.append(flag if value.lower() == "true" else flag.replace("--", "--no-", 1))
        elif kinds[name] == "bool | None":
            arguments += [flag, value.capitalize()]
        elif kinds[name].startswith("tuple"):
            arguments += [flag, *value.split()]
        else:
            arguments += [flag, value]
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


IN_A_FILE = (
    "Settings may stand in a file, YAML, TOML or the config.json of a run, as --config FILE; flags win over it. --print-config "
    "prints all settings as such a file, and ends."
)


def parse(config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """As `tyro.cli`, but with errors of one line. Raises UserError, or SystemExit after `--help`."""
    import tyro

    description = f"{(config_class.__doc__ or '').strip()}\n\n{IN_A_FILE}"
    try:
        with redirect_stderr(StringIO()):
            return tyro.cli(config_class, prog=program, args=list(arguments), description=description)
    except SystemExit as error:
        if not error.code:
            raise
    raise UserError(f"{_reason_of_tyro(config_class, arguments, program)}; see {program} --help")


def _reason_of_tyro(config_class: type[Config], arguments: Sequence[str], program: str) -> str:
    """What tyro writes in a box of several lines about arguments that it does not take, in one line."""
    import tyro

    output = StringIO()
    # Wide enough that nothing is broken between lines.
    with mock.patch.dict(os.environ, COLUMNS="9999"), redirect_stderr(output), redirect_stdout(output), suppress(SystemExit):
        tyro.cli(config_class, prog=program, args=list(arguments))
    # A title, a line, and what is wrong; some terminals get a box around them.
    lines = [stripped for line in output.getvalue().splitlines() if (stripped := line.strip("╭╮╰╯│─-+| "))]
    reason = lines[1].rstrip(".") if len(lines) > 1 else "no command line that it takes"
    kind = re.fullmatch(r"Error parsing (--[\w-]+): .*\{None\}\|(\w+) could be instantiated from \[(.*)\]", reason)
    if kind is not None:
        reason = f"{kind[1]}: {kind[3]} is no {kind[2]}"
    meant = re.search(r"Perhaps you meant:\n-*([\w-]+)", "\n".join(lines))
    hint = f"; do you mean --{meant[1]}?" if meant else ""
    return reason + hint
