"""Data types that everything else uses. Shapes: N completions, T tokens, A audio tokens, D hidden size, L layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Modality(StrEnum):
    """What a completion was conditioned on."""

    SPEECH = "speech"
    TEXT = "text"


class UserError(Exception):
    """Something only the user can put right; the command prints the one line and exits with status 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (non-finite loss, nothing to learn from); the last checkpoint stays, exit status 1."""


LongAudio = Literal["refuse", "chunk", "truncate"]
"""What becomes of a recording longer than the model encodes at once."""


class Recording(Protocol):
    """Where a recording's bytes are: a `Path`, or a row of a dataset. Hashable, and equal only to the same place."""

    def read_bytes(self) -> bytes:
        """The whole file as it was written, wav, flac, ogg or mp3. Raises OSError where it cannot be read."""
        ...

    def __str__(self) -> str:
        """What messages call it."""
        ...


@dataclass(frozen=True)
class Turn:
    """A turn of the conversation before a question."""

    role: Literal["user", "assistant"]
    text: str
    """As the written prompt has it, and the spoken one where there are no recordings."""
    recordings: tuple[Recording, ...] = ()
    """What the spoken prompt has in the place of the text, in order; of a user's turn only."""


@dataclass(frozen=True)
class AnswerFormat:
    """How completions write their answer, and how it is read back; see `tars_fast.learning.rewards.answers`."""

    name: str
    """`think`, `plain`, or the file that it comes from."""
    instruction: str
    """What a prompt says of it, in words."""
    answer: str = ""
    """Of a file: regular expression of which a group `answer` is the answer; of several matches the last counts."""
    whole: str = ""
    """Of a file: regular expression that a whole completion in this format matches, behind R_fmt."""


THINK = AnswerFormat(
    "think",
    "The assistant first thinks about the question and then gives the answer. The reasoning stands in <think> </think>, the "
    "answer in <answer> </answer> as: The answer is [ANSWER].",
)
"""The paper's: the reasoning in `<think>`, the answer as `The answer is X` in `<answer>`."""


@dataclass(frozen=True)
class Question:
    """One item: the same question written and, where `audio` is set, spoken."""

    id: str
    text: str
    """As written in the text prompt, lettered options included."""
    answer: str = ""
    """The reference answer, one of `choices`; empty: unknown, see `has_answer`."""
    choices: tuple[str, ...] = ()
    """The answer set: what may stand for X in `The answer is X`; empty: unknown."""
    audio: Recording | None = None
    category: str = ""
    """Part of the benchmark it comes from, for accuracy by category."""
    transcript: str | None = None
    """What the recording says, where that is known."""
    same_as_answer: tuple[str, ...] = ()
    """Other choices under which the question shows the answer's own text, as some published ones do."""
    answer_text: tuple[str, ...] = ()
    """Of a question without choices: the accepted answers in words, the first of which is the reference."""
    answer_number: float | None = None
    """Of a question without choices: the answer as a number."""
    rubric: str = ""
    """What a judge is to grade a completion by, in words."""
    rule: str = ""
    """VoiceBench's rule that grades it: `bbh`, `ifeval`, `refusal`; empty: none."""
    instructions: tuple[tuple[str, str], ...] = ()
    """Of `ifeval`: the instructions that completions must follow, as (name, arguments in JSON)."""
    turns: tuple[Turn, ...] = ()
    """The conversation before the question, in order."""
    about_audio: bool = False
    """The recording is what the question is about, not the question spoken: the spoken prompt has the question behind it."""
    answer_format: AnswerFormat = THINK
    """How its completions write their answer."""

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """Of its spoken prompt, in order: those of the turns before it, then its own."""
        own = () if self.audio is None else (self.audio,)
        return (*(recording for turn in self.turns for recording in turn.recordings), *own)

    @property
    def is_open(self) -> bool:
        """Whether completions answer in their own words or with a number: there are no choices."""
        return not self.choices

    @property
    def is_judged(self) -> bool:
        """Whether a judge grades completions in an evaluation: it is open, and VoiceBench has no rule for it."""
        return self.is_open and not self.rule

    @property
    def has_answer(self) -> bool:
        """Whether a rule can grade completions: there is a right choice, an accepted text or a number; a rubric is for a judge.

        Other items, also plain transcripts, are for objectives without such a reward.
        """
        return bool(self.answer or self.answer_text) or self.answer_number is not None

    def is_graded(self, *, judged: bool) -> bool:
        """Whether an evaluation has a figure for it: it has an answer or a rule, or is open and a judge is there."""
        return self.has_answer or bool(self.rule) or (judged and self.is_open)

    @property
    def reference(self) -> str:
        """The right answer in words, as a judge is told it; empty where none is known."""
        number = "" if self.answer_number is None else f"{self.answer_number:.15g}"
        return self.answer or next(iter(self.answer_text), number)

    def is_right(self, answer: str | None) -> bool:
        """Whether a completion that states `answer` is right, as `answers.read_answer` reads it; None: it states none.

        Of an open question that is one of `answer_text` in its own spelling, or a number that differs from `answer_number` by a
        millionth of it at most.
        """
        if answer is None or not self.has_answer:
            return False
        if answer == self.answer or answer in self.same_as_answer or answer in self.answer_text:
            return True
        try:
            return self.answer_number is not None and math.isclose(
                float(answer), self.answer_number, rel_tol=1e-6, abs_tol=1e-9
            )
        except ValueError:
            return False


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt; every audio placeholder already stands once per audio token."""

    modality: Modality
    token_ids: tuple[int, ...]
    audio_clips: tuple[Tensor, ...] = ()
    """Embeddings of each clip of the recording, [A, D], in order; none for a written prompt."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of one prompt."""

    question: int
    """Index of the question within the rollout batch."""
    modality: Modality
    token_ids: tuple[int, ...]
    """The stop token is included where one was produced."""
    rollout_logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was sampled from, in nats."""
    text: str
    """Decoded without the stop token."""
    truncated: bool
    """No stop token within the length limit."""
    routed_experts: Tensor | None = field(default=None, compare=False)
    """[P + T - 1, L, K] int16 experts that the engine chose, in each layer, for the tokens of prompt and completion but the
    last; None where it says none."""
