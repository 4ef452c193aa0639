"""Settings of a command in a file: YAML, TOML, or the config.json that a run of the same command has written.

A file's values take the place of the defaults that the command line is parsed with, so that flags win, and no value passes
through text.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tars_fast.support.command_line import NO_KIND, WRITERS, given_settings, no_setting
from tars_fast.support.text import visible
from tars_fast.types import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

_OF_ONE_RUN = ("output_dir", "resume", "resume_if_exists", "dry_run", "push_to_hub", "rewards", *WRITERS)
"""What the config.json of a run holds beside the settings that another run may have: that one has a place of its own, and
publishes where it is told to."""


@dataclass(frozen=True)
class FileSettings:
    """What a file says."""

    path: Path
    values: Mapping[str, Any]
    """By setting, with underscores; of the setting's kind."""
    lines: Mapping[str, int]
    """In which line of the file a setting is."""

    def as_default(self, config_class: type[Config], given: Sequence[str]) -> Config:
        """The settings that hold where the command line `given` says nothing.

        Nothing checks them together, since flags may say what they lack.
        """
        import tyro

        fields = {field.name: field.default for field in dataclasses.fields(config_class)}
        values = {name: tyro.MISSING if value is dataclasses.MISSING else value for name, value in fields.items()}
        # Those that may be given several times would be added to the file's.
        flags = given_settings(config_class, given)
        default = object.__new__(config_class)
        vars(default).update(values | {name: value for name, value in self.values.items() if name not in flags})
        return default


def read_settings_file(path: Path, config_class: type[DataclassInstance], program: str) -> FileSettings:
    """Read a file, and check its settings without any others.

    Raises:
        UserError: it cannot be read, names a setting that `program` has not, or gives one a value that it does not take.
    """
    shown = visible(str(path))
    try:
        # A pipe could be read only once, and `answer_early` reads it too.
        if path.exists() and not path.is_file():
            raise OSError(0, "no regular file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(f"--config {shown}: cannot be read ({reason}); name a file of settings") from error
    entries = _parse(path, text)
    writer = next((WRITERS[name] for name, value, _ in entries if name in WRITERS and isinstance(value, Mapping)), None)
    if writer is not None and len(entries) > 1:
        if not program.endswith(f".{writer}"):
            raise UserError(f"--config {shown}: is what a run of tars_fast.{writer} has written; give it to that command")
        entries = [entry for entry in entries if entry[0] not in _OF_ONE_RUN]
    kinds = get_type_hints(config_class)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, value, line in entries:
        if name in lines:
            raise UserError(
                f"--config {shown}, line {line}: {name} is there twice, first in line {lines[name]}; leave one of them out"
            )
        if name not in kinds:
            raise UserError(f"--config {shown}, line {line}: {no_setting(name, config_class, program)}")
        try:
            values[name], lines[name] = _as_kind(value, kinds[name]), line
        except ValueError as error:
            raise UserError(f"--config {shown}, line {line}: {name}: {error}; see {program} --help") from error
    return FileSettings(path, values, lines)


def _as_kind(value: Any, kind: Any) -> Any:
    """A file's value as one of a setting's kind. Raises ValueError with what it is not."""
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(_as_kind(one, get_args(kind)[0]) for one in (value if isinstance(value, list) else [value]))
    if isinstance(value, list | Mapping):
        raise ValueError(f"takes one value, no {'list' if isinstance(value, list) else 'settings'}")
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if value == choice and type(value) is type(choice):
                return choice
        raise ValueError(f"{value!r} is none of {', '.join(map(str, get_args(kind)))}")
    # YAML takes 4e-4 for a text, and names may be numbers.
    taken = {int: int | str, float: int | float | str, str: int | float | str, Path: str, bool: bool}[kind]
    try:
        if isinstance(value, taken) and (kind is bool or not isinstance(value, bool)):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{value!r} is {NO_KIND[kind]}")


def with_place(settings: FileSettings, flags: Iterable[str], error: UserError) -> UserError:
    """The same error, with the place in the file of the setting that it is about, if it came from there.

    Args:
        flags: settings that the command line gives.
    """
    flag = re.match(r"--(?:no-)?([a-z0-9-]+)", str(error))
    name = flag[1].replace("-", "_") if flag else ""
    if name not in settings.values or name in flags:
        return error
    return UserError(f"--config {visible(str(settings.path))}, line {settings.lines[name]}: {error}")


def _parse(path: Path, text: str) -> list[tuple[str, Any, int]]:
    """(setting with underscores, value, line) of each entry, in the file's order."""
    is_toml = path.suffix.lower() == ".toml"
    try:
        entries = _parse_toml(text) if is_toml else _parse_yaml(text)
    except (ValueError, TypeError, RecursionError) as error:
        kind, reason = "TOML" if is_toml else "YAML", str(error).partition("\n")[0]
        raise UserError(f"--config {visible(str(path))}: is no {kind} ({reason})") from error
    return [(name.replace("-", "_"), value, line) for name, value, line in entries]


def _parse_toml(text: str) -> list[tuple[str, Any, int]]:
    values = tomllib.loads(text)
    lines: dict[str, int] = {}
    rows = text.split("\n")
    start = 1
    for number in range(1, len(rows) + 1):
        try:
            known = tomllib.loads("\n".join(rows[:number]))
        except ValueError:
            # In the middle of a value.
            continue
        lines = dict.fromkeys(known, start) | lines
        start = number + 1
    return [(name, value, lines[name]) for name, value in values.items()]


def _parse_yaml(text: str) -> list[tuple[str, Any, int]]:
    """JSON is YAML too."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("holds no settings by name")
        return [(str(key.value), loader.construct_object(own, deep=True), key.start_mark.line + 1) for key, own in node.value]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{place}{getattr(error, 'problem', None) or error}") from error
