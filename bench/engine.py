"""One copy of the weights against two: memory by phase, seconds, parity. `python bench/engine.py --shape qwen2-audio-7b`.

`--shape qwen3-omni-30b` has one copy only: two do not fit on a card. `--layers 2` cuts the depth, for a machine without one.

A LoRA step of eight completions a question (four spoken, four written) at a model's real shape with random weights, so that
nothing has to be downloaded; of one question, or `--questions 8`. Each arm runs in a process of its own, whose memory is
watched from start to end:

- `shared`: vLLM and trainer on one copy, on CUDA with its graphs;
- `shared_eager`: the same without graphs;
- `shared_replay`: of a mixture of experts, the same with the engine's choice of experts replayed;
- `shared_no_adapter`: rollouts of the shared engine without LoRA, to be compared with
- `two_copies`: plain vLLM, whose Qwen2-Audio knows no LoRA, beside a transformers model of its own; the usual arrangement.

Writes one JSON with medians; `plan` beside a measured peak is what `tars_fast.plan` says of the same workload.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tars_fast  # noqa: F401  (before torch: threads.py)
from tars_fast.models.registry import architecture_of

# isort: split
import numpy as np
import torch

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.batch import Rollout
from tars_fast.learning.optimizer import make_optimizer
from tars_fast.learning.rewards.reward import completed
from tars_fast.learning.update import Learner
from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen2_audio, qwen3_omni
from tars_fast.models.memory import plan_memory
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, make_trainable
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.vllm_engine import VllmEngine, as_request, vllm_refusal
from tars_fast.rollout.vllm_internals import VllmSettings
from tars_fast.support.provenance import provenance
from tars_fast.support.text import GB
from tars_fast.train import update_policy
from tars_fast.types import Modality, Prompt, Question


@dataclass(frozen=True)
class SharedArm:
    """How vLLM and trainer run on one copy of the weights."""

    cuda_graphs: bool = True
    lora_rank: int = 8
    """0: no adapter, and no training."""
    replays: bool = False
    """The trainer sends tokens through the experts that vLLM chose."""


SHARED_ARMS = {
    "shared": SharedArm(),
    "shared_eager": SharedArm(cuda_graphs=False),
    "shared_no_adapter": SharedArm(lora_rank=0),
    "shared_replay": SharedArm(replays=True),
}
ARMS = ("shared", "shared_eager", "shared_no_adapter", "two_copies")
ARMS_OF_EXPERTS = ("shared", "shared_replay", "shared_eager")
"""Of a mixture of experts, two copies of which fit on no card."""
QUESTION = Question(id="q", text="What is two plus three?", answer="five", choices=("four", "five"))


@dataclass(frozen=True)
class Shape:
    """A workload at one model's shape."""

    architecture: Architecture
    audio_seconds: float
    max_new_tokens: int
    max_tokens: int
    num_questions: int = 1


SHAPES = {
    "pocket": Shape(architecture_of(PRESETS["pocket"]), audio_seconds=3.0, max_new_tokens=32, max_tokens=256),
    "qwen2-audio-7b": Shape(PRESETS["qwen2-audio-7b"].architecture, audio_seconds=10.0, max_new_tokens=512, max_tokens=1024),
    "qwen3-omni-30b": Shape(PRESETS["qwen3-omni-30b"].architecture, audio_seconds=10.0, max_new_tokens=512, max_tokens=1024),
}


def choose_shape(options: argparse.Namespace) -> Shape:
    """The shape of this name, with fewer layers or new tokens where they are given."""
    shape = SHAPES[options.shape]
    architecture = dataclasses.replace(shape.architecture, num_layers=options.layers or shape.architecture.num_layers)
    new_tokens = options.max_new_tokens or shape.max_new_tokens
    return dataclasses.replace(shape, architecture=architecture, max_new_tokens=new_tokens, num_questions=options.questions)


