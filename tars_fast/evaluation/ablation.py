"""Comparison of the arms of an ablation: figures over seeds and items, tests, learning curves.

All arms are trained with the same seeds and evaluated on the same items, so two arms differ by a matrix [seeds, items]. Seeds
and items are random samples both, and both are resampled: `CrossedBootstrap`. The test is a paired t-test over seeds, which
takes the items as given; its p-values are corrected for the number of arms (Holm 1979).

Shapes: S seeds, I items, L layers, R resamples.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tars_fast.evaluation.figures import FIGURES, columns_of, text_reference, with_interval
from tars_fast.evaluation.metrics import CrossedBootstrap, Curve, Estimate, holm, paired_t_test
from tars_fast.evaluation.results import ItemResult, read_predictions
from tars_fast.types import UserError

START = "start"
"""Name of the model that all arms start from, which no arm may have."""

SMOOTHED = 10
"""Steps that learning curves are averaged over."""
_CURVES = {
    "accuracy/speech": "accuracy in training, speech",
    "accuracy/text": "accuracy in training, text",
    "reward/representation": "R_rep",
    "reward/behaviour": "R_beh",
    "format/speech": "R_fmt, speech",
    "entropy/speech": "entropy of speech, nats a token",
    "divergence/speech": "divergence from the teacher, nats a token",
}
"""Name in metrics.jsonl -> title; an objective computes some of them."""
_IN_EVERY_STEP = {"entropy/speech", "seconds/step"}


@dataclass(frozen=True)
class FinishedRun:
    """The files of a training run that has ended."""

    arm: str
    seed: int
    before: Sequence[ItemResult]
    after: Sequence[ItemResult]
    metrics: Sequence[Mapping[str, float]]
    """Metrics of each step."""
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, arm: str, seed: int, folder: Path) -> FinishedRun:
        """Raises UserError where something is missing or cannot be read."""
        try:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            # With --eval-every there is an evaluation before the first step.
            metrics = [line for line in lines if line.get("step") != 0]
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            num_steps = settings["num_steps"]
            if not isinstance(num_steps, int) or not all(step.keys() >= _IN_EVERY_STEP for step in metrics):
                raise ValueError("config.json or metrics.jsonl lack what a run writes there")
            settings["data_fingerprint"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not a whole run ({error}); remove the folder to have it run again") from error
        before, after = (read_predictions(folder / f"predictions_{when}.jsonl", "--output-dir") for when in ("before", "after"))
        for name, expected, found in (
            ("metrics.jsonl", num_steps, len(metrics)),
            ("predictions_after.jsonl", len(before), len(after)),
        ):
            if found != expected:
                raise UserError(
                    f"{folder}: not a whole run ({name} has {found} lines, not {expected}); remove the folder to have it run "
                    "again"
                )
        return cls(arm, seed, before, after, metrics, settings)


def check_runs(runs: Sequence[FinishedRun]) -> None:
    """Raises UserError where two runs differ in their training items, their evaluation items or their number of steps."""
    for pair in itertools.pairwise(runs):
        first, run = pair
        items = [(either.settings["data_fingerprint"], [result.key for result in either.before]) for either in pair]
        steps = [either.settings["num_steps"] for either in pair]
        if items[0] != items[1] or steps[0] != steps[1]:
            difference = "other items" if items[0] != items[1] else f"num_steps {steps[0]} and {steps[1]}"
            raise UserError(
                f"runs do not match: {first.arm}, seed {first.seed} and {run.arm}, seed {run.seed} have {difference}; "
                "name another --output-dir, or remove the folder of the one that should run again"
            )


class Arms:
    """The runs of an ablation as matrices [S, I] by arm and figure.

    Args:
        runs: at least one of each arm; `check_runs` has passed.
        baseline: the arm that the others are compared with.

    Raises:
        UserError: no item was evaluated by all runs.
    """

    def __init__(self, runs: Sequence[FinishedRun], baseline: str):
        self.baseline = baseline
        self.names = list(dict.fromkeys(run.arm for run in runs))
        self.runs = {arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed) for arm in self.names}
        known = [{r.key for r in results if r.evaluated is not None} for run in runs for results in (run.before, run.after)]
        shared = set.intersection(*known)
        self.items = [result.key for result in runs[0].after if result.key in shared]
        self.num_left_out = len(runs[0].after) - len(self.items)
        if not self.items:
            raise UserError("runs do not match: no item was evaluated by all of them")
        # All arms start from the same model, which is evaluated with as many seeds as the arm with the most runs has.
        longest = max(self.runs.values(), key=len)
        results = {START: [run.before for run in longest]} | {arm: [run.after for run in own] for arm, own in self.runs.items()}
        self.seeds = {START: [run.seed for run in longest]}
        self.seeds |= {arm: [run.seed for run in own] for arm, own in self.runs.items()}
        # Greedy, so the same for every seed.
        self._reference = text_reference(longest[0].before)
        self._columns = {arm: self._figure_columns(own) for arm, own in results.items()}
        self._layer_cosines = {arm: self._stack_layers(own) for arm, own in results.items()}

    def _shared(self, results: Sequence[ItemResult]) -> list[ItemResult]:
        """The items that all runs evaluated, in the order of `items`."""
        by_key = {result.key: result for result in results}
        return [by_key[key] for key in self.items]

    def _figure_columns(self, runs: Sequence[Sequence[ItemResult]]) -> dict[str, np.ndarray]:
        """[columns, S, I] values of each figure that all items of all runs contribute to."""
        found = {}
        for name, figure in FIGURES.items():
            if figure.of_ablations:
                columns = [columns_of(figure, self._shared(results), self._reference) for results in runs]
                if all(own and len(own[0]) == len(self.items) for own in columns):
                    found[name] = np.array(columns).swapaxes(0, 1)
        return found

    def _stack_layers(self, runs: Sequence[Sequence[ItemResult]]) -> np.ndarray:
        """[L, S, I] cosines of pooled states."""
        items = [[r.evaluated for r in self._shared(results) if r.evaluated is not None] for results in runs]
        return np.array([[item.layer_cosine for item in own] for own in items]).transpose(2, 0, 1)

    def _rows(self, arm: str, name: str, resamples: CrossedBootstrap, seeds: Sequence[int]) -> np.ndarray:
        """[1 + R] a figure of these seeds: of all items, then of every resample."""
        chosen = [self.seeds[arm].index(seed) for seed in seeds]
        means = [resamples.means(column[chosen]) for column in self._columns[arm][name]]
        return FIGURES[name].statistic(*(column[:, None] for column in means))

    def _by_seed(self, arm: str, name: str, seeds: Sequence[int]) -> list[float]:
        """A figure of each of these seeds alone, over all items."""
        alone = CrossedBootstrap(1, len(self.items), num_resamples=0)
        return [self._rows(arm, name, alone, [seed])[0] for seed in seeds]

    def figures(self, arm: str) -> dict[str, Any]:
        """`<name>`, `<name>_ci95`, and `<name>_by_seed` of an arm, or of the start; `layer_cosine` by layer."""
        seeds = self.seeds[arm]
        resamples = CrossedBootstrap(len(seeds), len(self.items))
        figures: dict[str, Any] = {"seeds": seeds}
        for name in self._columns[arm]:
            figures |= with_interval(name, _estimate(self._rows(arm, name, resamples, seeds)))
            figures[f"{name}_by_seed"] = [_plain(value) for value in self._by_seed(arm, name, seeds)]
        layers = [_estimate(resamples.means(cosines)) for cosines in self._layer_cosines[arm]]
        figures["layer_cosine"] = [layer.value for layer in layers]
        figures["layer_cosine_ci95"] = [layer.interval for layer in layers]
        return figures

    def differences(self, arm: str) -> dict[str, Any]:
        """The figures of `arm` minus those of the baseline, paired by seed and item, with `<name>_p` of the t-test."""
        seeds = [seed for seed in self.seeds[arm] if seed in self.seeds[self.baseline]]
        figures: dict[str, Any] = {"seeds": seeds}
        if not seeds:
            return figures
        resamples = CrossedBootstrap(len(seeds), len(self.items))
        for name in self._columns[arm]:
            if name not in self._columns[self.baseline]:
                continue
            own, other = (self._rows(either, name, resamples, seeds) for either in (arm, self.baseline))
            figures |= with_interval(name, _estimate(own - other))
            sides = [self._by_seed(either, name, seeds) for either in (arm, self.baseline)]
            by_seed = [own - other for own, other in zip(*sides, strict=True)]
            figures[f"{name}_by_seed"] = [_plain(value) for value in by_seed]
            figures[f"{name}_p"] = paired_t_test(by_seed)
        return figures

    def report(self) -> dict[str, Any]:
        """All figures, with p-values corrected for the number of arms."""
        figures: dict[str, Any] = {
            "baseline": self.baseline,
            "num_items": len(self.items),
            "num_items_left_out": self.num_left_out,
            START: self.figures(START),
            "arms": {arm: self.figures(arm) for arm in self.names},
        }
        # Where every run of the baseline failed, nothing can be compared.
        others = [arm for arm in self.names if arm != self.baseline and self.baseline in self.names]
        differences = {arm: self.differences(arm) for arm in others}
        for name in FIGURES:
            known = {arm: own[f"{name}_p"] for arm, own in differences.items() if own.get(f"{name}_p") is not None}
            for arm, p in zip(known, holm(list(known.values())), strict=True):
                differences[arm][f"{name}_p_holm"] = p
        figures[f"minus_{self.baseline}"] = differences
        for arm in self.names:
            steps = [step for run in self.runs[arm] for step in run.metrics]
            figures["arms"][arm]["median_seconds_per_step"] = statistics.median(step["seconds/step"] for step in steps)
            if all("sampled/tokens" in step for step in steps):
                figures["arms"][arm]["sampled_tokens"] = sum(step["sampled/tokens"] for step in steps) / len(self.runs[arm])
        return figures

    def curves(self) -> dict[str, dict[str, Curve]]:
        """Learning curves by title and arm: smoothed, the mean over seeds, with its 95 % t-interval.

        An arm has no curve of what its objective does not compute; a reward without weight is logged as 0.
        """
        metrics = {arm: [run.metrics for run in own] for arm, own in self.runs.items()}
        curves = {
            title: {
                arm: _learning_curve(own, name)
                for arm, own in metrics.items()
                if all(name in step for run in own for step in run)
                and (not name.startswith("reward/") or any(step[name] for run in own for step in run))
            }
            for name, title in _CURVES.items()
        }
        return {title: lines for title, lines in curves.items() if lines}


def _learning_curve(runs: Sequence[Sequence[Mapping[str, float]]], name: str) -> Curve:
    from scipy import stats

    width = min(SMOOTHED, len(runs[0]))
    window = np.ones(width) / width
    curves = np.stack([np.convolve([step[name] for step in run], window, mode="valid") for run in runs])
    x, y = list(range(width, len(runs[0]) + 1)), curves.mean(0)
    if len(runs) == 1:
        return Curve(x, y.tolist())
    reach = stats.t.ppf(0.975, len(runs) - 1) * curves.std(0, ddof=1) / np.sqrt(len(runs))
    return Curve(x, y.tolist(), (y - reach).tolist(), (y + reach).tolist())


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _estimate(rows: np.ndarray) -> Estimate:
    """From [1 + R] rows: the figure, then its resamples."""
    return Estimate(float(rows[0]), np.percentile(rows[1:], [2.5, 97.5]).tolist())
