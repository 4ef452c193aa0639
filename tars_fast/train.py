"""TARS: GRPO that aligns the speech-conditioned with the text-conditioned policy (arXiv 2601.05543).

For every step:

1. sample half of each question's group from its spoken and half from its written prompt (`rollout.py`);
2. reward every completion for its answer and format, and speech completions also for hidden states (R_rep) and words (R_beh)
   like those of a correct text completion of the same question, drawn from the current policy;
3. centre rewards within (question, modality) (`update.py`, and all that follows);
4. one forward pass a token, packed without padding, whose hidden states give the log-probabilities and, pooled by hooks as the
   layers run, R_rep;
5. clipped asymmetric policy gradient, normalised by the unmasked tokens of the whole batch.

Left out on purpose: a reference model (the KL coefficient is 0), a value model, division by the reward's deviation, a separate
scoring pass where a rollout is trained on once (the first forward pass has the old log-probabilities already).
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from tars_kernels import use_reference

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import EMBEDDED, HELD_OUT_DATA, TRAINING_DATA, load_questions, or_embedded, read_usable
from tars_fast.data.splits import check_leaks, choose_by_id, split_by_id, without_leaks
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator
from tars_fast.evaluation.figures import change_since, report, text_reference
from tars_fast.evaluation.results import ItemResult, data_fingerprint, read_predictions
from tars_fast.learning.batch import RolloutSource
from tars_fast.learning.optimizer import make_optimizer
from tars_fast.learning.rewards import TextSimilarity, load_text_similarity
from tars_fast.learning.update import rollout_metrics, score_rollout, update_policy
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.models.architecture import find_layers
from tars_fast.models.audio_cache import make_cache_folder
from tars_fast.models.checkpoint import latest_checkpoint, load_trainer_state, save_checkpoint
from tars_fast.models.memory import GB, MemoryPlan, describe, plan_memory, remedies, size
from tars_fast.models.presets import architecture_of, family_of, find_preset, list_checkpoints
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.speech_model import SpeechModel, choose_device, make_trainable
from tars_fast.reports.log import RunLog
from tars_fast.reports.plots import ACCURACY_PLOT, accuracy_plot, can_plot, write_png
from tars_fast.reports.run_page import write_report
from tars_fast.reports.tables import print_summary
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.policy import available_bytes, choose_engine, load_policy
from tars_fast.support.cli import FAILED, INTERRUPTED, make_output_folder, new_output_folder, run_command
from tars_fast.support.files import write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.timing import PhaseTimer, explain_out_of_memory
from tars_fast.types import Question, TrainingError, UserError

MAX_EMPTY_STEPS = 3
"""Consecutive steps with every completion cut off, after which waiting longer is pointless."""
MAX_UNANIMOUS_STEPS = 10
"""Consecutive steps in which no group disagreed in its rewards before a warning repeats."""
PROFILED_STEPS = 3
"""After two that still load and allocate."""


class Interrupt:
    """Ctrl-C, or the SIGTERM of a cluster, asks to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGTERM:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step; once more stops at once", file=sys.stderr)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def load_data(config: TrainConfig) -> tuple[list[Question], list[Question], list[str]]:
    """(training items, evaluation items, what to say of items left out), checked not to overlap."""
    items, unusable = read_usable(or_embedded(config.data, TRAINING_DATA))
    questions: list[Question] = [item.question for item in items]
    notes = [] if unusable is None else [unusable]
    if config.disjoint_from:
        others = [question for source in config.disjoint_from for question in load_questions(source, spoken=False)]
        training = without_leaks(questions, others)
        listed = " ".join(config.disjoint_from)
        if not training:
            raise UserError(f"--disjoint-from {listed}: has all {len(questions)} items of --data; name other data to train on")
        notes.append(f"{len(questions) - len(training)} of {len(questions)} items left out, which are in {listed} too")
        questions = training
    if config.data not in (None, EMBEDDED) and config.eval_data is None:
        training, held_out = split_by_id(questions, held_out_fraction=0.1)
    else:
        training, held_out = questions, load_questions(or_embedded(config.eval_data, HELD_OUT_DATA))
    check_leaks(training, held_out)
    return training, choose_by_id(held_out, config.eval_items), notes


