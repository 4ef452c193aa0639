"""Items with their recordings inside one parquet file, as `sources` reads it and `datasets.load_dataset` shows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tars_fast.support.files import replaced_atomically

_ROWS_PER_GROUP = 100
_BYTES_PER_GROUP = 64 * 2**20
"""A reader loads a whole group of rows at once, so a group ends when it has reached either of these numbers."""


def write_parquet(path: Path, items: Sequence[Mapping[str, object]], read_recording: Callable[[str], bytes]) -> None:
    """Write `path` whole or not at all, one row an item.

    Args:
        path: the file, replaced where it exists.
        items: as the lines of a jsonl file have them; `audio` names the recording.
        read_recording: name -> the bytes of a whole file, wav, flac, ogg or mp3; called once for each item, in order.

    Raises:
        OSError: it cannot be written, or a recording cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Audio, Features

    columns = dict.fromkeys(column for item in items for column in item if column != "audio")
    texts = pa.table({column: [item.get(column) for item in items] for column in columns})
    # With what tells `datasets` that the bytes are sound.
    schema = Features({**Features.from_arrow_schema(texts.schema), "audio": Audio()}).arrow_schema
    with (
        replaced_atomically(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer,
    ):
        row = 0
        for recordings in _groups([str(item["audio"]) for item in items], read_recording):
            audio = pa.array(recordings, schema.field("audio").type)
            writer.write_table(texts.slice(row, len(recordings)).append_column("audio", audio).cast(schema))
            row += len(recordings)
        writer.close()
        # What the recordings come from may be deleted next.
        file.flush()
        os.fsync(file.fileno())


def _groups(names: Sequence[str], read_recording: Callable[[str], bytes]) -> Iterator[list[dict[str, object]]]:
    group: list[dict[str, object]] = []
    size = 0
    for name in names:
        content = read_recording(name)
        group.append({"bytes": content, "path": name})
        size += len(content)
        if len(group) == _ROWS_PER_GROUP or size >= _BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
