"""What a run says: a live table, metrics.jsonl, TensorBoard, and a closing summary."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_console() -> Console:
    """Standard output; a file has no edge at which tables would be cut off."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


_WIDTH_OF_FILES = 200

_BY_MODALITY = (
    ("accuracy", "accuracy"),
    ("format", "format"),
    ("reward", "reward"),
    ("entropy (nats)", "entropy"),
    ("length (tokens)", "length"),
    ("cut off", "truncated"),
    ("groups that disagree", "disagreeing"),
)
_OF_THE_STEP = (
    ("R_rep", "reward/representation"),
    ("R_beh", "reward/behaviour"),
    ("clipped below", "clip/low"),
    ("clipped above", "clip/high"),
    ("|trainer - rollout| (nats)", "logprob_diff_mean"),
    ("gradient norm", "grad_norm"),
    ("learning rate", "learning_rate"),
)


class RunLog:
    """Writes one line a step to metrics.jsonl and TensorBoard, and shows the latest step.

    Args:
        output_dir: where to write. None: nothing is written or said, another process does.
        num_steps: of the whole run.
        num_completed: steps already done; later lines of an interrupted run are dropped.
    """

    def __init__(self, output_dir: Path | None, num_steps: int, num_completed: int):
        self.console = Console(quiet=True) if output_dir is None else open_console()
        self._path: Path | None = None
        self._writer: SummaryWriter | None = None
        if output_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._path = output_dir / "metrics.jsonl"
            kept = self._path.read_text().splitlines()[:num_completed] if num_completed else []
            self._path.write_text("".join(line + "\n" for line in kept))
            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=num_completed + 1)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
        )
        self._task = self._progress.add_task("steps", total=num_steps, completed=num_completed)
        self._live = Live(self._progress, console=self.console, refresh_per_second=2, transient=True)
        self._num_steps = num_steps
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> RunLog:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._live.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Record a step; `metrics["step"]` counts from 1."""
        if self._path is None or self._writer is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, metrics["step"])
            if name.startswith("seconds/"):
                self._seconds[name.removeprefix("seconds/")].append(value)
        self._progress.update(self._task, completed=metrics["step"])
        if self.console.is_terminal:
            self._live.update(Group(self._progress, *self._tables(metrics)))
        else:
            self.say(
                f"step {metrics['step']}/{self._num_steps}  accuracy speech {metrics['accuracy/speech']:.3f} text "
                f"{metrics['accuracy/text']:.3f}  R_rep {metrics['reward/representation']:.3f} R_beh "
                f"{metrics['reward/behaviour']:.3f}  entropy {metrics['entropy/speech']:.3f}  {metrics['seconds/step']:.1f} s"
            )

    def median_seconds(self) -> dict[str, float]:
        """Median seconds a step of each phase, over the steps of this process."""
        return {name: statistics.median(values) for name, values in self._seconds.items()}

    def say(self, message: str) -> None:
        say(self.console, message)

    def warn(self, message: str) -> None:
        self.say(f"[yellow]warning:[/yellow] {message}")

    def _tables(self, metrics: Mapping[str, float]) -> Iterator[Table]:
        modalities = Table(box=None, pad_edge=False)
        for title in ("", "speech", "text"):
            modalities.add_column(title, justify="right" if title else "left", min_width=8)
        for title, name in _BY_MODALITY:
            modalities.add_row(title, *(f"{metrics[f'{name}/{modality}']:.4g}" for modality in ("speech", "text")))
        yield modalities
        rest = Table(box=None, pad_edge=False, show_header=False)
        rest.add_column("")
        rest.add_column("", justify="right")
        for title, name in _OF_THE_STEP:
            rest.add_row(title, f"{metrics[name]:.4g}")
        for name, value in metrics.items():
            if name.startswith("seconds/"):
                rest.add_row(f"{name.removeprefix('seconds/')} (s)", f"{value:.2f}")
        yield rest


_FIGURES = (
    ("speech, greedy %", "speech_accuracy", 100),
    ("text, greedy %", "text_accuracy", 100),
    ("speech, sampled %", "speech_accuracy_sampled", 100),
    ("text, sampled %", "text_accuracy_sampled", 100),
    ("MRR, fixed %", "mrr", 1),
    ("MRR, same %", "mrr_same_model", 1),
    ("behaviour sim. %", "behaviour_similarity", 100),
    ("unparsed, speech %", "speech_unparsed", 100),
    ("unparsed, text %", "text_unparsed", 100),
    ("cut off, speech %", "speech_truncated", 100),
    ("cut off, text %", "text_truncated", 100),
    ("word error rate %", "word_error_rate", 100),
)
_MOST_FAILURES_SHOWN = 5


def figure_table(title: str, reports: Mapping[str, Mapping[str, Any]], differences: Collection[str] = ()) -> Table:
    """Figures below each other, reports side by side, each figure with its 95 % interval.

    Args:
        reports: column title -> `<name>`, `<name>_ci95`; what no report has is left out, and what nowhere was cut off.
        differences: titles of the columns whose figures are differences.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("", *reports):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in figure_rows(reports, differences):
        table.add_row(*row)
    return table


