"""`report.html` and the pictures of an analysis: what analysis.json and items.jsonl hold, as sections of a `page`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from tars_fast.evaluation.metrics import Curve
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult
from tars_fast.evaluation.scorers import read_completion
from tars_fast.reports.figure import CKA_FIGURE, DRIFT_FIGURE, as_svg, can_draw, curves_figure, heat_map_figure, write_png
from tars_fast.reports.log import best_layer_cells, shown
from tars_fast.reports.page import REPORT, Picture, Section, Table, write_page
from tars_fast.reports.run_page import curves_picture, draw_sample, layer_curve, settings_section
from tars_fast.types import Modality, Question

T = TypeVar("T")
_KINDS = {"own": "each its own completion", "forced": "the written completion under both prompts"}
_MEANS = {"pooled": "averaged over tokens", "tokens": "token by token"}
_ESTIMATES = {"cka": "CKA", "debiased": "CKA, debiased"}
_CHAIN = (
    ("speech right, %", "speech_accuracy", 100, 0),
    ("text right, %", "text_accuracy", 100, 0),
    ("same final answer, %", "same_answer", 100, 0),
    ("same completion, %", "same_completion", 100, 0),
    ("first token that differs", "first_divergence", 1, 1),
    ("the same, % of the completion", "first_divergence_share", 100, 0),
    ("tokens, spoken question", "speech_tokens", 1, 1),
    ("tokens, written question", "text_tokens", 1, 1),
)
"""Title, name, scale, decimals of an interval's ends."""


@dataclass(frozen=True)
class Analysed:
    """An analysis that is done."""

    figures: Mapping[str, Any]
    """What analysis.json holds."""
    records: Sequence[Mapping[str, Any]]
    """The lines of items.jsonl."""


def item_results(analysed: Analysed, data: str, questions: Sequence[Question]) -> list[ItemResult]:
    """Its items as an evaluation has them, as far as they were looked at: how alike words are is nan.

    Args:
        data: name of the questions.

    Raises:
        KeyError: a record lacks something that this version writes.
    """
    records = {record["id"]: record for record in analysed.records}
    failed, seed = analysed.figures["failed"], analysed.figures["settings"]["seed"]
    results = []
    for question in questions:
        if (record := records.get(question.id)) is None:
            results.append(ItemResult.of(data, question, None, failed[question.id]))
            continue
        answers = {}
        for modality in Modality:
            completion = record[modality]
            readings = read_completion(completion, question.choices, question.answer, f"{seed} {modality} {question.id}")
            answers[modality] = Answered(completion, record[f"{modality}_truncated"], readings, None)
        cosines = tuple(np.nan if cosine is None else cosine for cosine in record["own_pooled"])
        results.append(
            ItemResult.of(
                data, question, Evaluated(answers[Modality.SPEECH], answers[Modality.TEXT], np.nan, cosines, None), None
            )
        )
    return results


