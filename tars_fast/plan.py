"""What a training run needs of a GPU's memory, before there is one: `python -m tars_fast.plan`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

from tars_fast.config import TrainConfig
from tars_fast.models.architecture import check_parts
from tars_fast.models.memory import describe, plan_memory
from tars_fast.models.registry import architecture_of, family_of, find_preset
from tars_fast.rollout.engine import engine_refusal
from tars_fast.support.cli import check_numbers, run_command
from tars_fast.support.text import GB
from tars_fast.types import UserError

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PlanConfig:
    """Memory of a training run on one GPU: weights, KV cache, adapters, optimiser, activations and peak by phase."""

    model: str = "qwen2-audio-7b"
    """A preset, a checkpoint folder, or a name on the hub (owner/name, owner/name@revision)."""
    gpu_memory: float = 80.0
    """Memory of the GPU, in GB (1e9 bytes)."""
    gpus: int = 1
    """How many such GPUs, each with a process of its own and whole weights."""
    tensor_parallel: int = 1
    """How many GPUs have a part of the weights each; see train."""
    objective: str = "opd"
    """What the loss consists of: opd, tars, grpo, cord, joined by +."""
    teacher: Literal["frozen", "moving", "ema"] = "frozen"
    """Whose distributions opd and cord take as targets; in full fine-tuning frozen and ema are copies of what is trained."""
    text_anchor: Literal["auto", "none", "kl", "rollouts"] = "auto"
    """What holds written answers where opd distils; kl looks at the model before training, as a frozen teacher does."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples rollouts. auto: vLLM where it can serve the policy."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights."""
    longest_prompt: int | None = None
    """Tokens of the longest prompt. None: the longest recording the model takes, inside the paper's instructions."""
    kv_cache_gb: float | None = None
    """KV cache in GB. None: what the completions in flight need, at most what is free."""
    lora_rank: int | None = None
    """0 for full fine-tuning. None here and below: the preset's."""
    lora_targets: str | None = None
    """Linear layers that get LoRA: attention, all-linear, or names with commas between. None: see train."""
    freeze_audio: bool = True
    """Keep audio tower and projector as they are."""
    group_size: int = 8
    """Completions of a question."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens."""
    rollout_batch_size: int | None = None
    """Completions in flight."""
    tokens_per_micro_batch: int | None = None
    """Tokens in one forward and backward pass. None: what free memory holds, at most 16,384."""
    rollout_ahead: Literal[0, 1] = 0
    """1: sampling and training at the same time."""
    gradient_checkpointing: bool | None = None
    """Compute each layer again for the backward pass."""
    behaviour_model: str = "auto"
    """Text embedder of R_beh."""

    def __post_init__(self) -> None:
        positive = ("gpu_memory", "gpus", "tensor_parallel", "longest_prompt", "kv_cache_gb", "tokens_per_micro_batch")
        check_numbers(self, positive=positive)
        if self.gpus > 1 and self.tensor_parallel > 1:
            raise UserError(
                f"--gpus {self.gpus}: not beside --tensor-parallel {self.tensor_parallel}, with which all GPUs share one copy "
                "of the weights; leave one of them out"
            )


_SHARED = ["lora_rank", "lora_targets", "group_size", "max_new_tokens", "rollout_batch_size", "tokens_per_micro_batch"]
_SHARED += ("rollout_ahead", "gradient_checkpointing", "behaviour_model", "model", "dtype", "engine", "kv_cache_gb")
_SHARED += ("objective", "teacher", "text_anchor", "tensor_parallel", "freeze_audio")


def plan(config: PlanConfig) -> int:
    """Print the plan; 0 where the run fits, 1 where it does not."""
    training = TrainConfig(**{name: getattr(config, name) for name in _SHARED})
    preset = training.as_preset(find_preset(config.model))
    refusal = engine_refusal(family_of(preset), preset.lora_rank, float32=config.dtype == "float32", on_cuda=True)
    if config.engine == "vllm" and refusal is not None:
        raise UserError(f"--engine vllm: {refusal}")
    engine = "vllm" if config.engine != "transformers" and refusal is None else "transformers"
    architecture = architecture_of(preset)
    check_parts(config.tensor_parallel, architecture, engine)
    workload = training.workload(preset, architecture, engine, _DTYPE_BYTES[config.dtype], longest_prompt=config.longest_prompt)
    workload = dataclasses.replace(workload, num_processes=config.gpus)
    result = plan_memory(workload, int(config.gpu_memory * GB))
    num_gpus = max(config.gpus, config.tensor_parallel)
    where = "a GPU" if num_gpus == 1 else f"each of {num_gpus} GPUs"
    print(f"{config.model} on {where} of {config.gpu_memory:g} GB")
    print(describe(result))
    return 0 if result.fits else 1


def main() -> int:
    return run_command(plan, PlanConfig, "python -m tars_fast.plan")


if __name__ == "__main__":
    sys.exit(main())
