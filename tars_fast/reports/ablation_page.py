"""What an ablation shows, as tables in Markdown, LaTeX and on the terminal, as pictures, and as `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable

from tars_fast.evaluation.ablation import SMOOTHED, START, Arms
from tars_fast.evaluation.figures import FIGURES
from tars_fast.reports.figure import can_draw, curves_figure, write_png
from tars_fast.reports.log import say, shown
from tars_fast.reports.page import REPORT, Section, Table, write_page
from tars_fast.reports.run_page import curves_picture, draw_curves, draw_sample, layer_curve, settings_section
from tars_fast.support.files import write_atomically
from tars_fast.types import Question

_TESTED = {"speech_accuracy": "speech", "text_accuracy": "text"}


def figure_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for the start and each arm, figures over seeds and items with their intervals."""
    names = [name for name in FIGURES if name in report[START]]
    header = ["arm", "seeds", *(FIGURES[name].title for name in names)]
    rows = [
        [arm, str(len(figures["seeds"])), *(_cell(figures, name) for name in names)]
        for arm, figures in {START: report[START], **report["arms"]}.items()
    ]
    return Table(header, rows)


def difference_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each arm minus the baseline, with p-values of greedy accuracies."""
    names = [name for name in FIGURES if name in report[START]]
    header = [f"minus {report['baseline']}", "seeds"]
    for name in names:
        header += [FIGURES[name].title, *([f"p, {_TESTED[name]}"] if name in _TESTED else [])]
    rows = []
    for arm, change in report[f"minus_{report['baseline']}"].items():
        row = [arm, str(len(change["seeds"]))]
        for name in names:
            row.append(_cell(change, name, sign="+"))
            if name in _TESTED:
                row.append(shown(change.get(f"{name}_p_holm"), None, ".2g"))
        rows.append(row)
    return Table(header, rows)


def headline_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """What fits a terminal or a page: greedy accuracies, MRR, and what differs from the baseline."""
    names = ("speech_accuracy", "text_accuracy", "mrr")
    header = ["arm", "seeds", *(FIGURES[name].title for name in names), f"speech - {report['baseline']}", "p"]
    rows = []
    for arm, figures in {START: report[START], **report["arms"]}.items():
        change = report[f"minus_{report['baseline']}"].get(arm, {})
        cells = [_cell(figures, name, ends_spec=".0f") for name in names]
        p = shown(change.get("speech_accuracy_p_holm"), None, ".2g")
        rows.append([arm, str(len(figures["seeds"])), *cells, _cell(change, "speech_accuracy", sign="+"), p])
    return Table(header, rows)


def _cell(figures: Mapping[str, Any], name: str, sign: str = "", ends_spec: str | None = None) -> str:
    figure = FIGURES[name]
    return shown(figures.get(name), figures.get(f"{name}_ci95"), f"{sign}.{figure.decimals}f", ends_spec, scale=figure.scale)


def describe(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the tables' figures were made, and what is missing."""
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


def print_ablation(console: Console, report: Mapping[str, Mapping[str, Any]]) -> None:
    """The headline on one screen."""
    table = headline_table(report)
    lines = ConsoleTable(box=box.SIMPLE_HEAD)
    for number, column in enumerate(table.header):
        lines.add_column(escape(column), justify="right" if number else "left")
    for row in table.rows:
        lines.add_row(*map(escape, row))
    console.print(lines)
    for note in describe(report):
        say(console, escape(note))


def write_ablation_page(
    output_dir: Path, title: str, arms: Arms, report: Mapping[str, Mapping[str, Any]], held_out: Sequence[Question]
) -> None:
    """report.html, learning_curves.png and drift.png; without matplotlib the numbers alone.

    Args:
        held_out: the items that all runs were evaluated on, with their recordings.
    """
    curves = arms.curves()
    states = {
        name: layer_curve(figures["layer_cosine"], figures["layer_cosine_ci95"])
        for name, figures in {START: report[START], **report["arms"]}.items()
    }
    order = list(states)
    if can_draw():
        learning = {title: lines for title, lines in curves.items() if title.startswith("accuracy")}
        write_png(output_dir / "learning_curves.png", curves_figure(learning, "step", "share of sampled completions", order))
        drawn = curves_figure({"completion states, speech to text": states}, "layer", "cosine", order)
        write_png(output_dir / "drift.png", drawn)
    training = []
    for label, lines in curves.items():
        ends = [(arm, shown(curve.y[0], None, ".3f"), shown(curve.y[-1], None, ".3f")) for arm, curve in lines.items()]
        numbers = Table(("", "beginning", "end"), ends)
        training.append(draw_curves(lines, "step", label, f"{label} by step: {', '.join(lines)}", numbers, order))
    told = f"Cosine of completion states, speech to text: {', '.join(states)}"
    drift = curves_picture(states, "layer", "cosine", told, order=order)
    by_seed = Table(("arm", "seed", *(FIGURES[name].title for name in _TESTED)), _rows_by_seed(report))
    differences = difference_table(report)
    sections = [
        Section("Arms", describe(report), [headline_table(report)]),
        Section(
            "Hidden states, speech to text", ["Pooled states of greedy completions, compared layer by layer."], (), [drift]
        ),
        Section("Training", [f"Means over {SMOOTHED} steps and over seeds, with 95 % intervals over seeds."], (), training),
        Section("All figures", tables=[figure_table(report)]),
        *([Section(f"Minus {report['baseline']}", tables=[differences])] if differences.rows else []),
        Section("Every run", ["After training."], [by_seed]),
        settings_section(report["settings"]),
    ]
    # More completions of an item would say little more.
    stages = {START: arms.runs[arms.names[0]][0].before} | {arm: own[0].after for arm, own in arms.runs.items()}
    sample = draw_sample(stages, {arms.items[0][0]: held_out})
    note = f"Each arm after the first of its seeds; tags and filters are of {arms.names[-1]}, the last one, since the start."
    write_page(output_dir / REPORT, title, sections, replace(sample, notes=[*sample.notes, note]))


def _rows_by_seed(report: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (arm, str(seed), *(shown(figures[f"{name}_by_seed"][place], None, ".1f", scale=100) for name in _TESTED))
        for arm, figures in report["arms"].items()
        for place, seed in enumerate(figures["seeds"])
    ]
