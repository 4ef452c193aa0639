"""`report.html` of a training run or an evaluation, made from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tars_fast.evaluation.figures import OVERALL
from tars_fast.evaluation.results import PREDICTIONS, ItemResult, by_data, read_predictions
from tars_fast.learning.samples import SAMPLES
from tars_fast.reports.page import REPORT, Picture, Section, Table, write_page
from tars_fast.reports.plots import accuracy_plot, as_svg, can_plot
from tars_fast.reports.sample import sample_items, training_samples
from tars_fast.reports.sections import curves_picture, layer_curve, settings_section, training_curves, validation_curves
from tars_fast.reports.tables import figure_rows
from tars_fast.types import Modality, Question


@dataclass(frozen=True)
class Compared:
    """Another evaluation of the same items, which this one is compared with."""

    results: Sequence[ItemResult]
    reports: Mapping[str, Mapping[str, Any]]
    """Reports by the name of the data, `overall` among them."""


def write_report(
    output_dir: Path,
    data: Mapping[str, Sequence[Question]],
    compared: Compared | None = None,
    sections: Sequence[Section] = (),
    training: Sequence[Question] = (),
) -> None:
    """`report.html` of the folder of a finished training run or evaluation.

    Args:
        output_dir: holds evaluation.json, config.json and predictions; metrics.jsonl is shown where there is one.
        data: the items that were evaluated, by the name of their data, for their recordings, which no file of the folder names.
        compared: the evaluation that this one was compared with.
        sections: more sections, which come after the others.
        training: the training items, for the recordings of samples.
    """
    settings = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("evaluation", settings)
    results, reports, changes = _read_evaluation(output_dir, compared)
    found = [*_figures(reports, changes), *_layer_curves(reports)]
    found += [*_training(output_dir, training), *sections, settings_section(settings)]
    kind = "trained" if "before" in results and compared is None else "evaluated"
    write_page(output_dir / REPORT, f"{settings['model']}, {kind}", found, sample_items(results, data))


def write_progress(output_dir: Path, num_completed: int, training: Sequence[Question] = ()) -> None:
    """`report.html` of a run that is not finished: its curves so far.

    Args:
        output_dir: holds config.json, metrics.jsonl and, with `--sample-every`, samples.jsonl.
        training: see `write_report`.
    """
    settings = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    title = f"{settings['model']}, {num_completed} of {settings['num_steps']} steps"
    write_page(output_dir / REPORT, title, [*_training(output_dir, training), settings_section(settings)])


def _training(output_dir: Path, training: Sequence[Question]) -> Iterator[Section]:
    """What metrics.jsonl and samples.jsonl show; nothing where they are missing."""
    metrics, samples = (_read_lines(output_dir / name) for name in ("metrics.jsonl", SAMPLES))
    yield from validation_curves(metrics)
    yield from training_curves([line for line in metrics if line["step"]])
    yield from training_samples(samples, training)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _read_evaluation(
    output_dir: Path, compared: Compared | None
) -> tuple[dict[str, list[ItemResult]], dict[str, dict[str, Mapping[str, Any]]], dict[str, Mapping[str, Any]]]:
    """(items by evaluation, reports by data and evaluation, changes by data)."""
    evaluation = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))
    if (output_dir / "predictions_after.jsonl").exists():
        both = {when: read_predictions(output_dir / f"predictions_{when}.jsonl", REPORT) for when in ("before", "after")}
        (name,) = by_data(both["after"])
        return both, {name: {when: evaluation[when] for when in both}}, {name: evaluation["change"]}
    results = read_predictions(output_dir / PREDICTIONS, REPORT)
    # A mean over one data set says nothing new.
    names = [name for name in evaluation if name != OVERALL or len(evaluation) > 2]
    changes = {name: evaluation[name]["change"] for name in names if "change" in evaluation[name]}
    if compared is None:
        return {"this model": results}, {name: {"this model": evaluation[name]} for name in names}, changes
    reports = {name: {"before": compared.reports[name], "after": evaluation[name]} for name in names}
    return {"before": list(compared.results), "after": results}, reports, changes


def _figures(
    reports: Mapping[str, Mapping[str, Mapping[str, Any]]], changes: Mapping[str, Mapping[str, Any]]
) -> Iterator[Section]:
    """Accuracy, MRR and the rest, a section for each data set."""
    for name, evaluations in reports.items():
        columns = dict(evaluations) | ({"change": changes[name]} if name in changes else {})
        title = "Mean over the data" if name == OVERALL else f"Accuracy on {name}"
        notes = ["95 % bootstrap intervals in brackets; a change is paired by item."]
        notes += [
            f"{when}: {report['num_items']} items, {report['num_failed']} failed." for when, report in evaluations.items()
        ]
        for modality in Modality:
            accuracy = f"{modality}_accuracy"
            if f"{accuracy}_mcnemar_p" in changes.get(name, {}):
                change = changes[name]
                notes.append(
                    f"{modality}: {change[f'{accuracy}_gained']} items became right, {change[f'{accuracy}_lost']} wrong; "
                    f"McNemar's exact test p = {change[f'{accuracy}_mcnemar_p']:.2g}."
                )
        rows = figure_rows(columns, differences=("change",))
        tables = [Table(("", *columns), rows)] if rows else []
        pictures = []
        if can_plot() and all("speech_accuracy" in report for report in evaluations.values()):
            alt = f"Greedy accuracy of spoken and written questions, {' and '.join(evaluations)}"
            pictures = [Picture(as_svg(accuracy_plot({name: evaluations})), f"{alt}; the numbers are in the table.")]
        yield Section(title, notes, tables, pictures)


def _layer_curves(reports: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[Section]:
    """Cosine of pooled states by layer."""
    pictures = []
    for name, evaluations in reports.items():
        curves = {
            when: layer_curve(report["layer_cosine"], report["layer_cosine_ci95"])
            for when, report in evaluations.items()
            if "layer_cosine" in report
        }
        if curves:
            alt = f"Cosine of pooled hidden states by layer, {name}, {' and '.join(curves)}, with 95 % intervals"
            pictures.append(curves_picture(curves, "layer", "cosine", alt))
    if pictures:
        yield Section(
            "Hidden states, speech to text",
            ["Each item's spoken and written completion, their states averaged over tokens, compared layer by layer."],
            pictures=pictures,
        )
