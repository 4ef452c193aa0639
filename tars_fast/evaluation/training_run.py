"""The evaluations of a training run: of held-out items before and after it, of validation items on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tars_fast.evaluation.answering import EvaluationSettings, Evaluator
from tars_fast.evaluation.figures import curve_point
from tars_fast.evaluation.results import PREDICTIONS, ItemResult, read_own
from tars_fast.learning.rewards.judge import find_judge
from tars_fast.learning.run import Run, evaluation_source
from tars_fast.support.console import PlainConsole, say
from tars_fast.support.files import write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import Question


def read_before(run: Run) -> list[ItemResult]:
    """What the evaluation before training gave, of all items. Raises UserError, with the command that makes it again."""
    config, path = run.config, run.config.output_dir / "predictions_before.jsonl"
    source = evaluation_source(config)
    remedy = (
        f"python -m tars_fast.evaluate --model {config.model} --data {run.evaluation_name}={source} --samples "
        f"{config.eval_samples} --output-dir DIR, and copy DIR/{PREDICTIONS} to it"
    )
    return read_own(path, run.evaluation_name, run.data.held_out, remedy)


def evaluate_now(run: Run, console: PlainConsole, when: str) -> list[ItemResult]:
    """Answer the evaluation items and write predictions_<when>.jsonl."""
    say(console, f"evaluating {when} training")
    with item_progress(console, len(run.data.held_out)) as advance:
        results = answer_items(run, run.data.held_out, run.evaluation_name, advance)
    if run.workers.is_first:
        path = run.config.output_dir / f"predictions_{when}.jsonl"
        write_atomically(path, "".join(result.to_line() for result in results))
    return results


def answer_items(
    run: Run, questions: Sequence[Question], name: str, advance: Callable[[int], None] = lambda _: None
) -> list[ItemResult]:
    """See `Evaluator.evaluate`. Nothing that training draws or remembers is touched."""
    config = run.config
    settings = EvaluationSettings(config.max_new_tokens, config.eval_samples, config.temperature, config.seed)
    evaluator = Evaluator(run.model, run.engine, run.text_similarity, settings, run.workers, find_judge(config))
    with explain_out_of_memory("evaluation"):
        return evaluator.evaluate(questions, name, advance)


def validate(run: Run, warn: Callable[[str], None], num_completed: int) -> dict[str, float]:
    """Figures of the validation items after so many steps, also for `run.best`; empty where it is not time for them."""
    config = run.config
    if not config.eval_every or (num_completed % config.eval_every and num_completed != config.num_steps):
        return {}
    started = time.perf_counter()
    results = answer_items(run, run.data.validation, "validation")
    failed = [result for result in results if result.failed is not None]
    if failed:
        warn(f"{len(failed)} of {len(results)} validation items failed; the first, {failed[0].id!r}: {failed[0].failed}")
    metrics = {"step": num_completed} | curve_point(results)
    if config.keep_best is not None and f"validation/{config.keep_best}" not in metrics:
        warn(f"--keep-best {config.keep_best}: the validation items give no such figure after {num_completed} steps")
    run.best.record(metrics)
    return metrics | {"seconds/evaluation": time.perf_counter() - started}
