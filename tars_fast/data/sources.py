"""Rows of jsonl files with recordings beside them, of parquet files, and of datasets, saved or on the hub.

What the columns mean is for `items` to say. A recording is read when its bytes are asked for.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tars_fast.data.recordings import AUDIO_COLUMNS, find_recording, take_recording
from tars_fast.types import Recording, UserError

if TYPE_CHECKING:
    import pyarrow as pa

SHORT_NAMES = {
    "mmsu": "hlt-lab/voicebench:mmsu",
    "obqa": "hlt-lab/voicebench:openbookqa",
    "openbookqa": "hlt-lab/voicebench:openbookqa",
    **{name: f"hlt-lab/voicebench:{name}" for name in ("alpacaeval", "commoneval", "sd-qa", "bbh", "ifeval", "advbench")},
}
"""Short names of benchmarks on the hub."""

NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
"""NUL, which ends a text for espeak-ng and a name for the system, and half a character, which JSON can write."""

_LARGEST_IN_MEMORY = 64 * 2**20
"""Bytes of parquet files up to which they are read whole: at once, and without the package datasets and a copy in its cache."""
_ROWS_AT_ONCE = 1000
"""Rows that are turned into Python objects at a time."""


@dataclass(frozen=True)
class DatasetRecording:
    """A recording inside a dataset, which is read when its bytes are asked for."""

    place: str
    column: pa.ChunkedArray = field(compare=False, repr=False)
    """The dataset's column `audio`; see `take_recording`."""
    row: int
    folder: Path = field(compare=False)
    """Paths in the row are relative to it."""
    version: str = field(compare=False, repr=False)
    """Differs where the dataset differs."""
    in_messages: bool = field(default=False, compare=False, repr=False)
    """The column holds chat messages."""
    part: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    """Of a column of turns: which turn, and which of its recordings."""

    def read_bytes(self) -> bytes:
        try:
            value = self.column[self.row].as_py()
            if self.part is not None:
                value = _listed(value[self.part[0]]["audio"])[self.part[1]]
            content = take_recording(find_recording({"messages": value})[1] if self.in_messages else value)
        except ValueError as error:
            raise OSError(errno.EINVAL, f"its row's 'audio' {error}") from error
        if isinstance(content, str):
            path = self.folder / content
            if not path.is_file():
                raise OSError(errno.EIO, f"its row names {path}, which is not there")
            return path.read_bytes()
        if content is None:
            raise OSError(errno.ENODATA, "its row holds no audio")
        return content

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True)
class InlineRecording:
    """A recording inside a line."""

    place: str
    content: bytes = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.place


def stamp(recording: Recording | None) -> str:
    """A cheap fingerprint of a recording, which is not read for it: it changes when the recording changes.

    Size and time of the last change of a file, the dataset's version for a row of it; both where a row names a file.
    """
    import pyarrow as pa

    if recording is None:
        return "none"
    if isinstance(recording, InlineRecording):
        return hashlib.sha256(recording.content).hexdigest()
    if not isinstance(recording, DatasetRecording):
        try:
            status = Path(str(recording)).stat()
        except (OSError, ValueError):  # NUL in its name is the latter.
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"
    names_file = pa.types.is_string(recording.column.type) or pa.types.is_large_string(recording.column.type)
    named = recording.column[recording.row].as_py() if names_file else None
    file = stamp(recording.folder / named) if named else ""
    return f"{recording.version} {recording.row} {file}"


@dataclass(frozen=True)
class Row:
    """One row of a source as it stands there, good or bad."""

    source: str
    where: str
    """Line or row within the source."""
    values: object
    audio: Recording | None = None
    split: str = ""
    """The part of the source it comes from, where several are joined."""
    error: UserError | None = None
    """Why it cannot even be read."""
    audio_fault: str | None = None
    """What is wrong with its recording, behind the name of `audio_column`."""
    audio_column: str = "audio"
    turn_audio: tuple[tuple[Recording, ...], ...] = ()
    """The recordings of each entry of its column `turns`."""
    turn_fault: str | None = None
    """What is wrong with one of them."""

    @property
    def place(self) -> str:
        return f"{self.source}, {self.where}"


def read_rows(source: str) -> Iterator[Row]:
    """Read every row of a source: `PATH[@split]`, `owner/name[:configuration][@split]` of the hub, or one of `SHORT_NAMES`.

    Raises:
        UserError: there is nothing to read, or `source` does not say which split it means.
    """
    try:
        return _find_rows(source)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"data {source:.300}: cannot be read ({reason}); give a path, or owner/name of the hub") from error


def _find_rows(source: str) -> Iterator[Row]:
    name, configuration, split = _take_apart(source)
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if _is_saved_dataset(path) or (not found and any(path.rglob("*.parquet"))):
            return _read_dataset(source, name, None, split)
        if not found:
            raise UserError(f"data {path}: holds neither a jsonl file nor a dataset; name the file with the items")
        if len(found) > 1:
            raise UserError(f"data {path}: holds {len(found)} jsonl files; name the one to read")
        path = found[0]
    elif path.suffix == ".parquet" or (
        not path.exists() and path.suffix != ".jsonl" and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    ):
        return _read_dataset(source, name, configuration, split)
    if split is not None:
        raise UserError(f"data {source}: a jsonl file has no splits; leave @{split} out")
    return _read_lines(path)


