"""What an evaluation knows of every item, and all figures made from it: report, paired comparison, `predictions.jsonl`.

Everything is by item: (name of the data, id) is what resuming, comparing and dividing by a reference match on. An item that
could not be evaluated is there too, with the reason; figures are over the others, whose number stands beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tars_fast.data.sources import stamp
from tars_fast.data.transcription import normalised
from tars_fast.evaluation.metrics import (
    bootstrap_interval,
    mcnemar,
    mean,
    mean_difference,
    mean_over_parts,
    modality_recovery_rate,
    ratio,
    total,
)
from tars_fast.evaluation.scorers import SCORERS, Reading
from tars_fast.types import Modality, Question, UserError

PREDICTIONS = "predictions.jsonl"
OVERALL = "overall"
"""What the mean over several data sets is called, which no data set may be."""


@dataclass(frozen=True)
class Answered:
    """What the model made of one item in one modality."""

    completion: str
    """Greedy."""
    truncated: bool
    readings: Mapping[str, Reading]
    """By scorer."""
    sampled_accuracy: float | None
    """Share of correct sampled completions; None: none were drawn."""


@dataclass(frozen=True)
class Transcribed:
    """What the model heard."""

    transcription: str
    transcript: str
    """What was said."""
    word_error_rate: float


@dataclass(frozen=True)
class Evaluated:
    """An item that could be evaluated."""

    speech: Answered
    text: Answered
    behaviour_similarity: float
    layer_cosine: tuple[float, ...]
    """[L] cosine of pooled completion states, speech against text, layers 1 .. L."""
    transcribed: Transcribed | None


@dataclass(frozen=True)
class ItemResult:
    """One item of one evaluation: a line of `predictions.jsonl`."""

    data: str
    """Name of the data it comes from."""
    id: str
    category: str
    question: str
    answer: str
    """The reference answer."""
    evaluated: Evaluated | None
    failed: str | None
    """Why it could not be evaluated."""

    @classmethod
    def of(cls, data: str, question: Question, evaluated: Evaluated | None, failed: str | None) -> ItemResult:
        return cls(data, question.id, question.category, question.text, question.answer, evaluated, failed)

    @property
    def key(self) -> tuple[str, str]:
        return self.data, self.id

    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ItemResult:
        """Raises ValueError, KeyError or TypeError for anything that `to_line` does not write."""
        values = json.loads(line)
        if values["evaluated"] is not None:
            parts = values["evaluated"]
            for modality in Modality:
                readings = {name: Reading(**reading) for name, reading in parts[modality].pop("readings").items()}
                parts[modality] = Answered(**parts[modality], readings=readings)
            transcribed = parts.pop("transcribed")
            parts["layer_cosine"] = tuple(parts["layer_cosine"])
            values["evaluated"] = Evaluated(**parts, transcribed=None if transcribed is None else Transcribed(**transcribed))
        return cls(**values)


def recordings_fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 over the `stamp` of each recording, in order: of these files on this machine, none of them read."""
    return hashlib.sha256("\n".join(stamp(question.audio) for question in questions).encode()).hexdigest()


