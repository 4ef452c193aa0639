"""How every command starts and ends: settings from the command line, errors as one line, exit statuses."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tars_fast.support.command_line import flag_of as flag_of
from tars_fast.support.command_line import given_settings, parse, setting_of
from tars_fast.support.requirements import missing
from tars_fast.support.starting import INTERRUPTED as INTERRUPTED
from tars_fast.support.text import visible
from tars_fast.types import TrainingError, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

FAILED = 1
MISUSED = 2
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command is to be started again."""


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
    resolve: Callable[[Config], Config] = lambda config: config,
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
        return parse(config_class, given, program), is_printed
    found = read_settings_file(path, config_class, program)
    try:
        return parse(config_class, given, program, found.as_default(config_class, given)), is_printed
    except UserError as error:
        raise with_place(found, given_settings(config_class, given), error) from error


def _take_file(arguments: Sequence[str]) -> tuple[list[str], Path | None, bool]:
    """(the other arguments, what follows --config, whether --print-config is among them)."""
    given, path, is_printed = [], None, False
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--print-config", "--print_config"):
            is_printed = True
        elif setting_of(argument) == "config":
            value = argument.partition("=")[2] if "=" in argument else next(rest, "")
            if not value or path is not None:
                raise UserError("--config: give one file of settings")
            path = Path(value)
        else:
            given.append(argument)
    return given, path, is_printed


def as_yaml(config: DataclassInstance) -> str:
    """All settings as a file that `--config` takes."""
    import yaml

    return yaml.safe_dump(plain_settings(config), sort_keys=False, allow_unicode=True)


def plain_settings(config: DataclassInstance) -> dict[str, Any]:
    """All settings as JSON and YAML have them, so that they equal what is read again."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {name: str(value) for name, value in values.items() if isinstance(value, Path)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _one_line(error: Exception) -> str:
    return visible(str(error)).replace("\n", "\\n")


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
    """The function that `module:function` or `FILE.py:function`, the value of `flag`, names.

    Raises:
        UserError: there is none, or the module itself raises one.
    """
    module, _, function = name.rpartition(":")
    try:
        if not (module and function):
            raise ValueError("no module and function")
        if not module.endswith(".py") and not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"{module} is neither the name of a module nor a .py file")
        found = getattr(_import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{function} is {type(found).__name__}, no function")
        return found
    except UserError:
        raise
    # Whatever the module raises while it is imported, or `sys.exit`.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{flag} {name}: {first_line(error)}; give module:function, of a module that Python finds from here, or "
            "FILE.py:function"
        ) from error


def _import_file(path: Path) -> ModuleType:
    """A Python file as a module, once; it may import what lies beside it."""
    path = path.resolve()
    name = f"tars_fast_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    # Last: a file that is called like a module of the standard library hides none.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
        # Of one choice, several in a row, or one that may be left open.
        literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if literal is not None and one not in get_args(literal) and (one is not None or literal is kind):
                raise UserError(f"{flag_of(name)} {one}: is none of {', '.join(map(str, get_args(literal)))}")


def check_conditions(config: object, conditions: Sequence[tuple[Sequence[str], bool, str]]) -> None:
    """Raises UserError for the first field that is not as by default and has no effect.

    Args:
        conditions: (fields, whether they take effect, what they need).
    """
    for names, takes_effect, needed in conditions:
        for name in names:
            if not takes_effect and getattr(config, name) != getattr(type(config), name):
                raise UserError(f"{flag_of(name)} {getattr(config, name)}: has no effect without {needed}; leave it out")


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
