"""The training side of one step, ours beside other trainers' structures: `python bench/train_step.py --json OUT`.

All that follows the rollout: forward passes, R_rep, advantages, loss, backward pass, clipping, optimiser step. Contenders share
model, rollout, audio embeddings, optimiser and settings (see `baselines`):

- `ours`: `update_policy`;
- `released`: three passes, the prompt repeated for every completion, logits of the whole vocabulary everywhere;
- `trl`: TRL 1.16, two passes, the prompt repeated, a fused head at completion tokens;
- `trl_keep_logits`: the same with logits at completion tokens, as TRL does up to 1.14;
- `trl_single_pass`: plain GRPO without R_rep and old log-probabilities, which is not the same method.

Gradients and rewards are compared first, in float32, and nothing is timed where they differ; in bf16 rounding alone moves a
gradient through 32 layers by a tenth of its norm. Then every contender chooses the fastest of a few micro-batch sizes, and they
take turns. Peak memory is counted above what was there before the step: by torch on CUDA, on a
CPU by the kernel, for each contender in a process of its own.

`--shape qwen2-audio-7b` (CUDA) has that model's shape with random weights and made-up rollouts, `tiny` is a test of that path.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import functools
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)
from tars_fast.models.registry import architecture_of

# isort: split
import torch
from baselines import StepInputs, StepTimer, completion_logprobs, released_step, run_layers, split_rollout, trl_step
from engine import randomise, resize_text
from torch import Tensor

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.batch import Rollout, RolloutCollector, prepare_batch
from tars_fast.learning.optimizer import make_optimizer
from tars_fast.learning.rewards.references import choose_references
from tars_fast.learning.rewards.reward import completed
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.update import Learner
from tars_fast.models.architecture import Architecture
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.provenance import provenance
from tars_fast.support.timing import PhaseTimer
from tars_fast.train import update_policy
from tars_fast.types import Completion, Modality, Prompt, Question

TOLERANCE = 1e-4
"""Of gradients (norm of the difference over the norm) and rewards, in float32."""
_ROUNDING = 1.0
"""How far rounding may move our gradient, in parts of what it does to the contender that it moves furthest."""
_TIE = 1.03
"""Of micro-batches whose seconds differ by less, the one that needs less memory is chosen."""
COMPARED = ("ours", "released", "trl")
"""Contenders in the chart of `--scaling`."""


class DisagreementError(Exception):
    """Two contenders compute different things, so that their times must not be compared."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a step's model and rollout, from which another process can make both again."""

    architecture: Architecture | None
    """None: the bundled model with its own weights."""
    num_questions: int
    group_size: int = 8
    audio_tokens: int = 0
    prompt_tokens: int = 100
    """Of the written prompt; the spoken one has a third of them beside its audio."""
    max_new_tokens: int = 0
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    dtype: str = "float32"

    def config(self) -> RunConfig:
        """Lengths are fixed and weights stay as they are (learning rate 0), so that every repeat does the same work."""
        settings = {"questions_per_step": self.num_questions, "group_size": self.group_size, "lora_rank": self.lora_rank}
        settings |= {"gradient_checkpointing": self.gradient_checkpointing, "max_new_tokens": self.max_new_tokens or None}
        # Clipping would hide a wrong normaliser; made-up log-probabilities differ from the trainer's on purpose.
        given = TrainConfig(**settings, objective="tars", max_grad_norm=1e9, max_logprob_diff=1.0)
        # Nothing is written, and every contender sets its own micro-batch.
        return given.resolve(PRESETS["pocket"], output_dir=Path(), tokens_per_micro_batch=1)


POCKET = architecture_of(PRESETS["pocket"])
TINY = dataclasses.replace(POCKET, hidden_size=64, num_layers=3, intermediate_size=96, vocabulary_size=500)
QWEN2_AUDIO_7B = Workload(
    PRESETS["qwen2-audio-7b"].architecture,
    num_questions=8,
    lora_rank=8,
    gradient_checkpointing=True,
    dtype="bfloat16",
)
AUDIO_TOKENS_PER_SECOND = 25


