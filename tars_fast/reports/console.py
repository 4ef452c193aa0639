"""Standard output, as a terminal or as a file, and lines of any length on it."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_FILES = 200


def open_console() -> Console:
    """Standard output. Where that is a file, tables are as wide as they need, not as wide as a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


def say(console: Console, message: str) -> None:
    """Print a line of any length."""
    console.print(message, highlight=False, soft_wrap=True)
