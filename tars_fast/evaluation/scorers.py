"""Scorers read the answer from a completion, each in its own way; all of them read the same completions.

`strict` is `answers.read_answer`: training rewards it, and accuracy means it unless another scorer is named. It never
guesses. `voicebench` repeats the rules of VoiceBench's multiple-choice evaluator, silly ones included, so that published
figures can be compared. `letter` takes the option that the completion states in some form, else the one that it names last; it
stands in for xFinder, the 0.5 B model that finds the letter in the released TARS code (for its reward and its figures), and is
not that model. Open questions are read by `strict` alone, and have grades besides: see `GRADES`.

A new scorer is a function and its entry in `SCORERS`, at the end of this file; reports and tables show it from then on.
"""

from __future__ import annotations

import dataclasses
import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tars_fast.evaluation.voicebench import follows_instructions, refuses, task_answer
from tars_fast.learning.rewards.answers import another_choice, answer_blocks, answer_part, read_answer, spellings
from tars_fast.support.text import fold_case
from tars_fast.types import Question

VOICEBENCH_CHOICES = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Reading:
    """What one scorer read from one completion."""

    extracted: str | None
    """None: nothing could be read, and the scorer does not guess."""
    guessed: bool
    """Nothing could be read, and `extracted` is a random choice."""
    correct: bool


@dataclass(frozen=True)
class Grade:
    """How good a completion of an open question is."""

    value: float
    """0 to 1."""
    weight: float = 1.0
    """What it counts for in a mean: number of instructions."""


GRADES = {
    "exact": "exact match",
    "numeric": "right number",
    "judge": "judge's mark",
    "refusal": "refused",
    "ifeval_strict": "all instructions",
    "ifeval_loose": "all instructions, loose",
    "ifeval_instructions_strict": "instructions",
    "ifeval_instructions_loose": "instructions, loose",
}
"""Grades of open questions by name, with their titles; those from `refusal` on are VoiceBench's rules."""


# `X` stands for the option letter. Order decides where several match; between letters that match the same line, a wins over b.
_VOICEBENCH_FORMS = (
    "答案(?:是 ?|是选项|是\u2018|应该是 ?|就是选项)X",
    "是X\uff1a|答案选X|X是正确|选项X是最合适的",
    r"final answer: X|answer is:? \*\*X|the answer to the (?:question is:|multiple-choice question is) \*\*X",
    r"the answer is 'X'|X is the best answer",
    r"the answer is X",
    r"the correct answer is X",
    r"would (?:select|choose) (?:option )?X",
    r'is "X[".]',
    r"is:? \*\*X\)|is \*\*X[,:.]|is: \*\*X(?:[.:]|\*\*)",
    r"(?:be|as|with|suggests|be to) \*\*X\)|(?:be|as) \*\*X:|be \*\*X,|(?:is therefore|be) option \*\*X:",
    r"is: \n\n(?:\*\*)?X\)|is: \n\n\*\*X\*\*|is typically \"X\)|is likely to be: \*\*X\.",
    r"is \*\*X \(|is (?:option|likely) \*\*X\*\*",
    r"is:\n\n?\*\*X\.",
    r"would be (?:option )?(?:X|\(X\))",
    r"is (?:typically )?X,|is typically X\.",
    r"i'd say X\.|option X[.:,]",
    r"the answer is:\n\*\*X",
    r"is X[:.]|is: X\.|is \(X\)",
    r"is:\n\*\*X\)|is likely \*\*X:|is the \*\*X\)",
    r":\n{1,2}X[.),]|: {1,2}\nX\.|: \n\nX\.|is most likely \*\*X:",
    r"\(X\) would be|is:? X\)|is:\n\nX:|is: \*\*X,|\(option X\)",
    r"answer: X|answer is:\n{1,2}X|select option \"X\"|is: X",
    r"is typically \*\*X,|is \*\*X\*\*|is (?:likely|option) 'X'|is:\n\*\*X:|would be 'X'|is the \*\*X\*\* ",
    r"question is X \(|is:\n\n\*\*X|(?:closest|corresponds) to option \*\*X\*\*|is most likely \*\*X[),]",
    r"the answer to the question is 'X'|known as 'X'|is 'X\)|is typically \*\*X:",
    r"is \\\( \\boxed\{(?:X[ })]|\\text\{X\}\} \\\))",
    r"is \\\( \\(?:text|textbf|mathbf)\{X\}|is \\\( \\text\{X[.:)]|is \\\( \\textbf\{X\)",
    r"is:\n\\\[ \\boxed\{(?:X|\\text\{X\})\}|is:\n\n?\\\[ \\text\{X\)|is: \\\( \\text\{X[.)]|is \\\(\\text\{X\.",
    r"is:\n\\\( \\textbf\{X\.|is \} \\mathbf\{X\.|is \\\( ?X ?\\\)",
    r"corresponds to:\n- \*\*X:|would be: \*\*X\*\*\.|is:\n\*\*X |be \*\*X\*\*|be: \n\nX\)",
    r"is: {1,2}\n(?:  \n)?\*\*X:|is:\n  \n\*\*X:",
    r"is likely: \*\*X,|is option \*\*X |was option \*\*X\*\*|is (?:likely )?\"X\)|option \*\*X:|is often \*\*X:|is:  \nX\)",
    r"is:\n(?:\*\*)?X",
    *(rf" X{re.escape(mark)}" for mark in ".,:)"),
    *(rf"\*\*X{re.escape(mark)}" for mark in ".):"),
    *(rf'"X{re.escape(mark)}' for mark in ".,:"),
    r"\(X\)",
    r'"X"|\{X\}|\n\n\*\*X|would be:\n\nX',
)
_VOICEBENCH = [[re.compile(form.replace("X", letter)) for letter in "abcd"] for form in _VOICEBENCH_FORMS]


