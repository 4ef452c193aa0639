"""Evaluation statistics: bootstrap intervals, modality recovery rate, their paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Statistic = Callable[..., np.ndarray]
"""Takes one array [..., N] a column, the values of N items, and returns the figure [...]."""

NUM_RESAMPLES = 2000
"""Enough for the ends of a 95 % interval to be stable to about a tenth of its width."""


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    interval: list[float]
    """[low, high]"""


def bootstrap_interval(statistic: Statistic, *columns: Sequence[float], seed: int = 0) -> Estimate:
    """A figure over items and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        columns: per-item values, N each; resampled together, so differences are paired.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    num_items = len(arrays[0])
    rows = np.random.default_rng(seed).integers(0, num_items, (NUM_RESAMPLES, num_items))
    figures = statistic(*(array[rows] for array in arrays))
    low, high = np.percentile(figures, [2.5, 97.5])
    return Estimate(float(statistic(*arrays)), [float(low), float(high)])


def mean_over_data(statistic: Statistic, data_sets: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> Estimate:
    """`bootstrap_interval` over several data sets that count equally, however many items each has.

    Items are resampled within each data set.

    Args:
        statistic: one that depends on the columns' means alone.
        data_sets: the columns of each data set.
    """

    def averaged(means: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        return statistic(*(np.mean(column, axis=0)[..., None] for column in zip(*means, strict=True)))

    figure, resampled = [], []
    for number, columns in enumerate(data_sets):
        arrays = [np.asarray(column, dtype=np.float64) for column in columns]
        rows = np.random.default_rng(seed + number).integers(0, len(arrays[0]), (NUM_RESAMPLES, len(arrays[0])))
        figure.append([array.mean() for array in arrays])
        resampled.append([array[rows].mean(axis=-1) for array in arrays])
    low, high = np.percentile(averaged(resampled), [2.5, 97.5])
    return Estimate(float(averaged(figure)), [float(low), float(high)])


class CrossedBootstrap:
    """Bootstrap of two crossed factors, seeds and the items that every seed was evaluated on (Owen 2007).

    A resample draws S - 1 of S seeds: with S of a few seeds the spread of the mean would be too small by sqrt((S - 1) / S) (Rao
    & Wu 1988). With a single seed only items are resampled. Matrices of the same shape have the same resamples.

    Args:
        num_resamples: 0: `means` has the figure itself only.
    """

    def __init__(self, num_seeds: int, num_items: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0):
        generator = np.random.default_rng(seed)
        # Items first, so that they are the same ones however many seeds there are.
        items = generator.multinomial(num_items, np.full(num_items, 1 / num_items), num_resamples) / num_items
        count = max(1, num_seeds - 1)
        seeds = generator.multinomial(count, np.full(num_seeds, 1 / num_seeds), num_resamples) / count
        self._items = np.concatenate([np.full((1, num_items), 1 / num_items), items])
        self._seeds = np.concatenate([np.full((1, num_seeds), 1 / num_seeds), seeds])

    def means(self, values: np.ndarray) -> np.ndarray:
        """[1 + R] means of values [S, I]: of all of them, then of every resample."""
        return ((self._seeds @ values) * self._items).sum(axis=-1)


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's t-test that paired differences have mean 0.

    None for a single difference, where any is nan, or where all are equal.
    """
    from scipy import stats

    # Equal differences of accuracies differ in the last bit, which would make p as small as can be.
    if len(differences) < 2 or not np.ptp(differences) > 1e-12 * np.max(np.abs(differences)):
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several tests, so that any of them falls below alpha by chance at most that often (Holm 1979)."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: an item that changed goes either way with probability 1/2 (McNemar 1947).

    Args:
        gained: items that became right.
        lost: items that became wrong.
    """
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def total(values: np.ndarray) -> np.ndarray:
    return values.sum(axis=-1)


def mean_difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return (after - before).mean(axis=-1)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return numerators.sum(axis=-1) / denominators.sum(axis=-1)


def modality_recovery_rate(speech_correct: np.ndarray, text_correct: np.ndarray) -> np.ndarray:
    """MRR in percent: accuracy on spoken input / accuracy on written input (docs/method.md, Metrics).

    With the text accuracy of a fixed reference in `text_correct` it is the paper's MRR, with the evaluated model's own the
    same-model ratio. A text accuracy of 0 gives nan: nothing to recover.
    """
    text_accuracy = text_correct.mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(text_accuracy > 0, 100.0 * speech_correct.mean(axis=-1) / text_accuracy, np.nan)


@dataclass(frozen=True)
class Curve:
    """A line of a plot; None or nan where nothing is known."""

    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    """Lower end of an interval around `y`."""
    high: Sequence[float | None] | None = None

    def thinned(self, most_points: int = 150) -> Curve:
        """The curve with at most so many points, each the mean over neighbours that are not None or nan."""
        size = max(1, -(-len(self.x) // most_points))
        starts = range(0, len(self.x), size)

        def means(values: Sequence[float | None]) -> list[float]:
            return [_mean(values[start : start + size]) for start in starts]

        low, high = (None if ends is None else means(ends) for ends in (self.low, self.high))
        return Curve(means(self.x), means(self.y), low, high)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
