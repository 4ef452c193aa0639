"""The figures of an evaluation: a table that says how each follows from items and how it is shown, and reports made from it.

Figures are over the items that could be evaluated, whose number stands beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tars_fast.data.transcription import normalised
from tars_fast.evaluation.metrics import (
    Estimate,
    Statistic,
    bootstrap_interval,
    mcnemar,
    mean,
    mean_difference,
    mean_over_data,
    modality_recovery_rate,
    ratio,
    total,
)
from tars_fast.evaluation.results import Evaluated, ItemResult, by_data
from tars_fast.evaluation.scorers import GRADES, SCORERS
from tars_fast.types import Modality

OVERALL = "overall"
"""Name of the mean over several data sets, which no data set may have."""


@dataclass(frozen=True)
class Figure:
    """A statistic over items, and how it is shown."""

    title: str
    statistic: Statistic
    values: Callable[[Evaluated, float | None], tuple[float, ...] | None]
    """The item and the text accuracy of the fixed reference on it -> a value for each column of the statistic. None: the item
    does not count."""
    scale: float = 100.0
    decimals: int = 1
    of_evaluations: bool = True
    """Whether evaluation.json has it."""
    of_ablations: bool = True
    """Whether ablation.json has it; its statistic then depends on the means of its columns alone."""


def _mean_of(title: str, value: Callable[[Evaluated], float | None], **shown: Any) -> Figure:
    """The mean of one value of each item; None: the item has none."""

    def values(item: Evaluated, _reference: float | None) -> tuple[float, ...] | None:
        own = value(item)
        return None if own is None else (float(own),)

    return Figure(title, mean, values, **shown)


def _mrr_values(item: Evaluated, reference: float | None) -> tuple[float, ...] | None:
    right = item.speech.is_correct
    return None if reference is None or right is None else (float(right), reference)


def _plain(right: bool | None) -> float | None:
    return None if right is None else float(right)


def _graded(title: str, modality: Modality, name: str) -> Figure:
    """Mean of a grade, each counting as much as it is over."""

    def values(item: Evaluated, _reference: float | None) -> tuple[float, ...] | None:
        grade = item[modality].grades.get(name)
        return None if grade is None else (grade.value * grade.weight, grade.weight)

    return Figure(f"{title}, {modality} %", ratio, values, of_ablations=False)


def _word_error_values(item: Evaluated, _reference: float | None) -> tuple[float, ...] | None:
    """Wrong words and words, so that the rate is that of all words together."""
    if item.transcribed is None:
        return None
    num_words = float(len(normalised(item.transcribed.transcript).split()))
    return item.transcribed.word_error_rate * num_words, num_words


FIGURES: dict[str, Figure] = {
    "speech_accuracy": _mean_of("speech, greedy %", lambda item: item.speech.is_correct),
    "text_accuracy": _mean_of("text, greedy %", lambda item: item.text.is_correct),
    "speech_accuracy_sampled": _mean_of("speech, sampled %", lambda item: item.speech.sampled_accuracy),
    "text_accuracy_sampled": _mean_of("text, sampled %", lambda item: item.text.sampled_accuracy),
    "mrr": Figure("MRR, fixed %", modality_recovery_rate, _mrr_values, scale=1.0),
    "mrr_same_model": Figure(
        "MRR, same %", modality_recovery_rate, lambda item, _: _mrr_values(item, _plain(item.text.is_correct)), scale=1.0
    ),
    "behaviour_similarity": _mean_of("behaviour sim. %", lambda item: item.behaviour_similarity),
    "layer_cosine_mean": _mean_of(
        "cosine of states", lambda item: float(np.mean(item.layer_cosine)), scale=1.0, decimals=3, of_evaluations=False
    ),
    "speech_unparsed": _mean_of("unparsed, speech %", lambda item: item.speech.is_unparsed, of_ablations=False),
    "text_unparsed": _mean_of("unparsed, text %", lambda item: item.text.is_unparsed, of_ablations=False),
    "speech_truncated": _mean_of("cut off, speech %", lambda item: item.speech.truncated, of_ablations=False),
    "text_truncated": _mean_of("cut off, text %", lambda item: item.text.truncated, of_ablations=False),
    "word_error_rate": Figure("word error rate %", ratio, _word_error_values, of_ablations=False),
    **{f"{modality}_{name}": _graded(title, modality, name) for name, title in GRADES.items() for modality in Modality},
}
"""All figures by their names in files, in the order of tables.

