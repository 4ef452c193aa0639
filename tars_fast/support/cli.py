"""How every command starts and ends: settings from the command line, errors as one line, exit statuses."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from unittest import mock

from tars_fast.support.requirements import missing
from tars_fast.support.starting import INTERRUPTED as INTERRUPTED
from tars_fast.support.text import visible
from tars_fast.types import TrainingError, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")

FAILED = 1
MISUSED = 2


def answer_early(name: str, config_class: type[Config], program: str) -> None:
    """Answer `--help` and wrong settings where a module is run as a command, before its imports that take seconds.

    Args:
        name: the module's `__name__`.

    Raises:
        SystemExit: with status 0 after the help, 2 after one line about a wrong setting.
    """
    if name == "__main__":
        status = run_command(None, config_class, program)
        if status:
            sys.exit(status)


def run_command(
    command: Callable[[Config], int] | None,
    config_class: type[Config],
    program: str,
    resolve: Callable[[Config], object] = lambda config: config,
) -> int:
    """Parse the command line into `config_class`, run `command`, and return its exit status.

    1 where the work cannot go on, 2 where the user has something to put right, 130 after Ctrl-C; any other exception is a
    defect and propagates.

    Args:
        command: None: the command line is only checked.
        resolve: replaces settings that others decide by their values, for `--print-config`.
    """
    # Nothing that the terminal's encoding lacks, in a name or a path, ends the command where it is printed.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        config, is_printed = parse_command_line(config_class, sys.argv[1:], program)
        if command is None:
            return 0
        if is_printed:
            print(as_yaml(resolve(config)), end="")
            return 0
        return command(config)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return MISUSED
    except TrainingError as error:
        print(f"stopped: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def parse_command_line(config_class: type[Config], arguments: Sequence[str], program: str) -> tuple[Config, bool]:
    """(settings, whether they are to be printed instead) from a command line, which may name a file of settings by `--config`.

    Raises:
        UserError: the command line or the file holds something that `program` does not take.
        SystemExit: after `--help`.
    """
    from tars_fast.support.settings_file import read_settings_file, with_place

    given, path, is_printed = _take_file(arguments)
    if path is None:
        return _parse(config_class, given, program), is_printed
    kind: Any = config_class
    found = read_settings_file(path, kind, program)
    try:
        return _parse(config_class, [*found.arguments(kind, given), *given], program), is_printed
    except UserError as error:
        raise with_place(found, given, error) from error


def _take_file(arguments: Sequence[str]) -> tuple[list[str], Path | None, bool]:
    """(the other arguments, what follows --config, whether --print-config is among them)."""
    given, path, is_printed = [], None, False
    rest = iter(arguments)
    for argument in rest:
        if argument == "--print-config":
            is_printed = True
        elif argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or next(rest, None)
            if value is None or path is not None:
                raise UserError("--config: give one file of settings")
            path = Path(value)
        else:
            given.append(argument)
    return given, path, is_printed


_IN_A_FILE = (
    "Settings may stand in a file, YAML, TOML or the config.json of a run, as --config FILE; flags win over it. --print-config "
    "prints all settings as such a file, and ends."
)


def _parse(config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """As `tyro.cli`, but with errors of one line. Raises UserError, or SystemExit after `--help`."""
    import tyro

    description = f"{(config_class.__doc__ or '').strip()}\n\n{_IN_A_FILE}"
    try:
        with redirect_stderr(StringIO()):
            return tyro.cli(config_class, prog=program, args=list(arguments), description=description)
    except SystemExit as error:
        if not error.code:
            raise
    raise UserError(_message_of_tyro(config_class, arguments, program))


def _message_of_tyro(config_class: type[Config], arguments: Sequence[str], program: str) -> str:
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
    return f"{reason}{hint}; see {program} --help"


def as_yaml(config: object) -> str:
    """All settings as a file that `--config` takes."""
    import yaml

    fields: Any = config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(fields)}
    plain = {name: _plain(value) for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _one_line(error: Exception) -> str:
    return visible(str(error)).replace("\n", "\\n")


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


def new_output_folder(model: str, prefix: str = "") -> Path:
    """What `--output-dir None` stands for: runs/<prefix><model>-<date>-<time>, which is not made yet."""
    return Path("runs") / f"{prefix}{model.strip('/').rpartition('/')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"


def make_output_folder(output_dir: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be made ({error.strerror}); name another folder") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def require_extra(extra: str) -> None:
    """Raises UserError where a package that an extra brings is not installed."""
    problem = missing(extra)
    if problem is not None:
        raise UserError(problem)


def load_function(flag: str, name: str) -> Callable[..., Any]:
    """The function that `module:function`, the value of `flag`, names. Raises UserError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{function} is {type(found).__name__}, no function")
        return found
    # Whatever the module raises while it is imported, or `sys.exit`.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{flag} {name}: {first_line(error)}; give module:function, of a module that Python finds from here"
        ) from error


MAX_NAME = 255
"""Bytes in the name of a file, on all usual file systems."""
MAX_SEED = 2**32 - 1
"""Leaves room in torch's 64-bit seeds for one of every step."""


def check_numbers(config: object, *, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raises UserError for the first of these fields that is out of range, not finite, or too large for a seed; None passes."""
    for name in (*positive, *not_negative):
        value = getattr(config, name)
        flag = f"{flag_of(name)} {value}"
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{flag}: must be a number, not {type(value).__name__}")
        if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
            raise UserError(f"{flag}: must be {'greater than 0' if name in positive else '0 or greater'}, and finite")
        if name == "seed" and value > MAX_SEED:
            raise UserError(f"{flag}: must be at most {MAX_SEED}")


def check_choices(config: object) -> None:
    """Raises UserError for the first field that is none of its choices; the command line has its own check of them."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and (value := getattr(config, name)) not in get_args(kind):
            listed = ", ".join(map(str, get_args(kind)))
            raise UserError(f"{flag_of(name)} {value}: is none of {listed}")


def as_paths(config: object, *names: str) -> None:
    """Make paths of these fields where a caller gave texts. Raises UserError as `check_file_names`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            # The class is frozen.
            object.__setattr__(config, name, Path(value))
    check_file_names(config, *names)


def check_file_names(config: object, *names: str) -> None:
    """Raises UserError for the first of these fields that no file or folder can be called."""
    for name in names:
        value = getattr(config, name)
        longest = max(str(value).split("/"), key=len)
        # Systems count bytes, and fail in other ways over NUL and half characters.
        encoded = longest.encode(errors="surrogatepass")
        if len(encoded) > MAX_NAME or b"\0" in encoded:
            raise UserError(f"{flag_of(name)} {value!s:.60}...: holds a name of more than {MAX_NAME} bytes, or NUL; correct it")