def read_predictions(path: Path, flag: str) -> list[ItemResult]:
    """The items of another evaluation, whole lines only: of its folder, its evaluation.json, or a jsonl file by itself.

    Args:
        flag: what the message calls it.

    Raises:
        UserError: there is none, or it holds something else.
    """
    path = path / PREDICTIONS if path.is_dir() else path
    path = path.with_name(PREDICTIONS) if path.suffix == ".json" else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); name the --output-dir of an evaluation") from error
    # What kill -9 cut off has no end of line.
    lines = text.split("\n")[:-1]
    try:
        return [ItemResult.from_line(line) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {path}: not the predictions of an evaluation by this version ({error!r})") from error


def by_data(results: Iterable[ItemResult]) -> dict[str, list[ItemResult]]:
    """Items by the name of their data, in order."""
    parts: dict[str, list[ItemResult]] = {}
    for result in results:
        parts.setdefault(result.data, []).append(result)
    return parts


def evaluated(results: Iterable[ItemResult]) -> list[Evaluated]:
    return [result.evaluated for result in results if result.evaluated is not None]


Reference = float | Mapping[tuple[str, str], float]
"""Text accuracy of the fixed reference that `mrr` divides by: a fraction, or 0 or 1 of each item."""


def text_reference(results: Iterable[ItemResult]) -> dict[tuple[str, str], float]:
    """Another evaluation's items as a `Reference`."""
    return {r.key: float(r.evaluated.text.readings["strict"].correct) for r in results if r.evaluated is not None}


def _accuracy(items: Sequence[Evaluated], modality: Modality, scorer: str = "strict") -> list[float]:
    return [float(getattr(item, modality).readings[scorer].correct) for item in items]


def _columns(results: Sequence[ItemResult], reference: Reference) -> dict[str, tuple[Any, ...]]:
    """Name of each figure -> (statistic, columns), over the items that were evaluated."""
    items = evaluated(results)
    if not items:
        return {}
    speech, text = (_accuracy(items, modality) for modality in Modality)
    referred = [
        (correct, reference if isinstance(reference, float) else reference[result.key])
        for correct, result in zip(speech, (r for r in results if r.evaluated is not None), strict=True)
        if isinstance(reference, float) or result.key in reference
    ]
    columns: dict[str, tuple[Any, ...]] = {"speech_accuracy": (mean, speech), "text_accuracy": (mean, text)}
    if referred:
        columns["mrr"] = (modality_recovery_rate, *map(list, zip(*referred, strict=True)))
    columns["mrr_same_model"] = (modality_recovery_rate, speech, text)
    columns["behaviour_similarity"] = (mean, [item.behaviour_similarity for item in items])
    for modality in Modality:
        answered = [getattr(item, modality) for item in items]
        columns[f"{modality}_unparsed"] = (mean, [float(a.readings["strict"].extracted is None) for a in answered])
        columns[f"{modality}_truncated"] = (mean, [float(a.truncated) for a in answered])
        if answered[0].sampled_accuracy is not None:
            columns[f"{modality}_accuracy_sampled"] = (mean, [a.sampled_accuracy for a in answered])
    heard = [item.transcribed for item in items if item.transcribed is not None]
    if heard:
        words = [float(len(normalised(one.transcript).split())) for one in heard]
        errors = [one.word_error_rate * count for one, count in zip(heard, words, strict=True)]
        columns["word_error_rate"] = (ratio, errors, words)
    return columns


def _with_intervals(figures: Mapping[str, tuple[float, list[float]]]) -> dict[str, Any]:
    """`<name>` and `<name>_ci95`; None in the place of nan."""
    report: dict[str, Any] = {}
    for name, (figure, interval) in figures.items():
        report[name] = None if np.isnan(figure) else figure
        report[f"{name}_ci95"] = None if np.isnan(interval).any() else interval
    return report


def _counts(results: Sequence[ItemResult]) -> dict[str, int]:
    num_failed = sum(result.failed is not None for result in results)
    return {"num_items": len(results) - num_failed, "num_failed": num_failed}


def report(results: Sequence[ItemResult], reference: Reference) -> dict[str, Any]:
    """Figures of one data set with `<name>_ci95` beside them.

    Accuracies, unparsed and truncated shares are fractions, MRR is in percent, `unparsed` counts unparseable greedy answers of
    both modalities; `word_error_rate` is that of all words together. Where nothing was evaluated only the counts are there.
    """
    items = evaluated(results)
    figures = {name: bootstrap_interval(*parts) for name, parts in _columns(results, reference).items()}
    if items:
        count = [sum(getattr(item, m).readings["strict"].extracted is None for m in Modality) for item in items]
        figures["unparsed"] = bootstrap_interval(total, count)
    made = _counts(results) | _with_intervals(figures)
    if items:
        layers = [bootstrap_interval(mean, column) for column in zip(*(item.layer_cosine for item in items), strict=True)]
        made["layer_cosine"] = [figure for figure, _ in layers]
        made["layer_cosine_ci95"] = [interval for _, interval in layers]
        made["scorers"] = {name: _scorer_report(items, name) for name in SCORERS}
    categories = sorted({result.category for result in results} - {""})
    if categories:
        made["categories"] = {
            category: _category_report([result for result in results if result.category == category]) for category in categories
        }
    made["failed"] = {result.id: result.failed for result in results if result.failed is not None}
    return made


def _scorer_report(items: Sequence[Evaluated], scorer: str) -> dict[str, Any]:
    """Accuracy by modality and the shares unparsed and guessed, over the items whose kind of answer the scorer knows."""
    known = [item for item in items if scorer in item.speech.readings]
    made: dict[str, Any] = {"num_items": len(known)}
    for modality in Modality if known else ():
        readings = [getattr(item, modality).readings[scorer] for item in known]
        columns = {
            "accuracy": [reading.correct for reading in readings],
            "unparsed": [reading.extracted is None or reading.guessed for reading in readings],
            "guessed": [reading.guessed for reading in readings],
        }
        made |= _with_intervals({f"{modality}_{name}": bootstrap_interval(mean, column) for name, column in columns.items()})
    return made


def _category_report(results: Sequence[ItemResult]) -> dict[str, Any]:
    items = evaluated(results)
    names = {f"{modality}_accuracy": _accuracy(items, modality) for modality in Modality} if items else {}
    return _counts(results) | _with_intervals({name: bootstrap_interval(mean, column) for name, column in names.items()})


def overall(results: Iterable[ItemResult], reference: Reference) -> dict[str, Any]:
    """Mean over the data sets, each counting the same, as published tables have it; MRR from the mean accuracies."""
    parts = by_data(results)
    columns = [_columns(part, reference) for part in parts.values()]
    counts = [_counts(part) for part in parts.values()]
    made: dict[str, Any] = {name: sum(count[name] for count in counts) for name in counts[0]}
    shared = [name for name in columns[0] if all(name in others for others in columns)]
    names = [name for name in shared if name != "word_error_rate"]
    return made | _with_intervals(
        {name: mean_over_parts(columns[0][name][0], [others[name][1:] for others in columns]) for name in names}
    )


def overall_change(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> dict[str, Any]:
    """Differences of `overall` accuracies to an earlier evaluation: paired by item, each data set counting the same."""
    parts, earlier = by_data(results), by_data(before)
    pairs = [_both_evaluated(parts[name], earlier[name]) for name in parts]
    made: dict[str, Any] = {"num_items": sum(map(len, pairs))}
    for modality in Modality if all(pairs) else ():
        columns = [[_accuracy(items, modality) for items in zip(*part, strict=True)] for part in pairs]
        made |= _with_intervals({f"{modality}_accuracy": mean_over_parts(mean_difference, columns)})
    return made


def _both_evaluated(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> list[tuple[Evaluated, Evaluated]]:
    """(now, before) of every item that both evaluated."""
    earlier = {result.key: result.evaluated for result in before}
    pairs = [(result.evaluated, earlier.get(result.key)) for result in results]
    return [(now, then) for now, then in pairs if now is not None and then is not None]


def check_same_items(data: Mapping[str, Sequence[Question]], others: Sequence[ItemResult], what: str) -> None:
    """Raises UserError where another evaluation is not of the same items, saying how many differ.

    Args:
        data: the items of this evaluation, by the name of their data.
        what: what the message calls the other one.
    """
    own = {(name, question.id): (question.text, question.answer) for name, part in data.items() for question in part}
    theirs = {other.key: (other.question, other.answer) for other in others}
    missing = [key for key in own if key not in theirs]
    added = [key for key in theirs if key not in own]
    changed = [key for key in own if key in theirs and own[key] != theirs[key]]
    if missing or added or changed:
        first = (missing or added or changed)[0]
        raise UserError(
            f"{what}: not an evaluation of the same items: {len(missing)} of these {len(own)} are not in it, {len(added)} of "
            f"its are not here, {len(changed)} ask or answer something else (the first: {first[1]!r} of data {first[0]!r}); "
            "both need the same --data, names included, and to be finished"
        )


def change_since(results: Iterable[ItemResult], before: Iterable[ItemResult]) -> dict[str, Any]:
    """Differences to an earlier evaluation, paired by item over those that both evaluated, with 95 % intervals.

    For greedy accuracies also how many items became right and wrong, and the p-value of McNemar's exact test.
    """
    pairs = _both_evaluated(results, before)
    made: dict[str, Any] = {"num_items": len(pairs)}
    if not pairs:
        return made
    after, first = zip(*pairs, strict=True)
    figures = {"behaviour_similarity": [[item.behaviour_similarity for item in items] for items in (after, first)]}
    for modality in Modality:
        name = f"{modality}_accuracy"
        figures[name] = [_accuracy(items, modality) for items in (after, first)]
        gained, lost = (sum(a - b == sign for a, b in zip(*figures[name], strict=True)) for sign in (1, -1))
        made |= {f"{name}_gained": gained, f"{name}_lost": lost, f"{name}_mcnemar_p": mcnemar(gained, lost)}
        sampled = [[getattr(item, modality).sampled_accuracy for item in items] for items in (after, first)]
        if None not in (sampled[0][0], sampled[1][0]):
            figures[f"{name}_sampled"] = sampled
    return made | _with_intervals({name: bootstrap_interval(mean_difference, *pair) for name, pair in figures.items()})
