"""How every command starts and ends: settings from the command line, errors as one line, exit statuses."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tars_fast.support.requirements import missing
from tars_fast.types import TrainingError, UserError

Config = TypeVar("Config")

FAILED = 1
MISUSED = 2
INTERRUPTED = 130
"""What shells give a process that Ctrl-C ended."""


def answer_early(name: str, config_class: type[Config], program: str) -> None:
    """Answer `--help` and wrong settings where a module is run as a command, before its imports that take seconds.

    Args:
        name: the module's `__name__`.

    Raises:
        SystemExit: with status 0 after the help, 2 after one line about a wrong setting.
    """
    if name == "__main__":
        status = run_command(lambda _: 0, config_class, program)
        if status:
            sys.exit(status)


def run_command(command: Callable[[Config], int], config_class: type[Config], program: str) -> int:
    """Parse the command line into `config_class`, run `command`, and return its exit status.

    1 where the work cannot go on, 2 where the user has something to put right, 130 after Ctrl-C; any other exception is a
    defect and propagates.
    """
    import tyro

    try:
        return command(tyro.cli(config_class, prog=program))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def new_output_folder(model: str, prefix: str = "") -> Path:
    """What `--output-dir None` stands for: runs/<prefix><model>-<date>-<time>, which is not made yet."""
    return Path("runs") / f"{prefix}{model.strip('/').rpartition('/')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"


def make_output_folder(output_dir: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be made ({error.strerror}); name another folder") from error


def require_extra(extra: str) -> None:
    """Raises UserError where a package that an extra brings is not installed."""
    problem = missing(extra)
    if problem is not None:
        raise UserError(problem)


def load_function(flag: str, name: str) -> Callable[..., Any]:
    """The function that `module:function`, the value of `flag`, names. Raises UserError where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(f"{flag} {name}: {error}; give module:function, of a module that Python finds from here") from error


MAX_SEED = 2**32 - 1
"""Leaves room in torch's 64-bit seeds for one of every step."""


def check_numbers(config: object, *, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raises UserError for the first of these fields that is out of range, not finite, or too large for a seed; None passes."""
    for name in (*positive, *not_negative):
        value = getattr(config, name)
        flag = f"--{name.replace('_', '-')} {value}"
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
            raise UserError(f"{flag}: must be {'greater than 0' if name in positive else '0 or greater'}, and finite")
        if name == "seed" and value > MAX_SEED:
            raise UserError(f"{flag}: must be at most {MAX_SEED}")
