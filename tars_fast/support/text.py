"""Texts from outside, compared without regard to case and shown; sizes as text."""

from __future__ import annotations

import unicodedata

GB = 10**9
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def fold_case(text: str) -> str:
    """A form that texts share where they differ in case alone, or in whether an accent is a character of its own.

    Unicode's full case folding, in no language in particular: "STRASSE" and "Straße" are one, "İ" is no "i".
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def fold_answer(answer: str) -> str:
    """`fold_case` of a possible answer, except that a single letter keeps its case: "a" is also a word."""
    composed = unicodedata.normalize("NFC", answer)
    return composed if len(composed) == 1 else fold_case(answer)


def visible(text: str) -> str:
    """Control characters as escapes, so that none commands the terminal; line ends and tabs stay."""
    return text.translate(_CONTROLS)


def size(num_bytes: int) -> str:
    """A number of bytes as text, in GB of 1e9 or MB of 1e6 bytes."""
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB else f"{num_bytes / 10**6:.2f} MB"
