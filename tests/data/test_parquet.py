"""Items with their recordings inside a parquet file: what others read there, and that it is whole or not there."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, List, Value

from tars_fast.data import parquet
from tars_fast.data.items import load_questions
from tars_fast.data.parquet import write_parquet
from tars_fast.data.sources import read_rows

ITEMS = [
    {"id": "q1", "question": "Which?", "options": ["x", "y"], "answer": "B", "audio": "q1.flac", "seconds": 1.5},
    {"id": "q2", "question": "Größe?", "answer_set": ["one", "two"], "answer": "two", "audio": "q2.flac", "category": "size"},
]


def content(name: str) -> bytes:
    return f"sound of {name}".encode()


def test_every_field_and_recording_comes_back(tmp_path):
    path = tmp_path / "items.parquet"
    write_parquet(path, ITEMS, content)
    rows = list(read_rows(str(path)))
    assert [{name: value for name, value in row.values.items() if value is not None} for row in rows] == [
        {name: value for name, value in item.items() if name != "audio"} for item in ITEMS
    ]
    assert [row.audio.read_bytes() for row in rows] == [b"sound of q1.flac", b"sound of q2.flac"]
    assert [question.choices for question in load_questions(path)] == [("A", "B"), ("one", "two")]


def test_datasets_knows_that_it_is_sound(tmp_path):
    write_parquet(tmp_path / "items.parquet", ITEMS, content)
    rows = Dataset.from_parquet(str(tmp_path / "items.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows.features == {
        "id": Value("string"), "question": Value("string"), "options": List(Value("string")), "answer": Value("string"),
        "seconds": Value("float64"), "answer_set": List(Value("string")), "category": Value("string"), "audio": Audio(),
    }  # fmt: skip
    assert rows.cast_column("audio", Audio(decode=False))["audio"][1] == {"bytes": content("q2.flac"), "path": "q2.flac"}


def test_groups_of_rows_are_small(tmp_path, monkeypatch):
    """A reader needs a whole group at once, whatever one recording weighs."""
    monkeypatch.setattr(parquet, "_BYTES_PER_GROUP", 1000)
    items = [{"id": str(number), "audio": f"{number}"} for number in range(250)]
    write_parquet(tmp_path / "short.parquet", items, lambda name: b"x")
    write_parquet(tmp_path / "long.parquet", items[:50], lambda name: b"x" * (600 if name != "7" else 5000))
    groups = {}
    for name in ("short", "long"):
        metadata = pq.ParquetFile(tmp_path / f"{name}.parquet").metadata
        groups[name] = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == {"short": [100, 100, 50], "long": [2, 2, 2, 2] + [2] * 21}
    assert [row.values["id"] for row in read_rows(str(tmp_path / "long.parquet"))] == [item["id"] for item in items[:50]]


def test_it_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "items.parquet"
    write_parquet(path, ITEMS, content)
    before = path.read_bytes()

    def gone(name: str) -> bytes:
        if name == "q2.flac":
            raise FileNotFoundError(name)
        return b"another"

    with pytest.raises(FileNotFoundError):
        write_parquet(path, ITEMS, gone)
    assert path.read_bytes() == before
    write_parquet(path, ITEMS, content)
    assert path.read_bytes() == before, "the same items give the same bytes"


def test_no_items(tmp_path):
    write_parquet(tmp_path / "items.parquet", [], content)
    assert list(read_rows(str(tmp_path / "items.parquet"))) == []
