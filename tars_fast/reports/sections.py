"""Sections, curves and their tables that several pages have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from tars_fast.evaluation.metrics import Curve
from tars_fast.learning.metrics import ALIGNMENT
from tars_fast.reports.page import Picture, Section, Table
from tars_fast.reports.plots import as_svg, can_plot, curves_plot
from tars_fast.reports.tables import shown

_OVER_STEPS = {
    "R_acc": {"speech": "accuracy/speech", "text": "accuracy/text"},
    "R_fmt": {"speech": "format/speech", "text": "format/text"},
    "R_rep and R_beh, speech": {"R_rep": "reward/representation", "R_beh": "reward/behaviour"},
    "Total reward": {"speech": "reward/speech", "text": "reward/text"},
    "Entropy, nats a token": {"speech": "entropy/speech", "text": "entropy/text"},
    "Divergence from the teacher, nats a token": {"speech": "divergence/speech"},
    "Divergence of written answers from the start, nats a token": {"text": "divergence/text"},
    "KL from the start on its own written answers, nats a token": {"text": "written_kl"},
}
"""Title -> curve -> its name in metrics.jsonl."""
_ENDS = 10
"""Steps that the beginning and the end of a table of rewards are means over."""


_ON_VALIDATION = {
    "Greedy accuracy": {"speech": "speech_accuracy", "text": "text_accuracy"},
    "Accuracy of samples": {"speech": "speech_accuracy_sampled", "text": "text_accuracy_sampled"},
    "Exact match": {"speech": "speech_exact", "text": "text_exact"},
    "Right number": {"speech": "speech_numeric", "text": "text_numeric"},
    "Judge's mark": {"speech": "speech_judge", "text": "text_judge"},
    "Similarity of completions": {"words": "behaviour_similarity"},
    "Answers that cannot be read": {"speech": "speech_unparsed", "text": "text_unparsed"},
}
"""Title -> curve -> its name in `FIGURES`."""


def layer_curve(values: Sequence[float | None], intervals: Sequence[Sequence[float | None]]) -> Curve:
    """The curve of a figure over layers, or over anything else that is counted from 1.

    Args:
        values: [L]
        intervals: [L] of (low, high)
    """
    low, high = zip(*intervals, strict=True)
    return Curve(range(1, len(values) + 1), values, low, high)


def curves_picture(
    curves: Mapping[str, Curve], x_label: str, y_label: str, alt: str, numbers: Table | None = None, order: Sequence[str] = ()
) -> Picture:
    """Curves and their numbers as a table.

    Args:
        alt: what the picture shows, in words.
        numbers: the table. None: `curves_table`.
        order: see `curves_plot`.
    """
    svg = as_svg(curves_plot({"": curves}, x_label, y_label, order)) if can_plot() else None
    return Picture(svg, alt, curves_table(curves, x_label) if numbers is None else numbers)


def curves_table(curves: Mapping[str, Curve], x_label: str, spec: str = ".3f") -> Table:
    """A row for each x, a column for each curve, numbers with their intervals; all curves are over the same x.

    Args:
        spec: format of the numbers.
    """
    columns = []
    for curve in curves.values():
        unknown = [None] * len(curve.x)
        ends = zip(curve.low or unknown, curve.high or unknown, strict=True)
        columns.append([shown(value, end, spec) for value, end in zip(curve.y, ends, strict=True)])
    (places,) = {tuple(curve.x) for curve in curves.values()}
    rows = [(f"{place:g}", *cells) for place, *cells in zip(places, *columns, strict=True)]
    return Table((x_label, *curves), rows)


def ends_table(curves: Mapping[str, Curve]) -> Table:
    """The first and the last number of each curve, where a table of all of them would be too long."""
    rows = [(name, shown(curve.y[0], None, ".3f"), shown(curve.y[-1], None, ".3f")) for name, curve in curves.items()]
    return Table(("", "beginning", "end"), rows)


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Iterator[Section]:
    """A section with the metrics of every step that has them; none where there are no steps.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    if not metrics:
        return
    pictures = []
    for label, names in _OVER_STEPS.items():
        curves = {}
        for title, name in names.items():
            # What an objective does not compute is in no line, what it seldom computes in a few.
            known = [(line["step"], line[name]) for line in metrics if name in line]
            if known:
                curves[title] = Curve(*zip(*known, strict=True)).thinned()
        if curves:
            alt = f"{label} over {len(metrics)} steps"
            pictures.append(curves_picture(curves, "step", label, alt, ends_table(curves)))
    yield Section("Training", ["Means over each step's completions; in a long run over neighbouring steps too."], (), pictures)
    yield from _rewards(metrics)


def _rewards(metrics: Sequence[Mapping[str, float]]) -> Iterator[Section]:
    """What each reward gave, how far it tells completions of a group apart, and how often it does not apply."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("not_applicable/"))
    found = [name.split("/")[1:] for name in names]
    rows, pictures = [], []
    for name, modality in found:
        columns = (f"{name}/{modality}", f"deviation/{name}/{modality}", f"not_applicable/{name}/{modality}")
        if name in ALIGNMENT and modality == "speech":
            columns = (f"reward/{name}", *columns[1:])
        series = [[line[column] for line in metrics if column in line] for column in columns]
        if any(share < 1 for share in series[2]):
            means = [[mean(part) if part else None for part in (values[:_ENDS], values[-_ENDS:])] for values in series]
            rows.append((name, modality, *(shown(value, None, ".3f") for ends in means for value in ends)))
    for name in dict.fromkeys(name for name, _ in found):
        if any(name in curve.split("/") for names in _OVER_STEPS.values() for curve in names.values()):
            continue
        known = {
            modality: [(line["step"], line[f"{name}/{modality}"]) for line in metrics if f"{name}/{modality}" in line]
            for modality in ("speech", "text")
        }
        curves = {modality: Curve(*zip(*points, strict=True)).thinned() for modality, points in known.items() if points}
        if curves:
            alt = f"Reward {name} over {len(metrics)} steps"
            pictures.append(curves_picture(curves, "step", name, alt, ends_table(curves)))
    if rows:
        header = ("reward", "completions", "beginning", "end", "deviation", "end", "does not apply", "end")
        notes = [
            f"Means over the first and the last {_ENDS} steps: of the reward, of its deviation within a group, and of the "
            "share of completions that it does not apply to. A reward without deviation teaches nothing."
        ]
        yield Section("Rewards", notes, [Table(header, rows)], pictures)


def validation_curves(metrics: Sequence[Mapping[str, float]]) -> Iterator[Section]:
    """A section with the evaluations while the run trained; none where there are none.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    pictures = []
    for label, names in _ON_VALIDATION.items():
        curves = {}
        for title, name in names.items():
            ends = [f"validation/{name}{end}" for end in ("", "/low", "/high")]
            known = [(line["step"], *(line.get(one) for one in ends)) for line in metrics if ends[0] in line]
            if known:
                curves[title] = Curve(*zip(*known, strict=True)).thinned()
        if curves:
            alt = f"{label} of the validation items over {metrics[-1]['step']} steps, with 95 % intervals"
            pictures.append(curves_picture(curves, "step", label.lower(), alt, ends_table(curves)))
    if pictures:
        notes = ["Evaluations while it trains, of items that are neither trained on nor held out for the end."]
        yield Section("Validation", notes, pictures=pictures)


def settings_section(settings: Mapping[str, Any]) -> Section:
    """All settings, folded away."""
    listed = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return Section("Settings", settings=Table(("setting", "value"), listed))