def figure_rows(reports: Mapping[str, Mapping[str, Any]], differences: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The rows of `figure_table`, each with what it is in front."""
    rows = []
    for row, name, scale in _FIGURES:
        known = [report[name] for report in reports.values() if report.get(name) is not None]
        if any(known) or (known and "truncated" not in name):
            rows.append((row, *(_shown(report, name, scale, column in differences) for column, report in reports.items())))
    return rows


def _shown(report: Mapping[str, Any], name: str, scale: float, is_difference: bool) -> str:
    sign, decimals = ("+", 1) if is_difference else ("", 0)
    return shown(report.get(name), report.get(f"{name}_ci95"), f"{sign}.1f", f"{sign}.{decimals}f", scale)


def shown(
    value: float | None, ends: Sequence[float | None] | None, spec: str, ends_spec: str | None = None, scale: float = 1
) -> str:
    """A figure and the ends of its interval in brackets; what is None or nan is not known, and a dash or left out.

    Args:
        spec: format of the figure.
        ends_spec: of the ends. None: the same.
    """
    if value is None or math.isnan(value):
        return "-"
    figure = f"{scale * value:{spec}}"
    known = [end for end in ends or () if end is not None and not math.isnan(end)]
    if len(known) < 2:
        return figure
    low, high = (f"{scale * end:{ends_spec or spec}}" for end in known)
    return f"{figure} [{low}, {high}]"


def print_evaluation(console: Console, evaluation: Mapping[str, Mapping[str, Any]]) -> None:
    """evaluation.json on one screen: figures, scorers, categories, the comparison, and what failed."""
    parts = {name: report for name, report in evaluation.items() if name != "overall"}
    columns = parts if len(parts) == 1 else {**parts, "mean": evaluation["overall"]}
    console.print(figure_table("95 % bootstrap intervals in brackets", columns))
    for name, report in parts.items():
        scorers = report.get("scorers", {})
        unparsed = {
            scorer: " / ".join(f"{100 * read[f'{modality}_unparsed']:.1f}" for modality in ("speech", "text"))
            for scorer, read in scorers.items()
            if read["num_items"]
        }
        title = f"{name}: the same completions by each scorer, %"
        console.print(_accuracy_table(title, "scorer", {scorer: scorers[scorer] for scorer in unparsed}, unparsed))
        if "categories" in report:
            categories = {category or "(none)": read for category, read in report["categories"].items()}
            console.print(_accuracy_table(f"{name}: by category, %", "category", categories))
    changes = {name: report["change"] for name, report in columns.items() if "change" in report}
    if changes:
        console.print(figure_table("Change, paired by item", changes, differences=changes))
        for name, change in changes.items():
            for modality in ("speech", "text"):
                accuracy = f"{modality}_accuracy"
                if f"{accuracy}_mcnemar_p" in change:
                    say(
                        console,
                        f"{name}, {modality}: {change[f'{accuracy}_gained']} items became right, {change[f'{accuracy}_lost']} "
                        f"wrong, of {change['num_items']}; McNemar's exact test p = {change[f'{accuracy}_mcnemar_p']:.2g}",
                    )
    for name, report in parts.items():
        say(console, f"{name}: {report['num_items']} items evaluated, {report['num_failed']} failed")
        if "layer_cosine" in report:
            cosines = ", ".join(f"{cosine:.3f}" for cosine in report["layer_cosine"])
            say(console, f"{name}, layer cosine, speech to text: {cosines}")
        print_failures(console, name, report)


def best_layer_cells(layers: Mapping[str, Sequence[Any]], number: int) -> tuple[str, str, str]:
    """Of a speech layer, from 0: its best text layer, the CKA of both, and how far that lies above another item's text.

    Args:
        layers: `debiased` of analysis.json's alignment.
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


def print_analysis(console: Console, analysis: Mapping[str, Mapping[str, Any]]) -> None:
    """analysis.json on one screen: drift and alignment by layer, behaviour, probes, cost."""
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
    correlations = {layer: one["debiased"]["correlation"] for layer, one in alignment["base_layers"].items()}
    width = shown(layers["mean_band_width"], layers["mean_band_width_ci95"], ".1f")
    shift = shown(layers["mean_shift"], None, "+.1f")
    say(
        console,
        f"debiased CKA, tokens paired at layer {alignment['base_layer']}: band of {width} layers, best text layer less speech "
        f"layer {shift} in the mean; correlation with that of tokens paired at "
        + ", ".join(f"layer {layer} {shown(r, None, '.3f')}" for layer, r in correlations.items()),
    )
    if "probes" in analysis:
        console.print(_accuracy_table("Probes, accuracy %", "probe", analysis["probes"]))
        changes = {name: one["change"] for name, one in analysis["probes"].items() if "change" in one}
        console.print(figure_table("Change by the probe, paired by item", changes, differences=changes))
    if "change" in analysis:
        for name, what in (("own_pooled", "own completions"), ("forced_pooled", "forced")):
            pairs = zip(analysis["change"][name], analysis["change"][f"{name}_ci95"], strict=True)
            listed = ", ".join(shown(value, ends, "+.3f") for value, ends in pairs)
            say(console, f"change of cosine by layer, {what}: {listed}")
    cost = {name: value for name, value in analysis["cost"].items() if name.endswith("_per_item")}
    parts = ", ".join(f"{name.partition('_')[0]} {value:.3f}" for name, value in cost.items())
    say(console, f"seconds an item: {parts}; at most {analysis['cost']['peak_memory_bytes'] / 1e9:.2f} GB of memory")


def _accuracy_table(
    title: str, kind: str, reports: Mapping[str, Mapping[str, Any]], unparsed: Mapping[str, str] | None = None
) -> Table:
    """Accuracy by modality of each `kind`, one below the other."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in (kind, "items", "speech", "text", *(["unparsed, speech / text"] if unparsed else [])):
        table.add_column(column, justify="left" if column == kind else "right", no_wrap=True)
    for name, report in reports.items():
        accuracies = (_shown(report, f"{modality}_accuracy", 100, False) for modality in ("speech", "text"))
        table.add_row(name, str(report["num_items"]), *accuracies, *([unparsed[name]] if unparsed else []))
    return table


def print_failures(console: Console, name: str, report: Mapping[str, Any]) -> None:
    """The items that could not be evaluated, the first ones with the reason."""
    failed = report["failed"]
    if failed:
        say(console, f"[red]{name}: {len(failed)} failed[/red], counted by no figure:")
    for item, reason in list(failed.items())[:_MOST_FAILURES_SHOWN]:
        say(console, escape(f"  {item}: {reason}"))
    if len(failed) > _MOST_FAILURES_SHOWN:
        say(console, f"  and {len(failed) - _MOST_FAILURES_SHOWN} more, in evaluation.json")


def say(console: Console, message: str) -> None:
    """A line of any length."""
    console.print(message, highlight=False, soft_wrap=True)


def print_summary(log: RunLog, evaluation: Mapping[str, Mapping[str, Any]], output_dir: Path) -> None:
    """The run on one screen: before, after, the paired change, and where the time went."""
    reports = {name: evaluation[name] for name in ("before", "after", "change")}
    log.console.print(figure_table("Held-out items, 95 % bootstrap intervals in brackets", reports, differences=("change",)))
    for name in ("before", "after"):
        print_failures(log.console, name, evaluation[name])
    if "layer_cosine" in reports["before"] and "layer_cosine" in reports["after"]:
        layers = zip(reports["before"]["layer_cosine"], reports["after"]["layer_cosine"], strict=True)
        log.say("layer cosine, speech to text: " + ", ".join(f"{before:.3f} -> {after:.3f}" for before, after in layers))
    log.say("median seconds a step: " + ", ".join(f"{name} {value:.2f}" for name, value in log.median_seconds().items()))
    written = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith("checkpoint-"))
    log.say(f"written to {output_dir}: {', '.join(written)}, checkpoint-*/")
