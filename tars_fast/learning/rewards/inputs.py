"""What a reward function gets, and what it may ask for. Shapes: N completions, L layers, D hidden size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from tars_fast.types import Completion, Modality, Question


@dataclass(frozen=True, eq=False)
class RewardInput:
    """One completion, as a reward function gets it. Two are equal only where they are the same one."""

    question: Question
    """The item, with all its fields: text, choices, answer, answer_text, answer_number, rubric, category, ..."""
    modality: Modality
    """What the completion was conditioned on: equal to "speech" or to "text"."""
    text: str
    """Decoded without the stop token; other special tokens are visible."""
    token_ids: tuple[int, ...]
    """The stop token is included where one was produced."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was sampled from, in nats."""
    truncated: bool
    """Cut off at the length limit; such a completion has no gradient, but counts in the mean of its group."""
    states: Tensor | None = field(default=None, repr=False)
    """[L, D] fp32, each layer's output averaged over the completion's tokens, where the function asks for it (`asks_for`)."""
    _of_question: list[RewardInput] = field(default_factory=list, repr=False)
    _reference: int | None = field(default=None, repr=False)
    """Place of the reference among those of the question."""

    @property
    def options(self) -> tuple[str, ...]:
        """The answer set: what may stand for X in `The answer is X`; empty where the question is open."""
        return self.question.choices

    @property
    def answer(self) -> str:
        """The right answer in words; empty where none is known."""
        return self.question.reference

    @property
    def others(self) -> list[RewardInput]:
        """The other completions of the same question, spoken and written, in the order in which they were drawn."""
        return [one for one in self._of_question if one is not self]

    @property
    def reference(self) -> RewardInput | None:
        """Of a spoken completion the correct written one that R_rep and R_beh compare it with; None where there is none."""
        return None if self._reference is None else self._of_question[self._reference]


RewardFunction = Callable[[list[RewardInput]], object]
"""Returns one number each, or None where it does not apply; `async def` is called with one completion at a time."""
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Needs:
    """What a reward function asks for, see `asks_for`."""

    layers: str = ""
    """Empty: no states."""
    reference: bool = False
    background: bool = False


def asks_for(*, layers: str = "", reference: bool = False, background: bool = False) -> Callable[[Function], Function]:
    """Decorate a reward function with what it needs beside completions.

    Args:
        layers: it gets `RewardInput.states` of these layers, as `--representation-layers` names them: all, a range like 11-20,
            shallow, middle, deep or last. It is then called after the forward pass, for a micro-batch of whole questions.
        reference: it is called for completions with a reference only. Other spoken ones get 0, written ones None; groups that
            need no backward pass are then known before the forward pass.
        background: it is called in a thread beside the forward pass, as `async def` functions always are; for what takes long.
    """

    def mark(function: Function) -> Function:
        vars(function)["needs"] = Needs(layers, reference, background)
        return function

    return mark


def reward_inputs(
    completions: Sequence[Completion],
    questions: Sequence[Question],
    references: Sequence[int | None] = (),
    states: Sequence[Tensor] = (),
) -> list[RewardInput]:
    """[N] what reward functions get of these completions.

    Args:
        questions: `completion.question` is an index into them.
        references: [N] index, within these completions, of each one's reference; empty: there is none.
        states: [N] of each completion [L, D]; empty: unknown.
    """
    of_question: dict[int, list[RewardInput]] = {}
    places: list[int] = []
    counts: Counter[int] = Counter()
    for completion in completions:
        places.append(counts[completion.question])
        counts[completion.question] += 1
    inputs = []
    for index, completion in enumerate(completions):
        reference = references[index] if references else None
        one = RewardInput(
            questions[completion.question],
            completion.modality,
            completion.text,
            completion.token_ids,
            completion.rollout_logprobs,
            completion.truncated,
            states[index] if len(states) else None,
            of_question.setdefault(completion.question, []),
            None if reference is None else places[reference],
        )
        of_question[completion.question].append(one)
        inputs.append(one)
    return inputs
