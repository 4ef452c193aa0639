"""Reports of an ablation: tables in Markdown, in LaTeX and on the terminal, plots, and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as ConsoleTable

from tars_fast.evaluation.ablation import SMOOTHED, START, Arms
from tars_fast.evaluation.figures import FIGURES
from tars_fast.reports.page import REPORT, Section, Table, write_page
from tars_fast.reports.plots import DRIFT_PLOT, can_plot, curves_plot, write_png
from tars_fast.reports.sample import sample_items
from tars_fast.reports.sections import curves_picture, ends_table, layer_curve, settings_section
from tars_fast.reports.tables import figure_cell, shown
from tars_fast.support.console import PlainConsole, say
from tars_fast.support.files import write_atomically
from tars_fast.types import Question

_TESTED = {"speech_accuracy": "speech", "text_accuracy": "text", "speech_accuracy_sampled": "sampled speech"}


def figure_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for the start and for each arm, figures over seeds and items with their intervals."""
    names = [name for name in FIGURES if name in report[START]]
    header = ["arm", "seeds", *(FIGURES[name].title for name in names)]
    arms = {START: report[START], **report["arms"]}
    rows = [[arm, str(len(own["seeds"])), *(figure_cell(own, name) for name in names)] for arm, own in arms.items()]
    if any("sampled_tokens" in figures for figures in arms.values()):
        header.append("tokens sampled in training")
        for row, figures in zip(rows, arms.values(), strict=True):
            row.append(f"{figures['sampled_tokens']:,.0f}" if "sampled_tokens" in figures else "-")
    return Table(header, rows)


def difference_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each arm minus the baseline, with p-values of the accuracies that arms are tested on."""
    names = [name for name in FIGURES if name in report[START]]
    header = [f"minus {report['baseline']}", "seeds"]
    for name in names:
        header += [FIGURES[name].title, *([f"p, {_TESTED[name]}"] if name in _TESTED else [])]
    rows = []
    for arm, change in report[f"minus_{report['baseline']}"].items():
        row = [arm, str(len(change["seeds"]))]
        for name in names:
            row.append(figure_cell(change, name, sign="+"))
            if name in _TESTED:
                row.append(shown(change.get(f"{name}_p_holm"), None, ".2g"))
        rows.append(row)
    return Table(header, rows)


def seed_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each run, with the figures that arms are tested on."""
    names = [name for name in _TESTED if name in report[START]]
    rows = [
        [arm, str(seed), *(shown(figures[f"{name}_by_seed"][place], None, ".1f", scale=100) for name in names)]
        for arm, figures in report["arms"].items()
        for place, seed in enumerate(figures["seeds"])
    ]
    return Table(["arm", "seed", *(FIGURES[name].title for name in names)], rows)


