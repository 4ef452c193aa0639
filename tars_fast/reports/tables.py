"""Figures as tables: their cells, rich tables of them on the terminal, and what the commands print at their end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tars_fast.evaluation.figures import FIGURES, OVERALL
from tars_fast.reports.log import RunLog
from tars_fast.support.console import PlainConsole, say
from tars_fast.support.files import listing
from tars_fast.types import Modality

_MOST_FAILURES_SHOWN = 5


def figure_table(title: str, reports: Mapping[str, Mapping[str, Any]], differences: Collection[str] = ()) -> Table:
    """A row for each figure and a column for each report, every figure with its 95 % interval.

    Figures that no report has are left out, and shares of truncated completions where all of them are 0.

    Args:
        reports: column title -> `<name>`, `<name>_ci95`.
        differences: titles of the columns whose figures are differences.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("", *reports):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in figure_rows(reports, differences):
        table.add_row(*row)
    return table


def figure_rows(reports: Mapping[str, Mapping[str, Any]], differences: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The rows of `figure_table`, each with its title in front."""
    rows = []
    for name, figure in FIGURES.items():
        known = [report[name] for report in reports.values() if report.get(name) is not None]
        if any(known) or (known and "truncated" not in name):
            cells = (
                figure_cell(report, name, sign="+") if column in differences else figure_cell(report, name, ends_spec=".0f")
                for column, report in reports.items()
            )
            rows.append((figure.title, *cells))
    return rows


def figure_cell(report: Mapping[str, Any], name: str, sign: str = "", ends_spec: str | None = None) -> str:
    """One of `FIGURES` with its interval, as `shown` has it, in its own scale and decimals.

    Args:
        report: `<name>`, `<name>_ci95`.
        sign: "+" for differences.
        ends_spec: see `shown`.
    """
    figure = FIGURES[name]
    return shown(report.get(name), report.get(f"{name}_ci95"), f"{sign}.{figure.decimals}f", ends_spec, figure.scale)


def describe_point(metrics: Mapping[str, float]) -> list[str]:
    """The accuracies of a `curve_point` and the grades of open questions, in words."""
    described = []
    for what, modality in itertools.product(("accuracy", "exact", "numeric", "judge"), Modality):
        name = f"{modality}_{what}"
        value, low, high = (metrics.get(f"validation/{name}{end}") for end in ("", "/low", "/high"))
        if value is not None:
            report = {name: value, f"{name}_ci95": None if low is None or high is None else [low, high]}
            described.append(f"{FIGURES[name].title} {figure_cell(report, name)}")
    return described


def shown(
    value: float | None, ends: Sequence[float | None] | None, spec: str, ends_spec: str | None = None, scale: float = 1
) -> str:
    """A figure and the ends of its interval in brackets.

    None or nan means unknown: an unknown figure is a dash, an interval with an unknown end is left out.

    Args:
        spec: format of the figure.
        ends_spec: format of the ends. None: the same.
    """
    if value is None or math.isnan(value):
        return "-"
    figure = f"{scale * value:{spec}}"
    known = [end for end in ends or () if end is not None and not math.isnan(end)]
    if len(known) < 2:
        return figure
    low, high = (f"{scale * end:{ends_spec or spec}}" for end in known)
    return f"{figure} [{low}, {high}]"


def print_evaluation(console: PlainConsole, evaluation: Mapping[str, Mapping[str, Any]]) -> None:
    """Print evaluation.json on one screen: figures, scorers, categories, the comparison, and what failed."""
    data_sets = {name: report for name, report in evaluation.items() if name != OVERALL}
    columns = data_sets if len(data_sets) == 1 else {**data_sets, "mean": evaluation[OVERALL]}
    console.print(figure_table("95 % bootstrap intervals in brackets", columns))
    for name, report in data_sets.items():
        scorers = report.get("scorers", {})
        unparsed = {
            scorer: " / ".join(f"{100 * own[f'{modality}_unparsed']:.1f}" for modality in Modality)
            for scorer, own in scorers.items()
            if own["num_items"]
        }
        title = f"{name}: the same completions by each scorer, %"
        console.print(_accuracy_table(title, "scorer", {scorer: scorers[scorer] for scorer in unparsed}, unparsed))
        if "categories" in report:
            console.print(_accuracy_table(f"{name}: by category, %", "category", report["categories"]))
    changes = {name: report["change"] for name, report in columns.items() if "change" in report}
    if changes:
        console.print(figure_table("Change, paired by item", changes, differences=changes))
        for name, change in changes.items():
            for modality in Modality:
                accuracy = f"{modality}_accuracy"
                if f"{accuracy}_mcnemar_p" in change:
                    say(
                        console,
                        f"{name}, {modality}: {change[f'{accuracy}_gained']} items became right, {change[f'{accuracy}_lost']} "
                        f"wrong, of {change['num_items']}; McNemar's exact test p = {change[f'{accuracy}_mcnemar_p']:.2g}",
                    )
    for name, report in data_sets.items():
        say(console, f"{name}: {report['num_items']} items evaluated, {report['num_failed']} failed")
        if "layer_cosine" in report:
            cosines = ", ".join(f"{cosine:.3f}" for cosine in report["layer_cosine"])
            say(console, f"{name}, layer cosine, speech to text: {cosines}")
        print_failures(console, name, report)


def best_layer_cells(layers: Mapping[str, Sequence[Any]], number: int) -> tuple[str, str, str]:
    """Cells of a speech layer: its best text layer, the CKA of the two, and how far that lies above another item's text.

    Args:
        layers: `debiased` of analysis.json's alignment.
        number: of the speech layer, from 0.
    """
    best = layers["best_text_layer"][number]
    if not best:
        return "-", "-", "-"
    above, ends = layers.get("above_mismatched"), layers.get("above_mismatched_ci95")
    return (
        shown(best, layers["best_text_layer_ci95"][number], ".0f"),
        shown(layers["matrix"][number][best - 1], None, ".3f"),
        "-" if above is None or ends is None else shown(above[number][best - 1], ends[number][best - 1], "+.3f"),
    )


PATH_FIGURES = {
    "sequence_cosine": "cosine of the means",
    "path_cosine": "cosine along the path (APS)",
    "monotonicity_cosine": "rank correlation of words and audio tokens, path by cosine",
    "sequence_distance": "distance of the means",
    "path_distance": "distance along the path (APS)",
    "monotonicity_distance": "rank correlation of words and audio tokens, path by distance",
    "same_path": "words with the same audio token on both paths",
}
"""Titles of `paths.METRICS`."""


def path_rows(paths: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """A row for each figure of `paths` of analysis.json, the mean over layers: title, of the item, with another item's text."""
    rows = []
    for name, title in PATH_FIGURES.items():
        means = (paths[kind]["mean"] if kind in paths else {} for kind in ("own", "mismatched"))
        own, other = (shown(mean.get(name), mean.get(f"{name}_ci95"), ".3f") for mean in means)
        rows.append((title, own, other))
    return rows


def intervention_rows(interventions: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """A row for each of `interventions` of analysis.json: name, accuracy on speech, its change."""
    return [
        (
            name,
            figure_cell(figures, "speech_accuracy", ends_spec=".0f"),
            figure_cell(figures.get("change", {}), "speech_accuracy", "+", "+.0f"),
        )
        for name, figures in interventions.items()
    ]


def model_rows(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each model of `checkpoints` of analysis.json: its accuracies, the gap, similarities of speech and text."""
    accuracies = ("speech_accuracy", "text_accuracy", "accuracy_gap")
    similarities = ("sequence_cosine", "path_cosine", "sequence_distance", "path_distance")
    return [
        (
            name,
            *(shown(figures[own], figures[f"{own}_ci95"], ".1f", ".0f", 100) for own in accuracies),
            *(shown(figures[own], figures[f"{own}_ci95"], ".3f") for own in similarities),
        )
        for name, figures in models.items()
    ]


MODEL_HEADER = ("model", "speech, %", "text, %", "gap", "cosine", "cosine, path", "distance", "distance, path")
"""Of `model_rows`."""


def correlation_rows(correlations: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """A row for each figure of `checkpoints` of analysis.json: title, correlation with the gap of its mean over layers, R^2."""
    rows = []
    for name, found in correlations.items():
        kind, _, what = name.partition("_")
        title = PATH_FIGURES.get(name, f"cosine of {kind} completions, {what}")
        square = None if found["mean"] is None else found["mean"] ** 2
        rows.append((title, shown(found["mean"], found["mean_ci95"], "+.2f"), shown(square, None, ".2f")))
    return rows


CORRELATION_HEADER = ("mean over layers", "correlation with the gap", "R^2")
"""Of `correlation_rows`."""


def _plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_analysis(console: PlainConsole, analysis: Mapping[str, Mapping[str, Any]]) -> None:
    """Print analysis.json on one screen: drift and alignment by layer, behaviour, probes, cost."""
    drift, alignment, chain = analysis["drift"], analysis["alignment"], analysis["chain"]
    columns = [(kind, what) for kind in ("own", "forced") for what in ("pooled", "tokens")]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{analysis['settings']['model']}: cosine of speech to text by layer, 95 % intervals in brackets",
    )
    headings = [f"{kind}, {what}" for kind, what in columns]
    for heading in ("layer", *headings, "best text layer", "its CKA, debiased", "above another text's"):
        table.add_column(heading, justify="right")
    layers = alignment["debiased"]
    for number in range(len(layers["matrix"])):
        cells = []
        for kind, what in columns:
            cells.append(shown(drift[kind][what][number], drift[kind][f"{what}_ci95"][number], ".3f"))
        table.add_row(str(number + 1), *cells, *best_layer_cells(layers, number))
    console.print(table)
    labels = {
        "speech_accuracy": "speech right",
        "text_accuracy": "text right",
        "same_answer": "same answer",
        "same_completion": "same completion",
        "first_divergence_share": "completions that differ are alike up to",
    }
    say(
        console,
        ", ".join(
            f"{label} {shown(chain[name], chain[f'{name}_ci95'], '.1f', '.0f', 100)} %" for name, label in labels.items()
        ),
    )
    correlations = {layer: other["debiased"]["correlation"] for layer, other in alignment["base_layers"].items()}
    width = shown(layers["mean_band_width"], layers["mean_band_width_ci95"], ".1f")
    shift = shown(layers["mean_shift"], None, "+.1f")
    say(
        console,
        f"debiased CKA, tokens paired at layer {alignment['base_layer']}: band of {width} layers, best text layer less speech "
        f"layer {shift} in the mean; correlation with that of tokens paired at "
        + ", ".join(f"layer {layer} {shown(r, None, '.3f')}" for layer, r in correlations.items()),
    )
    header = ("mean over layers", "own text", "another item's text")
    console.print(_plain_table("Speech and text of prompts", header, path_rows(analysis["paths"])))
    if "interventions" in analysis:
        rows = intervention_rows(analysis["interventions"])
        console.print(_plain_table("Audio tokens on the path changed", ("", "speech, %", "change"), rows))
    if "checkpoints" in analysis:
        over = analysis["checkpoints"]
        console.print(_plain_table("Checkpoints", MODEL_HEADER, model_rows(over["models"])))
        rows = correlation_rows(over["correlation"])
        console.print(_plain_table(f"Over {len(over['models'])} models", CORRELATION_HEADER, rows))
    if "probes" in analysis:
        console.print(_accuracy_table("Probes, accuracy %", "probe", analysis["probes"]))
        changes = {name: probe["change"] for name, probe in analysis["probes"].items() if "change" in probe}
        console.print(figure_table("Change by the probe, paired by item", changes, differences=changes))
    if "change" in analysis:
        for name, what in (("own_pooled", "own completions"), ("forced_pooled", "forced")):
            pairs = zip(analysis["change"][name], analysis["change"][f"{name}_ci95"], strict=True)
            listed = ", ".join(shown(value, ends, "+.3f") for value, ends in pairs)
            say(console, f"change of cosine by layer, {what}: {listed}")
    cost = {name: value for name, value in analysis["cost"].items() if name.endswith("_per_item")}
    phases = ", ".join(f"{name.partition('_')[0]} {value:.3f}" for name, value in cost.items())
    say(console, f"seconds an item: {phases}; at most {analysis['cost']['peak_memory_bytes'] / 1e9:.2f} GB of memory")


def _accuracy_table(
    title: str, kind: str, reports: Mapping[str, Mapping[str, Any]], unparsed: Mapping[str, str] | None = None
) -> Table:
    """A row for each `kind` with its accuracy by modality."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in (kind, "items", "speech", "text", *(["unparsed, speech / text"] if unparsed else [])):
        table.add_column(column, justify="left" if column == kind else "right", no_wrap=True)
    for name, report in reports.items():
        accuracies = (figure_cell(report, f"{modality}_accuracy", ends_spec=".0f") for modality in Modality)
        table.add_row(name, str(report["num_items"]), *accuracies, *([unparsed[name]] if unparsed else []))
    return table


def print_failures(console: PlainConsole, name: str, report: Mapping[str, Any]) -> None:
    """Print the items that could not be evaluated, the first ones with the reason."""
    failed = report["failed"]
    if failed:
        say(console, f"{name}: {len(failed)} failed, counted by no figure:", colour="red")
    for item, reason in list(failed.items())[:_MOST_FAILURES_SHOWN]:
        say(console, f"  {item}: {reason}")
    if len(failed) > _MOST_FAILURES_SHOWN:
        say(console, f"  and {len(failed) - _MOST_FAILURES_SHOWN} more, in evaluation.json")


def print_summary(log: RunLog, evaluation: Mapping[str, Mapping[str, Any]], output_dir: Path) -> None:
    """Print the run on one screen: before, after, the paired change, and where the time went."""
    reports = {name: evaluation[name] for name in ("before", "after", "change")}
    log.console.print(figure_table("Held-out items, 95 % bootstrap intervals in brackets", reports, differences=("change",)))
    for name in ("before", "after"):
        print_failures(log.console, name, evaluation[name])
    if "layer_cosine" in reports["before"] and "layer_cosine" in reports["after"]:
        layers = zip(reports["before"]["layer_cosine"], reports["after"]["layer_cosine"], strict=True)
        log.say("layer cosine, speech to text: " + ", ".join(f"{before:.3f} -> {after:.3f}" for before, after in layers))
    if seconds := log.median_seconds():
        log.say("median seconds a step: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    if best := evaluation.get("best"):
        what = f"checkpoint-{best['step']}" if best["step"] else "the model before training"
        log.say(f"best on the validation items by {best['metric']}: {what}, {best['value']:.4g}")
    if stopped := evaluation.get("stopped"):
        log.say(f"stopped early, after {stopped['step']} steps")
    log.say(f"written to {output_dir}: {listing(output_dir, without='checkpoint-')}, checkpoint-*/")
