"""Short questions that take two or three steps of reasoning, in words: `python examples/smol/questions.py --output-dir DIR`.

Kinds: stories of arithmetic, comparisons, orders, calendars, lengths of months, legs of animals, the alphabet. Each item has
its reasoning written out, for the supervised warm-up. What a problem is about (its operands, its days) decides whether it is
held out, so that no held-out problem is trained on under other names.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tars_fast.data.arithmetic import NUMBERS
from tars_fast.support.cli import as_paths, check_numbers, run_command
from tars_fast.support.files import write_atomically
from tars_fast.types import UserError

SHE = ("Anna", "Lucy", "Mary", "Emma", "Ruth")
HE = ("Ben", "Tom", "Sam", "Jack", "Paul")
THINGS = ("apples", "books", "coins", "pens", "eggs", "cups", "balls", "stamps")
WORDS = ("apple", "bread", "chair", "door", "egg", "fish", "glass", "house", "ice", "jar", "key", "lamp", "moon", "nose")
WORDS += ("onion", "paper", "rain", "sun", "table", "water")
LEGS = {"hen": 2, "duck": 2, "dog": 4, "horse": 4, "cat": 4, "ant": 6, "bee": 6, "spider": 8}
ORDERS = {"older": ("oldest", "youngest"), "taller": ("tallest", "shortest"), "faster": ("fastest", "slowest")}
DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]
LARGEST = 20
"""Of the numbers on the way to an answer."""
HELD_OUT_SHARE = 4
"""One problem in so many is held out."""


@dataclass(frozen=True)
class Item:
    """A question with its reasoning."""

    key: str
    """What the problem is about; items of one key are all of training, or all held out."""
    question: str
    reasoning: str
    answer: str
    choices: Sequence[str]

    @property
    def is_held_out(self) -> bool:
        return hashlib.sha256(self.key.encode()).digest()[0] % HELD_OUT_SHARE == 0

    @property
    def completion(self) -> str:
        return f"<think> {self.reasoning} </think> <answer> The answer is {self.answer}. </answer>"


def story(rng: random.Random) -> Item:
    """Two or three steps of addition and subtraction."""
    she = rng.random() < 0.5
    name, pronoun, thing = rng.choice(SHE if she else HE), "She" if she else "He", rng.choice(THINGS)
    value = start = rng.randint(2, 12)
    sentences, steps, operands = [f"{name} has {NUMBERS[start]} {thing}."], [], [start]
    for number in range(rng.choice((2, 3))):
        amount = rng.randint(1, 9)
        adds = value - amount < 0 or (value + amount <= LARGEST and rng.random() < 0.5)
        verb = rng.choice(("buys", "finds", "gets")) if adds else rng.choice(("sells", "loses", "gives away"))
        more = " more" if adds else ""
        sentences.append(f"{'Then ' + pronoun.lower() if number else pronoun} {verb} {NUMBERS[amount]}{more}.")
        after = value + amount if adds else value - amount
        steps.append(f"{value} {'+' if adds else '-'} {amount} = {after}.")
        operands.append(amount if adds else -amount)
        value = after
    question = f"{' '.join(sentences)} How many {thing} does {name} have now?"
    return Item(f"story {operands}", question, " ".join(steps), str(value), [str(n) for n in range(LARGEST + 1)])


def comparison(rng: random.Random) -> Item:
    """Who of three has the most or the fewest; what one has follows from another's."""
    names, thing = rng.sample(SHE + HE, 3), rng.choice(THINGS)
    most = rng.random() < 0.5
    while True:
        first, difference, third = rng.randint(3, 9), rng.randint(1, 4), rng.randint(1, 12)
        more = rng.random() < 0.5
        second = first + difference if more else first - difference
        if second >= 0 and len({first, second, third}) == 3:
            break
    values = (first, second, third)
    best = max(values) if most else min(values)
    question = (
        f"{names[0]} has {NUMBERS[first]} {thing}. {names[1]} has {NUMBERS[difference]} {'more' if more else 'fewer'} than "
        f"{names[0]}. {names[2]} has {NUMBERS[third]} {thing}. Who has the {'most' if most else 'fewest'} {thing}?"
    )
    reasoning = (
        f"{names[0]} has {first}. {names[1]} has {first} {'+' if more else '-'} {difference} = {second}. {names[2]} has "
        f"{third}. The {'most' if most else 'fewest'} is {best}."
    )
    return Item(f"comparison {first} {second} {third} {most}", question, reasoning, names[values.index(best)], names)


def order(rng: random.Random) -> Item:
    """Who comes first or last of three, of whom two pairs are compared."""
    names, adjective = rng.sample(SHE + HE, 3), rng.choice(list(ORDERS))
    wanted = rng.randrange(2)
    sentences = [f"{left} is {adjective} than {right}." for left, right in pairwise(names)]
    first, last = ORDERS[adjective]
    question = f"{' '.join(rng.sample(sentences, 2))} Who is the {(first, last)[wanted]}?"
    reasoning = f"From the {first} to the {last}: {', '.join(names)}."
    return Item(f"order {names} {adjective}", question, reasoning, names[-wanted], sorted(names))


