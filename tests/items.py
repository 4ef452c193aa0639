"""A few of the bundled items: a run on all of them would decode all of them before its first step."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tars_fast.data.items import read_items


def first_items(source: Path, count: int, folder: Path) -> Path:
    """Make `folder` hold the first `count` items of a bundled set as a user's own: a jsonl file, and a recording for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for item in islice(read_items(source), count):
        audio = f"recordings/{item.question.id}.ogg"
        (folder / audio).parent.mkdir(exist_ok=True)
        (folder / audio).write_bytes(item.audio.read_bytes())
        lines.append(json.dumps({**item.fields, "audio": audio}) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))
    return folder
