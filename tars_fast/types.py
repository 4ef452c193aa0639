"""Data types that everything else uses. Shapes: N completions, T tokens, A audio tokens, D hidden size, L layers."""

from __future__ import annotations

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

    @property
    def has_answer(self) -> bool:
        """Whether completions can be graded. Other items, also plain transcripts, are for objectives without such a reward."""
        return bool(self.answer)

    def is_right(self, choice: str | None) -> bool:
        """Whether a completion that names `choice` is right; None: it names none."""
        return choice == self.answer or choice in self.same_as_answer


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