def choose_micro_batch(config: TrainConfig, output_dir: Path, plan: MemoryPlan, workers: Workers) -> int:
    """Tokens that the plan leaves room for, the same in all processes; a resumed run goes on with what it had.

    Raises:
        UserError: `--rollout-ahead` does not fit.
    """
    if config.rollout_ahead and not plan.fits:
        raise UserError(
            f"--rollout-ahead 1: sampling and training at the same time do not fit into {size(plan.device_bytes)}; "
            f"{remedies(plan)[0]}"
        )
    tokens = config.tokens_per_micro_batch
    if tokens is None and config.resume:
        latest_checkpoint(output_dir)
        tokens = read_settings(output_dir).get("tokens_per_micro_batch")
    return tokens or min(workers.gather(plan.micro_batch))


def read_settings(output_dir: Path) -> dict[str, Any]:
    """What `settings_of_run` said when the run began."""
    return json.loads((output_dir / "config.json").read_text(encoding="utf-8"))


def settings_of_run(config: RunConfig, training: Sequence[Question], held_out: Sequence[Question]) -> dict[str, object]:
    """What config.json holds: the settings, and fingerprints of the data."""
    fingerprint = {"training": data_fingerprint(training), "evaluation": data_fingerprint(held_out)}
    return config.to_json() | {"data_fingerprint": fingerprint}


def check_output(config: RunConfig, settings: dict[str, object]) -> None:
    """Raises UserError where the folder holds another run, or with --resume one whose settings differ."""
    movable = {
        "output_dir",
        "resume",
        "device",
        "save_every",
        "profile",
        "audio_cache_gb",
        "audio_cache_dir",
        "audio_cache_dir_gb",
    }
    if config.resume:
        latest_checkpoint(config.output_dir)
        earlier = read_settings(config.output_dir)
        changed = sorted(name for name in settings if name not in movable and earlier.get(name) != settings[name])
        if changed:
            # Two hashes tell nobody anything, and follow from another setting where one changed.
            told = [name for name in changed if name != "data_fingerprint"]
            listed = ", ".join(f"{name} {earlier.get(name)} -> {settings[name]}" for name in told) or "other items"
            raise UserError(f"--resume: the settings differ from those of the run ({listed}); give the same ones")
    elif list_checkpoints(config.output_dir):
        raise UserError(f"--output-dir {config.output_dir}: already holds a run; add --resume or name another folder")


def prepare_output(config: RunConfig, settings: dict[str, object]) -> None:
    """Make the output folder and write config.json. Raises UserError where it cannot be made."""
    make_output_folder(config.output_dir)
    write_atomically(config.output_dir / "config.json", json.dumps(settings, indent=2) + "\n")


def check_progress(log: RunLog, metrics: dict[str, float], history: list[dict[str, float]]) -> None:
    """Say what makes a step useless, and stop where it will not get better by itself."""
    recent = history[-MAX_EMPTY_STEPS:]
    if metrics["truncated/speech"] == metrics["truncated/text"] == 1:
        log.warn(f"step {metrics['step']}: every completion was cut off; raise --max-new-tokens")
        if len(recent) == MAX_EMPTY_STEPS and all(m["truncated/speech"] == m["truncated/text"] == 1 for m in recent):
            raise TrainingError(f"every completion was cut off for {MAX_EMPTY_STEPS} steps; raise --max-new-tokens")
    unanimous = 0
    while unanimous < len(history) and history[-1 - unanimous]["disagreeing/any"] == 0:
        unanimous += 1
    if unanimous and (unanimous - 1) % MAX_UNANIMOUS_STEPS == 0:
        log.warn(
            f"step {metrics['step']}: no group disagrees in its rewards, so there is nothing to learn; "
            "raise --temperature or choose items of middling difficulty"
        )


