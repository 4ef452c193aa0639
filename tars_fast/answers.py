"""What a completion answered, and whether it kept to the format (METHOD: R_acc and R_fmt). Pure string functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCKS = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<answer>(?P<answer>.*?)(?:</answer>|\Z)", re.DOTALL)


def _stated(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that `text` states as the answer; case of a choice counts for letters only."""
    by_name = {choice if len(choice) == 1 else choice.casefold(): choice for choice in choices}
    # Longest first, so that `sixteen` is not read as `six`.
    names = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    pattern = rf"[Tt]he (?:correct )?answer is:?\s*[\(\[\*\"']*(?P<name>{names}|(?i:{names}))(?![\w])"
    found = (match["name"] for match in re.finditer(pattern, text))
    return {by_name[name if len(name) == 1 else name.casefold()] for name in found if len(name) > 1 or name in by_name}


def extract_answer(completion: str, choices: Sequence[str]) -> str | None:
    """The one choice that the completion states as `The answer is X`, or None.

    Looks in the `<answer>` block where there is one, else in the whole completion. Two different statements, or none, are
    unparseable: never guessed.

    Args:
        completion: decoded text without special tokens.
        choices: the answer set.
    """
    block = _ANSWER_BLOCK.search(completion)
    stated = _stated(block["answer"] if block else completion, choices)
    return stated.pop() if len(stated) == 1 else None


def has_format(completion: str, choices: Sequence[str]) -> bool:
    """The whole completion is `<think>...</think> <answer>... The answer is X ...</answer>`, X one of `choices`."""
    blocks = _BLOCKS.fullmatch(completion)
    if blocks is None or any(tag in blocks["think"] + blocks["answer"] for tag in ("<think>", "<answer>", "</think>")):
        return False
    return len(_stated(blocks["answer"], choices)) == 1
