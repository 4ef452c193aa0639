"""What a completion answered, and whether it kept to the format: pure string functions behind R_acc and R_fmt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_FORMAT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


@lru_cache(maxsize=1024)
def _statement(choices: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that `sixteen` is not read as `six`; single letters keep their case: "a" is also a word.
    ordered = sorted(choices, key=len, reverse=True)
    names = "|".join(re.escape(name) if len(name) == 1 else f"(?ai:{re.escape(name)})" for name in ordered)
    # An answer ends where the word does: neither "twenty-five" nor "twenty one" nor "5.5" nor "A or B" states its first part.
    another = rf"(?:[)\s\]*\"',]*(?:\b(?:or|and)\b|[/&|,])\s*[(\[*\"']*|\s+)(?:{names})(?!\w)"
    end = rf"(?!\w|[-.,/:'\u2019]\w|{another})"
    return re.compile(rf"\b(?i:the (?:correct |final )?answer is):?\s*[(\[*\"']*(?P<name>{names}){end}")


def _stated(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that `text` states as the answer."""
    by_name = {_folded(choice): choice for choice in choices}
    return {by_name[_folded(match["name"])] for match in _statement(tuple(choices)).finditer(text)}


def _folded(choice: str) -> str:
    return choice if len(choice) == 1 else choice.casefold()


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