def headline_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures that fit a terminal or a page: greedy accuracies, MRR, and the difference from the baseline."""
    names = ("speech_accuracy", "text_accuracy", "mrr")
    header = ["arm", "seeds", *(FIGURES[name].title for name in names), f"speech - {report['baseline']}", "p"]
    rows = []
    for arm, figures in {START: report[START], **report["arms"]}.items():
        change = report[f"minus_{report['baseline']}"].get(arm, {})
        cells = [figure_cell(figures, name, ends_spec=".0f") for name in names]
        p = shown(change.get("speech_accuracy_p_holm"), None, ".2g")
        rows.append([arm, str(len(figures["seeds"])), *cells, figure_cell(change, "speech_accuracy", sign="+"), p])
    return Table(header, rows)


def describe(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on the tables: how figures were computed, and what is missing."""
    left_out = report["num_items_left_out"]
    missing = f" ({left_out} left out, which some run could not evaluate)" if left_out else ""
    notes = [
        f"{report['num_items']} held-out items{missing}. In brackets 95 % intervals of a bootstrap over seeds and items; "
        f"differences from {report['baseline']} are paired by seed and item; p is of a paired t-test over seeds, two-sided, "
        "corrected for the number of arms (Holm)."
    ]
    seeds = {arm: figures["seeds"] for arm, figures in report["arms"].items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        finished = ", ".join(f"{arm} {len(own)}" for arm, own in seeds.items())
        notes.append(f"Runs are missing (finished seeds: {finished}): differences are over the seeds that both arms have.")
    return notes + [f"Failed: {name}: {reason}" for name, reason in report["failed"].items()]


def write_tables(output_dir: Path, report: Mapping[str, Mapping[str, Any]]) -> None:
    """ablation.md with all figures, and ablation.tex (with booktabs) with the headline."""
    from tabulate import tabulate

    whole = [table for table in (figure_table(report), difference_table(report)) if table.rows]
    for name, tables, table_format, mark in (
        ("ablation.md", whole, "github", ""),
        ("ablation.tex", [headline_table(report)], "latex_booktabs", "% "),
    ):
        parts = []
        for table in tables:
            sides = ["left", *["right"] * (len(table.header) - 1)]
            parts.append(tabulate(table.rows, table.header, table_format, disable_numparse=True, colalign=sides))
        parts += [f"{mark}{line}" for line in describe(report)]
        write_atomically(output_dir / name, "\n\n".join(parts) + "\n")


def print_ablation(console: PlainConsole, report: Mapping[str, Mapping[str, Any]]) -> None:
    """Print `headline_table` and the notes."""
    table = headline_table(report)
    lines = ConsoleTable(box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.header):
        lines.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        lines.add_row(*row)
    console.print(lines)
    for note in describe(report):
        say(console, note)


def write_ablation_page(
    output_dir: Path, title: str, arms: Arms, report: Mapping[str, Mapping[str, Any]], held_out: Sequence[Question]
) -> None:
    """Write report.html, learning_curves.png and drift.png; without matplotlib report.html alone, with the numbers.

    Args:
        held_out: the items that all runs were evaluated on, with their recordings.
    """
    curves = arms.curves()
    states = {
        name: layer_curve(figures["layer_cosine"], figures["layer_cosine_ci95"])
        for name, figures in {START: report[START], **report["arms"]}.items()
    }
    order = list(states)
    if can_plot():
        learning = {title: lines for title, lines in curves.items() if title.startswith("accuracy")}
        write_png(output_dir / "learning_curves.png", curves_plot(learning, "step", "share of sampled completions", order))
        drift_plot = curves_plot({"completion states, speech to text": states}, "layer", "cosine", order)
        write_png(output_dir / DRIFT_PLOT, drift_plot)
    training = []
    for label, lines in curves.items():
        alt = f"{label} by step: {', '.join(lines)}"
        training.append(curves_picture(lines, "step", label, alt, ends_table(lines), order))
    alt = f"Cosine of completion states, speech to text: {', '.join(states)}"
    drift = curves_picture(states, "layer", "cosine", alt, order=order)
    differences = difference_table(report)
    sections = [
        Section("Arms", describe(report), [headline_table(report)]),
        Section(
            "Hidden states, speech to text", ["Pooled states of greedy completions, compared layer by layer."], (), [drift]
        ),
        Section("Training", [f"Means over {SMOOTHED} steps and over seeds, with 95 % intervals over seeds."], (), training),
        Section("All figures", tables=[figure_table(report)]),
        *([Section(f"Minus {report['baseline']}", tables=[differences])] if differences.rows else []),
        Section("Every run", ["After training."], [seed_table(report)]),
        settings_section(report["settings"]),
    ]
    # Of other seeds there would be as many completions again, and little new in them.
    evaluations = {START: arms.runs[arms.names[0]][0].before} | {arm: own[0].after for arm, own in arms.runs.items()}
    sample = sample_items(evaluations, {arms.items[0][0]: held_out})
    note = f"Each arm after the first of its seeds; tags and filters are of {arms.names[-1]}, the last one, since the start."
    write_page(output_dir / REPORT, title, sections, replace(sample, notes=[*sample.notes, note]))
