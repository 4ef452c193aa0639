"""Evaluation statistics: bootstrap intervals, modality recovery rate, their paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NUM_RESAMPLES = 2000
"""Enough for the ends of a 95 % interval to be stable to about a tenth of its width."""


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *columns: Sequence[float], seed: int = 0
) -> tuple[float, list[float]]:
    """A figure over items and its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: maps arrays [..., N], one for each column, to the figure [...].
        columns: per-item values, N each; resampled together, so differences are paired.

    Returns:
        (figure, [low, high]).
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    num_items = len(arrays[0])
    rows = np.random.default_rng(seed).integers(0, num_items, (NUM_RESAMPLES, num_items))
    figures = statistic(*(array[rows] for array in arrays))
    low, high = np.percentile(figures, [2.5, 97.5])
    return float(statistic(*arrays)), [float(low), float(high)]


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def total(values: np.ndarray) -> np.ndarray:
    return values.sum(axis=-1)


def mean_difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return (after - before).mean(axis=-1)


def modality_recovery_rate(speech_correct: np.ndarray, text_correct: np.ndarray) -> np.ndarray:
    """MRR in percent: accuracy on spoken input / accuracy on written input (METHOD, Metrics).

    With the text accuracy of a fixed reference in `text_correct` it is the paper's MRR, with the evaluated model's own the
    same-model ratio. A text accuracy of 0 gives nan: nothing to recover.
    """
    text_accuracy = text_correct.mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(text_accuracy > 0, 100.0 * speech_correct.mean(axis=-1) / text_accuracy, np.nan)
