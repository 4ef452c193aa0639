"""A few of the bundled items: a run on all of them would decode all of them before its first step."""

from __future__ import annotations

from pathlib import Path


def first_items(source: Path, count: int, folder: Path) -> Path:
    """Make `folder` hold the first `count` items of a bundled set with their recordings, as a user's own would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.stem).symlink_to(source.parent / source.stem)
    (folder / "items.jsonl").write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return folder
