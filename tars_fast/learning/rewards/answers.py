"""What a completion answered, and whether it kept to the format: pure string functions behind R_acc and R_fmt.

How an answer is written is the question's `answer_format`. `think` is the paper's, see `has_format`; under `plain` the whole
completion is the answer, or states it; a file brings two regular expressions. A choice counts where it is stated, an accepted
text where what is stated is the same but for case, punctuation and articles, a number where it is the only one that is stated.
Nothing is ever guessed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from tars_fast.data.transcription import normalised
from tars_fast.support.text import fold_answer, fold_case
from tars_fast.types import Question

_FORMAT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_SAYS = re.compile(r"\b(?:the (?:correct |final )?answer is):?", re.IGNORECASE)
_AROUND = " \t\n\r.,:;!?*\"'()[]{}<>\u201c\u201d\u2018\u2019"
_NUMBER = re.compile(
    r"(?<![\w.])(?P<number>[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)(?:/(?P<parts>[1-9]\d*))?"
)
_SENTENCE_END = re.compile(r"[.!?]\s")


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


def answer_part(completion: str) -> str:
    """What a completion answers, without its reasoning: the last `<answer>` block, else what follows the last `</think>`."""
    blocks = answer_blocks(completion)
    return (blocks[-1] if blocks else completion.rpartition("</think>")[2]).strip()


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


def same_text(left: str, right: str) -> bool:
    """Whether two answers differ in case, punctuation, spaces and English articles at most, as in SQuAD's exact match.

    Of answers that are nothing else, as "+" or "A", these count.
    """
    return _plainly(left) == _plainly(right)


@lru_cache(maxsize=4096)
def _plainly(text: str) -> str:
    folded = fold_case(text)
    words = re.sub(r"[^\w\s]|_", " ", folded).split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(folded.split())


def numbers_in(text: str) -> list[float]:
    """The different numbers of a text, in order: in digits, or where there are none in English words."""

    def found(text: str) -> list[float]:
        values = (_value(match) for match in _NUMBER.finditer(text))
        return [value for value in values if math.isfinite(value)]

    in_words = [] if any(character.isdigit() for character in text) else found(normalised(text))
    return list(dict.fromkeys(found(text) or in_words))


def _value(match: re.Match[str]) -> float:
    """Of a number or fraction; NaN where floats hold none of it."""
    number = float(match["number"].replace(",", "").replace("\u2212", "-"))
    parts = float(match["parts"] or 1)
    return number / parts if math.isfinite(parts) else math.nan


def read_answer(completion: str, question: Question) -> str | None:
    """The answer that a completion states, in the question's `answer_format`; None: none can be read.

    Of a question with choices it is one of them. Of an open one it is the accepted text that is meant, in its own spelling, or
    the number, or else the words that are stated, which `Question.is_right` then finds wrong.

    Args:
        completion: decoded text without special tokens.
        question: what it answers.
    """
    if question.answer_format.name == "think" and question.choices:
        return extract_answer(completion, question.choices)
    stated = _stated_words(completion, question)
    if stated is None:
        return None
    return _choice(stated, question.choices) if question.choices else _open_answer(stated, question)


def keeps_format(completion: str, question: Question) -> bool:
    """Whether a whole completion is written as the question's `answer_format` asks."""
    format = question.answer_format
    if format.name == "think" and question.choices:
        return has_format(completion, question.choices)
    if format.name == "think":
        parts = _FORMAT.fullmatch(completion)
        return parts is not None and not _TAG.search(parts["think"] + parts["answer"]) and bool(parts["answer"].strip())
    if format.whole:
        return _compiled(format.whole).fullmatch(completion) is not None
    return read_answer(completion, question) is not None and (format.name != "plain" or not _TAG.search(completion))


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


def _stated_words(completion: str, question: Question) -> str | None:
    """Where the answer stands; None: nowhere."""
    format = question.answer_format
    if format.name == "think":
        blocks = answer_blocks(completion)
        text = blocks[-1] if blocks else completion if _SAYS.search(completion) else ""
    elif format.name == "plain":
        text = completion
    else:
        matches = [match["answer"] for match in _compiled(format.answer).finditer(completion)]
        # A group that is optional may have matched nothing.
        text = (matches[-1] if matches else None) or ""
    return text.strip() or None


def _choice(stated: str, choices: tuple[str, ...]) -> str | None:
    """The choice that the words are, or state."""
    alone = _by_name(choices).get(fold_answer(stated)) or _by_name(choices).get(fold_answer(stated.strip(_AROUND)))
    found = _stated(stated, choices)
    return alone or (found.pop() if len(found) == 1 else None)


def _open_answer(stated: str, question: Question) -> str | None:
    """See `read_answer`."""
    *_, said = _SAYS.split(stated)
    line = next(iter(said.strip().splitlines()), "")
    candidates = dict.fromkeys((stated, said, line, _SENTENCE_END.split(line)[0]))
    for accepted in question.answer_text:
        if any(same_text(candidate, accepted) for candidate in candidates):
            return accepted
    if question.answer_number is not None:
        numbers = numbers_in(said)
        if len(numbers) == 1:
            return repr(numbers[0])
    return None if question.answer_number is not None and not question.answer_text else said.strip(_AROUND) or None