def voicebench_answer(completion: str, _choices: Sequence[str] = VOICEBENCH_CHOICES) -> str | None:
    """The letter A to D that VoiceBench's multiple-choice evaluator reads, or None where it would guess one.

    Its rules (github.com/MatthewCYM/VoiceBench, src/evaluator/mcq.py, Apache-2.0; arXiv 2410.17196): the completion in lower
    case is searched, anywhere and without regard to word boundaries, for a long ordered list of phrases with a letter in them,
    and the first phrase decides; failing that the completion is a letter, or begins with one and a full stop, comma, colon or
    bracket. So "The answer is a tundra, so B." is A. Ours puts neighbouring phrases into one pattern: where a completion holds
    several phrases of one pattern with different letters, the first letter of the alphabet wins, not the first phrase.
    """
    text = completion.lower()
    if text.startswith(("<1>", "<2>", "<3>")):
        text = text[3:].strip()
    for patterns in _VOICEBENCH:
        for letter, pattern in zip(VOICEBENCH_CHOICES, patterns, strict=True):
            if pattern.search(text):
                return letter
    if text in ("a", "b", "c", "d") or (text[:1] in ("a", "b", "c", "d") and text[1:2] in (".", ",", ":", ")")):
        return text[0].upper()
    return None


_CONTEXT = 200
"""Characters on each side that decide what a name is meant as; completions may be one name thousands of times."""
# What makes a lower-case letter, or an "A" that could be an article, a mention of the option.
_LED = re.compile(
    r"(?:\b(?:answer|option|choice|choose|select|pick)s?(?: is| to| was| would be| should be)?:?|boxed\{(?:\\text\{)?"
    r"|答案是?|选项?)[ \"'(*:]*$",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:\b(?:not|isn't|neither|nor|than|instead of|rules? out|eliminates?)|不是|不选)(?: option)? *[\"'(*]*$", re.IGNORECASE
)
_STATED = re.compile(
    r"(?:\banswer(?: to (?:the|this) question)?(?: is|:)(?: option)?|boxed\{(?:\\text\{)?"
    r"|答案(?:是|[:\uff1a])(?:选项)?)[\s\"'(\[*:]*$",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[)\s\]*\"'}]*[?\uff1f]")
