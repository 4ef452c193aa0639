"""Which questions a step takes: all in turn, or those from which most can be learnt, by what earlier rollouts showed.

`--select` other than `all` draws a part of each batch (`--select-floor`) as `all` does, from shuffled epochs, so that every
question comes again; the others in proportion to a score of the question, without replacement (Efraimidis and Spirakis 2006):

- `gap`: |running accuracy from text - running accuracy from speech|.
- `disagreement`: the probability that a spoken group of n completions disagrees, 1 - p^n - (1 - p)^n at running accuracy p.
- `kl`: running mean of the divergence between spoken and written distribution that a distilling objective computes anyway.

Estimates are exponential averages over the rollouts that a question was in; one that was in none has the mean score of the
others. The batch of step t is drawn from estimates up to step t - 2, because it is prepared while step t - 1 is sampled; with
`--rollout-ahead 1` up to step t - 3. Every process draws the same batch of the same estimates, which are in each checkpoint.

With `--max-redraws` (dynamic sampling, DAPO, arXiv 2503.14476) each batch has questions in reserve, drawn the same way.

Shapes: Q training questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.learning.batch import Outcome
from tars_fast.learning.scored import ScoredRollout
from tars_fast.support.files import write_atomically
from tars_fast.types import Question, UserError

NEWEST_WEIGHT = 0.5
"""Of the newest rollout in a running estimate; the weights have moved since the older ones."""
SELECTION_FILE = "selection.jsonl"
_ESTIMATES = ("speech", "text", "divergence")
_SMALLEST_WEIGHT = 1e-12
"""Relative weight of a question whose score is 0: it is drawn where no other one is left."""


def batch_of_step(num_questions: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which questions step `step` trains on: shuffled epochs laid end to end, a pure function of its arguments.

    Needs no state, so that a resumed run sees what an unbroken one would have seen.
    """
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_questions)
        chosen.append((epoch, place))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_questions) for epoch, _ in chosen}
    return [int(orders[epoch][place]) for epoch, place in chosen]


