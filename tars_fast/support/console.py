"""Standard output, as a terminal or as a file: lines of any length and tables on it, text from outside shown as it is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

_WIDTH_OF_FILES = 200
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class PlainConsole(Console):
    """A console to which text is text: `[b]` is no markup, `:x:` no picture, and control characters command no terminal."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(self.visible(text), **settings)

    def visible(self, text: str) -> str:
        """Control characters, and what the terminal's encoding has no character for, as escapes."""
        return text.translate(_CONTROLS).encode(self.encoding, "backslashreplace").decode(self.encoding)


def open_console() -> PlainConsole:
    """Standard output. Where that is a file, tables are as wide as they need, not as wide as a terminal."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


def say(console: PlainConsole, message: str, colour: str = "") -> None:
    """Print a line of any length."""
    console.print(message, style=colour, soft_wrap=True)