@dataclass
class MemoryMeter:
    """Device memory in use, sampled by a thread: it sees what PyTorch's own counters do not, such as vLLM's pools.

    On a CPU it is the process's anonymous memory.
    """

    peaks: dict[str, int] = field(default_factory=dict)
    phase: str = "elsewhere"

    def start(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Before the process ends: Python kills a thread that is still in CUDA's library, which ends the process with it."""
        self._stopped.set()
        self._thread.join()

    def now(self) -> int:
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return total - free
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            phase, used = self.phase, self.now()
            self.peaks[phase] = max(self.peaks.get(phase, 0), used)

    @contextmanager
    def watching(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now())
        self.phase = before


@contextmanager
def timed(seconds: dict[str, list[float]], name: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.setdefault(name, []).append(time.perf_counter() - started)


def resize_text(text_config, sizes: Architecture) -> None:
    """Give the configuration of a Qwen2 decoder the shape of another, in place."""
    text = {"hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size}
    text |= {"num_hidden_layers": sizes.num_layers, "num_attention_heads": sizes.num_heads}
    text |= {"num_key_value_heads": sizes.num_key_value_heads, "vocab_size": sizes.vocabulary_size}
    text |= {"max_position_embeddings": 8192, "layer_types": ["full_attention"] * sizes.num_layers}
    for name, value in text.items():
        setattr(text_config, name, value)


def mixture_config(sizes: Architecture, audio_token_id: int) -> Any:
    """The configuration of a Qwen3-Omni of this shape; what does not change a shape is as published."""
    from transformers import Qwen3OmniMoeConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"hidden_size": sizes.hidden_size, "num_hidden_layers": sizes.num_layers, "vocab_size": sizes.vocabulary_size}
    text |= {"num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_key_value_heads}
    text |= {"head_dim": sizes.head_size, "num_experts": sizes.num_experts, "num_experts_per_tok": sizes.experts_per_token}
    text |= {"moe_intermediate_size": sizes.moe_intermediate_size, "intermediate_size": sizes.intermediate_size}
    text |= {"max_position_embeddings": sizes.max_tokens, "rope_parameters": rope}
    thinker = {"text_config": text, "audio_config": {"output_dim": sizes.hidden_size}, "audio_token_id": audio_token_id}
    thinker["vision_config"] = {"out_hidden_size": sizes.hidden_size}
    return Qwen3OmniMoeConfig(thinker_config=thinker, architectures=["Qwen3OmniMoeForConditionalGeneration"])


def write_checkpoint(folder: Path, sizes: Architecture) -> None:
    """Write configuration and processor of a shape, with the bundled model's tokenizer, without weights."""
    from transformers import AutoConfig, AutoProcessor, WhisperFeatureExtractor

    pocket = PRESETS["pocket"].source
    config, processor = AutoConfig.from_pretrained(pocket), AutoProcessor.from_pretrained(pocket)
    if sizes.num_experts:
        processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
        processor.save_pretrained(folder)
        # The bundled tokenizer calls its audio token as Qwen2-Audio does.
        for path in (path for path in folder.iterdir() if path.suffix in (".json", ".jinja")):
            path.write_text(path.read_text("utf-8").replace("<|AUDIO|>", qwen3_omni.FAMILY.audio_token), encoding="utf-8")
        mixture_config(sizes, config.audio_token_id).save_pretrained(folder)
        return
    if sizes != SHAPES["pocket"].architecture:
        resize_text(config.text_config, sizes)
        audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
        audio |= {"num_mel_bins": 128, "max_source_positions": 1500}
        for name, value in audio.items():
            setattr(config.audio_config, name, value)
        processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_prompts(model: SpeechModel, audio_seconds: float, num_questions: int = 1) -> list[Prompt]:
    """Prompts of each question, spoken (as noise, which takes as long as speech) and written."""
    random = np.random.default_rng(0)
    waves = [0.1 * random.standard_normal(int(16000 * audio_seconds)) for _ in range(num_questions)]
    with torch.no_grad():
        clips = model.encode_clips([model.prompts.features(wave.astype(np.float32)) for wave in waves])
    written = Prompt(Modality.TEXT, model.prompts.token_ids(QUESTION, Modality.TEXT))
    spoken = [
        Prompt(Modality.SPEECH, model.prompts.token_ids(QUESTION, Modality.SPEECH, [[len(clip)]]), (clip,)) for clip in clips
    ]
    return [prompt for one in spoken for prompt in (one, written)]


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Give the module random weights of a usual scale; with vLLM's own all tokens are equally likely."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


def run_shared(
    arm: SharedArm, shape: Shape, source: str, device: torch.device, dtype: torch.dtype, num_steps: int
) -> dict[str, object]:
    """Measure rollouts and, with an adapter, training steps."""
    lora_rank = arm.lora_rank
    prompts = load_prompt_format(PRESETS["pocket"], source)
    given = TrainConfig(
        objective="tars", lora_rank=8, max_new_tokens=shape.max_new_tokens, tokens_per_micro_batch=1024 * shape.num_questions,
        rollout_batch_size=8 * shape.num_questions, gradient_checkpointing=True, questions_per_step=shape.num_questions,
        max_logprob_diff=10.0,
    )  # fmt: skip
    preset = given.as_preset(PRESETS["pocket"])
    config = given.resolve(preset, output_dir=Path(source), tokens_per_micro_batch=given.tokens_per_micro_batch)
    longest = shape.max_tokens - shape.max_new_tokens
    total = torch.cuda.mem_get_info()[1] if device.type == "cuda" else 16 * GB
    on_gpu = device.type == "cuda"
    plan = plan_memory(given.workload(preset, shape.architecture, "vllm", dtype.itemsize, longest, on_gpu=on_gpu), total)
    meter, seconds = MemoryMeter(), {}
    meter.start()
    with meter.watching("loading"), timed(seconds, "start"):
        settings = VllmSettings(
            8 * shape.num_questions, shape.max_tokens, plan.kv_cache, lora_rank, cuda_graphs=arm.cuda_graphs, dummy_weights=True
        )
        engine = VllmEngine(prompts, source, device, dtype, settings)
    model = engine.model
    if model.routing is not None:
        model.routing.set_replay(replays=arm.replays)
    randomise(model.module)
    if lora_rank:
        make_trainable(model, lora_rank=lora_rank, lora_alpha=32.0, freeze_audio=True, gradient_checkpointing=True)
        optimizer = make_optimizer(model.trainable_parameters(), 0.0, 0)
    tokens_per_second: list[float] = []
    agreement: list[dict[str, float]] = []
    for step in range(num_steps):
        with meter.watching("encode"), timed(seconds, "encode"):
            distinct = make_prompts(model, shape.audio_seconds, shape.num_questions)
        questions = [number // 2 for number in range(len(distinct))]
        with meter.watching("rollout"), timed(seconds, "rollout"):
            completions = engine.generate(distinct, questions, Sampling(4, shape.max_new_tokens, 1.0, seed=step))
        tokens_per_second.append(sum(len(one.token_ids) for one in completions) / seconds["rollout"][-1])
        with timed(seconds, "release_kv"):
            engine.release_memory()
        if lora_rank:
            with meter.watching("training"), timed(seconds, "training"):
                agreement.append(train_on(model, optimizer, distinct, completions, config))
            with timed(seconds, "lora_hand_over"):
                engine._write_adapter()
        with timed(seconds, "restore_kv"):
            engine._internals.restore_kv_cache()
        with timed(seconds, "assert_shared"):
            engine.assert_shared()
    result = measured(meter, seconds, tokens_per_second) | {
        "plan_gb": {phase: round(peak / GB, 3) for phase, peak in plan.peaks.items()},
        "kv_cache_gb": round(plan.kv_cache / GB, 3),
        "cuda_graphs": engine._internals._keeps_addresses,
    }
    engine.close()
    if lora_rank:
        result["logprob_diff_mean"] = max(metrics["logprob_diff_mean"] for metrics in agreement)
        result["logprob_diff_max"] = max(metrics["logprob_diff_max"] for metrics in agreement)
        result["other_experts"] = max(metrics.get("other_experts", 0.0) for metrics in agreement)
        result["entropy_nats"] = statistics.median(metrics["entropy/speech"] for metrics in agreement)
    return result


def measured(meter: MemoryMeter, seconds: dict[str, list[float]], tokens_per_second: list[float]) -> dict[str, object]:
    """Peaks and medians; medians leave out the first of several steps, which captures graphs, compiles and allocates."""
    meter.stop()
    return {
        "peak_gb": {phase: round(peak / GB, 3) for phase, peak in meter.peaks.items()},
        "median_seconds": {name: round(statistics.median(times[1:] or times), 5) for name, times in seconds.items()},
        "median_tokens_per_second": round(statistics.median(tokens_per_second[1:] or tokens_per_second), 1),
    }


def train_on(model: SpeechModel, optimizer, distinct, completions, config: RunConfig) -> dict[str, float]:
    """Update once on a rollout whose completions are made to count: random weights never stop, so all are cut off."""
    num_questions = len(distinct) // 2
    rollout = Rollout(
        questions=[Question(f"made up {number}", "") for number in range(num_questions)],
        prompts=[prompt for prompt in distinct for _ in range(4)],
        written=[prompt for prompt in distinct if prompt.modality is Modality.TEXT],
        spoken=[],
        completions=[dataclasses.replace(one, truncated=False) for one in completions],
        # Random weights answer nothing; rewards that differ give the update something to do.
        completion_rewards={
            "accuracy": torch.tensor([0.0, 1.0]).repeat(4 * num_questions),
            "format": torch.zeros(8 * num_questions),
            "unparsed": torch.zeros(8 * num_questions),
        },
        references=[
            8 * question + 5 if spoken else None for question in range(num_questions) for spoken in (True,) * 4 + (False,) * 4
        ],
        late={"behaviour": completed(torch.linspace(0, 1, 8).repeat(num_questions))},
        groups_N=group_indices([one.question for one in completions], [one.modality for one in completions]),
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    learner = Learner(model, optimizer, config)
    metrics = update_policy(learner, learner.begin_rollout(rollout))
    optimizer.zero_grad(set_to_none=True)
    return metrics


def run_two_copies(shape: Shape, source: str, device: torch.device, dtype: torch.dtype, num_steps: int) -> dict:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from transformers import Qwen2AudioForConditionalGeneration
    from vllm import LLM, SamplingParams

    prompts: PromptFormat = load_prompt_format(PRESETS["pocket"], source)
    meter, seconds, tokens_per_second = MemoryMeter(), {}, []
    meter.start()
    with meter.watching("loading"), timed(seconds, "start"):
        kv = shape.architecture.kv_bytes_per_token(dtype.itemsize) * 8 * shape.num_questions * shape.max_tokens
        llm = LLM(
            model=source, dtype=str(dtype).removeprefix("torch."), load_format="dummy", max_model_len=shape.max_tokens,
            max_num_seqs=8 * shape.num_questions, kv_cache_memory_bytes=kv, gpu_memory_utilization=0.01,
            limit_mm_per_prompt={"audio": 1}, skip_mm_profiling=True, enable_mm_embeds=True,
            generation_config="vllm", disable_log_stats=True, logprobs_mode="processed_logprobs", block_size=32,
            enforce_eager=device.type == "cpu",
        )  # fmt: skip
        with device:
            module = Qwen2AudioForConditionalGeneration._from_config(prompts.config, dtype=dtype, attn_implementation="sdpa")
    model = SpeechModel(module.eval(), prompts)
    distinct = make_prompts(model, shape.audio_seconds, shape.num_questions)
    requests = [as_request(number, prompt, prompts.audio_token_id) for number, prompt in enumerate(distinct)]
    for step in range(num_steps):
        params = SamplingParams(
            n=4, temperature=1.0, max_tokens=shape.max_new_tokens, logprobs=0, detokenize=False,
            seed=None if device.type == "cpu" else step, ignore_eos=True,
        )  # fmt: skip
        llm.reset_prefix_cache()
        with meter.watching("rollout"), timed(seconds, "rollout"), torch.compiler.set_stance("force_eager"):
            outputs = llm.generate(requests, params, use_tqdm=False)
        tokens_per_second.append(
            sum(len(one.token_ids) for output in outputs for one in output.outputs) / seconds["rollout"][-1]
        )
    return measured(meter, seconds, tokens_per_second) | {"kv_cache_gb": round(kv / GB, 3)}


def run_arm(arm: str, shape: Shape, source: str, num_steps: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A mixture of experts in the dtype in which rounding decides between experts.
    dtype = torch.bfloat16 if device.type == "cuda" or shape.architecture.num_experts else torch.float32
    if arm == "two_copies":
        return run_two_copies(shape, source, device, dtype, num_steps)
    return run_shared(SHARED_ARMS[arm], shape, source, device, dtype, num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pocket")
    parser.add_argument("--num-steps", type=int, default=4, help="steps of each arm; the first of several is not counted")
    parser.add_argument("--output", type=Path, help="JSON file, written after each arm")
    parser.add_argument("--questions", type=int, default=1, help="of a step")
    parser.add_argument("--arms", help="with commas between them; all that the shape has")
    parser.add_argument("--arm", choices=(*SHARED_ARMS, "two_copies"), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help="of the decoder; the shape's")
    parser.add_argument("--max-new-tokens", type=int, help="the shape's")
    options = parser.parse_args()
    shape = choose_shape(options)
    if options.arm:
        print(json.dumps(run_arm(options.arm, shape, options.source, options.num_steps)), flush=True)
        return
    reason = vllm_refusal(
        qwen2_audio.FAMILY, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16, lora_rank=8
    )
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), shape.architecture)
        arms = ARMS_OF_EXPERTS if shape.architecture.num_experts else ARMS
        for arm in options.arms.split(",") if options.arms else arms:
            if arm == "shared_eager" and not torch.cuda.is_available():
                # Without graphs `shared` is eager already.
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--source", folder]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (run.stdout.strip().splitlines() or [""])[-1]
            if run.returncode:
                print(run.stderr[-4000:], file=sys.stderr)
            if last.startswith("{"):
                # Complete, even where a library's threads end the process badly afterwards.
                results[arm] = json.loads(last)
            else:
                # An arm that does not fit, or that the installed vLLM refuses, must not cost the others.
                results[arm] = {"failed": run.stderr.strip().splitlines()[-1]}
            print(f"{arm}: {json.dumps(results[arm])}", flush=True)
            if options.output is not None:
                sizes = {"shape": options.shape, "layers": shape.architecture.num_layers, "questions": shape.num_questions}
                sizes["new_tokens"] = shape.max_new_tokens
                report = provenance() | {"command": shlex.join(["python", *sys.argv])} | sizes | {"arms": results}
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    main()
