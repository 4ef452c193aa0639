"""Files and folders that appear and disappear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Behind the name of what is still being written."""


def make_readable(*paths: Path) -> None:
    """Give files the mode that the user's umask asks for; safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


@contextmanager
def replaced_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` at the end, or never where an exception comes first."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        yield file
    partial.replace(path)


def remove_folder(path: Path) -> None:
    """Delete a folder that never stands under its name in part: a kill in between leaves it under another one."""
    doomed = path.with_name(f"{path.name}.deleted{PARTIAL}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_partial(folder: Path) -> None:
    """Delete what killed processes have left of files and folders they were writing or deleting in `folder`."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one go; text becomes UTF-8."""
    with replaced_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
