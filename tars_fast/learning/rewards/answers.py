"""What a completion answered, and whether it kept to the format: pure string functions behind R_acc and R_fmt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from tars_fast.support.text import fold_answer

_FORMAT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def spellings(choices: Iterable[str], fold: Callable[[str], str]) -> list[str]:
    """What the choices look like in a text, longest first, so that `sixteen` is not read as `six`.

    With the folded forms a pattern that ignores case also finds what is longer or shorter in another case.
    """
    composed = (unicodedata.normalize("NFC", choice) for choice in choices)
    return sorted({spelling for choice in composed for spelling in (choice, fold(choice))}, key=lambda s: (-len(s), s))


def another_choice(names: str) -> str:
    """Pattern of what stands behind a choice that is one of several, or a part of one: "or B", "/ (B)", "twenty *one*".

    Args:
        names: pattern of a choice.
    """
    return rf"(?:[)\s\]*\"',]*(?:\b(?:or|and)\b|[/&|,])\s*[(\[*\"']*|\s+)(?:{names})(?!\w)"


@lru_cache(maxsize=1024)
def _statement(choices: tuple[str, ...]) -> re.Pattern[str]:
    names = "|".join(
        re.escape(name) if len(name) == 1 else f"(?i:{re.escape(name)})" for name in spellings(choices, fold_answer)
    )
    # An answer ends where the word does: neither "twenty-five" nor "twenty one" nor "5.5" nor "A or B" states its first part.
    end = rf"(?!\w|[-.,/:'\u2019]\w|{another_choice(names)})"
    return re.compile(rf"\b(?i:the (?:correct |final )?answer is):?\s*[(\[*\"']*(?P<name>{names}){end}")


@lru_cache(maxsize=1024)
def _by_name(choices: tuple[str, ...]) -> dict[str, str]:
    return {fold_answer(choice): choice for choice in choices}


def _stated(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that `text` states as the answer."""
    by_name = _by_name(tuple(choices))
    # The pattern takes letters for one that are not, as "İ" and "i": such a word is no choice.
    names = (fold_answer(match["name"]) for match in _statement(tuple(choices)).finditer(unicodedata.normalize("NFC", text)))
    return {by_name[name] for name in names if name in by_name}


def answer_blocks(completion: str) -> list[str]:
    """What stands in `<answer>` tags; a last block may lack its end."""
    return _ANSWER_BLOCK.findall(completion)


def extract_answer(completion: str, choices: Sequence[str]) -> str | None:
    """The one choice that the completion states as `The answer is X`, or None.

    Looks in the `<answer>` blocks where there are any, else in the whole completion. Two different statements, or none, are
    unparseable: never guessed.

    Args:
        completion: decoded text without special tokens.
        choices: the answer set; words are compared without regard to case, single letters with it.
    """
    blocks = answer_blocks(completion)
    stated = _stated("\n".join(blocks) if blocks else completion, choices)
    return stated.pop() if len(stated) == 1 else None


def has_format(completion: str, choices: Sequence[str]) -> bool:
    """The whole completion is `<think>...</think> <answer>... The answer is X ...</answer>`, X one of `choices`."""
    parts = _FORMAT.fullmatch(completion)
    if parts is None or _TAG.search(parts["think"]) or _TAG.search(parts["answer"]):
        return False
    return len(_stated(parts["answer"], choices)) == 1
