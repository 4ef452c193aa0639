"""TARS: GRPO that aligns the speech-conditioned with the text-conditioned policy (arXiv 2601.05543; docs/method.md).

One step of `run_steps` with `--objective tars`:

1. Rollout (`learning/loader.py`): half of each question's group of completions is sampled from its spoken prompt, half from its
   written one. The engine samples from the trainer's own weights, so there is nothing to synchronise.
2. Rewards (`learning/rewards/`): every completion earns R_acc + 0.5 R_fmt for its answer and its format. A spoken one also
   earns R_rep and R_beh: how close its hidden states and its words are to a correct written completion of the same question.
   `--reward` adds functions of a user's own.
3. Advantages (`learning/advantages.py`): rewards are centred within (question, modality).
4. Forward pass (`learning/update.py`): one packed pass over every token. The last hidden states give the log-probabilities;
   those of all layers, pooled while the layers run, give R_rep. So rewards and advantages are complete after this pass only.
5. Update: clipped asymmetric policy loss (DAPO), normalised by the unmasked tokens of the whole batch; backward pass; AdamW.

Other objectives have other terms (`learning/objectives/`). The default, on-policy distillation, samples from spoken prompts
alone; what the model makes of the same completions behind the written prompts takes the place of 2 and 3.

Left out on purpose: a second model as the reference of KL (`--kl-coef` takes this one with its adapter off), a value model, a
separate forward pass for the old log-probabilities (the first update's own pass has them).
"""
# ruff: noqa: E402

from __future__ import annotations

from tars_fast.config import TrainConfig
from tars_fast.support.cli import FAILED, INTERRUPTED, answer_early, run_command

# --help and wrong settings, before what takes seconds to load.
answer_early(__name__, TrainConfig, "python -m tars_fast.train")

import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tars_kernels import use_reference

from tars_fast.evaluation.training_run import evaluate_now, read_before, validate
from tars_fast.learning.loader import LoadedRollout, RolloutLoader
from tars_fast.learning.metrics import (
    LOOKED_BACK,
    BackwardPass,
    check_progress,
    check_written,
    completion_columns,
    completion_metrics,
    heartbeat_metrics,
)
from tars_fast.learning.optimizer import learning_rate_at
from tars_fast.learning.run import Interrupt, Run, open_run, plan_run, profiled
from tars_fast.learning.samples import choose_samples
from tars_fast.learning.saving import Stop
from tars_fast.learning.scored import ScoredRollout
from tars_fast.learning.selection import outcomes_of
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import join_workers, preempted_in_one_line, preempted_status
from tars_fast.models.memory import describe
from tars_fast.models.publish import HubRepository
from tars_fast.models.registry import find_preset
from tars_fast.reports.log import RunLog
from tars_fast.reports.loggers import check_loggers
from tars_fast.reports.training_run import publish, report_failures, save_and_publish, show_validation, write_evaluation


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended."""

    output_dir: Path
    """The run's folder."""
    is_finished: bool
    """False: it was interrupted, and can be resumed."""
    evaluation: dict[str, dict[str, Any]] | None
    """The content of evaluation.json: `before`, `after`, `change`, with `--keep-best` also `best`, and `stopped` after
    `--early-stop`. None where the run was interrupted, and in all processes but
    the first."""
    is_preempted: bool = False
    """Whether SIGUSR1 interrupted it: the same command is to be started again."""

    @property
    def num_failed(self) -> int:
        """Items that could not be evaluated."""
        return sum(self.evaluation[part]["num_failed"] for part in ("before", "after")) if self.evaluation else 0


def train(config: TrainConfig) -> TrainOutcome:
    """Load, evaluate, train, evaluate, report; alone, or as one of the processes that torchrun started.

    Raises:
        UserError: settings, data or checkpoint are not usable.
        TrainingError: training cannot go on; the last checkpoint is good.
    """
    check_loggers(config.log)
    with ExitStack() as stack:
        stack.enter_context(preempted_in_one_line())
        stack.enter_context(use_reference(config.kernels == "reference"))
        workers = stack.enter_context(join_workers(config.collective_timeout, config.tensor_parallel))
        run = stack.enter_context(open_run(config, workers))
        log = RunLog(run.config.output_dir if workers.is_first else None, run.config.num_steps, run.num_completed, config.log)
        log.say(run.describe())
        # Before what takes long: an account that may not write there is the user's to put right.
        hub = HubRepository(config.push_to_hub) if config.push_to_hub is not None and workers.is_first else None
        if run.num_completed:
            before = read_before(run)
        else:
            before = evaluate_now(run, log.console, "before")
            if start := validate(run, log.warn, 0):
                log.write(start)
                show_validation(run, log, start)
        interrupt = Interrupt()
        with interrupt.deferred(), log:
            stop = run_steps(run, log, interrupt, hub)
        if stop:
            if workers.is_first:
                how = "" if config.resume_if_exists else f" and --resume --output-dir {run.config.output_dir}"
                print(f"stopped; continue with the same command{how}", file=sys.stderr)
            return TrainOutcome(run.config.output_dir, False, None, stop is Stop.PREEMPTED)
        after = evaluate_now(run, log.console, "after")
        # Only the first process reports. Were another to fail meanwhile, torchrun would end it in the middle of its report.
        evaluation = write_evaluation(run, log, before, after, hub) if workers.is_first else None
        return TrainOutcome(run.config.output_dir, True, evaluation)


