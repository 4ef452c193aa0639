"""What stands around the training loop: data and settings of a run, its folder, resuming, signals, profiling.

`open_run` checks everything that can be wrong before it loads weights, in the order in which a user would want to hear of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import UsableItem, bundled_name, load_questions, or_bundled, read_items, read_usable
from tars_fast.data.splits import check_leaks, choose_by_id, data_fingerprint, split_by_id, without_leaks
from tars_fast.learning.best import BestStep
from tars_fast.learning.likeness import check_alike, check_shared, code_fingerprint, settings_fingerprint
from tars_fast.learning.objectives.references import References
from tars_fast.learning.objectives.watch import WrittenWatch
from tars_fast.learning.optimizer import load_optimizer_state, make_optimizer
from tars_fast.learning.rewards.behaviour import TextSimilarity, load_text_similarity
from tars_fast.learning.rewards.judge import find_judge
from tars_fast.learning.rewards.total import Rewards, load_own_rewards, reward_weights
from tars_fast.learning.rewards.trial import try_rewards
from tars_fast.learning.saving import Saver, Stop
from tars_fast.learning.selection import Selection, check_selection
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import Workers, locked_by_first, num_started
from tars_fast.models.adapters import load_adapter_weights
from tars_fast.models.architecture import check_parts, find_layers
from tars_fast.models.audio_cache import make_cache_folder
from tars_fast.models.checkpoint import (
    check_room,
    is_damaged,
    latest_checkpoint,
    load_trainer_state,
    set_damaged_aside,
)
from tars_fast.models.memory import MemoryPlan, plan_memory, remedies
from tars_fast.models.preset import Preset
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.registry import architecture_of, family_of, find_preset, list_checkpoints
from tars_fast.models.speech_model import SpeechModel, choose_device, make_trainable
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.policy import available_bytes, choose_engine, load_model_and_engine
from tars_fast.support.cli import first_line, new_output_folder, plain_settings
from tars_fast.support.files import CannotWriteError, explain_cannot_write, remove_partial, write_atomically
from tars_fast.support.text import GB, size
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import Question, TrainingError, UserError

_LOCK_SECONDS = 120.0
"""Wait of `--resume-if-exists` for a folder that another process holds."""
PROFILED_STEPS = 3
"""Steps in the profile; the two before them, which still load and allocate, are left out."""
MAY_CHANGE_ON_RESUME = {
    "output_dir",
    "resume",
    "resume_if_exists",
    "device",
    "save_every",
    "save_minutes",
    "sample_every",
    "log",
    "push_to_hub",
    "keep_checkpoints",
    "profile",
    "audio_cache_gb",
    "audio_cache_dir",
    "audio_cache_dir_gb",
    "reward_concurrency",
    "reward_timeout",
    "judge_url",
    "collective_timeout",
    "tensor_parallel",
}
"""Settings that a resumed run may change."""


@dataclass(frozen=True)
class RunData:
    """The items of a run that the model can take."""

    training: list[Question]
    held_out: list[Question]
    """Items for the evaluation before and after training."""
    notes: list[str]
    """What was left out, or is cut."""
    longest_prompt: int
    """Tokens of the longest prompt."""
    validation: list[Question] = dataclasses.field(default_factory=list)
    """Items for the evaluations while it trains; empty without `--eval-every`."""
    prompt_tokens: list[int] = dataclasses.field(default_factory=list)
    """Of each training item."""


@dataclass(frozen=True)
class Run:
    """Everything that one training run is made of."""

    config: RunConfig
    data: RunData
    learner: Learner
    engine: RolloutEngine
    text_similarity: TextSimilarity
    selection: Selection
    num_completed: int
    """Steps that were done before it was resumed."""
    best: BestStep
    saver: Saver

    @property
    def model(self) -> SpeechModel:
        return self.learner.model

    @property
    def workers(self) -> Workers:
        return self.learner.workers

    @property
    def evaluation_name(self) -> str:
        """What the evaluation items are called in predictions and reports."""
        return Path(evaluation_source(self.config)).stem

    def describe(self) -> str:
        """One line for the terminal."""
        config, model = self.config, self.model
        processes = "" if self.workers.size == 1 else f" in {self.workers.size} processes"
        if config.tensor_parallel > 1:
            processes = f" in {config.tensor_parallel} processes with a part of the weights each"
        num_trainable = sum(parameter.numel() for parameter in model.trainable_parameters())
        return (
            f"{config.model} on {model.device}{processes}, {model.module.dtype}, {model.attention} over micro-batches of "
            f"{config.tokens_per_micro_batch:,} tokens, rollouts by {self.engine.name}, "
            f"{num_trainable:,} trainable parameters{'' if model.parallel is None else ' in each'}; "
            f"{len(self.data.training)} training and {len(self.data.held_out)} evaluation items; writing to {config.output_dir}"
        )


@contextmanager
def open_run(config: TrainConfig, workers: Workers) -> Iterator[Run]:
    """Check settings and data, load the policy, and make it trainable; the engine is closed at the end of the block.

    Raises:
        UserError: settings that contradict each other, data that cannot be used, a folder that holds another run or that
            another process writes into, a checkpoint that cannot be read, a disk without room for the checkpoints.
        TrainingError: memory ran out.
    """
    check_alike(workers, "code", code_fingerprint() if workers.num_processes > 1 else {})
    check_alike(workers, "settings", settings_fingerprint(config))
    preset = config.as_preset(find_preset(config.model))
    output_dir = config.output_dir or workers.gather(new_output_folder(config.model))[0]
    if preset.questions_per_step < workers.size:
        raise UserError(
            f"--questions-per-step {preset.questions_per_step}: fewer than the {workers.size} processes; raise it, or start "
            "fewer"
        )
    # What holds the folder may be of a run that was killed, on a machine that is still to notice it.
    patience = _LOCK_SECONDS if config.resume_if_exists else 0.0
    with locked_by_first(output_dir, workers, patience), ExitStack() as closed:
        check_shared(workers, output_dir)
        config = decide_resume(config, output_dir, workers)
        run = closed.enter_context(_load_run(config, preset, output_dir, workers))
        try:
            yield run
        except CannotWriteError as error:
            checkpoints = list_checkpoints(output_dir)
            if not checkpoints:
                raise
            raise TrainingError(f"{error}; --resume continues from {checkpoints[-1][1].name}") from error


def decide_resume(config: TrainConfig, output_dir: Path, workers: Workers) -> TrainConfig:
    """`--resume-if-exists` as `--resume`, or without it where there is no whole checkpoint; the first process looks for all."""
    if not config.resume_if_exists:
        return config
    exists = workers.is_first and set_damaged_aside(output_dir, lambda said: print(f"warning: {said}", flush=True))
    return dataclasses.replace(config, resume=workers.gather(exists)[0], resume_if_exists=False, output_dir=output_dir)


@contextmanager
def _load_run(config: TrainConfig, preset: Preset, output_dir: Path, workers: Workers) -> Iterator[Run]:
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    architecture = architecture_of(preset)
    find_layers(config.representation_layers, architecture.num_layers)
    architecture.find_lora_targets(config.lora_targets)
    training, held_out, notes = load_data(config)
    validation: list[Question] = []
    if config.eval_every:
        training, validation = load_validation(config, training, held_out)
    resumed_from = latest_checkpoint(output_dir) if config.resume else None
    source = str(resumed_from) if resumed_from is not None and preset.lora_rank == 0 else preset.source
    # Not from the checkpoint it resumes from, which later ones outlive: processor and configuration are read at each save.
    prompts = load_prompt_format(preset, preset.source, config.long_audio)
    training, held_out, validation = (prompts.ask(questions) for questions in (training, held_out, validation))
    engine_name = choose_engine(config.engine, prompts.family, device, dtype, preset.lora_rank)
    check_parts(config.tensor_parallel, architecture, engine_name)
    if config.router_replay and (engine_name != "vllm" or not architecture.num_experts):
        reason = "the model is no mixture of experts" if engine_name == "vllm" else "it is for rollouts by vLLM"
        raise UserError(f"--router-replay: {reason}; leave it out")
    # Before it samples, vLLM compares where its weights are with the trainer's; an adapter's lie in buffers of its own.
    is_exchanged = config.exchanges_weights and (engine_name == "transformers" or preset.lora_rank == 0)
    if config.rollout_ahead and (is_exchanged or (config.kl_coef and engine_name == "transformers")):
        flag = f"--objective {config.objective}" if is_exchanged else f"--kl-coef {config.kl_coef}"
        remedy = "--engine vllm or --rollout-ahead 0" if preset.lora_rank else "--rollout-ahead 0"
        raise UserError(
            f"{flag}: with --rollout-ahead 1 this engine would sample while the module computes with other weights; "
            f"use {remedy}"
        )
    found = RunData(training, held_out, notes, 0, validation)
    check_alike(workers, "data", fingerprints_of(found) if workers.num_processes > 1 else {})
    data = keep_usable(config, prompts, found, workers)
    workload = config.workload(
        preset,
        prompts.family.architecture(prompts.config),
        engine_name,
        dtype.itemsize,
        data.longest_prompt,
        on_gpu=device.type == "cuda",
    )
    workload = dataclasses.replace(workload, num_processes=workers.size)
    check_selection(config, preset.questions_per_step, data.training)
    earlier = read_settings(output_dir) if config.resume else {}
    plan = plan_memory(workload, available_bytes(device))
    resident = sum(workload.resident.values())
    if resident > plan.device_bytes:
        raise UserError(
            f"--model {config.model}: {size(resident)}, of them {size(workload.weights)} weights, do not fit into "
            f"{size(plan.device_bytes)}; {remedies(plan)[0]}"
        )
    if workload.reference_bytes and not plan.fits:
        setting = "--text-anchor kl" if config.teacher == "moving" else f"--teacher {config.teacher}"
        raise UserError(
            f"{setting}: {size(workload.resident['reference weights'])} for another copy of what is trained "
            f"do not fit beside the rest into {size(plan.device_bytes)}; {remedies(plan)[0]}"
        )
    tokens = choose_micro_batch(config, earlier, plan, workers)
    run_config = config.resolve(preset, output_dir=output_dir, tokens_per_micro_batch=tokens)
    judge = find_judge(run_config)
    if judge is not None:
        # Resumed at another address, or another day, the run would else take whichever model is listed there.
        run_config = dataclasses.replace(run_config, judge_model=judge.find_model())
        if "judge" not in [own.source for own in run_config.own_rewards]:
            judge.check([*data.held_out, *data.validation])
    settings = settings_of_run(run_config, data)
    check_output(run_config, settings, earlier)
    for note in data.notes:
        if workers.is_first:
            print(note, flush=True)
    if config.audio_cache_dir is not None:
        make_cache_folder(config.audio_cache_dir)
    if source != preset.source:
        check_architecture(Path(source), prompts)
    with ExitStack() as closed:
        own_rewards = closed.enter_context(closing(load_own_rewards(run_config)))
        applies = try_rewards(own_rewards, data.held_out, data.training, prompts)
        if workers.is_first and not (applies or may_teach_without_own(run_config, data.training)):
            print(
                f"warning: --reward {' '.join(run_config.reward)}: applies to no completion of the training item that it was "
                "tried on, and no other reward does; where that is so of all items, there is nothing to train on",
                flush=True,
            )
        with explain_out_of_memory("loading the model"), _explain_damage(resumed_from):
            model, engine = load_model_and_engine(prompts, source, device, dtype, workload, cuda_graphs=config.cuda_graphs)
        closed.enter_context(closing(engine))
        if model.parallel is not None and workers.watchdog is not None:
            model.parallel.together = partial(workers.watchdog.waiting, "parts")
        if model.routing is not None:
            model.routing.set_replay(replays=config.router_replay)
        model.set_audio_cache(int(config.audio_cache_gb * GB), config.audio_cache_dir, int(config.audio_cache_dir_gb * GB))
        text_similarity = load_text_similarity(run_config.behaviour_model, device)
        selection = Selection(data.training, run_config, data.prompt_tokens)
        best = BestStep(config.keep_best, config.early_stop)
        with _explain_damage(resumed_from):
            prepare_model(run_config, model, workload.adapted_layers, resumed_from)
            rewards = Rewards(run_config, text_similarity, own_rewards)
            learner, num_completed, extra = make_learner(run_config, model, rewards, resumed_from, workers)
            if resumed_from is not None:
                load_extra(extra, resumed_from, (learner, selection, best))
        if run_config.steps_between_looks and learner.watch is None:
            learner.watch = WrittenWatch.begin(model, engine, data.training, run_config)
        # Every process looks at the folder before the first one writes there.
        workers.gather(None)
        if workers.is_first:
            prepare_output(run_config, settings)
            num_steps_left = run_config.num_steps - num_completed
            num_saves = math.ceil(num_steps_left / run_config.save_every)
            num_kept = run_config.keep_checkpoints
            if run_config.keep_best is not None:
                num_saves += math.ceil(num_steps_left / run_config.eval_every)
                num_kept += 1
            check_room(output_dir, model, num_saves, num_kept, learner.extra())
        workers.gather(None)
        saver = closed.enter_context(closing(Saver(run_config, learner, selection, best)))
        yield Run(run_config, data, learner, engine, text_similarity, selection, num_completed, best, saver)


def check_architecture(checkpoint: Path, prompts: PromptFormat) -> None:
    """Raises UserError where a checkpoint's config.json is of another model; transformers fills gaps with large defaults."""
    try:
        architecture = architecture_of(dataclasses.replace(prompts.preset, source=str(checkpoint), architecture=None))
        if architecture == prompts.family.architecture(prompts.config):
            return
        fault: Exception = ValueError("of another model")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError) as error:
        fault = error
    raise is_damaged(checkpoint, f"config.json: {first_line(fault.__cause__ or fault)}") from fault


