"""`report.html` and the plots of an analysis, made from analysis.json and items.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from tars_fast.evaluation.metrics import Curve
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult
from tars_fast.evaluation.scorers import read_strictly
from tars_fast.reports.page import REPORT, Picture, Section, Table, write_page
from tars_fast.reports.plots import CKA_PLOT, DRIFT_PLOT, as_svg, can_plot, curves_plot, heat_map_plot, write_png
from tars_fast.reports.sample import sample_items
from tars_fast.reports.sections import curves_picture, curves_table, layer_curve, settings_section
from tars_fast.reports.tables import (
    CORRELATION_HEADER,
    MODEL_HEADER,
    best_layer_cells,
    correlation_rows,
    figure_cell,
    intervention_rows,
    model_rows,
    path_rows,
    shown,
)
from tars_fast.types import Modality, Question

Analysis = TypeVar("Analysis")
_KINDS = {"own": "each its own completion", "forced": "the written completion under both prompts"}
_MEANS = {"pooled": "averaged over tokens", "tokens": "token by token"}
_TOKENS = {
    "Cosine of speech and text by layer": {"sequence_cosine": "of the means", "path_cosine": "along the path"},
    "Distance of speech and text by layer": {"sequence_distance": "of the means", "path_distance": "along the path"},
    "Rank correlation of words with their audio tokens by layer": {
        "monotonicity_cosine": "path by cosine",
        "monotonicity_distance": "path by distance",
    },
}
"""Title -> figure of `paths` -> its curve."""
_PATH_KINDS = {"own": "", "mismatched": ", another item's text"}
_ESTIMATES = {"cka": "CKA", "debiased": "CKA, debiased"}


@dataclass(frozen=True)
class ChainFigure:
    """How the mean over items of one of `drift.SCALARS` is shown."""

    title: str
    scale: float = 100
    decimals_of_ends: int = 0


_CHAIN = {
    "speech_accuracy": ChainFigure("speech right, %"),
    "text_accuracy": ChainFigure("text right, %"),
    "accuracy_gap": ChainFigure("gap, text less speech, points"),
    "same_answer": ChainFigure("same final answer, %"),
    "same_completion": ChainFigure("same completion, %"),
    "first_divergence": ChainFigure("first token that differs", 1, 1),
    "first_divergence_share": ChainFigure("the same, % of the completion"),
    "speech_tokens": ChainFigure("tokens, spoken question", 1, 1),
    "text_tokens": ChainFigure("tokens, written question", 1, 1),
}


@dataclass(frozen=True)
class Analysed:
    """The files of a finished analysis."""

    figures: Mapping[str, Any]
    """The content of analysis.json."""
    records: Sequence[Mapping[str, Any]]
    """The lines of items.jsonl."""


def item_results(analysed: Analysed, data: str, questions: Sequence[Question]) -> list[ItemResult]:
    """The items of an analysis as results of an evaluation; the similarity of their words, which it has not, is nan.

    Args:
        data: name of the questions.

    Raises:
        KeyError: a record lacks something that this version writes.
    """
    records = {record["id"]: record for record in analysed.records}
    failed = analysed.figures["failed"]
    results = []
    for question in questions:
        if (record := records.get(question.id)) is None:
            results.append(ItemResult.of(data, question, None, failed[question.id]))
            continue
        answers = {}
        for modality in Modality:
            completion = record[modality]
            readings = {"strict": read_strictly(completion, question)}
            answers[modality] = Answered(completion, record[f"{modality}_truncated"], readings, None)
        cosines = tuple(np.nan if cosine is None else cosine for cosine in record["own_pooled"])
        results.append(
            ItemResult.of(
                data, question, Evaluated(answers[Modality.SPEECH], answers[Modality.TEXT], np.nan, cosines, None), None
            )
        )
    return results


def draw_analysis(output_dir: Path, figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    """Write drift.png and cka.png, where matplotlib is installed.

    Args:
        figures: the content of analysis.json.
        before: the same of the analysis that this one was compared with.
    """
    if not can_plot():
        return
    analyses = _analyses(figures, before)
    panels = {title: _drift_curves(analyses, kind) for kind, title in _KINDS.items()}
    write_png(output_dir / DRIFT_PLOT, curves_plot(panels, "layer", "cosine, speech to text"))
    write_png(output_dir / CKA_PLOT, heat_map_plot(_matrices(figures), "text layer", "speech layer", "CKA"))


def write_analysis(
    output_dir: Path, analysed: Analysed, before: Analysed | None, data: str, questions: Sequence[Question]
) -> None:
    """Write `report.html`.

    Args:
        before: the analysis that this one was compared with, of the same questions.
        data: name of the questions.
    """
    figures = analysed.figures
    analyses = _analyses(figures, None if before is None else before.figures)
    sections = [
        *_behaviour(analyses, figures.get("change")),
        *_drift(analyses, figures.get("change")),
        *_along(analyses),
        *_alignment(analyses),
        *_stability(analyses),
        *_paths(analyses),
        *_checkpoints(figures),
        *_probes(analyses),
        *_interventions(analyses),
        _cost(analyses),
        settings_section(figures["settings"]),
    ]
    results = _analyses(analysed, before)
    sample = sample_items({name: item_results(own, data, questions) for name, own in results.items()}, {data: questions})
    write_page(output_dir / REPORT, f"{figures['settings']['model']}, analysed", sections, sample)


def _analyses(this: Analysis, before: Analysis | None) -> dict[str, Analysis]:
    """Analyses by their names on the page."""
    return {"this model": this} if before is None else {"before": before, "after": this}


def _behaviour(analyses: Mapping[str, Mapping[str, Any]], change: Mapping[str, Any] | None) -> Iterator[Section]:
    columns = {name: figures["chain"] for name, figures in analyses.items()}
    rows = []
    for name, figure in _CHAIN.items():
        ends = f".{figure.decimals_of_ends}f"
        cells = [shown(chain[name], chain[f"{name}_ci95"], ".1f", ends, figure.scale) for chain in columns.values()]
        if change is not None:
            cells.append(shown(change[name], change[f"{name}_ci95"], "+.1f", f"+{ends}", figure.scale))
        rows.append((figure.title, *cells))
    header = ("", *columns, *(["change"] if change is not None else []))
    notes = ["95 % bootstrap intervals over items in brackets; a change is paired by item."]
    notes += [f"{name}: {figures['num_items']} items, {figures['num_failed']} failed." for name, figures in analyses.items()]
    notes.append("Where completions part is counted in tokens from 0, over the items whose completions differ.")
    yield Section("Behaviour along the chain of reasoning", notes, [Table(header, rows)])


def _drift_curves(analyses: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Curve]:
    """Curves by mean over tokens and by analysis."""
    return {
        f"{what}, {name}": layer_curve(figures["drift"][kind][what], figures["drift"][kind][f"{what}_ci95"])
        for what in _MEANS
        for name, figures in analyses.items()
    }


def _drift(analyses: Mapping[str, Mapping[str, Any]], change: Mapping[str, Any] | None) -> Iterator[Section]:
    notes = [
        "Cosine of hidden states after a spoken question with those after the same question written, by layer, with 95 % "
        "intervals. " + "; ".join(f"{name}: states {what}" for name, what in _MEANS.items()) + "."
    ]
    pictures = []
    for kind, title in _KINDS.items():
        alt = f"Cosine by layer, {title}"
        pictures.append(curves_picture(_drift_curves(analyses, kind), "layer", "cosine, speech to text", alt))
    for kind, title in _KINDS.items():
        if change is None:
            break
        curves = {what: layer_curve(change[f"{kind}_{what}"], change[f"{kind}_{what}_ci95"]) for what in _MEANS}
        alt = f"Change of the cosine since the analysis before, paired by item, {title}"
        pictures.append(curves_picture(curves, "layer", "change of the cosine", alt, curves_table(curves, "layer", "+.3f")))
    yield Section("Drift of hidden states", notes, pictures=pictures)


def _along(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    pictures = []
    num_layers = len(next(iter(analyses.values()))["drift"]["own"]["along"])
    for kind, title in _KINDS.items():
        for layer in sorted({-(-num_layers // 2), num_layers}):
            curves = {}
            for name, figures in analyses.items():
                along = figures["drift"][kind]
                curves[name] = layer_curve(along["along"][layer - 1], along["along_ci95"][layer - 1])
            alt = f"Cosine along the completion, layer {layer} of {num_layers}, {title}"
            pictures.append(curves_picture(curves, "stretch", "cosine, speech to text", alt))
    notes = ["Token by token, averaged within ten equal stretches from the completion's beginning to its end."]
    yield Section("Along the completion", notes, pictures=pictures)


def _matrices(figures: Mapping[str, Any]) -> dict[str, Sequence[Sequence[float | None]]]:
    """Matrices by title."""
    alignment = figures["alignment"]
    panels = {title: alignment[name]["matrix"] for name, title in _ESTIMATES.items()}
    if "mismatched" in alignment["debiased"]:
        panels["debiased, of another item"] = alignment["debiased"]["mismatched"]
        panels["debiased, above another item"] = alignment["debiased"]["above_mismatched"]
    return panels


def _alignment(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    pictures = []
    matrices_by_analysis = {name: _matrices(figures) for name, figures in analyses.items()}
    for title in matrices_by_analysis[next(iter(matrices_by_analysis))]:
        pictures += [_heat_map(matrices[title], f"{title}, {name}") for name, matrices in matrices_by_analysis.items()]
    for title, figure in (("Best text layer", "best_text_layer"), ("Text layers in the band", "band_width")):
        for estimate, label in _ESTIMATES.items():
            curves = {}
            for name, figures in analyses.items():
                layers = figures["alignment"][estimate]
                curves[name] = layer_curve(layers[figure], layers[f"{figure}_ci95"])
            numbers = curves_table(curves, "speech layer", ".0f")
            pictures.append(curves_picture(curves, "speech layer", title.lower(), f"{title} by {label}", numbers))
    base_layer = next(iter(analyses.values()))["alignment"]["base_layer"]
    headings = ("best text layer", "its CKA, debiased", "above another item's")
    rows = []
    for name, figures in analyses.items():
        layers = figures["alignment"]["debiased"]
        before = "" if len(analyses) == 1 else f"{name}, "
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
    svg = as_svg(heat_map_plot({"": matrix}, "text layer", "speech layer", "CKA")) if can_plot() else None
    return Picture(svg, alt, Table(header, rows))


def _stability(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    rows = []
    for name, figures in analyses.items():
        before = "" if len(analyses) == 1 else f"{name}: "
        for estimate, label in _ESTIMATES.items():
            for layer, by_estimate in figures["alignment"]["base_layers"].items():
                agreement = by_estimate[estimate]
                columns = (("correlation", ".2f", 1), ("same_best_layer", ".0f", 100), ("mean_band_width", ".1f", 1))
                cells = [shown(agreement[what], agreement[f"{what}_ci95"], spec, scale=scale) for what, spec, scale in columns]
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


def _paths(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    pictures = []
    for title, names in _TOKENS.items():
        for analysis, figures in analyses.items():
            curves = {
                f"{curve}{suffix}": layer_curve(layers[name], layers[f"{name}_ci95"])
                for kind, suffix in _PATH_KINDS.items()
                if kind in figures["paths"]
                for layers in [figures["paths"][kind]["layers"]]
                for name, curve in names.items()
            }
            pictures.append(curves_picture(curves, "layer", title.partition(" of ")[0].lower(), f"{title}, {analysis}"))
    header = ("mean over layers", *(f"{name}{suffix}" for name in analyses for suffix in ("", ", another item's text")))
    columns = [path_rows(figures["paths"]) for figures in analyses.values()]
    rows = [(cells[0][0], *(cell for _, *own in cells for cell in own)) for cells in zip(*columns, strict=True)]
    notes = [
        "Audio tokens of the spoken prompt and words of the written one: cosine and Euclidean distance of their mean states, "
        "and along the alignment path, which gives each word the audio token nearest to it. In the mean over layers the latter "
        "are the Alignment Path Scores of arXiv 2510.12116. With another item's text there is nothing to align."
    ]
    yield Section("Speech and text, token by token", notes, [Table(header, rows)], pictures)


def _checkpoints(figures: Mapping[str, Any]) -> Iterator[Section]:
    if "checkpoints" not in figures:
        return
    over = figures["checkpoints"]
    curves = {
        title: layer_curve(found["layers"], found["layers_ci95"])
        for name, title in (("sequence_cosine", "cosine of the means"), ("path_cosine", "cosine along the path"))
        for found in [over["correlation"][name]]
    }
    alt = "Correlation with the accuracy gap over checkpoints, by layer"
    tables = [Table(MODEL_HEADER, model_rows(over["models"]))]
    tables.append(Table(CORRELATION_HEADER, correlation_rows(over["correlation"])))
    notes = [
        f"The gap is the accuracy on text less that on speech. Correlations are Pearson's over {len(over['models'])} models; "
        "their intervals are over items, and say nothing of other runs. Checkpoints of one run all change with its steps: "
        "figures that do as well correlate."
    ]
    yield Section("Over the checkpoints of a run", notes, tables, [curves_picture(curves, "layer", "correlation", alt)])


def _interventions(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    rows = [
        (cells[0] if len(analyses) == 1 else f"{name}: {cells[0]}", *cells[1:])
        for name, figures in analyses.items()
        for cells in intervention_rows(figures.get("interventions", {}))
    ]
    if rows:
        notes = [
            "Accuracy on speech with audio tokens on the alignment path changed on the way into a layer: angle_N gives them "
            "the direction of their word's state, length_N its length; lowest_K changes the K that are least similar to their "
            "word, all every one on the path."
        ]
        yield Section("Audio tokens on the path changed", notes, [Table(("", "speech, %", "change"), rows)])


def _probes(analyses: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    rows = []
    for name, figures in analyses.items():
        for probe_name, probe in figures.get("probes", {}).items():
            cells = []
            for report, sign in ((probe, ""), (probe.get("change", {}), "+")):
                cells += [figure_cell(report, f"{modality}_accuracy", sign, f"{sign}.0f") for modality in Modality]
            rows.append((probe_name if len(analyses) == 1 else f"{name}: {probe_name}", *cells))
    if rows:
        notes = [
            "Accuracy with one thing changed: calibrate_N gives speech the mean and deviation of text on the way into layer N, "
            "repeat_N says every written word N times. Changes are those by the probe, paired by item."
        ]
        header = ("", "speech, %", "text, %", "change, speech", "change, text")
        yield Section("Probes", notes, [Table(header, rows)])


def _cost(analyses: Mapping[str, Mapping[str, Any]]) -> Section:
    end = "_seconds_per_item"
    costs = [figures["cost"] for figures in analyses.values()]
    # One of them may have had probes that the other had not.
    phases = dict.fromkeys(name.removesuffix(end) for cost in costs for name in cost if name.endswith(end))
    rows = [(phase, *(shown(cost.get(f"{phase}{end}"), None, ".3f") for cost in costs)) for phase in phases]
    peaks = (shown(cost["peak_memory_bytes"], None, ".2f", scale=1e-9) for cost in costs)
    return Section("Cost", ["Seconds an item."], [Table(("", *analyses), [*rows, ("peak memory, GB", *peaks)])])