def _take_apart(source: str) -> tuple[str, str | None, str | None]:
    """(path or name, configuration, split); a path that exists may itself hold `:` and `@`."""
    if Path(source).exists():
        return source, None, None
    base, separator, named = source.rpartition("@")
    base, split = (base, named) if separator else (source, None)
    if Path(base).exists():
        return base, None, split
    name, _, configuration = SHORT_NAMES.get(base, base).partition(":")
    return name, configuration or None, split


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _read_lines(path: Path) -> Iterator[Row]:
    try:
        # Not splitlines(): JSON text may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "give a jsonl file or a folder that holds one"
        raise UserError(f"data {path}: cannot be read ({error}); {remedy}") from error
    if path.suffix == ".json" and "".join(lines[:1]).lstrip().startswith("["):
        yield from _read_list(path, "\n".join(lines))
        return
    for number, line in enumerate(lines, start=1):
        row = Row(str(path), f"line {number}", None)
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # A number of thousands of digits is a plain ValueError.
            reason = UserError(f"{row.place}: not JSON ({error}); write one object a line")
            yield Row(row.source, row.where, None, error=reason)
            continue
        yield _with_recording(row, path.parent, values)


def _read_list(path: Path, text: str) -> Iterator[Row]:
    """The rows of a file that is one JSON list."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data {path}: not JSON ({error}); give a list of objects, or one object a line") from error
    for number, value in enumerate(values, start=1):
        yield _with_recording(Row(str(path), f"entry {number}", None), path.parent, value)


def _with_recording(row: Row, folder: Path, values: object) -> Row:
    """A row of a text file, with the recording that its values hold or name."""
    column, held = find_recording(values) if isinstance(values, dict) else ("audio", None)
    audio, fault = _line_audio(row.place, folder, held)
    turns, turn_fault = _turn_audio(row.place, folder, values, lambda place, _, content: InlineRecording(place, content))
    return dataclasses.replace(
        row,
        values=values,
        audio=audio,
        audio_fault=fault,
        audio_column=column,
        turn_audio=turns,
        turn_fault=turn_fault,
    )


def _listed(value: object) -> list[object]:
    """The recordings of a turn: one, or a list of them; a list of numbers is one that is none."""
    return value if isinstance(value, list) and not (value and isinstance(value[0], int | float)) else [value]


def _turn_audio(
    place: str, folder: Path, values: object, keep: Callable[[str, tuple[int, int], bytes], Recording]
) -> tuple[tuple[tuple[Recording, ...], ...], str | None]:
    """(the recordings of each entry of a row's `turns`, what is wrong with one of them).

    Args:
        keep: makes a recording of (what messages call it, turn and number within it, its content).
    """
    turns = values.get("turns") if isinstance(values, dict) else None
    found: list[tuple[Recording, ...]] = []
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        recordings: list[Recording] = []
        for part, held in enumerate(_listed(turn.get("audio") if isinstance(turn, dict) else None)):
            name = f"{place}, turn {number + 1}, recording {part + 1}"
            recording, fault = _line_audio(name, folder, held)
            if fault is not None:
                return (), f"turn {number + 1}: the recording in 'audio' {fault}"
            if isinstance(recording, InlineRecording):
                recording = keep(name, (number, part), recording.content)
            if recording is not None:
                recordings.append(recording)
        found.append(tuple(recordings))
    return tuple(found), None


def _line_audio(place: str, folder: Path, value: object) -> tuple[Recording | None, str | None]:
    """(the recording that a line holds or names, what is wrong with it)."""
    try:
        content = take_recording(value)
    except ValueError as error:
        return None, str(error)
    if isinstance(content, bytes):
        return InlineRecording(place, content), None
    if content is not None and (found := NO_TEXT.search(content)):
        return None, f"holds {found[0]!r}, which no text can hold; correct it"
    if content is not None and len(content.splitlines()) > 1:
        return None, f"is {content!r:.80}, a path with a line break; rename the file"
    return None if content is None else folder / content, None


_SPLITS_APART = frozenset({"train", "validation", "valid", "val", "dev", "test", "auxiliary_train"})
"""Splits that are never read together; splits of other names, such as the subjects of mmsu, are joined."""


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files by the split in their name, `law-00000-of-00001.parquet` or `train.parquet`; all others as "data"."""
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        numbered = re.fullmatch(r"(\w+)-\d+-of-\d+", file.stem)
        split = numbered[1] if numbered else file.stem
        files[split if numbered or split in _SPLITS_APART else "data"].append(file)
    return files


@dataclass(frozen=True)
class _Table:
    """One split of a dataset."""

    rows: pa.Table
    version: str
    """Differs where the dataset differs."""


def _load_tables(source: str, name: str, configuration: str | None) -> dict[str, _Table]:
    """Every split by its name, "" where a saved dataset has none."""
    path = Path(name)
    files = _split_files(path) if path.exists() and not _is_saved_dataset(path) else {}
    if files and sum(file.stat().st_size for found in files.values() for file in found) <= _LARGEST_IN_MEMORY:
        try:
            return {split: _read_parquet(found) for split, found in files.items()}
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(source, path, error) from error
    import datasets
    from huggingface_hub.utils import logging

    # The hub's client would log what is wrong at each of its retries; the error below says it once.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if files:
            # A row of parquet cannot be read by itself; from the copy that this makes in its cache it can.
            named = {split: [str(file) for file in found] for split, found in files.items()}
            loaded = datasets.load_dataset("parquet", data_files=named)
        elif path.exists():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, path, error) from error
    splits = {"": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return {split: _Table(part.with_format("arrow")[:], part._fingerprint) for split, part in splits.items()}


def _read_parquet(files: Sequence[Path]) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    states = [file.stat() for file in files]
    rows = pa.concat_tables([pq.ParquetFile(file).read() for file in files])
    return _Table(rows, " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in states))


def _unreadable(source: str, path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    remedy = "is it whole?" if path.exists() else "check the spelling; from the hub it needs the network"
    return UserError(f"data {source}: cannot be read as a dataset ({reason}); {remedy}")


def _choose_splits(source: str, tables: dict[str, _Table], split: str | None) -> dict[str, _Table]:
    """The splits that `source` means, by name where they are several that are joined; a single one by ""."""
    listed = ", ".join(filter(None, tables)) or "none"
    if split is not None:
        if split not in tables:
            raise UserError(f"data {source}: has no split {split!r}; it has {listed}")
        return {"": tables[split]}
    if len(tables) > 1 and not _SPLITS_APART.isdisjoint(tables):
        raise UserError(f"data {source}: has the splits {listed}; name one of them, as in {source}@{next(iter(tables))}")
    return tables if len(tables) > 1 else dict(zip([""], tables.values(), strict=True))


def _read_dataset(source: str, name: str, configuration: str | None, split: str | None) -> Iterator[Row]:
    folder = Path(name).parent if Path(name).is_file() else Path(name)
    for part, table in _choose_splits(source, _load_tables(source, name, configuration), split).items():
        column = _audio_column(source, table.rows)
        recordings = None if column is None else table.rows.column(column)
        for number, values in enumerate(_texts(table.rows, column)):
            where = f"{part}, row {number}" if part else f"row {number}"
            if values is None:
                yield Row(source, where, None, error=UserError(f"{source}, {where}: a text is not UTF-8; write it again"))
                continue
            audio = None
            if recordings is not None:
                place = f"{source}, {where}"
                audio = DatasetRecording(place, recordings, number, folder, table.version, column == "messages")

            def keep(
                place: str, at: tuple[int, int], _content: bytes, table: _Table = table, number: int = number
            ) -> DatasetRecording:
                return DatasetRecording(place, table.rows.column("turns"), number, folder, table.version, part=at)

            turns, fault = _turn_audio(f"{source}, {where}", folder, values, keep)
            yield Row(source, where, values, audio, part, turn_audio=turns, turn_fault=fault)


def _is_file(type_: pa.DataType) -> bool:
    """Whether a column holds files as {bytes, path}."""
    import pyarrow as pa

    return pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0


def _may_hold_recordings(type_: pa.DataType) -> bool:
    """See `take_recording`."""
    import pyarrow as pa

    types = pa.types
    if types.is_list(type_) or types.is_large_list(type_):
        return _may_hold_recordings(type_.value_type)
    if types.is_struct(type_):
        return any(type_.get_field_index(name) >= 0 for name in ("bytes", "data", "path", "array"))
    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(type_) for is_kind in kinds)


def _audio_column(source: str, rows: pa.Table) -> str | None:
    """The column with the recordings, None where there is none."""
    for name in (*AUDIO_COLUMNS, "messages"):
        if name in rows.column_names and (name == "messages" or _may_hold_recordings(rows.column(name).type)):
            return name
    if "audio" in rows.column_names:
        from datasets import Features

        feature = Features.from_arrow_schema(rows.schema)["audio"]
        raise UserError(f"data {source}: column 'audio' holds {feature}; it must hold whole files (Audio) or their paths")
    return None


def _texts(rows: pa.Table, audio: str | None) -> Iterator[dict[str, object] | None]:
    """Each row without its recording, and without pictures and other files; None where a text of it is not UTF-8.

    Args:
        audio: the column with the recordings; messages also hold the text.
    """
    dropped = {"audio", audio} - {"messages"}
    kept = [field.name for field in rows.schema if field.name not in dropped and not _is_file(field.type)]
    for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
        part = rows.slice(start, _ROWS_AT_ONCE).select(kept)
        try:
            yield from part.to_pylist() if kept else [{} for _ in range(part.num_rows)]
        except UnicodeDecodeError:
            yield from (_text(part, number) for number in range(part.num_rows))


def _text(rows: pa.Table, number: int) -> dict[str, object] | None:
    try:
        return rows.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
