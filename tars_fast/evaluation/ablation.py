"""Arms of an ablation, held against each other: figures over seeds and items, tests, tables, curves.

Every arm was evaluated on the same items after training with the same seeds, so what differs between two arms is a matrix of
differences [seeds, items]. Both were drawn at random, and both are resampled (a bootstrap of crossed factors, Owen 2007);
of S seeds S - 1 are drawn, without which the spread between few seeds comes out too small (Rao & Wu 1988). The test is a
paired t-test over seeds, its p-values held against each other as Holm (1979) does: it treats the items as given.

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

from tars_fast.evaluation.metrics import CrossedBootstrap, Curve, holm, paired_t_test
from tars_fast.evaluation.results import Evaluated, ItemResult, read_predictions
from tars_fast.types import Modality, UserError

START = "start"
"""What the model is called that all arms start from; no arm may be."""


@dataclass(frozen=True)
class Figure:
    """How a figure is shown."""

    title: str
    scale: float = 100.0
    decimals: int = 1


FIGURES = {
    "speech_accuracy": Figure("speech, greedy %"),
    "text_accuracy": Figure("text, greedy %"),
    "speech_accuracy_sampled": Figure("speech, sampled %"),
    "text_accuracy_sampled": Figure("text, sampled %"),
    "mrr": Figure("MRR, fixed %", scale=1.0),
    "mrr_same_model": Figure("MRR, same %", scale=1.0),
    "behaviour_similarity": Figure("behaviour sim. %"),
    "layer_cosine_mean": Figure("cosine of states", scale=1.0, decimals=3),
}
"""MRR is in percent already; its fixed reference is the text accuracy of the start."""
SMOOTHED = 10
"""Steps that learning curves are averaged over."""
_CURVES = {
    "accuracy/speech": "accuracy in training, speech",
    "accuracy/text": "accuracy in training, text",
    "reward/representation": "R_rep",
    "reward/behaviour": "R_beh",
    "format/speech": "R_fmt, speech",
    "entropy/speech": "entropy of speech, nats a token",
}
"""What metrics.jsonl calls them."""


@dataclass(frozen=True)
class FinishedRun:
    """What a training run left in its folder."""

    arm: str
    seed: int
    before: Sequence[ItemResult]
    after: Sequence[ItemResult]
    metrics: Sequence[Mapping[str, float]]
    """One mapping a step."""
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, arm: str, seed: int, folder: Path) -> FinishedRun:
        """Raises UserError where something is missing or cannot be read."""
        try:
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            num_steps = settings["num_steps"]
        except (OSError, ValueError, LookupError) as error:
            raise UserError(f"{folder}: not a whole run ({error}); remove the folder to have it run again") from error
        before, after = (read_predictions(folder / f"predictions_{when}.jsonl", "--output-dir") for when in ("before", "after"))
        for name, expected, found in (
            ("metrics.jsonl", num_steps, len(metrics)),
            ("predictions_after.jsonl", len(before), len(after)),
        ):
            if found != expected:
                told = f"{name} has {found} lines, not {expected}"
                raise UserError(f"{folder}: not a whole run ({told}); remove the folder to have it run again")
        return cls(arm, seed, before, after, metrics, settings)


def check_runs(runs: Sequence[FinishedRun]) -> None:
    """Raises UserError where two runs were not trained on the same for as long, or not evaluated on the same."""
    for first, run in itertools.pairwise(runs):
        items = [(one.settings["data_fingerprint"], [result.key for result in one.before]) for one in (first, run)]
        steps = [one.settings["num_steps"] for one in (first, run)]
        if items[0] != items[1] or steps[0] != steps[1]:
            told = "other items" if items[0] != items[1] else f"num_steps {steps[0]} and {steps[1]}"
            raise UserError(
                f"runs do not match: {first.arm}, seed {first.seed} and {run.arm}, seed {run.seed} have {told}; "
                "name another --output-dir, or remove the folder of the one that should run again"
            )


def _columns(item: Evaluated) -> dict[str, float]:
    """What an item adds to each figure; `mrr` is made of two."""
    values = {f"{modality}_accuracy": float(getattr(item, modality).readings["strict"].correct) for modality in Modality}
    sampled = {f"{modality}_accuracy_sampled": getattr(item, modality).sampled_accuracy for modality in Modality}
    values |= {name: value for name, value in sampled.items() if value is not None}
    values |= {"behaviour_similarity": item.behaviour_similarity, "layer_cosine_mean": float(np.mean(item.layer_cosine))}
    return values | {f"layer/{number}": cosine for number, cosine in enumerate(item.layer_cosine, 1)}


class Arms:
    """The runs of an ablation as matrices [S, I] by arm and figure.

    Args:
        runs: of each arm at least one; `check_runs` has passed.
        baseline: the arm that the others are compared with.

    Raises:
        UserError: there is no item that all of them could evaluate.
    """

    def __init__(self, runs: Sequence[FinishedRun], baseline: str):
        self.baseline = baseline
        self.names = list(dict.fromkeys(run.arm for run in runs))
        self.runs = {arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed) for arm in self.names}
        known = [{r.key for r in part if r.evaluated is not None} for run in runs for part in (run.before, run.after)]
        shared = set.intersection(*known)
        self.items = [result.key for result in runs[0].after if result.key in shared]
        self.num_left_out = len(runs[0].after) - len(self.items)
        if not self.items:
            raise UserError("runs do not match: no item was evaluated by all of them")
        # All arms start from the same model, so one of them speaks for all seeds that it has.
        longest = max(self.runs.values(), key=len)
        self._values = {START: self._stack([run.before for run in longest])}
        self._values |= {arm: self._stack([run.after for run in own]) for arm, own in self.runs.items()}
        self.seeds = {START: [run.seed for run in longest]}
        self.seeds |= {arm: [run.seed for run in own] for arm, own in self.runs.items()}
        self.num_layers = sum(name.startswith("layer/") for name in self._values[START])

    def _stack(self, parts: Sequence[Sequence[ItemResult]]) -> dict[str, np.ndarray]:
        rows = []
        for part in parts:
            found = {result.key: result.evaluated for result in part if result.evaluated is not None}
            rows.append([_columns(found[key]) for key in self.items])
        names = set.intersection(*(set(columns) for row in rows for columns in row))
        return {name: np.array([[columns[name] for columns in row] for row in rows]) for name in names}

    def _rows(self, arm: str, name: str, resamples: CrossedBootstrap, seeds: Sequence[int]) -> np.ndarray:
        """[1 + R] a figure of these seeds: of all items, then of every resample."""
        chosen = [self.seeds[arm].index(seed) for seed in seeds]

        def means(name: str, arm: str = arm) -> np.ndarray:
            return resamples.means(self._values[arm][name][chosen])

        if name not in ("mrr", "mrr_same_model"):
            return means(name)
        # Greedy, so the same for every seed: the start's first run is as good as any.
        reference = self._values[START]["text_accuracy"][:1].repeat(len(seeds), axis=0)
        text = means("text_accuracy") if name == "mrr_same_model" else resamples.means(reference)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(text > 0, 100 * means("speech_accuracy") / text, np.nan)

    def _by_seed(self, arm: str, name: str, seeds: Sequence[int]) -> list[float]:
        """A figure of each of these seeds alone, over all items."""
        alone = CrossedBootstrap(1, len(self.items), num_resamples=0)
        return [self._rows(arm, name, alone, [seed])[0] for seed in seeds]

    def _known(self, arm: str) -> list[str]:
        return [name for name in FIGURES if name.startswith("mrr") or name in self._values[arm]]

    def figures(self, arm: str) -> dict[str, Any]:
        """`<name>`, `<name>_ci95`, and `<name>_by_seed` of an arm, or of the start; `layer_cosine` by layer."""
        seeds = self.seeds[arm]
        resamples = CrossedBootstrap(len(seeds), len(self.items))
        made: dict[str, Any] = {"seeds": seeds}
        for name in self._known(arm):
            made |= _figure(name, self._rows(arm, name, resamples, seeds))
            made[f"{name}_by_seed"] = [_plain(value) for value in self._by_seed(arm, name, seeds)]
        layers = [self._rows(arm, f"layer/{number}", resamples, seeds) for number in range(1, self.num_layers + 1)]
        made["layer_cosine"] = [float(rows[0]) for rows in layers]
        made["layer_cosine_ci95"] = [_interval(rows) for rows in layers]
        return made

    def differences(self, arm: str) -> dict[str, Any]:
        """The same for `arm` minus the baseline, paired by seed and item, with `<name>_p` of the t-test over seeds."""
        seeds = [seed for seed in self.seeds[arm] if seed in self.seeds[self.baseline]]
        made: dict[str, Any] = {"seeds": seeds}
        if not seeds:
            return made
        resamples = CrossedBootstrap(len(seeds), len(self.items))
        for name in (name for name in self._known(arm) if name in self._known(self.baseline)):
            pairs = [self._rows(which, name, resamples, seeds) for which in (arm, self.baseline)]
            made |= _figure(name, pairs[0] - pairs[1])
            sides = [self._by_seed(which, name, seeds) for which in (arm, self.baseline)]
            by_seed = [own - other for own, other in zip(*sides, strict=True)]
            made[f"{name}_by_seed"] = [_plain(value) for value in by_seed]
            made[f"{name}_p"] = paired_t_test(by_seed)
        return made

    def report(self) -> dict[str, Any]:
        """All figures, p-values corrected for the number of arms."""
        made: dict[str, Any] = {
            "baseline": self.baseline,
            "num_items": len(self.items),
            "num_items_left_out": self.num_left_out,
            START: self.figures(START),
            "arms": {arm: self.figures(arm) for arm in self.names},
        }
        # Where every run of the baseline failed there is nothing to hold the others against.
        others = [arm for arm in self.names if arm != self.baseline and self.baseline in self.names]
        differences = {arm: self.differences(arm) for arm in others}
        for name in FIGURES:
            known = {arm: made[f"{name}_p"] for arm, made in differences.items() if made.get(f"{name}_p") is not None}
            for arm, p in zip(known, holm(list(known.values())), strict=True):
                differences[arm][f"{name}_p_holm"] = p
        made[f"minus_{self.baseline}"] = differences
        for arm in self.names:
            made["arms"][arm]["median_seconds_per_step"] = statistics.median(
                step["seconds/step"] for run in self.runs[arm] for step in run.metrics
            )
        return made

    def curves(self) -> dict[str, dict[str, Curve]]:
        """Title -> arm -> what metrics.jsonl says, smoothed, mean over seeds, with the 95 % t-interval over them.

        R_beh is not measured where it has no weight, and 0 there: such an arm has no curve of it.
        """
        metrics = {arm: [run.metrics for run in own] for arm, own in self.runs.items()}
        curves = {
            title: {
                arm: _learning_curve(own, name)
                for arm, own in metrics.items()
                if not name.startswith("reward/") or any(step[name] for run in own for step in run)
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


def _interval(rows: np.ndarray) -> list[float] | None:
    return np.percentile(rows[1:], [2.5, 97.5]).tolist() if np.isfinite(rows).all() else None


def _figure(name: str, rows: np.ndarray) -> dict[str, Any]:
    return {name: _plain(rows[0]), f"{name}_ci95": _interval(rows)}
