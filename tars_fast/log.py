"""What a run says: a live table, metrics.jsonl, TensorBoard, and a closing summary."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tars_fast.memory import explain_out_of_memory


def open_console() -> Console:
    """Standard output; a file has no edge at which tables would be cut off."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console


class PhaseTimer:
    """Wall-clock seconds by phase of a step; on CUDA a phase ends when the device is done with what this thread gave it.

    A phase that runs out of memory raises TrainingError, which names it and what to lower.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with explain_out_of_memory(name), torch.profiler.record_function(name):
            yield
            if self._on_cuda:
                torch.cuda.current_stream().synchronize()
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`seconds/<phase>` since the last call."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


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
        self._path = self._writer = None
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
        if self._path is None:
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


def figure_table(title: str, reports: Mapping[str, Mapping], differences: Collection[str] = ()) -> Table:
    """Figures below each other, reports side by side, each figure with its 95 % interval.

    Args:
        reports: column title -> `<name>`, `<name>_ci95`; what no report has is left out, and what nowhere was cut off.
        differences: titles of the columns whose figures are differences.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("", *reports):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row, name, scale in _FIGURES:
        known = [report[name] for report in reports.values() if report.get(name) is not None]
        if any(known) or (known and "truncated" not in name):
            table.add_row(row, *(_shown(report, name, scale, column in differences) for column, report in reports.items()))
    return table


def _shown(report: Mapping, name: str, scale: float, is_difference: bool) -> str:
    if report.get(name) is None:
        return "-"
    sign, decimals = ("+", 1) if is_difference else ("", 0)
    figure = f"{scale * report[name]:{sign}.1f}"
    if report[f"{name}_ci95"] is None:
        return figure
    low, high = (f"{scale * end:{sign}.{decimals}f}" for end in report[f"{name}_ci95"])
    return f"{figure} [{low}, {high}]"


def print_evaluation(console: Console, evaluation: Mapping[str, Mapping]) -> None:
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


def _accuracy_table(title: str, kind: str, reports: Mapping[str, Mapping], unparsed: Mapping[str, str] | None = None) -> Table:
    """Accuracy by modality of each `kind`, one below the other."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in (kind, "items", "speech", "text", *(["unparsed, speech / text"] if unparsed else [])):
        table.add_column(column, justify="left" if column == kind else "right", no_wrap=True)
    for name, report in reports.items():
        accuracies = (_shown(report, f"{modality}_accuracy", 100, False) for modality in ("speech", "text"))
        table.add_row(name, str(report["num_items"]), *accuracies, *([unparsed[name]] if unparsed else []))
    return table


def print_failures(console: Console, name: str, report: Mapping) -> None:
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


def print_summary(log: RunLog, evaluation: Mapping[str, Mapping], output_dir: Path) -> None:
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