def check_weights(model: SpeechModel) -> None:
    """Raises TrainingError before weights that are not finite can take the place of good ones."""
    if not all(parameter.isfinite().all() for parameter in model.trainable_parameters()):
        raise TrainingError("the weights are not finite; lower --learning-rate; the last checkpoint, if there is one, is good")


def train(config: TrainConfig) -> int:
    """Run the whole job; returns the exit status."""
    with use_reference(config.kernels == "reference"):
        return run_job(config)


def check_items(
    prompts: PromptFormat, questions: Sequence[Question], max_new_tokens: int, skip_unusable: bool, workers: Workers
) -> tuple[dict[str, PromptSize], str | None]:
    """(sizes by id of the items that can be used, what was left out); each process looks at its share of the recordings.

    Raises:
        UserError: see `PromptFormat.check_questions`; with `--skip-unusable` only where nothing is left.
    """
    sizes = workers.spread(lambda share: prompts.try_questions(share, max_new_tokens), questions)
    usable = {q.id: size for q, size in zip(questions, sizes, strict=True) if isinstance(size, PromptSize)}
    if not skip_unusable or not usable:
        prompts.refuse(questions, sizes)
    refused = [f"item {q.id!r}: {size}" for q, size in zip(questions, sizes, strict=True) if not isinstance(size, PromptSize)]
    return usable, f"{len(refused)} of {len(questions)} items left out; the first: {refused[0]}" if refused else None


def run_job(config: TrainConfig) -> int:
    """Train alone, or as one of the processes that torchrun started."""
    with join_workers() as workers:
        return prepare_and_train(config, workers)


def prepare_and_train(config: TrainConfig, workers: Workers) -> int:
    """Check the data, load the policy, train it."""
    preset = config.as_preset(find_preset(config.model))
    output_dir = config.output_dir or workers.gather(new_output_folder(config.model))[0]
    if preset.questions_per_step < workers.size:
        raise UserError(
            f"--questions-per-step {preset.questions_per_step}: fewer than the {workers.size} processes; raise it, or start "
            "fewer"
        )
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    find_layers(config.representation_layers, architecture_of(preset).num_layers)
    if config.dry_run:
        engine_name = choose_engine(config.engine, family_of(preset), device, dtype, preset.lora_rank)
        total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_bytes(device)
        architecture = architecture_of(preset)
        workload = config.workload(preset, architecture, engine_name, dtype.itemsize, on_gpu=device.type == "cuda")
        plan = plan_memory(workload, total)
        print(describe(plan))
        return 0 if plan.fits else FAILED
    training, held_out, notes = load_data(config)
    adapter = latest_checkpoint(output_dir) if config.resume else None
    source = str(adapter) if adapter is not None and preset.lora_rank == 0 else preset.source
    prompts = load_prompt_format(preset, source, config.long_audio)
    engine_name = choose_engine(config.engine, prompts.family, device, dtype, preset.lora_rank)
    sizes, left_out = check_items(prompts, [*training, *held_out], preset.max_new_tokens, config.skip_unusable, workers)
    training, held_out = ([question for question in part if question.id in sizes] for part in (training, held_out))
    if not training or not held_out:
        raise UserError(f"--skip-unusable: {left_out}; nothing is left to train or to evaluate on")
    workload = config.workload(
        preset,
        prompts.family.architecture(prompts.config),
        engine_name,
        dtype.itemsize,
        max(size.num_tokens for size in sizes.values()),
        on_gpu=device.type == "cuda",
    )
    tokens = choose_micro_batch(config, output_dir, plan_memory(workload, available_bytes(device)), workers)
    run = config.resolve(preset, output_dir=output_dir, tokens_per_micro_batch=tokens)
    settings = settings_of_run(run, training, held_out)
    check_output(run, settings)
    for note in (*notes, left_out, prompts.tell_long(list(sizes.values()))):
        if note is not None and workers.is_first:
            print(note, flush=True)
    if config.audio_cache_dir is not None:
        make_cache_folder(config.audio_cache_dir)
    with explain_out_of_memory("loading the model"):
        model, engine = load_policy(prompts, source, device, dtype, workload, cuda_graphs=config.cuda_graphs)
    with closing(engine):
        return train_policy(run, settings, model, engine, training, held_out, adapter, workers)


