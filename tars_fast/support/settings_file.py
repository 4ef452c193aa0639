"""Settings of a command in a file: YAML, TOML, or the config.json of a run.

A file's settings are turned into the command line that says the same, in front of the user's own, so that flags win and a
setting is checked in one way, wherever it comes from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tars_fast.support.command_line import as_arguments, flag_of, parse_arguments
from tars_fast.support.text import visible
from tars_fast.types import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RUN_FILE = "config.json"
"""What a run writes its settings into."""
_OF_ONE_RUN = ("output_dir", "resume", "dry_run", "data_fingerprint", "rewards")
"""What such a file holds beside the settings that another run can be given."""


@dataclass(frozen=True)
class FileSettings:
    """What a file says."""

    path: Path
    values: Mapping[str, Any]
    """By setting, with underscores."""
    lines: Mapping[str, int]
    """In which line of the file a setting is."""

    def place(self, name: str) -> str:
        """Where a setting is, for messages."""
        return f"{visible(str(self.path))}, line {self.lines.get(name, 1)}: {name}"

    def arguments(self, config_class: type[DataclassInstance], given: Sequence[str]) -> list[str]:
        """The command line that says the same, without settings that may stand there several times and are in `given`."""
        kinds = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
        arguments: list[str] = []
        for name, value in self.values.items():
            repeated = "UseAppendAction" in kinds[name]
            if value is None or (repeated and flag_of(name) in given):
                continue
            for one in value if repeated and isinstance(value, list) else [value]:
                arguments += as_arguments(config_class, {name: _as_text(one)})
        return arguments


def _as_text(value: object) -> str:
    """A value as a command line has it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def read_settings_file(path: Path, config_class: type[DataclassInstance], program: str) -> FileSettings:
    """Read a file, and check its settings without any others.

    Raises:
        UserError: it cannot be read, names a setting that `program` has not, or gives one a value that it does not take.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"--config {visible(str(path))}: cannot be read ({reason}); name a file of settings") from error
    values, lines = _parse(path, text)
    if path.name == RUN_FILE:
        values = {name: value for name, value in values.items() if name not in _OF_ONE_RUN}
    found = FileSettings(path, values, lines)
    known = [field.name for field in dataclasses.fields(config_class)]
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; do you mean {nearest[0]}?" if nearest else f"; see {program} --help"
            raise UserError(f"--config {found.place(name)}: no setting of {program}{hint}")
        if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, list | Mapping) for one in value)):
            raise UserError(f"--config {found.place(name)}: must be one value or a list of them")
    if not _is_taken(found, config_class, program):
        # One by one only then, since a run's file has a hundred of them.
        for name, value in values.items():
            if not _is_taken(dataclasses.replace(found, values={name: value}), config_class, program):
                raise UserError(f"--config {found.place(name)}: {value!r} is no value that {program} takes; see its --help")
    return found


def _is_taken(settings: FileSettings, config_class: type[DataclassInstance], program: str) -> bool:
    """Whether each value is of the setting's kind; what they mean may depend on others, and is looked at with those."""
    try:
        parse_arguments("", config_class, settings.arguments(config_class, ()), program)
    except UserError as error:
        return not isinstance(error.__cause__, SystemExit)
    return True


def with_place(settings: FileSettings, given: Sequence[str], error: UserError) -> UserError:
    """The same error, with the place in the file of the setting that it is about, if it came from there."""
    flag = re.match(r"--([a-z0-9-]+)", str(error))
    name = flag[1].replace("-", "_") if flag else ""
    if name not in settings.values or any(one.split("=")[0] == flag_of(name) for one in given):
        return error
    return UserError(f"--config {visible(str(settings.path))}, line {settings.lines.get(name, 1)}: {error}")


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(value by setting, line by setting)."""
    is_toml = path.suffix == ".toml"
    try:
        values, lines = _parse_toml(text) if is_toml else _parse_yaml(text)
    except (ValueError, TypeError) as error:
        kind, reason = "TOML" if is_toml else "YAML", str(error).partition("\n")[0]
        raise UserError(f"--config {visible(str(path))}: is no {kind} ({reason})") from error
    found = {name.replace("-", "_"): value for name, value in values.items()}
    return found, {name.replace("-", "_"): number for name, number in lines.items()}


def _parse_toml(text: str) -> tuple[dict[str, Any], dict[str, int]]:
    values = tomllib.loads(text)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key = re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line)
        if key is not None:
            lines.setdefault(key[1], number)
    return values, lines


def _parse_yaml(text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """JSON is YAML too."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("holds no settings by name")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"line {line}: {name} is there twice")
            lines[name] = line
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{place}{getattr(error, 'problem', None) or error}") from error
    return {str(name): value for name, value in values.items()}, lines