def cases_of(shape: str) -> dict[str, Workload]:
    """The cases of a shape, the headline first."""
    if shape == "pocket":
        return {"pocket": Workload(None, PRESETS["pocket"].questions_per_step)}
    if shape == "tiny":
        tiny = Workload(TINY, 2, audio_tokens=20, prompt_tokens=30, max_new_tokens=12)
        return {"full": tiny, "lora": dataclasses.replace(tiny, lora_rank=4, gradient_checkpointing=True)}
    sizes = [(10, 512), (10, 256), (10, 1024), (30, 256), (30, 512), (30, 1024)]
    return {
        f"{seconds}s-{tokens}": dataclasses.replace(
            QWEN2_AUDIO_7B, audio_tokens=AUDIO_TOKENS_PER_SECOND * seconds, max_new_tokens=tokens
        )
        for seconds, tokens in sizes
    }


def scaling_of(shape: str) -> dict[str, dict[int, Workload]]:
    """For each size that is varied, the workload at each of its values."""
    if shape == "qwen2-audio-7b":
        base = dataclasses.replace(QWEN2_AUDIO_7B, num_questions=4, audio_tokens=250, max_new_tokens=512)
        questions, groups, layers = (1, 2, 4, 8, 16), (4, 8, 16, 32), (8, 16, 24, 32)
    else:
        architecture = TINY if shape == "tiny" else POCKET
        base = Workload(architecture, 8, audio_tokens=75, prompt_tokens=60, max_new_tokens=48)
        questions, groups, layers = (2, 4, 8, 16), (4, 8, 16, 32), (2, 4, 8, 16)
    if shape == "tiny":
        questions, groups, layers = (1, 2), (4, 8), (2, 4)
    deeper = {n: dataclasses.replace(base.architecture, num_layers=n) for n in layers}
    return {
        "tokens per step": {n: dataclasses.replace(base, num_questions=n) for n in questions},
        "group size": {n: dataclasses.replace(base, group_size=n) for n in groups},
        "layers": {n: dataclasses.replace(base, architecture=architecture) for n, architecture in deeper.items()},
    }


def choose_test_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(workload: Workload) -> SpeechModel:
    """Trainable; with random weights the audio tower stays the bundled model's small one, since it does not run."""
    device, dtype, preset = choose_test_device(), getattr(torch, workload.dtype), PRESETS["pocket"]
    if workload.architecture is None:
        model = load_model(preset, preset.source, device, dtype)
    else:
        prompts = load_prompt_format(preset, preset.source)
        family, config = prompts.family, copy.deepcopy(prompts.config)
        resize_text(config.text_config, workload.architecture)
        with device:
            module = family.transformers_class()._from_config(config, dtype=dtype, attn_implementation="sdpa")
        randomise(module)
        model = SpeechModel(module.requires_grad_(False).eval(), prompts)
    torch.manual_seed(0)
    make_trainable(
        model,
        lora_rank=workload.lora_rank,
        lora_alpha=32.0,
        freeze_audio=True,
        gradient_checkpointing=workload.gradient_checkpointing,
    )
    for name, parameter in model.module.named_parameters():
        # As after some steps: with B = 0 half of the adapter would have no gradient.
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0, 0.01)
    return model


def make_rollout(model: SpeechModel, workload: Workload) -> Rollout:
    if workload.architecture is not None:
        return make_up_rollout(model, workload)
    config = workload.config()
    engine = TransformersEngine(model, config.rollout_batch_size)
    questions = load_questions(TRAINING_DATA)[: workload.num_questions]
    batch = prepare_batch(model, questions)
    with ThreadPoolExecutor(2) as background:
        collector = RolloutCollector(model, engine, Rewards(config), config, background)
        return collector.collect(batch, 0, PhaseTimer(model.device))[0]


