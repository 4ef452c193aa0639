"""The policy: a speech LLM and the rollout engine that samples from those very weights."""

from __future__ import annotations

from typing import Literal

import torch

from tars_fast.models.adapters import load_adapter
from tars_fast.models.families.base import Family
from tars_fast.models.memory import Workload, plan_memory, size
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.models.weights import SharingError, assert_shared
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.rollout.vllm_engine import VllmEngine, vllm_refusal
from tars_fast.rollout.vllm_internals import VllmSettings
from tars_fast.types import UserError

__all__ = ["SharingError", "assert_shared", "choose_engine", "load_policy"]


def choose_engine(
    name: Literal["auto", "vllm", "transformers"], family: Family, device: torch.device, dtype: torch.dtype, lora_rank: int
) -> Literal["vllm", "transformers"]:
    """Resolve `auto`: on CUDA vLLM where a supported version of it is installed and can serve the policy, else transformers.

    Raises:
        UserError: vLLM is asked for and cannot be used; says what to install.
    """
    if name == "transformers":
        return name
    reason = vllm_refusal(family, device, dtype, lora_rank)
    if name == "vllm" and reason is not None:
        raise UserError(f"--engine vllm: {reason}")
    return "vllm" if reason is None and (name == "vllm" or device.type == "cuda") else "transformers"


def load_policy(
    prompts: PromptFormat,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    workload: Workload,
    *,
    cuda_graphs: bool = True,
) -> tuple[SpeechModel, RolloutEngine]:
    """Load the weights once, for trainer and engine alike; an adapter goes on top of its base.

    Args:
        workload: names the engine, and what its memory is sized by.
        cuda_graphs: see `TrainConfig`.

    Raises:
        UserError: the checkpoint cannot be read, or the engine does not fit beside it.
    """
    if workload.engine == "transformers":
        model = SpeechModel(load_module(prompts, source, device, dtype), prompts)
        return model, TransformersEngine(model, workload.rollout_batch_size, apart=workload.rollout_ahead)
    plan = plan_memory(workload, available_bytes(device))
    if plan.kv_cache < workload.sequence_bytes:
        given = "free for it here" if workload.given_kv_cache is None else "given by --kv-cache-gb"
        raise UserError(
            f"--engine vllm: {size(plan.kv_cache)} of KV cache are {given}, a single completion of "
            f"{workload.longest_prompt + workload.max_new_tokens} tokens needs {size(workload.sequence_bytes)}; "
            "lower --max-new-tokens or raise --kv-cache-gb"
        )
    engine = VllmEngine(
        prompts,
        source,
        device,
        dtype,
        VllmSettings(
            max_sequences=workload.rollout_batch_size,
            max_tokens=workload.longest_prompt + workload.max_new_tokens,
            kv_cache_bytes=plan.kv_cache,
            lora_rank=workload.lora_rank,
            cuda_graphs=cuda_graphs,
        ),
    )
    load_adapter(engine.model.module, prompts.family, source)
    return engine.model, engine


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or what the host can give to a run on the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