@contextmanager
def _explain_damage(checkpoint: Path | None) -> Iterator[None]:
    """Say of a checkpoint to resume from that it is damaged, and which other one is not, where it cannot be loaded."""
    try:
        yield
    except UserError as error:
        if checkpoint is None or not str(error).startswith(f"--model {checkpoint}:"):
            raise
        raise is_damaged(checkpoint, first_line(error.__cause__ or error)) from error


def plan_run(config: TrainConfig) -> MemoryPlan:
    """What memory each phase of the run needs, from the model's configuration alone; loads no weights and no data.

    Raises:
        UserError: see `open_run`.
    """
    preset = config.as_preset(find_preset(config.model))
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    architecture = architecture_of(preset)
    find_layers(config.representation_layers, architecture.num_layers)
    engine_name = choose_engine(config.engine, family_of(preset), device, dtype, preset.lora_rank)
    check_parts(config.tensor_parallel, architecture, engine_name)
    on_gpu = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if on_gpu else available_bytes(device)
    workload = config.workload(preset, architecture, engine_name, dtype.itemsize, on_gpu=on_gpu)
    if config.tensor_parallel == 1:
        workload = dataclasses.replace(workload, num_processes=num_started())
    return plan_memory(workload, total)


def prepare_model(config: RunConfig, model: SpeechModel, lora_targets: Collection[str], resumed_from: Path | None) -> None:
    """Make a model trainable, with the adapters of a checkpoint where it resumes from one.

    Args:
        lora_targets: see `make_trainable`.
    """
    # Not earlier: starting vLLM seeds torch's generator with a number of its own.
    torch.manual_seed(config.seed)
    make_trainable(
        model,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=lora_targets,
        freeze_audio=config.freeze_audio,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if resumed_from is not None and config.lora_rank:
        load_adapter_weights(model.module, model.family, resumed_from, model.parallel)


def make_learner(
    config: RunConfig,
    model: SpeechModel,
    rewards: Rewards,
    resumed_from: Path | None,
    workers: Workers,
) -> tuple[Learner, int, dict[str, Any]]:
    """(learner, completed steps, what else the checkpoint holds, for `load_extra`); `resumed_from` is that checkpoint.

    Raises:
        UserError: it does not fit, or the model before training, which the objective needs, cannot be loaded any more.
    """
    sharded = workers.size > 1 and config.lora_rank == 0
    optimizer = make_optimizer(model.trainable_parameters(), config.weight_decay, config.seed, sharded=sharded)
    references = References(model, config, is_resumed=resumed_from is not None)
    learner = Learner(model, optimizer, config, workers, references, rewards)
    if resumed_from is None:
        return learner, 0, {}
    trained = model.trainable_by_name()
    num_completed, state, extra = load_trainer_state(resumed_from, list(trained))
    try:
        load_optimizer_state(optimizer, trained, state, model.parallel)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise is_damaged(resumed_from, f"state of the optimiser: {first_line(error)}") from error
    return learner, num_completed, extra


def load_extra(extra: Mapping[str, Any], resumed_from: Path, parts: Sequence[Learner | Selection | BestStep]) -> None:
    """Have each part of a run go on from what the checkpoint `resumed_from` holds. Raises UserError where it is of another."""
    try:
        for part in parts:
            part.load_extra(extra)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise is_damaged(resumed_from, f"trainer_state.pt: {first_line(error)}") from error


def read_training(config: TrainConfig) -> tuple[list[UsableItem], str | None]:
    """`read_usable` of `--data`, whose items need as much of an answer as the objective does.

    Raises:
        UserError: there is no good item, the first bad row of the user's own data, or the first item without an answer, or
            without possible answers, that the objective needs.
    """
    source = or_bundled(config.data, "training", find_preset(config.model).bundled_data)
    if config.needs_answers:
        try:
            return read_usable(source)
        except UserError as error:
            remedy = "--objective opd" if config.parts.uses_rewards else "--text-anchor kl"
            without_answers = read_items(source, answered=False)
            if any(isinstance(item, UsableItem) and str(error).startswith(f"{item.place}:") for item in without_answers):
                raise UserError(f"{error}; {remedy} needs no answers") from error
            raise
    items, unusable = read_usable(source, answered=False)
    for item in items if config.parts.uses_agreement else ():
        if not item.question.choices:
            raise UserError(
                f"{item.place}: item {item.question.id!r:.80} has no possible answers, which --objective {config.objective} "
                "compares; give 'options' or 'answer_set', or train with --objective opd"
            )
    return items, unusable


def evaluation_source(config: TrainConfig | RunConfig) -> str:
    """Where the evaluation items are: in `--eval-data`, in bundled data, or in `--data`, a part of which is kept for them."""
    own = config.data if bundled_name(config.data) is None else None
    default = bundled_name(config.data) or find_preset(config.model).bundled_data
    return or_bundled(config.eval_data or own, "held_out", default)


def load_data(config: TrainConfig) -> tuple[list[Question], list[Question], list[str]]:
    """(training items, evaluation items, notes on items left out or without an answer), checked not to overlap.

    Raises:
        UserError: nothing readable there, a row that is no item, or an item in both parts.
    """
    items, unusable = read_training(config)
    questions: list[Question] = [item.question for item in items]
    notes = [] if unusable is None else [unusable]
    if config.disjoint_from:
        needs = config.needs_answers
        others = [q for source in config.disjoint_from for q in load_questions(source, spoken=False, answered=needs)]
        training = without_leaks(questions, others)
        listed = " ".join(config.disjoint_from)
        if not training:
            raise UserError(f"--disjoint-from {listed}: has all {len(questions)} items of --data; name other data to train on")
        notes.append(f"{len(questions) - len(training)} of {len(questions)} items left out, which are in {listed} too")
        questions = training
    if config.data is not None and bundled_name(config.data) is None and config.eval_data is None:
        held_out = split_by_id(_graded(config, questions, "--eval-data"), held_out_fraction=0.1)[1]
        training = without_leaks(questions, held_out)
    else:
        training, held_out = questions, load_questions(evaluation_source(config), answered=config.judge_url is None)
    check_leaks(training, held_out)
    num_unanswered = sum(not question.has_answer for question in training)
    if num_unanswered:
        rewards = "R_acc and R_fmt" if config.own_rewards else "rewards"
        notes.append(f"{num_unanswered} of {len(training)} training items have no answer, and no {rewards}")
    return training, choose_by_id(held_out, config.eval_items), notes


def may_teach_without_own(config: TrainConfig, questions: Sequence[Question]) -> bool:
    """Whether these items have anything to learn from besides the rewards that `--reward` names."""
    has_base = bool(config.accuracy_weight or config.format_weight) and any(question.has_answer for question in questions)
    return has_base or config.parts.distils or not config.own_rewards


def _graded(config: TrainConfig, questions: Sequence[Question], flag: str) -> list[Question]:
    """Those that an evaluation of this run has a figure for; `flag` names other items to evaluate on."""
    graded = [question for question in questions if question.is_graded(judged=config.judge_url is not None)]
    if not graded:
        raise UserError(f"--data {config.data}: none of its items has an answer to evaluate by; give {flag}")
    return graded


def load_validation(
    config: TrainConfig, training: list[Question], held_out: Sequence[Question]
) -> tuple[list[Question], list[Question]]:
    """(training items, items of the evaluations while it trains), which are neither trained on nor held out.

    Raises:
        UserError: nothing readable there, or an item is in two of the three.
    """
    source, name = config.validation_data, bundled_name(config.data)
    if source is None and config.data is None:
        name = find_preset(config.model).bundled_data
    if source is None and name is None:
        # Without --eval-data the first tenth is held out already.
        fraction = 0.2 if config.eval_data is None else 0.1
        validation = split_by_id(_graded(config, training, "--validation-data"), fraction, "--validation-data")[1]
        return without_leaks(training, validation), choose_by_id(validation, config.eval_items)
    source = or_bundled(source or name, "validation")
    validation = load_questions(source, answered=config.judge_url is None)
    check_leaks(training, validation)
    unseen = without_leaks(validation, held_out)
    if len(unseen) < len(validation):
        raise UserError(
            f"--validation-data {source}: {len(validation) - len(unseen)} of its {len(validation)} items are among those held "
            "out for the end; name other items, or another --eval-data"
        )
    return training, choose_by_id(validation, config.eval_items)


def keep_usable(config: TrainConfig, prompts: PromptFormat, data: RunData, workers: Workers) -> RunData:
    """The items whose prompts the model can take; each process looks at its share of the recordings.

    Raises:
        UserError: see `PromptFormat.check_questions`; with `--skip-unusable` only where nothing is left.
    """
    questions = [*data.training, *data.held_out, *data.validation]
    max_new_tokens = config.as_preset(prompts.preset).max_new_tokens
    sizes = workers.spread(lambda share: prompts.prompt_sizes(share, max_new_tokens), questions)
    usable = {q.id: size for q, size in zip(questions, sizes, strict=True) if isinstance(size, PromptSize)}
    if not config.skip_unusable or not usable:
        prompts.raise_refusals(questions, sizes)
    refused = [f"item {q.id!r}: {size}" for q, size in zip(questions, sizes, strict=True) if not isinstance(size, PromptSize)]
    left_out = f"{len(refused)} of {len(questions)} items left out; the first: {refused[0]}" if refused else None
    parts = (data.training, data.held_out, data.validation)
    training, held_out, validation = ([q for q in part if q.id in usable] for part in parts)
    if not training or not held_out or (data.validation and not validation):
        raise UserError(f"--skip-unusable: {left_out}; nothing is left to train or to evaluate on")
    notes = [note for note in (*data.notes, left_out, prompts.long_audio_notice(list(usable.values()))) if note is not None]
    longest = max(size.num_tokens for size in usable.values())
    return RunData(training, held_out, notes, longest, validation, [usable[q.id].num_tokens for q in training])


def choose_micro_batch(config: TrainConfig, earlier: Mapping[str, Any], plan: MemoryPlan, workers: Workers) -> int:
    """Tokens that the plan leaves room for, the same in all processes; a resumed run keeps its number.

    Args:
        earlier: see `read_settings`.

    Raises:
        UserError: `--rollout-ahead` does not fit.
    """
    if config.rollout_ahead and not plan.fits:
        raise UserError(
            f"--rollout-ahead 1: sampling and training at the same time do not fit into {size(plan.device_bytes)}; "
            f"{remedies(plan)[0]}"
        )
    return config.tokens_per_micro_batch or earlier.get("tokens_per_micro_batch") or min(workers.gather(plan.micro_batch))


def read_settings(output_dir: Path) -> dict[str, Any]:
    """The result of `settings_of_run` when the run began; empty where config.json is missing.

    Raises:
        UserError: config.json is damaged.
    """
    path = output_dir / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        tokens = settings["tokens_per_micro_batch"]
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"tokens_per_micro_batch is {tokens!r:.50}")
        return settings
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--resume: {path} is damaged ({first_line(error)}); remove it, and resume with the settings of the run, of which "
            "it is made again"
        ) from error