def gap_scores(estimates: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    return np.abs(estimates["text"] - estimates["speech"])


def disagreement_scores(estimates: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    accuracy, num_spoken = estimates["speech"], group_size // 2
    return 1.0 - accuracy**num_spoken - (1.0 - accuracy) ** num_spoken


def divergence_scores(estimates: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    # A sampled estimate of a divergence may be negative.
    return np.maximum(estimates["divergence"], 0.0)


SCORES: dict[str, Callable[[dict[str, np.ndarray], int], np.ndarray]] = {
    "gap": gap_scores,
    "disagreement": disagreement_scores,
    "kl": divergence_scores,
}
"""--select -> ([Q] estimates by name, completions of a question) -> [Q] scores, NaN for a question without an estimate."""


def num_drawn_uniformly(floor: float, questions_per_step: int) -> int:
    """Of a step's questions, where the others are selected."""
    return max(1, round(floor * questions_per_step))


def check_selection(config: TrainConfig, questions_per_step: int, questions: Sequence[Question]) -> None:
    """Raises UserError where nothing can be selected."""
    if config.select == "kl" and not config.parts.distils:
        raise UserError(
            f"--select kl: --objective {config.objective} computes no divergence between speech and text; take --select gap or "
            "disagreement"
        )
    if config.select == "gap" and not config.samples_text:
        raise UserError(
            f"--select gap: --objective {config.objective} samples no written completions; take --select kl or disagreement"
        )
    if config.max_redraws and not config.accuracy_weight:
        raise UserError(
            f"--max-redraws {config.max_redraws}: goes by right answers, which --accuracy-weight 0 does not train on; leave it "
            "out"
        )
    setting = f"--select {config.select}" if config.select != "all" else f"--max-redraws {config.max_redraws}"
    needs_answers = config.select in ("gap", "disagreement") or config.max_redraws
    if needs_answers and not any(question.has_answer for question in questions):
        raise UserError(f"{setting}: goes by right answers, and no training item has one; take --select kl without redraws")
    if config.select != "all" and num_drawn_uniformly(config.select_floor, questions_per_step) == questions_per_step:
        raise UserError(
            f"--select {config.select}: of a step of --questions-per-step {questions_per_step} --select-floor "
            f"{config.select_floor} draws all uniformly, at least one, which leaves nothing to choose; lower it, or give more "
            "questions a step"
        )
    if (config.select != "all" or config.max_redraws) and questions_per_step >= len(questions):
        raise UserError(
            f"{setting}: a step of --questions-per-step {questions_per_step} takes all {len(questions)} training items, which "
            "leaves nothing to choose; lower it, or give more items"
        )


def outcomes_of(scored: ScoredRollout) -> list[Outcome]:
    """What a rollout showed of its questions, with the divergences that the training pass has added."""
    rollout = scored.rollout
    divergences: dict[int, list[Tensor]] = {}
    for completion, divergence_T in zip(rollout.completions, scored.divergences, strict=True):
        if len(divergence_T):
            divergences.setdefault(completion.question, []).append(divergence_T)
    means_N = [torch.cat(parts).float().mean() for parts in divergences.values()]
    # One wait for the device instead of one a question.
    means = dict(zip(divergences, torch.stack(means_N).tolist() if means_N else (), strict=True))
    return [replace(outcome, divergence=means.get(number)) for number, outcome in enumerate(rollout.outcomes)]


class Selection:
    """The questions of each step, and what is known of them.

    `plan` and `record` are called once a step, in the order of the steps; between them other threads may read the batches.

    Args:
        prompt_tokens: of each question, by which several processes share a batch; empty: by number.
    """

    def __init__(self, questions: Sequence[Question], config: RunConfig, prompt_tokens: Sequence[int] = ()):
        self.questions = questions
        self.prompt_tokens = prompt_tokens or [1] * len(questions)
        self._config = config
        self._numbers = {question.id: number for number, question in enumerate(questions)}
        self._batches: dict[int, tuple[list[int], list[int]]] = {}
        self._num_drawn = np.zeros(len(questions), np.int64)
        self._estimates = {name: np.full(len(questions), np.nan) for name in _ESTIMATES}
        self._is_unusable = np.zeros(len(questions), bool)

    @property
    def is_active(self) -> bool:
        """Whether anything is chosen that does not follow from the number of the step alone."""
        return self._config.select != "all"

    def plan(self, step: int) -> None:
        """Choose the batches up to the one that is prepared while the next one is sampled."""
        self._batches = {planned: batch for planned, batch in self._batches.items() if planned >= step}
        for planned in range(step, step + 2 + self._config.rollout_ahead):
            if planned not in self._batches:
                self._batches[planned] = self._choose(planned)

    def batch(self, step: int) -> list[int]:
        """The questions of a step that `plan` has chosen."""
        return self._batches[step][0]

    def reserve(self, step: int) -> list[int]:
        """Those that may take the place of unanimous ones of this step."""
        return self._batches[step][1]

    def _choose(self, step: int) -> tuple[list[int], list[int]]:
        config, num_questions = self._config, len(self.questions)
        num_uniform = config.questions_per_step
        if self.is_active:
            num_uniform = num_drawn_uniformly(config.select_floor, config.questions_per_step)
        uniform = batch_of_step(num_questions, num_uniform, step, config.seed)
        num_others = config.questions_per_step * (1 + config.max_redraws) - num_uniform
        if not num_others:
            return uniform, []
        keys = np.random.default_rng([config.seed, step, 1]).exponential(size=num_questions) / self._weights()
        keys[uniform] = np.inf
        num_left = num_questions - len(set(uniform))
        others = np.argsort(keys, kind="stable")[: min(num_others, num_left)].tolist()
        missing = config.questions_per_step - num_uniform
        return uniform + others[:missing], others[missing:]

    def _weights(self) -> np.ndarray:
        """[Q] in proportion to which questions are drawn, all above 0."""
        if not self.is_active:
            return np.ones(len(self.questions))
        scores = SCORES[self._config.select](self._estimates, self._config.group_size)
        is_known = np.isfinite(scores)
        scores = np.where(is_known, scores, scores[is_known].mean() if is_known.any() else 1.0)
        scores[self._is_unusable] = 0.0
        largest = scores.max()
        return np.maximum(scores / largest, _SMALLEST_WEIGHT) if largest > 0 else np.ones(len(scores))

    def record(self, step: int, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Take what a step's rollouts of all processes showed into the estimates; returns what was sampled and drawn.

        Args:
            outcomes: one of each question that was sampled, in any order. A question of the batch without one, whose
                recording could not be used, is left to the uniform draws until it can.
        """
        metrics: dict[str, float] = {
            "sampled/questions": len(outcomes),
            "sampled/completions": sum(outcome.num_completions for outcome in outcomes),
            "sampled/tokens": sum(outcome.num_tokens for outcome in outcomes),
        }
        if not self.is_active:
            return metrics
        self._is_unusable[self.batch(step)] = True
        for outcome in outcomes:
            number = self._numbers[outcome.id]
            self._is_unusable[number] = False
            self._num_drawn[number] += 1
            for name, values in self._estimates.items():
                observed = getattr(outcome, name)
                if observed is not None:
                    known = values[number]
                    values[number] = observed if np.isnan(known) else known + NEWEST_WEIGHT * (observed - known)
        coverage = float((self._num_drawn > 0).mean())
        return metrics | {"selection/coverage": coverage, "selection/largest_num_drawn": int(self._num_drawn.max())}

    def write(self, folder: Path) -> None:
        """Write selection.jsonl: how often each question was drawn, and its estimates. Raises CannotWriteError."""
        if not self.is_active:
            return
        lines = []
        for number, question in enumerate(self.questions):
            known = {name: float(values[number]) for name, values in self._estimates.items() if np.isfinite(values[number])}
            lines.append(json.dumps({"id": question.id, "num_drawn": int(self._num_drawn[number]), **known}) + "\n")
        write_atomically(folder / SELECTION_FILE, "".join(lines))

    def extra(self) -> dict[str, object]:
        """What a checkpoint holds so that a resumed run draws as this one would have; nothing where that needs nothing."""
        if not self.is_active:
            return {}
        return {
            "selection": {
                "batches": self._batches,
                "num_drawn": self._num_drawn.tolist(),
                "is_unusable": self._is_unusable.tolist(),
                "estimates": {name: values.tolist() for name, values in self._estimates.items()},
            }
        }

    def load_extra(self, extra: Mapping[str, Any]) -> None:
        """Go on from what `extra` returned. Raises LookupError, ValueError or TypeError where it is not of these questions."""
        if not self.is_active:
            return
        state = extra["selection"]
        columns = {name: np.array(state["estimates"][name], np.float64) for name in _ESTIMATES}
        num_drawn, is_unusable = np.array(state["num_drawn"], np.int64), np.array(state["is_unusable"], bool)
        batches = {int(step): (list(batch), list(reserve)) for step, (batch, reserve) in state["batches"].items()}
        numbers = {number for parts in batches.values() for part in parts for number in part}
        if any(len(values) != len(self.questions) for values in (*columns.values(), num_drawn, is_unusable)):
            raise ValueError(f"of {len(num_drawn)}, not {len(self.questions)} items")
        if not numbers <= set(range(len(self.questions))):
            raise ValueError(f"names item {max(numbers)} of {len(self.questions)}")
        self._estimates, self._num_drawn, self._is_unusable, self._batches = columns, num_drawn, is_unusable, batches