def draw_analysis(output_dir: Path, figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    """drift.png and cka.png, where there is something to draw with.

    Args:
        figures: what analysis.json holds.
        before: the same of the analysis that it was compared with.
    """
    if not can_draw():
        return
    stages = _stages(figures, before)
    panels = {title: _drift_curves(stages, kind) for kind, title in _KINDS.items()}
    write_png(output_dir / DRIFT_FIGURE, curves_figure(panels, "layer", "cosine, speech to text"))
    write_png(output_dir / CKA_FIGURE, heat_map_figure(_matrices(figures), "text layer", "speech layer", "CKA"))


def write_analysis(
    output_dir: Path, analysed: Analysed, before: Analysed | None, data: str, questions: Sequence[Question]
) -> None:
    """`report.html`.

    Args:
        before: the analysis that it was compared with, of the same questions.
        data: name of the questions.
    """
    figures = analysed.figures
    stages = _stages(figures, None if before is None else before.figures)
    sections = [
        *_behaviour(stages, figures.get("change")),
        *_drift(stages, figures.get("change")),
        *_along(stages),
        *_alignment(stages),
        *_stability(stages),
        *_probes(stages),
        _cost(stages),
        settings_section(figures["settings"]),
    ]
    results = _stages(analysed, before)
    sample = draw_sample({name: item_results(one, data, questions) for name, one in results.items()}, {data: questions})
    write_page(output_dir / REPORT, f"{figures['settings']['model']}, analysed", sections, sample)


def _stages(this: T, before: T | None) -> dict[str, T]:
    return {"this model": this} if before is None else {"before": before, "after": this}


def _behaviour(stages: Mapping[str, Mapping[str, Any]], change: Mapping[str, Any] | None) -> Iterator[Section]:
    columns = {name: figures["chain"] for name, figures in stages.items()}
    rows = []
    for title, name, scale, decimals in _CHAIN:
        cells = [shown(chain[name], chain[f"{name}_ci95"], ".1f", f".{decimals}f", scale) for chain in columns.values()]
        if change is not None:
            cells.append(shown(change[name], change[f"{name}_ci95"], "+.1f", f"+.{decimals}f", scale))
        rows.append((title, *cells))
    header = ("", *columns, *(["change"] if change is not None else []))
    notes = ["95 % bootstrap intervals over items in brackets; a change is paired by item."]
    notes += [f"{name}: {figures['num_items']} items, {figures['num_failed']} failed." for name, figures in stages.items()]
    notes.append("Where completions part is counted in tokens from 0, over the items whose completions differ.")
    yield Section("Behaviour along the chain of reasoning", notes, [Table(header, rows)])


def _drift_curves(stages: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Curve]:
    """By mean and stage."""
    return {
        f"{what}, {name}": layer_curve(figures["drift"][kind][what], figures["drift"][kind][f"{what}_ci95"])
        for what in _MEANS
        for name, figures in stages.items()
    }


def _drift(stages: Mapping[str, Mapping[str, Any]], change: Mapping[str, Any] | None) -> Iterator[Section]:
    notes = [
        "Cosine of hidden states after a spoken question with those after the same question written, by layer, with 95 % "
        "intervals. " + "; ".join(f"{name}: states {what}" for name, what in _MEANS.items()) + "."
    ]
    pictures = []
    for kind, title in _KINDS.items():
        alt = f"Cosine by layer, {title}"
        pictures.append(curves_picture(_drift_curves(stages, kind), "layer", "cosine, speech to text", alt))
    for kind, title in _KINDS.items():
        if change is None:
            break
        curves = {what: layer_curve(change[f"{kind}_{what}"], change[f"{kind}_{what}_ci95"]) for what in _MEANS}
        alt = f"Change of the cosine since the analysis before, paired by item, {title}"
        pictures.append(curves_picture(curves, "layer", "change of the cosine", alt, "+.3f"))
    yield Section("Drift of hidden states", notes, pictures=pictures)


def _along(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    pictures = []
    num_layers = len(next(iter(stages.values()))["drift"]["own"]["along"])
    for kind, title in _KINDS.items():
        for layer in sorted({-(-num_layers // 2), num_layers}):
            curves = {}
            for name, figures in stages.items():
                along = figures["drift"][kind]
                curves[name] = layer_curve(along["along"][layer - 1], along["along_ci95"][layer - 1])
            alt = f"Cosine along the completion, layer {layer} of {num_layers}, {title}"
            pictures.append(curves_picture(curves, "stretch", "cosine, speech to text", alt))
    notes = ["Token by token, averaged within ten equal stretches from the completion's beginning to its end."]
    yield Section("Along the completion", notes, pictures=pictures)


def _matrices(figures: Mapping[str, Any]) -> dict[str, Sequence[Sequence[float | None]]]:
    """By title."""
    alignment = figures["alignment"]
    panels = {title: alignment[name]["matrix"] for name, title in _ESTIMATES.items()}
    if "mismatched" in alignment["debiased"]:
        panels["debiased, of another item"] = alignment["debiased"]["mismatched"]
        panels["debiased, above another item"] = alignment["debiased"]["above_mismatched"]
    return panels


def _alignment(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    pictures = []
    by_stage = {name: _matrices(figures) for name, figures in stages.items()}
    for title in by_stage[next(iter(by_stage))]:
        pictures += [_heat_map(matrices[title], f"{title}, {name}") for name, matrices in by_stage.items()]
    for title, figure in (("Best text layer", "best_text_layer"), ("Text layers in the band", "band_width")):
        for estimate, label in _ESTIMATES.items():
            curves = {}
            for name, figures in stages.items():
                layers = figures["alignment"][estimate]
                curves[name] = layer_curve(layers[figure], layers[f"{figure}_ci95"])
            pictures.append(curves_picture(curves, "speech layer", title.lower(), f"{title} by {label}", ".0f"))
    base_layer = next(iter(stages.values()))["alignment"]["base_layer"]
    headings = ("best text layer", "its CKA, debiased", "above another item's")
    rows = []
    for name, figures in stages.items():
        layers = figures["alignment"]["debiased"]
        before = "" if len(stages) == 1 else f"{name}, "
        rows += [(f"{before}layer {number + 1}", *best_layer_cells(layers, number)) for number in range(len(layers["matrix"]))]
    notes = [
        f"Linear CKA of the states of every speech layer with those of every text layer over prompts, tokens paired at layer "
        f"{base_layer}. Few tokens lift plain CKA, which the debiased estimate puts right; what the text of another item "
        "reaches in the same way has nothing to do with what was said.",
        "The band: neighbouring text layers that reach nine tenths of the best one's CKA.",
    ]
    yield Section("Which layers agree", notes, [Table(("speech", *headings), rows)], pictures)


def _heat_map(matrix: Sequence[Sequence[float | None]], alt: str) -> Picture:
    """CKA [speech layers][text layers]."""
    header = ("speech layer", *(f"text {number}" for number in range(1, len(matrix) + 1)))
    rows = [(str(number), *(shown(value, None, ".2f") for value in row)) for number, row in enumerate(matrix, start=1)]
    drawn = as_svg(heat_map_figure({"": matrix}, "text layer", "speech layer", "CKA")) if can_draw() else None
    return Picture(drawn, alt, Table(header, rows))


def _stability(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    rows = []
    for name, figures in stages.items():
        before = "" if len(stages) == 1 else f"{name}: "
        for estimate, label in _ESTIMATES.items():
            for layer, parts in figures["alignment"]["base_layers"].items():
                part = parts[estimate]
                columns = (("correlation", ".2f", 1), ("same_best_layer", ".0f", 100), ("mean_band_width", ".1f", 1))
                cells = [shown(part[what], part[f"{what}_ci95"], spec, scale=scale) for what, spec, scale in columns]
                rows.append((f"{before}{label}, base layer {layer}", *cells))
            halves = figures["alignment"][estimate]["halves"]
            correlation, same, width = (
                _mean_known(halves[what]) for what in ("correlation", "same_best_layer", "mean_band_width")
            )
            cells = [shown(correlation, None, ".2f"), shown(same, None, ".0f", scale=100), shown(width, None, ".1f")]
            rows.append((f"{before}{label}, halves of the items", *cells))
    notes = [
        "The matrix with tokens paired at another layer beside the one above, and random halves of the items one beside the "
        "other, the mean over ten divisions."
    ]
    header = ("", "correlation", "same best layer, %", "layers in the band")
    yield Section("How stable that is", notes, [Table(header, rows)])


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _probes(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    rows = []
    for stage, figures in stages.items():
        for name, probe in figures.get("probes", {}).items():
            cells = []
            for part, sign in ((probe, ""), (probe.get("change", {}), "+")):
                for modality in Modality:
                    accuracy = f"{modality}_accuracy"
                    cells.append(shown(part.get(accuracy), part.get(f"{accuracy}_ci95"), f"{sign}.1f", f"{sign}.0f", 100))
            rows.append((name if len(stages) == 1 else f"{stage}: {name}", *cells))
    if rows:
        notes = [
            "Accuracy with one thing changed: calibrate_N gives speech the mean and deviation of text on the way into layer N, "
            "repeat_N says every written word N times. Changes are those by the probe, paired by item."
        ]
        header = ("", "speech, %", "text, %", "change, speech", "change, text")
        yield Section("Probes", notes, [Table(header, rows)])


def _cost(stages: Mapping[str, Mapping[str, Any]]) -> Section:
    end = "_seconds_per_item"
    parts = [name.removesuffix(end) for name in next(iter(stages.values()))["cost"] if name.endswith(end)]
    rows = [(part, *(shown(figures["cost"][f"{part}{end}"], None, ".3f") for figures in stages.values())) for part in parts]
    peaks = (shown(figures["cost"]["peak_memory_bytes"], None, ".2f", scale=1e-9) for figures in stages.values())
    return Section("Cost", ["Seconds an item."], [Table(("", *stages), [*rows, ("peak memory, GB", *peaks)])])