def counting(rng: random.Random) -> Item:
    """The day or month so many days or months later or earlier."""
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    start, steps, sign = rng.randrange(len(names)), rng.randint(2, 4), rng.choice((1, -1))
    passed = [names[(start + sign * step) % len(names)] for step in range(1, steps + 1)]
    direction = "after" if sign == 1 else "before"
    asked = rng.choice((f"Which {unit} comes", f"What {unit} is"))
    question = f"{asked} {NUMBERS[steps]} {unit}s {direction} {names[start]}?"
    # Without the numbers a small model loses count.
    reasoning = ", ".join(f"{number} {name}" for number, name in enumerate(passed, 1))
    return Item(f"counting {start} {unit} {sign * steps}", question, f"{reasoning}.", passed[-1], names)


def month_lengths(rng: random.Random) -> Item:
    """How long two months are together, in a year that is no leap year."""
    pair = rng.sample(range(12), 2)
    lengths = [calendar.monthrange(2023, month + 1)[1] for month in pair]
    names = [MONTHS[month] for month in pair]
    asked = rng.choice(("How many days do {} and {} have together", "How many days long are {} and {} together")).format(*names)
    question = f"{asked}{', when it is no leap year' if 'February' in names else ''}?"
    told = " ".join(f"{name} has {length} days." for name, length in zip(names, lengths, strict=True))
    reasoning = f"{told} {lengths[0]} + {lengths[1]} = {sum(lengths)}."
    return Item(f"months {sorted(pair)}", question, reasoning, str(sum(lengths)), ["58", "59", "60", "61", "62"])


def legs(rng: random.Random) -> Item:
    """How many legs some animals of two kinds have."""
    animals, counts = rng.sample(list(LEGS), 2), [rng.randint(1, 3), rng.randint(1, 3)]
    herds = [f"{NUMBERS[n]} {animal}{'s' if n > 1 else ''}" for n, animal in zip(counts, animals, strict=True)]
    products = [n * LEGS[animal] for n, animal in zip(counts, animals, strict=True)]
    question = f"How many legs do {herds[0]} and {herds[1]} have together?"
    told = [f"{n} * {LEGS[animal]} = {product}." for n, animal, product in zip(counts, animals, products, strict=True)]
    reasoning = f"{' '.join(told)} {products[0]} + {products[1]} = {sum(products)}."
    choices = [str(n) for n in range(4, 49, 2)]
    # Two hens and one dog are the problem of two ducks and one cat.
    key = f"legs {sorted((LEGS[animal], n) for animal, n in zip(animals, counts, strict=True))}"
    return Item(key, question, reasoning, str(sum(products)), choices)


def alphabet(rng: random.Random) -> Item:
    """Which of three words comes first, or last, in the alphabet."""
    words, first = rng.sample(WORDS, 3), rng.random() < 0.5
    answer = min(words) if first else max(words)
    question = f"Which word comes {'first' if first else 'last'} in the alphabet: {words[0]}, {words[1]}, or {words[2]}?"
    reasoning = f"In alphabetical order: {', '.join(sorted(words))}."
    return Item(f"alphabet {sorted(words)}", question, reasoning, answer, words)


KINDS: dict[str, Callable[[random.Random], Item]] = {
    make.__name__: make for make in (story, comparison, order, counting, month_lengths, legs, alphabet)
}


def draw(num_items: int, *, held_out: bool, seed: int) -> list[tuple[str, Item]]:
    """(kind, item) of different questions, the kinds in turn.

    Raises:
        UserError: there are not so many different questions.
    """
    rng = random.Random(f"{seed} {held_out}")
    found: dict[str, tuple[str, Item]] = {}
    draws = 0
    kinds = list(KINDS)
    while len(found) < num_items:
        kind = kinds[len(found) % len(kinds)]
        item = KINDS[kind](rng)
        if item.is_held_out == held_out and item.question not in found:
            found[item.question] = kind, item
        draws += 1
        if draws > 50 * num_items:
            flag = "--num-held-out" if held_out else "--num-training"
            raise UserError(
                f"{flag} {num_items}: there are only {len(found)} different questions with this seed; ask for fewer"
            )
    return list(found.values())


@dataclass(frozen=True)
class QuestionsConfig:
    """Write questions of several kinds with their reasoning: training.jsonl and held_out.jsonl."""

    output_dir: Path
    num_training: int = 1050
    num_held_out: int = 350
    seed: int = 0

    def __post_init__(self) -> None:
        as_paths(self, "output_dir")
        check_numbers(self, positive=("num_training", "num_held_out"), not_negative=("seed",))


def write(config: QuestionsConfig) -> int:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for name, count in (("training", config.num_training), ("held_out", config.num_held_out)):
        drawn = draw(count, held_out=name == "held_out", seed=config.seed)
        rows = [
            {
                "id": f"{name}-{number:04}",
                "category": kind,
                "question": item.question,
                "answer": item.answer,
                "answer_set": list(item.choices),
                "completion": item.completion,
            }
            for number, (kind, item) in enumerate(drawn)
        ]
        write_atomically(config.output_dir / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} questions written to {config.output_dir / f'{name}.jsonl'}")
    return 0


def main() -> int:
    return run_command(write, QuestionsConfig, "python examples/smol/questions.py")


if __name__ == "__main__":
    sys.exit(main())
