"""Standard output, as a terminal or as a file: lines of any length and tables on it, text from outside shown as it is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from tars_fast.support.text import visible

_WIDTH_OF_FILES = 200


class PlainConsole(Console):
    """A console to which text is text: `[b]` is no markup, `:x:` no picture, and control characters command no terminal."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        # What the terminal's encoding has no character for is shown as an escape, too.
        known = visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(known, **settings)


def open_console() -> PlainConsole:
    """Standard output. Where that is a file, tables are as wide as they need, not as wide as a terminal."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


def say(console: PlainConsole, message: str, colour: str = "") -> None:
    """Print a line of any length."""
    console.print(message, style=colour, soft_wrap=True)