def run_steps(run: Run, log: RunLog, interrupt: Interrupt, hub: HubRepository | None = None) -> Stop:
    """The training loop; returns whether it was interrupted before its end.

    With several updates a rollout, loss, gradient norm and clip fractions are logged of the last one; entropy and what compares
    trainer and engine are of the first one, which has the log-probabilities of every completion.
    """
    config, learner, workers = run.config, run.learner, run.workers
    history: deque[dict[str, float]] = deque(maxlen=LOOKED_BACK)
    loader = RolloutLoader(run.model, run.engine, learner.rewards, run.selection, config, workers)
    with loader, profiled(run) as step_done:
        for step in range(run.num_completed, config.num_steps):
            if run.best.is_over:
                break
            started = time.perf_counter()
            # 1. Rollout.
            loaded = loader.next_batch(step, learner.timer)
            report_failures(run, log, loaded, step, loader)
            # 2 to 5. Rewards, advantages, forward pass, update.
            scored = learner.begin_rollout(loaded.rollout, step)
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate_at(config, step)
            for _ in range(config.updates_per_rollout):
                metrics = update_policy(learner, scored, loader.finish_sampling)
            # Gradients would take room beside the KV cache of the next rollout.
            learner.optimizer.zero_grad(set_to_none=True)
            # Log; save a checkpoint where it is time.
            metrics = {"step": step + 1, "learning_rate": learning_rate_at(config, step)} | metrics
            metrics |= step_metrics(run, scored, loaded, step) | {"seconds/step": time.perf_counter() - started}
            metrics |= learner.written_kl(step + 1)
            validated = validate(run, log.warn, step + 1)
            metrics |= validated
            history.append(metrics)
            log.step(metrics)
            if scored is not None and config.sample_every and (step + 1) % config.sample_every == 0:
                log.samples(choose_samples(scored, step + 1), scored.rollout.questions)
            if validated:
                show_validation(run, log, metrics)
            check_written(metrics, config)
            check_progress(history, log.warn)
            step_done()
            stop, is_due, saved = run.saver.agree(interrupt.stop)
            publish(run, log, hub, saved)
            is_last = bool(stop) or step + 1 == config.num_steps or run.best.is_over
            if is_last or is_due or (step + 1) % config.save_every == 0 or run.best.step == step + 1:
                save_and_publish(run, log, hub, step + 1, wait=is_last)
            if stop:
                return stop
    return Stop.NO


def update_policy(
    learner: Learner, scored: ScoredRollout | None, finish_sampling: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """One optimiser step on a rollout, its gradient accumulated over micro-batches; returns token-level metrics.

    Args:
        scored: this process's share of the rollout; None where nothing of it could be used.
        finish_sampling: with `--rollout-ahead` blocks until the sampler has stopped reading the weights.
    """
    learner.start_update(scored)
    losses: list[BackwardPass] = []
    if scored is not None:
        micro_batches = learner.micro_batches(scored)
        for rows in micro_batches:
            losses += train_micro_batch(learner, scored, rows, is_last=rows is micro_batches[-1])
    return learner.optimizer_step(scored, losses, finish_sampling)


def train_micro_batch(learner: Learner, scored: ScoredRollout, rows: list[int], *, is_last: bool) -> list[BackwardPass]:
    """Steps 4, 2, 3 and 5 for the completions `rows` of a rollout; an empty list where none of them has a gradient."""
    # Where the objective distils: what the model makes of the same completions behind their written prompts.
    teacher = learner.teacher_states(scored, rows)
    # 4. Hidden states of every token, in a graph where a gradient is possible.
    states = learner.forward(scored, rows)
    if scored.is_first_update:
        # 2 and 3. R_rep from these states; with it R and the advantages are complete.
        learner.complete_rewards(scored, states)
    # 5. The loss and its backward pass. The first update's log-probabilities are kept as the old ones of later updates.
    # Several processes send their gradients during the last backward pass of an update.
    return learner.backward(scored, states, teacher, is_last=is_last)


def step_metrics(run: Run, scored: ScoredRollout | None, loaded: LoadedRollout, step: int) -> dict[str, float]:
    """Metrics of a step's completions, of all processes, and where the time of this one and of all went; updates
    `run.selection`."""
    seconds = run.learner.timer.take()
    beside = {f"beside/{name.removeprefix('seconds/')}": value for name, value in loaded.seconds.items()}
    own = None if scored is None else (completion_columns(scored), outcomes_of(scored))
    gathered = run.workers.gather((own, seconds | beside))
    columns, outcomes = zip(*(part for part, _ in gathered if part is not None), strict=True)
    metrics = completion_metrics(columns) | run.selection.record(step, [outcome for part in outcomes for outcome in part])
    return metrics | seconds | beside | heartbeat_metrics([seconds for _, seconds in gathered])


def command(config: TrainConfig) -> int:
    """Train, or with `--dry-run` print the memory plan; returns the exit status."""
    if config.dry_run:
        plan = plan_run(config)
        if os.environ.get("RANK", "0") == "0":
            print(describe(plan))
        return 0 if plan.fits else FAILED
    outcome = train(config)
    if not outcome.is_finished:
        return preempted_status() if outcome.is_preempted else INTERRUPTED
    return FAILED if outcome.num_failed else 0


def resolve(config: TrainConfig) -> TrainConfig:
    """The settings with the preset's in the place of None."""
    return dataclasses.replace(config, **config.as_preset(find_preset(config.model)).settings_of(config))


def main() -> int:
    return run_command(command, TrainConfig, "python -m tars_fast.train", resolve)


if __name__ == "__main__":
    sys.exit(main())