def make_up_rollout(model: SpeechModel, workload: Workload) -> Rollout:
    """Random tokens and answers; one completion in sixteen is cut off, the others are half as long as allowed to all of it."""
    draw = random.Random(0)
    noise = torch.Generator().manual_seed(0)
    audio_token = model.prompts.audio_token_id
    usable = [token for token in range(workload.architecture.vocabulary_size) if token != audio_token]
    width = workload.architecture.hidden_size
    prompts: list[Prompt] = []
    completions: list[Completion] = []
    for question in range(workload.num_questions):
        clip = 0.02 * torch.randn(workload.audio_tokens, width, generator=noise)
        around = draw.choices(usable, k=workload.prompt_tokens // 3)
        spoken = (*around[:8], *[audio_token] * workload.audio_tokens, *around[8:])
        pair = (
            Prompt(Modality.SPEECH, spoken, (clip.to(model.device, model.module.dtype),)),
            Prompt(Modality.TEXT, tuple(draw.choices(usable, k=workload.prompt_tokens))),
        )
        for prompt in pair:
            for _ in range(workload.group_size // 2):
                truncated = draw.random() < 1 / 16
                shortest = workload.max_new_tokens if truncated else workload.max_new_tokens // 2
                tokens = tuple(draw.choices(usable, k=draw.randint(shortest, workload.max_new_tokens)))
                prompts.append(prompt)
                completions.append(Completion(question, prompt.modality, tokens, (0.0,) * len(tokens), "", truncated))
    accuracy = torch.tensor([float(draw.random() < 0.5) for _ in completions])
    references = choose_references(completions, accuracy, draw)
    rollout = Rollout(
        questions=[Question(f"made up {number}", "") for number in range(workload.num_questions)],
        prompts=prompts,
        written=prompts[workload.group_size // 2 :: workload.group_size],
        spoken=[],
        completions=completions,
        completion_rewards={"accuracy": accuracy, "format": torch.ones(len(accuracy)), "unparsed": torch.zeros(len(accuracy))},
        references=references,
        late={"behaviour": completed(torch.tensor([0.0 if reference is None else draw.random() for reference in references]))},
        groups_N=group_indices([one.question for one in completions], [one.modality for one in completions]),
    )
    return with_logprobs(model, rollout, draw)


@torch.no_grad()
def with_logprobs(model: SpeechModel, rollout: Rollout, draw: random.Random) -> Rollout:
    """The policy's own log-probabilities, and noise that leaves the importance weights something to correct."""
    sampled: list[Completion] = []
    # Every token is wanted here, those of cut-off completions too.
    whole = [dataclasses.replace(completion, truncated=False) for completion in rollout.completions]
    for batch in split_rollout(model, dataclasses.replace(rollout, completions=whole), 4):
        states = run_layers(model, batch).last_hidden_state
        logprobs, _ = completion_logprobs(model, states, batch, 1.0, keep_logits=False, entropy=False)
        for row in logprobs.tolist():
            completion = rollout.completions[len(sampled)]
            noisy = tuple(value + draw.gauss(0, 0.1) for value in row[: len(completion.token_ids)])
            sampled.append(dataclasses.replace(completion, rollout_logprobs=noisy))
    return dataclasses.replace(rollout, completions=sampled)


def first_questions(rollout: Rollout, num_questions: int) -> Rollout:
    count = sum(completion.question < num_questions for completion in rollout.completions)
    return Rollout(
        questions=rollout.questions[:num_questions],
        prompts=rollout.prompts[:count],
        written=rollout.written[:num_questions],
        spoken=[],
        completions=rollout.completions[:count],
        completion_rewards={name: values_N[:count] for name, values_N in rollout.completion_rewards.items()},
        references=rollout.references[:count],
        late={"behaviour": completed(rollout.late["behaviour"].of(range(count)))},
        groups_N=rollout.groups_N[:count],
    )


def tokens_of(rollout: Rollout, num_questions: int) -> int:
    """`tokens_per_micro_batch` for so many questions in a micro-batch; 1 token for one question, whatever its length."""
    if num_questions == 1:
        return 1
    prompts = {id(prompt): len(prompt.token_ids) for prompt in rollout.prompts}
    tokens = sum(prompts.values()) + sum(len(completion.token_ids) for completion in rollout.completions)
    return num_questions * tokens // len({completion.question for completion in rollout.completions})


def our_step(inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """([N] rewards, [N] advantages); a micro-batch has about `size` completions, in whole questions."""
    num_questions = max(1, inputs.size // inputs.config.group_size)
    config = dataclasses.replace(inputs.config, tokens_per_micro_batch=tokens_of(inputs.rollout, num_questions))
    learner = Learner(inputs.model, inputs.optimizer, config)
    learner.timer = inputs.timer
    scored = learner.begin_rollout(inputs.rollout)
    update_policy(learner, scored)
    return scored.rewards_N, scored.advantages_N


@dataclass(frozen=True)
class Contender:
    step: Callable[..., tuple[Tensor | None, Tensor]]
    num_passes: int
    """Forward passes over the whole rollout."""


CONTENDERS = {
    "ours": Contender(our_step, 1),
    "released": Contender(released_step, 3),
    "trl": Contender(trl_step, 2),
    "trl_keep_logits": Contender(functools.partial(trl_step, keep_logits=True), 2),
    "trl_single_pass": Contender(trl_step, 1),
}


@dataclass
class Bench:
    """A workload, and the model, rollout, optimiser and settings that all contenders use."""

    workload: Workload
    model: SpeechModel
    rollout: Rollout
    advantages_N: Tensor | None = None
    """Of our step, for `trl_single_pass`, which computes none."""
    optimizer: torch.optim.Optimizer = field(init=False)
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.workload.config()
        self.optimizer = make_optimizer(self.model.trainable_parameters(), self.config.weight_decay, 0)

    def step(self, name: str, size: int, timer: StepTimer | None = None) -> tuple[Tensor | None, Tensor]:
        given = {}
        if name == "trl_single_pass":
            given["advantages_N"] = self.advantages_N[: len(self.rollout.completions)]
        timer = timer or StepTimer()
        with timer.phase("step"):
            inputs = StepInputs(self.model, self.optimizer, self.rollout, self.config, timer, size)
            result = CONTENDERS[name].step(inputs, **given)
        return result

    def gradient(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.model.trainable_parameters()]
        return torch.cat([gradient.float().flatten() for gradient in gradients])

    def to_float32(self) -> None:
        """Compute in float32 from here on, with the weights and embeddings as they were rounded."""
        self.model.module.float()
        prompts = {
            id(prompt): dataclasses.replace(prompt, audio_clips=tuple(clip.float() for clip in prompt.audio_clips))
            for prompt in self.rollout.prompts
        }
        self.rollout = dataclasses.replace(self.rollout, prompts=[prompts[id(prompt)] for prompt in self.rollout.prompts])

    def gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Each contender's gradient; keeps our advantages."""
        _, self.advantages_N = self.step("ours", self.config.group_size)
        found = {}
        for name in names:
            self.step(name, self.config.group_size)
            found[name] = self.gradient()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def check(self, names: Sequence[str]) -> tuple[dict[str, float], Tensor]:
        """(relative error of each contender's gradient against ours, our gradient); keeps our advantages.

        Raises:
            DisagreementError: gradients or rewards differ by more than rounding.
        """
        size = self.config.group_size
        rewards_N, self.advantages_N = self.step("ours", size)
        expected = self.gradient()
        errors: dict[str, float] = {}
        for name in names:
            rewards, _ = self.step(name, size)
            errors[name] = distance(self.gradient(), expected)
            if not errors[name] <= TOLERANCE:
                raise DisagreementError(f"the gradient of {name!r} differs from ours by {errors[name]:.2g} of its norm")
            difference = 0.0 if rewards is None else (rewards - rewards_N).abs().max().item()
            if not difference <= TOLERANCE:
                raise DisagreementError(f"a reward of {name!r} differs from ours by {difference:.2g}")
        self.optimizer.zero_grad(set_to_none=True)
        return errors, expected

    @contextmanager
    def counting(self, name: str, found: dict[str, float]) -> Iterator[None]:
        """Write into `found` the token positions that go through the decoder inside the block, and how many are padding."""
        forward, backward, calls = 0, 0, 0

        def record(_module, _args, kwargs) -> None:
            nonlocal forward, backward, calls
            positions = kwargs["inputs_embeds"].shape[:2].numel()
            forward += positions
            backward += positions * torch.is_grad_enabled()
            calls += 1

        hook = self.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        passes = CONTENDERS[name].num_passes
        # Ours has each prompt once, the others have it once for every completion.
        prompts = [*{id(one): one for one in self.rollout.prompts}.values()] if name == "ours" else self.rollout.prompts
        held = sum(len(one.token_ids) for one in (*prompts, *self.rollout.completions))
        padding = forward - passes * held
        found |= {
            "num_passes": passes,
            "num_forward_calls": calls,
            "forward_positions": forward,
            "backward_positions": backward,
            "padding_share": padding / forward,
        }


def distance(gradient: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((gradient - expected).norm() / expected.norm()).item()


def make_bench(workload: Workload) -> Bench:
    model = make_model(workload)
    return Bench(workload, model, make_rollout(model, workload))


@contextmanager
def peak_memory(found: dict[str, int]) -> Iterator[None]:
    """Write into `found["peak_bytes"]` how far memory rises inside the block."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return
    # What malloc kept of earlier work would else hide what the step takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # 5: the high-water mark falls to what is in use.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield
    found["peak_bytes"] = resident("VmHWM") - before


def resident(entry: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(entry + ":"))


def measure_in_process(name: str, size: int, saved: Path) -> int:
    """Peak bytes of one step on a CPU, in a new process, because a contender would reuse the heap of an earlier one."""
    command = [sys.executable, __file__, "--worker", name, "--worker-size", str(size), "--worker-file", str(saved)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the process of {name!r} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def run_worker(name: str, size: int, saved: Path) -> None:
    workload, rollout, advantages_N = torch.load(saved, weights_only=False)
    bench = Bench(workload, make_model(workload), rollout, advantages_N)
    # Libraries start and the optimiser makes its moments on a single question.
    bench.rollout = first_questions(rollout, 1)
    bench.step(name, workload.group_size)
    bench.rollout = rollout
    bench.optimizer.zero_grad(set_to_none=True)
    found: dict[str, int] = {}
    with peak_memory(found):
        bench.step(name, size)
    print(found["peak_bytes"])


def run_case(
    workload: Workload,
    names: Sequence[str],
    sizes: Sequence[int],
    repeats: int,
    *,
    memory: bool = True,
    at_all_sizes: bool = False,
) -> dict[str, object]:
    """Check, choose micro-batches, count, time in turns, measure memory.

    Args:
        at_all_sizes: measure memory at every micro-batch tried; on CUDA that is so anyway.
    """
    bench = make_bench(workload if workload.dtype == "float32" else dataclasses.replace(workload, num_questions=1))
    rounding = None if workload.dtype == "float32" else bench.gradients(names)
    if rounding is not None:
        bench.to_float32()
    errors, exact = bench.check(names)
    if rounding is not None:
        rounding = {name: distance(gradient, exact) for name, gradient in rounding.items()}
        if not rounding["ours"] <= _ROUNDING * max(rounding.values()):
            raise DisagreementError(f"{workload.dtype} moves our gradient further from float32's than any other: {rounding}")
        del bench
        bench = make_bench(workload)
        _, bench.advantages_N = bench.step("ours", bench.config.group_size)
    model = bench.model
    results = {name: choose_size(bench, name, sizes) | {"seconds": []} for name in names}
    timers = {name: StepTimer() for name in names}
    for _ in range(repeats):
        for name in names:
            bench.step(name, results[name]["completions_per_micro_batch"], timers[name])
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "rollout.pt"
        if memory and model.device.type == "cpu":
            torch.save((workload, bench.rollout, bench.advantages_N), saved)
        for name in names:
            result, seconds = results[name], timers[name].seconds
            size = result["completions_per_micro_batch"]
            result["seconds"] = [round(value, 5) for value in seconds.pop("step")]
            result["median_seconds"] = statistics.median(result["seconds"])
            result["phase_seconds"] = {phase: round(sum(times) / repeats, 5) for phase, times in seconds.items()}
            bench.optimizer.zero_grad(set_to_none=True)
            if memory and model.device.type == "cpu":
                for one in result["tried"]:
                    if one["completions"] == size or (at_all_sizes and name in COMPARED):
                        one["peak_bytes"] = measure_in_process(name, one["completions"], saved)
                result["peak_bytes"] = next(one["peak_bytes"] for one in result["tried"] if one["completions"] == size)
    completions = bench.rollout.completions
    return {
        "workload": dataclasses.asdict(workload),
        "num_completions": len(completions),
        "completion_tokens": sum(len(one.token_ids) for one in completions),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in {id(one): one for one in bench.rollout.prompts}.values()),
        "gradient_relative_error": errors,
        "rounding_of_gradient": rounding,
        "contenders": results,
    }


def choose_size(bench: Bench, name: str, sizes: Sequence[int]) -> dict[str, object]:
    """The smallest micro-batch as fast as the fastest of those that fit, each timed once, and what `counting` finds of it.

    `tried` has them all, on CUDA with their peak of memory.
    """
    tried: list[dict[str, float | None]] = []
    counts: dict[int, dict[str, float]] = {}
    num = len(bench.rollout.completions)
    usable = sorted({min(size, num) for size in sizes if name != "ours" or size >= bench.config.group_size})
    for size in usable or [bench.config.group_size]:
        timer, found, counted, whole = StepTimer(), {}, {}, bench.rollout
        try:
            if bench.model.device.type == "cuda":
                # Libraries start and kernels compile on a single question.
                bench.rollout = first_questions(whole, 1)
                bench.step(name, size)
                bench.rollout = whole
                bench.optimizer.zero_grad(set_to_none=True)
                with peak_memory(found), bench.counting(name, counted):
                    bench.step(name, size, timer)
            else:
                with bench.counting(name, counted):
                    bench.step(name, size, timer)
        except torch.OutOfMemoryError:
            bench.rollout = whole
            bench.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            tried.append({"completions": size, "seconds": None})
            continue
        counts[size] = counted
        tried.append({"completions": size, "seconds": round(timer.seconds["step"][0], 5), **found})
        print(f"{name}, {size} completions a micro-batch: {timer.seconds['step'][0]:.3f} s", file=sys.stderr, flush=True)
    fitting = [one for one in tried if one["seconds"] is not None]
    if not fitting:
        raise RuntimeError(f"{name!r} fits into memory with none of {[one['completions'] for one in tried]} completions")
    fastest = min(one["seconds"] for one in fitting)
    best = next(one for one in fitting if one["seconds"] <= _TIE * fastest)
    size = best["completions"]
    found = {"peak_bytes": best["peak_bytes"]} if "peak_bytes" in best else {}
    return {"completions_per_micro_batch": size, "tried": tried, **counts[size], **found}


def headline(cases: dict[str, dict]) -> dict[str, object]:
    """How much faster our step is than the others, in the first case."""
    name, case = next(iter(cases.items()))
    contenders = case["contenders"]
    ours = contenders["ours"]

    def speedup(other: str) -> float:
        return round(contenders[other]["median_seconds"] / ours["median_seconds"], 3)

    others = [other for other in contenders if other != "ours"]
    ratios: dict[str, object] = {f"speedup_vs_{other}": speedup(other) for other in others}
    if "peak_bytes" in ours:
        ratios |= {
            f"peak_memory_vs_{other}": round(ours["peak_bytes"] / contenders[other]["peak_bytes"], 3) for other in others
        }
        ratios = {name.replace("peak_memory", "peak_memory_each_at_its_fastest"): ratio for name, ratio in ratios.items()}
        if "trl" in others:
            size, ratios["peak_memory_vs_trl"] = at_our_size(contenders)
            ratios["peak_memory_completions_per_micro_batch"] = size
    return {"headline": name, **ratios}


def at_our_size(contenders: dict[str, dict]) -> tuple[int, float]:
    """(completions a micro-batch, our peak memory over TRL's), both at the size that we chose, or the largest that both ran."""
    ours, theirs = (
        {one["completions"]: one["peak_bytes"] for one in contenders[name]["tried"] if "peak_bytes" in one}
        for name in ("ours", "trl")
    )
    size = max(size for size in ours.keys() & theirs.keys() if size <= contenders["ours"]["completions_per_micro_batch"])
    return size, round(ours[size] / theirs[size], 3)


def run_scaling(shape: str, sizes: Sequence[int], repeats: int) -> dict[str, list[dict[str, object]]]:
    """For each size that is varied, its values with seconds, memory and positions of the contenders."""
    lines: dict[str, list[dict[str, object]]] = {}
    for varied, workloads in scaling_of(shape).items():
        for value, workload in workloads.items():
            case = run_case(workload, COMPARED, sizes, repeats)
            tokens = case["completion_tokens"] + case["prompt_tokens"]
            point: dict[str, object] = {"value": value, "tokens": tokens}
            for name, result in case["contenders"].items():
                kept = ("median_seconds", "peak_bytes", "forward_positions", "completions_per_micro_batch")
                point[name] = {key: result[key] for key in kept}
            print(f"{varied} {value}: " + ", ".join(f"{n} {point[n]['median_seconds']:.3f} s" for n in COMPARED), flush=True)
            lines.setdefault(varied, []).append(point)
    return lines


def draw_scaling(report: dict[str, object], path: Path) -> None:
    """Seconds and memory of a step against what is varied."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = report["scaling"]
    figure, axes = plt.subplots(2, len(lines), figsize=(3.8 * len(lines), 6), squeeze=False)
    for column, (varied, points) in enumerate(lines.items()):
        for row, (key, label, unit) in enumerate((("median_seconds", "seconds", 1), ("peak_bytes", "MiB above before", 2**20))):
            axis = axes[row, column]
            for name in COMPARED:
                places = [one["tokens" if varied == "tokens per step" else "value"] for one in points]
                axis.plot(places, [one[name][key] / unit for one in points], marker="o", label=name)
            axis.set(xlabel=varied, ylabel=label if column == 0 else None, ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{report['device']}: the training side of one step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(name: str, case: dict[str, object]) -> None:
    print(f"{name}: {case['num_completions']} completions, {case['completion_tokens']} tokens, gradients within "
          f"{max(case['gradient_relative_error'].values()):.1e}")  # fmt: skip
    print(f"  {'contender':16} {'batch':>5} {'passes':>6} {'forward':>9} {'backward':>9} {'padding':>7} {'s':>8} {'MiB':>8}")
    for contender, result in case["contenders"].items():
        memory = f"{result['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in result else ""
        print(
            f"  {contender:16} {result['completions_per_micro_batch']:>5} {result['num_passes']:>6} "
            f"{result['forward_positions']:>9} {result['backward_positions']:>9} {result['padding_share']:>7.1%} "
            f"{result['median_seconds']:>8.3f} {memory:>8}"
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    shapes = ("pocket", "qwen2-audio-7b", "tiny")
    parser.add_argument("--shape", choices=shapes, default="qwen2-audio-7b" if on_cuda else "pocket")
    parser.add_argument("--cases", nargs="+", help="of the shape's, by name; the first is the headline")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="besides ours")
    sizes = [4, 8, 16, 32] if on_cuda else [8, 16, 32]
    parser.add_argument("--micro-batches", type=int, nargs="+", default=sizes, help="completions; each takes the fastest")
    parser.add_argument("--json", type=Path, help="file to write; a chart of --scaling goes beside it as .png")
    parser.add_argument("--scaling", action="store_true", help="time and memory against questions, group size and layers")
    parser.add_argument("--no-memory", action="store_true", help="not for the cases: on a CPU it takes processes")
    for name, kind in (("--worker", str), ("--worker-size", int), ("--worker-file", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shape == "qwen2-audio-7b" and not on_cuda:
        parser.error("--shape qwen2-audio-7b: torch sees no CUDA GPU; use --shape tiny")
    if unknown := set(options.cases or ()) - set(cases_of(options.shape)):
        parser.error(f"--cases {' '.join(sorted(unknown))}: of this shape there are {' '.join(cases_of(options.shape))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.worker:
        run_worker(options.worker, options.worker_size, options.worker_file)
        return 0
    workloads = cases_of(options.shape)
    names = [name for name in CONTENDERS if name == "ours" or name in options.contenders]
    cases: dict[str, dict] = {}
    report = provenance() | {"shape": options.shape, "threads": torch.get_num_threads(), "repeats": options.repeats}
    try:
        for name in options.cases or workloads:
            cases[name] = run_case(
                workloads[name],
                names,
                options.micro_batches,
                options.repeats,
                memory=not options.no_memory,
                at_all_sizes=True,
            )
            show(name, cases[name])
        report |= {**headline(cases), "cases": cases}
        if options.scaling:
            report["scaling"] = run_scaling(options.shape, options.micro_batches, options.repeats)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{key} {value}" for key, value in headline(cases).items()))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if options.scaling:
            draw_scaling(report, options.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
