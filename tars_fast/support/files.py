"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""Behind the name of what is still being written."""


def make_readable(*paths: Path) -> None:
    """Give files the mode that the user's umask asks for; safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one go; text becomes UTF-8."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
