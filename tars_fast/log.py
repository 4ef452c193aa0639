"""What a run says: a live table, metrics.jsonl, TensorBoard, and a closing summary."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tars_fast.memory import explain_out_of_memory


class PhaseTimer:
    """Wall-clock seconds by phase of a step; on CUDA a phase ends when the device is done with it.

    A phase that runs out of memory raises TrainingError, which names it and what to lower.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with explain_out_of_memory(name):
            yield
            if self._on_cuda:
                torch.cuda.synchronize()
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`seconds/<phase>` since the last call."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


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
        output_dir: where to write.
        num_steps: of the whole run.
        num_completed: steps already done; later lines of an interrupted run are dropped.
    """

    def __init__(self, output_dir: Path, num_steps: int, num_completed: int):
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console()
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
        self._writer.close()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Record a step; `metrics["step"]` counts from 1."""
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
            seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
            self.say(
                f"step {metrics['step']}/{self._num_steps}  accuracy speech {metrics['accuracy/speech']:.3f} text "
                f"{metrics['accuracy/text']:.3f}  R_rep {metrics['reward/representation']:.3f} R_beh "
                f"{metrics['reward/behaviour']:.3f}  entropy {metrics['entropy/speech']:.3f}  {seconds:.1f} s"
            )

    def median_seconds(self) -> dict[str, float]:
        """Median seconds a step of each phase, over the steps of this process."""
        return {name: statistics.median(values) for name, values in self._seconds.items()}

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True)

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


def print_summary(log: RunLog, evaluation: Mapping[str, Mapping], output_dir: Path) -> None:
    """The run on one screen: before, after, the paired change, and where the time went."""

    def shown(part: str, name: str, scale: float) -> str:
        report = evaluation[part]
        if report.get(name) is None:
            return "-"
        sign, decimals = ("+", 1) if part == "change" else ("", 0)
        if report[f"{name}_ci95"] is None:
            return f"{scale * report[name]:{sign}.1f}"
        low, high = (f"{scale * end:{sign}.{decimals}f}" for end in report[f"{name}_ci95"])
        return f"{scale * report[name]:{sign}.1f} [{low}, {high}]"

    table = Table(box=box.SIMPLE_HEAD, title="Held-out items, 95 % bootstrap intervals in brackets")
    for title in ("", "before", "after", "change"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for title, name, scale in (
        ("speech, greedy %", "speech_accuracy", 100),
        ("text, greedy %", "text_accuracy", 100),
        ("speech, sampled %", "speech_accuracy_sampled", 100),
        ("text, sampled %", "text_accuracy_sampled", 100),
        ("MRR, fixed %", "mrr", 1),
        ("MRR, same %", "mrr_same_model", 1),
        ("behaviour sim. %", "behaviour_similarity", 100),
        ("unparsed", "unparsed", 1),
    ):
        if name in evaluation["before"]:
            table.add_row(title, *(shown(part, name, scale) for part in ("before", "after", "change")))
    layers = zip(evaluation["before"]["layer_cosine"], evaluation["after"]["layer_cosine"], strict=True)
    log.console.print(table)
    log.say("layer cosine, speech to text: " + ", ".join(f"{before:.3f} -> {after:.3f}" for before, after in layers))
    log.say("median seconds a step: " + ", ".join(f"{name} {value:.2f}" for name, value in log.median_seconds().items()))
    log.say(f"written to {output_dir}: evaluation.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoint-*/")
