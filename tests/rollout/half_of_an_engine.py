"""One of two processes whose vLLM and trainer hold half of a model's weights each, held to the whole model.

`torchrun half_of_an_engine.py CHECKPOINT`, with the folders of tests and of tests of models on PYTHONPATH.
"""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import torch.distributed as dist
from half_of_the_weights import CPU, as_if_answered, compare, difference, same_adapters, settings, trained
from steps import rollout_of
from tars_kernels import LayerPooler, linear_logprob

from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.models.weights import SharingError
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.vllm_engine import VllmEngine
from tars_fast.rollout.vllm_internals import VllmSettings
from tars_fast.types import Modality


def compare_policies(engine: VllmEngine, whole: SpeechModel, questions) -> dict[str, float]:
    """What vLLM's halves sampled is as likely to the trainer's halves, and to the whole model, as they said it was.

    Returns:
        the largest differences.
    """
    differences = {"logprobs": 0.0, "pooled": 0.0, "engine_logprobs": 0.0}
    half = engine.model
    prompts = [prompt for modality in Modality for prompt in whole.encode_prompts(questions, modality)]
    for temperature in (0.0, 1.0):
        sampling = Sampling(num_completions=1, max_new_tokens=8, temperature=temperature, seed=3)
        completions = engine.generate(prompts, list(range(len(prompts))), sampling)
        rollout = torch.tensor([value for one in completions for value in one.rollout_logprobs])
        found = []
        for model in (whole, half):
            packed = model.pack(prompts, completions)
            pooler = LayerPooler(model.language_model.layers, model.language_model.norm)
            with pooler.pooling(packed.cu_seqlens, positions=packed.positions):
                hidden_TD = model.forward(packed)
            logprobs = linear_logprob(hidden_TD, model.head, packed.targets, bias=model.head_bias, group=model.head_group)
            found.append((logprobs, pooler.pooled))
        (logprobs, pooled), (own_logprobs, own_pooled) = found
        pairs = ((own_logprobs, logprobs), (own_pooled, pooled), (own_logprobs, rollout))
        for name, (own, expected) in zip(differences, pairs, strict=True):
            differences[name] = max(differences[name], difference(own, expected))
    return differences


def assert_sharing_is_checked(engine: VllmEngine) -> None:
    engine.assert_shared()
    layer = engine.model.language_model.layers[0].mlp.down_proj
    layer = getattr(layer, "base_layer", layer)
    shared = layer.weight.data
    layer.weight.data = shared.clone()
    with pytest.raises(SharingError, match="down_proj"):
        engine.assert_shared()
    layer.weight.data = shared


def main(source: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = load_prompt_format(PRESETS["pocket"], source)
    config, questions = settings(), load_questions(TRAINING_DATA)[:2]
    given = VllmSettings(
        max_sequences=16, max_tokens=2048, kv_cache_bytes=2**24, lora_rank=4, cuda_graphs=False, tensor_parallel=2
    )
    engine = VllmEngine(prompts, source, CPU, torch.float32, given)
    half = engine.model
    weights = sum(parameter.numel() for parameter in half.language_model.parameters())
    found: dict[str, dict[str, float]] = {}
    for lora_rank in (0, 4):
        whole = SpeechModel(load_module(prompts, source, CPU, torch.float32), prompts)
        assert weights < 0.6 * sum(parameter.numel() for parameter in whole.language_model.parameters())
        half.module.requires_grad_(False)
        with torch.no_grad():
            for name, parameter in half.module.named_parameters():
                parameter.copy_(half.parallel.part(name, whole.module.get_parameter(name)))
        for model in (half, whole):
            trained(model, lora_rank)
        if lora_rank:
            same_adapters(whole, half)
        assert_sharing_is_checked(engine)
        kind = "lora" if lora_rank else "full"
        with torch.no_grad():
            found[f"{kind}, sampled before an update"] = compare_policies(engine, whole, questions)
        rollout = as_if_answered(rollout_of(half, questions, config, engine=engine))
        found[f"{kind}, the update"] = compare(whole, half, copy.deepcopy(rollout), config)
        engine.assert_shared()
        with torch.no_grad():
            found[f"{kind}, sampled after it"] = compare_policies(engine, whole, questions)
    engine.close()
    print("equal", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