# Behind "A", the start of a sentence rather than of a reason: "A tundra", but not "A is", "A because".
_NOUN_AFTER = re.compile(r" (?!(?:is|was|would|as|because|since|and|or|but|seems|looks|fits)\b)[a-z]")


# \b does not stand between a Chinese character and a letter: both are word characters. Thai, Chinese, Japanese and Korean write
# without spaces, or words and their endings as one.
_LETTER = r"[^\W_\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]"


def _any_of(choices: Sequence[str]) -> str:
    return "|".join(map(re.escape, spellings(choices, fold_case)))


@lru_cache(maxsize=1024)
def _another(choices: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(another_choice(_any_of(choices)), re.IGNORECASE)


@lru_cache(maxsize=1024)
def _named(choices: tuple[str, ...]) -> re.Pattern[str]:
    names = _any_of(choices)
    before = rf"(?<!{_LETTER})(?<!['\u2019-])(?<!\d[.,](?=\d))"
    return re.compile(rf"{before}(?P<name>{names})(?!{_LETTER}|['\u2019-]\w|(?<=\d)[.,]\d)", re.IGNORECASE)


def _is_mention(name: str, before: str, after: str) -> bool:
    """Whether a name of a choice, as it stands between `before` and `after`, is meant as one."""
    if len(name) > 1 or not name.isalpha():
        return True
    if not before.strip(" \n\"'(*[") and (after.startswith((".", ")", ":")) or not after.strip(" \n\"')*].,:")):
        return True
    if _LED.search(before):
        # "The answer is a tundra": no option either.
        return name.isupper() or not _NOUN_AFTER.match(after)
    return name.isupper() and not (name in "AI" and _NOUN_AFTER.match(after))


def letter_answer(completion: str, choices: Sequence[str]) -> str | None:
    """The choice that the completion states, else the one that it names last, or None where it names none.

    Looks in the last `<answer>` block, else behind the last `</think>`, else everywhere. Stated is what stands last behind
    "answer is" or "answer:" or in a `\\boxed{}`, but not what is asked ("The answer is A?") or one of several ("A or B").
    A choice that is negated ("not A") does not count. A letter in lower case counts where it is all there is or leads a list
    ("c)"), or stands behind "answer", "option", "choice" or in a `\\boxed{}`; so does an "A" or "I" that could be a word of the
    sentence.

    Args:
        completion: decoded text without special tokens.
        choices: the answer set; words are compared without regard to case.
    """
    blocks = answer_blocks(completion)
    text = blocks[-1] if blocks else completion.rpartition("</think>")[2]
    text = unicodedata.normalize("NFC", text)
    by_name = {fold_case(choice): choice for choice in choices}
    # Of two that differ in case alone the one that is spelt like this.
    by_name |= {unicodedata.normalize("NFC", choice): choice for choice in choices}
    named = None
    for match in reversed(list(_named(tuple(choices)).finditer(text))):
        start, end = match.span()
        name, before, after = match["name"], text[max(0, start - _CONTEXT) : start], text[end : end + _CONTEXT]
        # The pattern takes letters for one that are not, as "İ" and "i": such a word is no choice.
        choice = by_name.get(name) or by_name.get(fold_case(name))
        if choice is None or _NEGATED.search(before) or not _is_mention(name, before, after):
            continue
        if _STATED.search(before) and not _ASKED.match(after) and not _another(tuple(choices)).match(after):
            return choice
        named = named or choice
    return named


@dataclass(frozen=True)
class Scorer:
    """One way of reading answers."""

    read: Callable[[str, Question], str | None]
    """From a completion and what it answers to one of the choices, or any text where there are none; None: nothing is read."""
    choices: tuple[str, ...] | None = None
    """The only answer set that it knows; completions of other questions have no reading by it. None: it knows all."""
    guesses: bool = False
    """Whether it guesses one of the choices where it could read none."""

    def knows(self, question: Question) -> bool:
        """Whether it reads completions of a question: all that training rewards read, others those with choices."""
        if self.choices is not None and question.rule == "bbh":
            return True
        return not question.is_open and (self.choices is None or question.choices == self.choices)


def _read_as_voicebench(completion: str, question: Question) -> str | None:
    if question.rule == "bbh":
        return task_answer(answer_part(completion), question.category)
    return voicebench_answer(completion)


STRICT = "strict"
SCORERS: dict[str, Scorer] = {
    STRICT: Scorer(read_answer),
    "voicebench": Scorer(_read_as_voicebench, VOICEBENCH_CHOICES, guesses=True),
    "letter": Scorer(lambda completion, question: letter_answer(completion, question.choices)),
}
"""All scorers by name, in the order of reports."""


class ScorerError(Exception):
    """A scorer failed on a completion; the message names the scorer."""


def read_strictly(completion: str, question: Question) -> Reading:
    """What `strict` reads, by which training rewards and accuracy is meant."""
    extracted = read_answer(completion, question)
    return Reading(extracted, False, question.is_right(extracted))


def grade_by_rule(completion: str, question: Question, readings: Mapping[str, Reading]) -> dict[str, Grade]:
    """The grades of a completion of an open question by name in `GRADES`, without the judge's.

    VoiceBench's rules are for what the completion answers, not for its reasoning: the last `<answer>` block, else what stands
    behind the last `</think>`.

    Args:
        readings: see `read_completion`.

    Raises:
        ScorerError: a rule raised something.
    """
    if not question.is_open:
        return {}
    grades: dict[str, Grade] = {}
    if "strict" in readings:
        extracted = readings["strict"].extracted
        if question.answer_text:
            grades["exact"] = Grade(float(extracted in question.answer_text))
        if question.answer_number is not None:
            number = dataclasses.replace(question, answer="", answer_text=())
            grades["numeric"] = Grade(float(number.is_right(read_answer(completion, number))))
    answer = answer_part(completion)
    try:
        if question.rule == "refusal":
            grades["refusal"] = Grade(float(refuses(answer)))
        if question.rule == "ifeval":
            for name, followed in zip(
                ("strict", "loose"), follows_instructions(answer, question.text, question.instructions), strict=True
            ):
                grades[f"ifeval_{name}"] = Grade(float(all(followed)))
                grades[f"ifeval_instructions_{name}"] = Grade(sum(followed) / len(followed), len(followed))
    except Exception as error:
        raise ScorerError(f"rule {question.rule!r} raised {error!r:.200} on {completion!r:.200}") from error
    return grades


def read_completion(completion: str, question: Question, key: str) -> dict[str, Reading]:
    """The reading of a completion by every scorer that knows the answer set, by the scorer's name; none without an answer.

    Args:
        completion: decoded text without special tokens.
        question: what it answers.
        key: seed of guesses; the same for the same item, modality and seed of a run.

    Raises:
        ScorerError: a scorer raised something, or read what is none of the choices.
    """
    readings: dict[str, Reading] = {}
    choices = question.choices
    if not question.has_answer:
        return readings
    for name, scorer in SCORERS.items():
        if name != STRICT and not scorer.knows(question):
            continue
        try:
            extracted = scorer.read(completion, question)
        except Exception as error:
            raise ScorerError(f"scorer {name!r} raised {error!r:.200} on {completion!r:.200}") from error
        if extracted is not None and (not isinstance(extracted, str) or (choices and extracted not in choices)):
            raise ScorerError(f"scorer {name!r} read {extracted!r:.80} from {completion!r:.200}, which is none of the choices")
        guessed = extracted is None and scorer.guesses
        if guessed:
            extracted = random.Random(key).choice(choices)
        readings[name] = Reading(extracted, guessed, question.is_right(extracted))
    return readings