Fractions are shown in percent; the modality recovery rate is in percent already. Its fixed reference is another evaluation, or
the model before training.
"""

Reference = float | Mapping[tuple[str, str], float]
"""Text accuracy of the fixed reference that `mrr` divides by: a fraction, or 0 or 1 of each item by its key."""


def text_reference(results: Iterable[ItemResult]) -> dict[tuple[str, str], float]:
    """Make a `Reference` of an evaluation."""
    known = {r.key: r.evaluated.text.is_correct for r in results if r.evaluated is not None}
    return {key: float(right) for key, right in known.items() if right is not None}


def columns_of(figure: Figure, results: Iterable[ItemResult], reference: Reference) -> list[list[float]]:
    """[columns, items] values of a figure, over the items that contribute; empty where none does."""
    rows = []
    for result in results:
        if result.evaluated is not None:
            of_item = reference if isinstance(reference, float) else reference.get(result.key)
            rows.append(figure.values(result.evaluated, of_item))
    return [list(column) for column in zip(*(row for row in rows if row is not None), strict=True)]


def with_interval(name: str, estimate: Estimate) -> dict[str, Any]:
    """`<name>` and `<name>_ci95`, with None in the place of nan."""
    value, interval = estimate
    return {
        name: None if np.isnan(value) else value,
        f"{name}_ci95": None if np.isnan(interval).any() else interval,
    }


def report(results: Sequence[ItemResult], reference: Reference) -> dict[str, Any]:
    """Figures of one data set with `<name>_ci95` beside them.

    Accuracies, unparsed and truncated shares are fractions, MRR is in percent, `unparsed` counts unparseable greedy answers of
    both modalities; `word_error_rate` is that of all words together. Where nothing was evaluated only the counts are there.
    """
    figures: dict[str, Any] = _counts(results)
    items = _evaluated(results)
    for name, columns in _columns(results, reference).items():
        figures |= with_interval(name, bootstrap_interval(FIGURES[name].statistic, *columns))
    if items:
        figures |= with_interval(
            "unparsed", bootstrap_interval(total, [sum(bool(item[m].is_unparsed) for m in Modality) for item in items])
        )
        layers = [bootstrap_interval(mean, column) for column in zip(*(item.layer_cosine for item in items), strict=True)]
        figures["layer_cosine"] = [layer.value for layer in layers]
        figures["layer_cosine_ci95"] = [layer.interval for layer in layers]
        figures["scorers"] = {name: _scorer_report(items, name) for name in SCORERS}
    categories = sorted({result.category for result in results} - {""})
    if categories:
        figures["categories"] = {
            category: _category_report([result for result in results if result.category == category]) for category in categories
        }
    figures["failed"] = {result.id: result.failed for result in results if result.failed is not None}
    return figures


def curve_point(results: Iterable[ItemResult]) -> dict[str, float]:
    """The figures of `FIGURES` that need no reference, as metrics.jsonl has them: `validation/<name>`, and `/low` and `/high`
    for the ends of its 95 % interval; without those that are not known."""
    point: dict[str, float] = {}
    for name, columns in _columns(list(results), {}).items():
        value, (low, high) = bootstrap_interval(FIGURES[name].statistic, *columns)
        named = {f"validation/{name}": value, f"validation/{name}/low": low, f"validation/{name}/high": high}
        point |= {place: number for place, number in named.items() if np.isfinite(number)}
    return point


def overall(results: Iterable[ItemResult], reference: Reference) -> dict[str, Any]:
    """Mean over the data sets, each counting the same, as published tables have it; MRR from the mean accuracies."""
    data_sets = list(by_data(results).values())
    columns = [_columns(own, reference) for own in data_sets]
    counts = [_counts(own) for own in data_sets]
    figures: dict[str, Any] = {name: sum(count[name] for count in counts) for name in counts[0]}
    for name in columns[0]:
        # A mean over data sets of a rate of all words would be of neither.
        if name != "word_error_rate" and all(name in others for others in columns):
            figures |= with_interval(name, mean_over_data(FIGURES[name].statistic, [others[name] for others in columns]))
    return figures


def change_since(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> dict[str, Any]:
    """Differences to an earlier evaluation, paired by item over those that both evaluated, with 95 % intervals.

    For greedy accuracies also how many items became right and wrong, and the p-value of McNemar's exact test.
    """
    after, first = _evaluated_by_both(results, before)
    figures: dict[str, Any] = {"num_items": len(after)}
    if not after:
        return figures
    changes = {"behaviour_similarity": (_values("behaviour_similarity", after), _values("behaviour_similarity", first))}
    for modality in Modality:
        name = f"{modality}_accuracy"
        pair = (_values(name, after), _values(name, first))
        if not all(pair):
            continue
        changes[name] = pair
        gained, lost = (sum(now - then == sign for now, then in zip(*pair, strict=True)) for sign in (1, -1))
        figures |= {f"{name}_gained": gained, f"{name}_lost": lost, f"{name}_mcnemar_p": mcnemar(gained, lost)}
        sampled = (_values(f"{name}_sampled", after), _values(f"{name}_sampled", first))
        if all(sampled):
            changes[f"{name}_sampled"] = sampled
    for modality, name in itertools.product(Modality, GRADES):
        both = [(now[modality].grades, then[modality].grades) for now, then in zip(after, first, strict=True)]
        known = [(now[name].value, then[name].value) for now, then in both if name in now and name in then]
        if known:
            now, then = zip(*known, strict=True)
            changes[f"{modality}_{name}"] = (list(now), list(then))
    for name, pair in changes.items():
        figures |= with_interval(name, bootstrap_interval(mean_difference, *pair))
    return figures


def overall_change(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> dict[str, Any]:
    """Differences of `overall` accuracies to an earlier evaluation: paired by item, each data set counting the same."""
    now, earlier = by_data(results), by_data(before)
    pairs = [_evaluated_by_both(now[name], earlier[name]) for name in now]
    figures: dict[str, Any] = {"num_items": sum(len(after) for after, _ in pairs)}
    for modality in Modality if all(after for after, _ in pairs) else ():
        name = f"{modality}_accuracy"
        columns = [[_values(name, items) for items in pair] for pair in pairs]
        if not all(column for pair in columns for column in pair):
            continue
        figures |= with_interval(name, mean_over_data(mean_difference, columns))
    return figures


def _evaluated(results: Iterable[ItemResult]) -> list[Evaluated]:
    return [result.evaluated for result in results if result.evaluated is not None]


def _evaluated_by_both(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> tuple[list[Evaluated], list[Evaluated]]:
    """(now, before) of the items that both evaluations have, in the same order."""
    earlier = {result.key: result.evaluated for result in before}
    pairs = [(result.evaluated, earlier.get(result.key)) for result in results]
    known = [(now, then) for now, then in pairs if now is not None and then is not None]
    return [now for now, _ in known], [then for _, then in known]


def _values(name: str, items: Iterable[Evaluated]) -> list[float]:
    """Values of a figure that is the mean of one column."""
    rows = [FIGURES[name].values(item, None) for item in items]
    return [row[0] for row in rows if row is not None]


def _columns(results: Sequence[ItemResult], reference: Reference) -> dict[str, list[list[float]]]:
    """`columns_of` every figure that evaluation.json has, by name, as far as an item contributes to it."""
    columns = {name: columns_of(figure, results, reference) for name, figure in FIGURES.items() if figure.of_evaluations}
    return {name: found for name, found in columns.items() if found}


def _counts(results: Sequence[ItemResult]) -> dict[str, int]:
    num_failed = sum(result.failed is not None for result in results)
    return {"num_items": len(results) - num_failed, "num_failed": num_failed}


def _scorer_report(items: Sequence[Evaluated], scorer: str) -> dict[str, Any]:
    """Accuracy by modality and the shares unparsed and guessed, over the items whose answer set the scorer knows."""
    known = [item for item in items if scorer in item.speech.readings]
    figures: dict[str, Any] = {"num_items": len(known)}
    for modality in Modality if known else ():
        readings = [item[modality].readings[scorer] for item in known]
        columns = {
            "accuracy": [reading.correct for reading in readings],
            "unparsed": [reading.extracted is None or reading.guessed for reading in readings],
            "guessed": [reading.guessed for reading in readings],
        }
        for name, column in columns.items():
            figures |= with_interval(f"{modality}_{name}", bootstrap_interval(mean, column))
    return figures


def _category_report(results: Sequence[ItemResult]) -> dict[str, Any]:
    figures: dict[str, Any] = _counts(results)
    items = _evaluated(results)
    for name in ("speech_accuracy", "text_accuracy"):
        if values := _values(name, items):
            figures |= with_interval(name, bootstrap_interval(mean, values))
    return figures