def train_policy(
    config: RunConfig,
    settings: dict[str, object],
    model: SpeechModel,
    engine: RolloutEngine,
    training: Sequence[Question],
    held_out: Sequence[Question],
    adapter: Path | None,
    workers: Workers,
) -> int:
    """Evaluate, train, evaluate, report; `adapter` is the checkpoint to continue from, `settings` what config.json holds."""
    device = model.device
    model.keep_audio(int(config.audio_cache_gb * GB), config.audio_cache_dir, int(config.audio_cache_dir_gb * GB))
    text_similarity = load_text_similarity(config.behaviour_model, device)
    # Every process has looked at the folder before the first one writes there, and that has been before others read.
    workers.gather(None)
    if workers.is_first:
        prepare_output(config, settings)
    # Here and not earlier: starting vLLM seeds torch's generator with a number of its own.
    torch.manual_seed(config.seed)
    make_trainable(
        model,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        freeze_audio=config.freeze_audio,
        gradient_checkpointing=config.gradient_checkpointing,
        adapter=adapter,
    )
    optimizer = make_optimizer(model.trainable_parameters(), config.weight_decay, config.seed)
    num_completed = load_trainer_state(adapter, optimizer) if adapter is not None else 0

    log = RunLog(config.output_dir if workers.is_first else None, config.num_steps, num_completed)
    alone = "" if workers.size == 1 else f" in {workers.size} processes"
    num_trainable = sum(parameter.numel() for parameter in model.trainable_parameters())
    log.say(
        f"{config.model} on {device}{alone}, {model.module.dtype}, {model.attention} over micro-batches of "
        f"{config.tokens_per_micro_batch:,} tokens, rollouts by {engine.name}, {num_trainable:,} trainable parameters; "
        f"{len(training)} training and {len(held_out)} evaluation items; writing to {config.output_dir}"
    )

    eval_name = Path(or_embedded(config.eval_data or config.data, HELD_OUT_DATA)).stem

    def evaluate_now(when: str) -> list[ItemResult]:
        log.say(f"evaluating {when} training")
        settings = EvaluationSettings(config.max_new_tokens, config.eval_samples, config.temperature, config.seed)
        with explain_out_of_memory("evaluation"), item_progress(log.console, len(held_out)) as advance:
            results = Evaluator(model, engine, text_similarity, settings, workers).evaluate(held_out, eval_name, advance)
        if workers.is_first:
            write_atomically(config.output_dir / f"predictions_{when}.jsonl", "".join(result.to_line() for result in results))
        return results

    if num_completed:
        before = read_predictions(config.output_dir / "predictions_before.jsonl", "--resume")
    else:
        before = evaluate_now("before")

    interrupt = Interrupt()
    with interrupt.deferred(), log:
        finished = run_steps(
            config, model, engine, text_similarity, training, optimizer, num_completed, log, interrupt, workers
        )
    if not finished:
        if workers.is_first:
            print(f"stopped; continue with the same command and --resume --output-dir {config.output_dir}", file=sys.stderr)
        return INTERRUPTED

    after = evaluate_now("after")
    if not workers.is_first:
        # How it went is for the first to say: torchrun would end it in the middle of its report, were another to fail earlier.
        return 0
    reference = text_reference(before)
    evaluation = {
        "before": report(before, reference),
        "after": report(after, reference),
        "change": change_since(after, before),
    }
    write_atomically(config.output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    parts = {part: evaluation[part] for part in ("before", "after")}
    if can_plot() and all(part["num_items"] for part in parts.values()):
        write_png(config.output_dir / ACCURACY_PLOT, accuracy_plot({"held-out items": parts}))
    write_report(config.output_dir, {eval_name: held_out})
    print_summary(log, evaluation, config.output_dir)
    return FAILED if any(part["num_failed"] for part in parts.values()) else 0


def run_steps(
    config: RunConfig,
    model: SpeechModel,
    engine: RolloutEngine,
    text_similarity: TextSimilarity,
    training: Sequence[Question],
    optimizer: torch.optim.Optimizer,
    num_completed: int,
    log: RunLog,
    interrupt: Interrupt,
    workers: Workers,
) -> bool:
    """The training loop; returns whether it came to its end. With several updates a rollout, metrics are the last one's."""
    timer = PhaseTimer(model.device)
    history: list[dict[str, float]] = []
    with (
        RolloutSource(model, engine, text_similarity, training, config, workers) as rollouts,
        profiled(config, config.num_steps - num_completed, model.device, workers) as step_done,
    ):
        for step in range(num_completed, config.num_steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            taken = rollouts.take(step, timer)
            rollout = taken.rollout
            for line in (line for lines in workers.gather(taken.warnings) for line in lines):
                log.warn(line)
            failures = workers.gather(taken.unusable)
            if None not in failures:
                rollouts.wait()
                save_step(config, step, model, optimizer, workers)
                raise failures[0]
            scored = score_rollout(model, rollout, config, timer) if rollout and config.updates_per_rollout > 1 else None
            for _ in range(config.updates_per_rollout):
                scored, metrics = update_policy(
                    model, optimizer, rollout, scored, config, timer, workers, before_step=rollouts.wait
                )
            # Gradients would stay beside the KV cache of the next rollout.
            optimizer.zero_grad(set_to_none=True)

            metrics = {"step": step + 1, "learning_rate": config.learning_rate_at(step), **metrics}
            # Without what is large and only of use here.
            share = None
            if rollout is not None and scored is not None:
                slim = dataclasses.replace(scored, logprobs=[], entropies=[])
                share = dataclasses.replace(rollout, prompts=[], spoken=[]), slim
            metrics |= rollout_metrics([part for part in workers.gather(share) if part is not None])
            metrics |= timer.take() | {"seconds/step": time.perf_counter() - started}
            metrics |= {f"beside/{name.removeprefix('seconds/')}": value for name, value in taken.seconds.items()}
            history.append(metrics)
            log.step(metrics)
            check_progress(log, metrics, history)
            step_done()
            done = step + 1
            stopping = any(workers.gather(interrupt.requested))
            if stopping or done % config.save_every == 0 or done == config.num_steps:
                check_weights(model)
                save_step(config, done, model, optimizer, workers)
            if stopping:
                return False
    return True


@contextmanager
def profiled(config: RunConfig, num_steps: int, device: torch.device, workers: Workers) -> Iterator[Callable[[], None]]:
    """With `--profile` a Chrome trace of a few of the steps that are left; yields what is to be called after each."""
    if not config.profile or not workers.is_first:
        yield lambda: None
        return
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    idle = max(0, min(2, num_steps - PROFILED_STEPS))

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(config.output_dir / "trace.json.gz"))

    planned = schedule(wait=idle // 2, warmup=idle - idle // 2, active=PROFILED_STEPS, repeat=1)
    # Without it only what this thread does is seen.
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, schedule=planned, on_trace_ready=write, experimental_config=all_threads) as profiler:
        yield profiler.step


def save_step(
    config: RunConfig, num_completed: int, model: SpeechModel, optimizer: torch.optim.Optimizer, workers: Workers
) -> None:
    """One checkpoint for all processes, which must agree on what is in it."""
    workers.check_same(model.trainable_parameters())
    if workers.is_first:
        save_checkpoint(config.output_dir, num_completed, model, optimizer)
    workers.gather(None)


def main() -> int:
    return run_command(train, TrainConfig, "python -m tars_fast.train")


if __name__ == "__main__":
    sys.exit(main())
