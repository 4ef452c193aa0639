"""Spoken arithmetic, the tasks of the bundled models: their problems, how these are split, and who speaks them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.data.synthesis import ACCENTS, SPEAKERS, Synthesiser

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
OPERATORS = {1: "plus", -1: "minus"}


@dataclass(frozen=True)
class Problem:
    """`a plus b minus c ...`, an odd number of operands whose values along the way are within 0..12."""

    operands: tuple[int, ...]
    signs: tuple[int, ...]
    """1 or -1 before each operand but the first."""

    @property
    def values(self) -> list[int]:
        """The first operand, and the value after each operation."""
        values = [self.operands[0]]
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            values.append(values[-1] + sign * operand)
        return values

    @property
    def _operations(self) -> list[str]:
        return [f"{OPERATORS[sign]} {NUMBERS[operand]}" for sign, operand in zip(self.signs, self.operands[1:], strict=True)]

    @property
    def question(self) -> str:
        return f"What is {' '.join([NUMBERS[self.operands[0]], *self._operations])}?"

    @property
    def steps(self) -> list[str]:
        """`five plus two is seven`, one for each operation."""
        words = [NUMBERS[value] for value in self.values]
        return [
            f"{before} {operation} is {after}"
            for before, operation, after in zip(words, self._operations, words[1:], strict=False)
        ]

    @property
    def answer(self) -> str:
        """The value after every second operation: of three operands the result, of five `half-way then result`.

        With the result alone a wrong chain of five is right one time in nine.
        """
        return " then ".join(NUMBERS[value] for value in self.values[2::2])

    @property
    def completion(self) -> str:
        return f"<think>{', '.join(self.steps)}.</think><answer>The answer is {self.answer}.</answer>"


def with_margins(wave: np.ndarray, rate: int, rng: random.Random) -> np.ndarray:
    """A synthesiser's wave, 50 ms of what is around its speech left, behind up to 100 ms of silence.

    Returns:
        [samples] float32 at 16 kHz.
    """
    import soxr

    wave = soxr.resample(wave, rate, SAMPLE_RATE)
    audible = np.flatnonzero(np.abs(wave) > 0.01)
    margin = SAMPLE_RATE // 20
    wave = wave[max(0, audible[0] - margin) : audible[-1] + margin]
    silence = np.zeros(rng.randint(0, SAMPLE_RATE // 10), np.float32)
    return np.concatenate([silence, wave])


@dataclass(frozen=True)
class Splits:
    training: list[Problem]
    validation: list[Problem]
    held_out: list[Problem]


@dataclass(frozen=True)
class Task:
    """A kind of problems, how many of them are spoken, and by whom; each part has voices of its own."""

    num_operands: int
    num_training: int
    """Utterances; the first problems are spoken twice where there are fewer."""
    num_validation: int
    num_held_out: int
    training_speakers: tuple[str, ...]
    validation_speakers: tuple[str, ...]
    held_out_speakers: tuple[str, ...]
    words_per_minute: tuple[int, int]
    compression: float | None = None
    """libsndfile's compression level of Opus; None: its own."""

    @property
    def choices(self) -> list[str]:
        """All answers that a problem may have."""
        return [" then ".join(words) for words in product(NUMBERS, repeat=self.num_operands // 2)]

    def split_problems(self) -> Splits:
        """Split all problems, each of which is in one part; the split never depends on a seed."""
        digits, limits = range(1, 10), range(len(NUMBERS))
        chains: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [((digit,), (), digit) for digit in digits]
        for _ in range(self.num_operands - 1):
            chains = [
                ((*operands, operand), (*signs, sign), value + sign * operand)
                for operands, signs, value in chains
                for sign in OPERATORS
                for operand in digits
                if value + sign * operand in limits
            ]
        problems = [Problem(operands, signs) for operands, signs, _ in chains]
        random.Random(0).shuffle(problems)
        tail = self.num_held_out + self.num_validation
        return Splits(problems[tail:], problems[self.num_held_out : tail], problems[: self.num_held_out])

    def speak(
        self, synthesiser: Synthesiser, problem: Problem, speakers: Sequence[str], rng: random.Random
    ) -> tuple[np.ndarray, str]:
        """Synthesise a question without noise: ([samples] float32 at 16 kHz, voice)."""
        voice = f"{rng.choice(ACCENTS)}+{rng.choice(speakers)}"
        wave, rate = synthesiser(
            problem.question,
            voice,
            words_per_minute=rng.randint(*self.words_per_minute),
            pitch=rng.randint(30, 70),
            seed=rng.randrange(2**31),
        )
        return with_margins(wave, rate, rng), voice


TASKS = {
    "pocket": Task(
        num_operands=3,
        num_training=840,
        num_validation=100,
        num_held_out=400,
        training_speakers=SPEAKERS,
        validation_speakers=("steph", "anika"),
        held_out_speakers=("f5", "linda", "edward", "max"),
        words_per_minute=(210, 290),
    ),
    "pocket-hard": Task(
        num_operands=5,
        num_training=800,
        num_validation=200,
        num_held_out=400,
        training_speakers=SPEAKERS,
        validation_speakers=("f1", "belinda", "david", "Andy"),
        held_out_speakers=("f5", "linda", "edward", "max"),
        words_per_minute=(260, 330),
        compression=0.98,
    ),
}
"""By the name of the model that learns it."""