def settings_of_run(config: RunConfig, data: RunData) -> dict[str, object]:
    """The content of config.json: the settings, fingerprints of the data, and the weights of the reward's terms."""
    return plain_settings(config) | {"data_fingerprint": fingerprints_of(data), "rewards": reward_weights(config)}


def fingerprints_of(data: RunData) -> dict[str, str]:
    """`data_fingerprint` of each part that has items."""
    parts = {"training": data.training, "evaluation": data.held_out, "validation": data.validation}
    return {name: data_fingerprint(questions) for name, questions in parts.items() if questions}


def check_output(config: RunConfig, settings: Mapping[str, object], earlier: Mapping[str, Any]) -> None:
    """Raises UserError where the folder holds another run, or with --resume one whose settings differ from `earlier` ones."""
    if earlier:
        # Runs of earlier versions did not write down what came later: it was then as the defaults are.
        then = {"objective": "tars", "text_anchor": "none", "rewards": settings["rewards"]}
        earlier = {**plain_settings(TrainConfig()), **then, **earlier}
        if earlier["judge_url"] and earlier["judge_model"] is None:
            earlier["judge_model"] = settings["judge_model"]
        changed = sorted(name for name in settings if name not in MAY_CHANGE_ON_RESUME and earlier.get(name) != settings[name])
        if changed:
            # Hashes help nobody, and follow from another setting where one changed.
            named = [name for name in changed if name != "data_fingerprint"]
            listed = ", ".join(f"{name} {earlier.get(name)} -> {settings[name]}" for name in named) or "other items"
            raise UserError(f"--resume: the settings differ from those of the run ({listed}); give the same ones")
    elif config.resume:
        print(
            f"warning: {config.output_dir / 'config.json'} is missing; it is made again of the settings given now", flush=True
        )
    elif list_checkpoints(config.output_dir):
        raise UserError(f"--output-dir {config.output_dir}: already holds a run; add --resume or name another folder")


