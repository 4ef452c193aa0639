"""What a training run shows of its evaluations, in its folder, on the terminal and on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tars_fast.evaluation.figures import change_since, report, text_reference
from tars_fast.evaluation.results import ItemResult
from tars_fast.learning.loader import LoadedRollout, RolloutLoader
from tars_fast.learning.run import Run
from tars_fast.models.publish import HubRepository
from tars_fast.models.registry import list_checkpoints
from tars_fast.reports.log import RunLog
from tars_fast.reports.model_card import CardSubject, model_card
from tars_fast.reports.plots import ACCURACY_PLOT, accuracy_plot, can_plot, write_png
from tars_fast.reports.run_page import write_progress, write_report
from tars_fast.reports.tables import describe_point, print_summary
from tars_fast.support.files import write_atomically
from tars_fast.support.timing import entered


def show_validation(run: Run, log: RunLog, metrics: Mapping[str, float]) -> None:
    """Say what `validate` found, and write the report as far as the run has come."""
    num_items = len(run.data.validation)
    log.say(f"after {metrics['step']} steps, {num_items} validation items: {', '.join(describe_point(metrics))}")
    if run.workers.is_first:
        write_progress(run.config.output_dir, int(metrics["step"]), run.data.training)


def publish(
    run: Run, log: RunLog, hub: HubRepository | None, step: int | None, evaluation: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Upload the checkpoint of `step`, if any, with its model card, where that is asked for; what goes wrong is a warning."""
    if hub is None or step is None:
        return
    config, model = run.config, run.model
    dtype = None if config.lora_rank else str(model.module.dtype).removeprefix("torch.")
    merge_first = model.family.adapter_folder if config.lora_rank else ""
    subject = CardSubject(hub.name.partition("/")[2], config.model, dtype, merge_first)
    settings = json.loads((config.output_dir / "config.json").read_text(encoding="utf-8"))
    card = model_card(subject, settings, evaluation)
    with entered("upload"):
        problem = hub.push(config.output_dir / f"checkpoint-{step}", card, f"after {step} steps")
    if problem is not None:
        log.warn(problem)


def save_and_publish(run: Run, log: RunLog, hub: HubRepository | None, step: int, *, wait: bool) -> None:
    """Begin to write a checkpoint once the last one is there; with `wait` this one is there too when it returns."""
    publish(run, log, hub, run.saver.finish())
    run.saver.start(step)
    if wait:
        publish(run, log, hub, run.saver.finish())


def report_failures(run: Run, log: RunLog, loaded: LoadedRollout, step: int, loader: RolloutLoader) -> None:
    """Warn of questions that were left out; save and stop where no process has a rollout.

    Raises:
        UnusableBatchError: no recording of this step could be used.
    """
    for warnings in run.workers.gather(loaded.warnings):
        for warning in warnings:
            log.warn(warning)
    failures = [failure for failure in run.workers.gather(loaded.failure) if failure is not None]
    if len(failures) == run.workers.size:
        loader.finish_sampling()
        save_and_publish(run, log, None, step, wait=True)
        raise failures[0]
    for failure in failures:
        log.warn(f"one of {run.workers.size} processes has no rollout in this step: {failure}")


def write_evaluation(
    run: Run, log: RunLog, before: list[ItemResult], after: list[ItemResult], hub: HubRepository | None
) -> dict[str, dict[str, Any]]:
    """Write evaluation.json, the figure and the report, and publish the last checkpoint; returns the first one's content."""
    output_dir, reference = run.config.output_dir, text_reference(before)
    parts = {"before": report(before, reference), "after": report(after, reference)}
    evaluation = parts | {"change": change_since(after, before)}
    if run.best.metric is not None:
        evaluation["best"] = {"step": run.best.step, "metric": run.best.metric, "value": run.best.value}
    last_step = list_checkpoints(output_dir)[-1][0]
    if last_step < run.config.num_steps:
        evaluation["stopped"] = {"step": last_step}
    write_atomically(output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    if can_plot() and all("speech_accuracy" in part for part in parts.values()):
        write_png(output_dir / ACCURACY_PLOT, accuracy_plot({"held-out items": parts}))
    write_report(output_dir, {run.evaluation_name: run.data.held_out}, training=run.data.training)
    print_summary(log, evaluation, output_dir)
    publish(run, log, hub, last_step, evaluation)
    return evaluation
