"""Chooses a rollout engine, and loads a policy: the model that the trainer updates, and the engine that samples from it.

Both use one copy of the weights. With the transformers engine, transformers loads them, and the engine runs the trainer's
module. With vLLM, vLLM loads them, and the trainer's parameters are views of vLLM's memory (`vllm_engine.py`).
"""

from __future__ import annotations

from typing import Literal

import torch

from tars_fast.models.adapters import load_adapter
from tars_fast.models.families.base import Family
from tars_fast.models.memory import Workload, plan_memory
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.rollout.vllm_engine import VllmEngine, adapter_refusal, vllm_refusal
from tars_fast.rollout.vllm_internals import VllmSettings
from tars_fast.support.text import size
from tars_fast.types import UserError


def choose_engine(
    name: Literal["auto", "vllm", "transformers"],
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    lora_rank: int,
    adapter: str | None = None,
) -> Literal["vllm", "transformers"]:
    """Resolve `--engine auto`: vLLM on CUDA where a supported version is installed and can serve the policy, or transformers.

    Args:
        lora_rank: 0 for full fine-tuning.
        adapter: the checkpoint that is evaluated, which may be an adapter.

    Raises:
        UserError: `--engine vllm` is given and cannot be used, with the remedy.
    """
    if name == "transformers":
        return name
    reason = vllm_refusal(family, device, dtype, lora_rank)
    if reason is None and adapter is not None:
        reason = adapter_refusal(family, adapter)
    if name == "vllm" and reason is not None:
        raise UserError(f"--engine vllm: {reason}")
    return "vllm" if reason is None and (name == "vllm" or device.type == "cuda") else "transformers"


def load_model_and_engine(
    prompts: PromptFormat,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    workload: Workload,
    *,
    cuda_graphs: bool = True,
) -> tuple[SpeechModel, RolloutEngine]:
    """Load the weights once, for trainer and engine; an adapter is put on top of its base.

    Args:
        source: the checkpoint, or an adapter.
        workload: which engine, and the settings that its KV cache is sized by.
        cuda_graphs: see `TrainConfig`.

    Returns:
        (the model that the trainer updates, the engine that samples from its weights).

    Raises:
        UserError: the checkpoint cannot be read, or the KV cache does not fit into the memory that is free.
    """
    if workload.engine == "transformers":
        model = SpeechModel(load_module(prompts, source, device, dtype), prompts)
        return model, TransformersEngine(model, workload.rollout_batch_size, own_modules=workload.rollout_ahead)
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
            lora_targets=workload.adapted_layers,
            cuda_graphs=cuda_graphs,
            tensor_parallel=workload.tensor_parallel,
        ),
    )
    load_adapter(engine.model.module, prompts.family, source)
    return engine.model, engine


def available_bytes(device: torch.device) -> int:
    """Free bytes of the GPU, or of the host for a run on the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
