"""Rows of data from wherever they are: jsonl files with recordings beside them, parquet files, datasets saved or on the hub.

What the columns mean is for `data` to say. Recordings are left where they are until their bytes are asked for.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tars_fast.types import Recording, UserError

if TYPE_CHECKING:
    from datasets import Dataset

SHORT_NAMES = {
    "mmsu": "hlt-lab/voicebench:mmsu",
    "obqa": "hlt-lab/voicebench:openbookqa",
    "openbookqa": "hlt-lab/voicebench:openbookqa",
}
"""Benchmarks of the hub that a word names."""


@dataclass(frozen=True)
class DatasetRecording:
    """A recording inside a dataset; its bytes are read when they are asked for, and nothing is written anywhere."""

    place: str
    dataset: Dataset = field(compare=False, repr=False)
    """Has the column `audio`, not decoded."""
    row: int
    folder: Path = field(compare=False)
    """What a path in the row is relative to."""

    def read_bytes(self) -> bytes:
        value = self.dataset[self.row]["audio"]
        if isinstance(value, dict):
            value = value["bytes"] or value.get("path")
        if isinstance(value, str):
            path = self.folder / value
            if not path.is_file():
                raise OSError(errno.EIO, f"its row names {path}, which is not there")
            return path.read_bytes()
        if not value:
            raise OSError(errno.ENODATA, "its row holds no audio")
        return value

    def __str__(self) -> str:
        return self.place


def stamp(recording: Recording | None) -> str:
    """What is another one once a recording is another one, told without reading it.

    Size and time of the last change of a file, the dataset's own fingerprint for a row of it; both where a row names a file.
    """
    if recording is None:
        return "none"
    if not isinstance(recording, DatasetRecording):
        try:
            status = Path(str(recording)).stat()
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"
    feature = recording.dataset.features["audio"]
    names_file = getattr(feature, "dtype", None) in ("string", "large_string")
    named = recording.dataset[recording.row]["audio"] if names_file else None
    file = stamp(recording.folder / named) if named else ""
    return f"{recording.dataset._fingerprint} {recording.row} {file}"


@dataclass(frozen=True)
class Row:
    """What a source holds in one place, before it is understood."""

    source: str
    where: str
    """Within the source: line or row."""
    values: object
    audio: Recording | None = None
    split: str = ""
    """The part of the source it comes from, where several are joined."""
    error: UserError | None = None
    """It cannot even be read."""

    @property
    def place(self) -> str:
        return f"{self.source}, {self.where}"


def read_rows(source: str) -> Iterator[Row]:
    """Every row of a source: `PATH[@split]`, `owner/name[:configuration][@split]` of the hub, or one of `SHORT_NAMES`.

    Raises:
        UserError: nothing readable there, or it does not say which split it means.
    """
    name, configuration, split = _take_apart(source)
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if _is_saved_dataset(path) or (not found and any(path.rglob("*.parquet"))):
            return _read_dataset(source, name, None, split)
        if len(found) != 1:
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
    """(path or name, configuration, split); a path may hold any of the signs that separate them."""
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
    except (OSError, UnicodeDecodeError) as error:
        remedy = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "give a jsonl file or a folder that holds one"
        raise UserError(f"data {path}: cannot be read ({error}); {remedy}") from error
    for number, line in enumerate(lines, start=1):
        row = Row(str(path), f"line {number}", None)
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = UserError(f"{row.place}: not JSON ({error}); write one object a line")
            yield Row(row.source, row.where, None, error=reason)
            continue
        audio = values.get("audio") if isinstance(values, dict) else None
        named = audio.strip() if isinstance(audio, str) else ""
        yield Row(row.source, row.where, values, path.parent / named if named else None)


_SPLITS_APART = frozenset({"train", "validation", "valid", "val", "dev", "test", "auxiliary_train"})
"""Not to be mixed; splits of other names, such as the subjects of mmsu, are joined."""


def _split_files(path: Path) -> dict[str, list[str]]:
    """Parquet files by the split in their name, `law-00000-of-00001.parquet` or `train.parquet`; all others together."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        numbered = re.fullmatch(r"(\w+)-\d+-of-\d+", file.stem)
        split = numbered[1] if numbered else file.stem
        files[split if numbered or split in _SPLITS_APART else "data"].append(str(file))
    return files


def _load_splits(source: str, name: str, configuration: str | None, split: str | None) -> dict[str, Dataset]:
    import datasets
    from huggingface_hub.utils import logging

    # The error says it once; the hub's client says it at each of its retries.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(name)
    try:
        if _is_saved_dataset(path):
            loaded = datasets.load_from_disk(name)
        elif path.exists():
            loaded = datasets.load_dataset("parquet", data_files=_split_files(path))
        else:
            loaded = datasets.load_dataset(name, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        remedy = "is it whole?" if path.exists() else "check the spelling; from the hub it needs the network"
        raise UserError(f"data {source}: cannot be read as a dataset ({reason}); {remedy}") from error
    splits = {"": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    listed = ", ".join(filter(None, splits)) or "none"
    if split is not None:
        if split not in splits:
            raise UserError(f"data {source}: has no split {split!r}; it has {listed}")
        return {"": splits[split]}
    if len(splits) > 1 and not _SPLITS_APART.isdisjoint(splits):
        raise UserError(f"data {source}: has the splits {listed}; name one of them, as in {source}@{next(iter(splits))}")
    return splits if len(splits) > 1 else dict(zip([""], splits.values(), strict=True))


def _read_dataset(source: str, name: str, configuration: str | None, split: str | None) -> Iterator[Row]:
    from datasets import Audio, Value

    folder = Path(name).parent if Path(name).is_file() else Path(name)
    for part, dataset in _load_splits(source, name, configuration, split).items():
        recordings = None
        if "audio" in dataset.column_names:
            feature = dataset.features["audio"]
            if isinstance(feature, Audio):
                dataset = dataset.cast_column("audio", Audio(decode=False))
            elif not (
                (isinstance(feature, Value) and feature.dtype in ("string", "binary", "large_string", "large_binary"))
                or (isinstance(feature, dict) and "bytes" in feature)
            ):
                raise UserError(
                    f"data {source}: column 'audio' holds {feature}; it must hold whole files (Audio) or their paths"
                )
            recordings = dataset.select_columns("audio")
        # Without recordings, which would all be read, and without what would be decoded.
        texts = [column for column, feature in dataset.features.items() if column != "audio" and not hasattr(feature, "decode")]
        for number, values in enumerate(dataset.select_columns(texts)):
            where = f"{part}, row {number}" if part else f"row {number}"
            audio = None if recordings is None else DatasetRecording(f"{source}, {where}", recordings, number, folder)
            yield Row(source, where, values, audio, part)