def prepare_output(config: RunConfig, settings: Mapping[str, object]) -> None:
    """Clear what killed processes have left in the output folder, and write config.json. Raises CannotWriteError."""
    remove_partial(config.output_dir)
    write_atomically(config.output_dir / "config.json", json.dumps(settings, indent=2) + "\n")


class Interrupt:
    """Ctrl-C, the SIGTERM of a cluster, or its SIGUSR1, asks to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.stop = Stop.NO

    def _handle(self, number: int, _frame: object) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stop:
            again = "" if number == signal.SIGUSR1 else "; a second Ctrl-C stops at once"
            print(f"stopping after this step{again}", file=sys.stderr)
        self.stop = max(self.stop, Stop.PREEMPTED if number == signal.SIGUSR1 else Stop.INTERRUPTED)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block signals only set `stop`; outside a program's main thread nobody can handle them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, self._handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def profiled(run: Run) -> Iterator[Callable[[], None]]:
    """With `--profile` a Chrome trace of a few of the steps that are left; yields a function to call after each step."""
    config, device = run.config, run.model.device
    if not config.profile or not run.workers.is_first:
        yield lambda: None
        return
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    idle = max(0, min(2, config.num_steps - run.num_completed - PROFILED_STEPS))

    def write(profiler: profile) -> None:
        path = config.output_dir / "trace.json.gz"
        with explain_cannot_write(path):
            profiler.export_chrome_trace(str(path))

    planned = schedule(wait=idle // 2, warmup=idle - idle // 2, active=PROFILED_STEPS, repeat=1)
    # Without it the trace holds this thread alone.
    all_threads = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, schedule=planned, on_trace_ready=write, experimental_config=all_threads) as profiler:
        yield profiler.step
