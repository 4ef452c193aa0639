"""Adapters as peft writes them: its own logits, or a refusal by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from checkpoints import make_qwen2_audio
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from tars_fast.models.adapters import beyond_plain_lora, has_adapter, merge_adapter
from tars_fast.models.families.qwen2_audio import FAMILY
from tars_fast.models.hub import adapter_config
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_model
from tars_fast.rollout.policy import choose_engine
from tars_fast.rollout.vllm_engine import adapter_refusal
from tars_fast.types import UserError

CPU = torch.device("cpu")
DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"
"""A pattern, which peft's layers of the audio tower do not fit."""
TOWER = "model.audio_tower.layers.0.fc1.lora_A.weight"

KINDS: dict[str, tuple[dict[str, object], str | None]] = {
    "plain": ({}, None),
    "rslora": ({"use_rslora": True}, None),
    "ranks": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}, None),
    "tower": ({"target_modules": ["q_proj", "v_proj", "fc1"]}, None),
    "dora": ({"use_dora": True}, "lora_magnitude_vector"),
    "dora by names": ({"use_dora": True, "target_modules": ["q_proj", "v_proj", "fc1"]}, "lora_magnitude_vector"),
    "bias": ({"bias": "all"}, "bias"),
    "bias of B": ({"lora_bias": True}, "lora_B.bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head", "multi_modal_projector"]}, "lm_head.weight"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "tokens": ({"trainable_token_indices": [5, 6]}, "embed_tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "other weights of its base (pissa)"),
}
"""Settings of peft's LoRA, and what of it vLLM does not take."""


def kinds(*fast: str) -> list[object]:
    """All kinds; those that are not `fast` in the slow tier."""
    return [pytest.param(kind, marks=() if kind in fast else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_qwen2_audio(folder)
    return folder


def plain(base: Path) -> Qwen2AudioForConditionalGeneration:
    return Qwen2AudioForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()


def write_adapter(base: Path, folder: Path, config: peft.PeftConfig) -> None:
    """Save an adapter that does something."""
    torch.manual_seed(0)
    model = peft.get_peft_model(plain(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    described = json.loads((folder / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(described))


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": DECODER} | settings)


def load(folder: Path) -> SpeechModel:
    return load_model(find_preset(str(folder)), str(folder), CPU, torch.float32)


@torch.no_grad()
def look(module: torch.nn.Module, prompts) -> list[torch.Tensor]:
    """Logits of a text, and embeddings of a recording."""
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    return [module(torch.tensor([[5, 6, 7, 8]])).logits, *FAMILY.encode_clips(module, [prompts.features(wave)])]


@pytest.mark.parametrize("kind", kinds("plain", "dora", "modules_to_save", "head", "tower"))
def test_every_kind_of_lora_computes_what_peft_computes(kind, base, tmp_path):
    settings, beyond = KINDS[kind]
    write_adapter(base, tmp_path, lora(**settings))
    ours = load(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path).eval().base_model.model
    results = look(ours.module, ours.prompts), look(theirs, ours.prompts)
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    # What samples and trains multiplies with the head by itself.
    states = ours.language_model(input_ids=torch.tensor([[5, 6, 7, 8]])).last_hidden_state
    torch.testing.assert_close(ours.head(states), results[1][0], rtol=1e-6, atol=1e-6)
    assert any(
        (own - before).abs().max() > 0.1 for own, before in zip(results[0], look(plain(base), ours.prompts), strict=True)
    )
    # vLLM takes what is plain, and the audio tower is none of its business.
    refusal = adapter_refusal(FAMILY, str(tmp_path))
    assert (refusal is None) == (beyond is None)
    assert beyond is None or (beyond in refusal and "--engine transformers" in refusal)


@pytest.mark.parametrize("kind", kinds("dora"))
def test_every_kind_of_lora_is_merged_as_it_computes(kind, base, tmp_path):
    """What `export` writes."""
    write_adapter(base, tmp_path, lora(**KINDS[kind][0]))
    ours = load(base)
    theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path).eval().base_model.model
    if kind == "bias of B":
        with pytest.raises(UserError, match=r"--model .*: the adapter cannot be loaded \(.*bias"):
            merge_adapter(ours.module, FAMILY, tmp_path)
        return
    merged = merge_adapter(ours.module, FAMILY, tmp_path)
    assert not has_adapter(merged)
    for own, expected in zip(look(merged, ours.prompts), look(theirs, ours.prompts), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_vllm_is_not_chosen_for_an_adapter_that_it_cannot_take(base, tmp_path, monkeypatch):
    write_adapter(base, tmp_path, lora(use_dora=True))
    monkeypatch.setattr("tars_fast.rollout.policy.vllm_refusal", lambda *_: None)
    gpu = torch.device("cuda")
    assert choose_engine("auto", FAMILY, gpu, torch.bfloat16, 4) == "vllm"
    assert choose_engine("auto", FAMILY, gpu, torch.bfloat16, 4, str(tmp_path)) == "transformers"
    with pytest.raises(UserError, match=r"--engine vllm: it cannot take an adapter with .*lora_magnitude_vector; merge it by"):
        choose_engine("vllm", FAMILY, gpu, torch.bfloat16, 4, str(tmp_path))
    assert beyond_plain_lora(FAMILY, str(base)) is None


@pytest.mark.parametrize("kind", kinds("modules_to_save"))
def test_no_weight_is_missing_or_left_over_in_silence(kind, base, tmp_path):
    write_adapter(base, tmp_path / "whole", lora(**KINDS[kind][0]))
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    # One of each kind of name; peft also writes the base's own head and embedding where they are adapted.
    own = [name for name in sorted(weights) if not name.endswith("base_layer.weight")]
    names = {name.rpartition("layers.")[2].partition(".")[2] or name: name for name in own}
    for number, name in enumerate({"removed": None, **names}):
        broken = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        kept = dict(weights)
        if name == "removed":
            kept["base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 4)
        else:
            del kept[names[name]]
        save_file(kept, broken / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            UserError, match=r"the adapter cannot be loaded \(the model (finds nothing|has no place) for 1 of its"
        ):
            load(broken)


def test_weights_of_parts_that_are_not_loaded_are_not_needed(base, tmp_path, monkeypatch):
    """The vision tower's, of an adapter that was trained on all of a model."""
    import dataclasses

    from tars_fast.models.adapters import _read_adapter

    write_adapter(base, tmp_path, lora(target_modules=["q_proj", "fc1"]))
    without = dataclasses.replace(FAMILY, unused_parts=("model.audio_tower",))
    assert any(name.startswith("model.audio_tower") for name in _read_adapter(FAMILY, tmp_path)[1])
    assert not any(name.startswith("model.audio_tower") for name in _read_adapter(without, tmp_path)[1])


OTHERS = {
    "ADALORA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "LOHA": peft.LoHaConfig(target_modules=["q_proj"]),
    "LOKR": peft.LoKrConfig(target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"]),
    "VERA": peft.VeraConfig(target_modules=["q_proj"]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm"]),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "LORA with alora_invocation_tokens": lora(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
    "LORA with layer_replication": lora(layer_replication=[(0, 2)]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(kind, base, tmp_path):
    config = OTHERS[kind]
    config.base_model_name_or_path = str(base)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"an adapter of the kind {kind}, only LORA is read") as refusal:
        load_prompt_format(find_preset(str(tmp_path)), str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "described",
    [
        "",
        "[]",
        "3",
        "null",
        "{}",
        '{"peft_type": 3}',
        '{"peft_type": "NEW"}',
        '{"peft_type": ["LORA"]}',
        '{"peft_type": "LORA", "r": "8"}',
        '{"peft_type": "LORA", "r": 0}',
        '{"peft_type": "LORA", "rank_pattern": 3}',
        '{"peft_type": "LORA", "rank_pattern": {"q_proj": null}}',
        '{"peft_type": "LORA", "target_modules": 3}',
        '{"peft_type": "LORA", "target_modules": [3]}',
        '{"peft_type": "LORA", "target_modules": "("}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": 3}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": "x"}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": null}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "x"}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "x"}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": "x"}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "base_model_name_or_path": 3}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "revision": 3}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_dropout": "x"}',
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": "x"}',
    ],
)
def test_a_damaged_configuration_is_one_line(described, base, tmp_path):
    try:
        values = json.loads(described)
        described = json.dumps({"base_model_name_or_path": str(base)} | values) if values else described
    except (ValueError, TypeError):
        pass
    (tmp_path / "adapter_config.json").write_text(described)
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as refusal:
        load(tmp_path)
    assert str(refusal.value).startswith("--model ")
    assert "\n" not in str(refusal.value)


def test_an_adapter_without_safetensors_runs_no_pickle(base, tmp_path):
    write_adapter(base, tmp_path, lora())
    (tmp_path / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "adapter_model.bin")
    with pytest.raises(
        UserError, match=r"--model .*: holds no adapter_model.safetensors; save it by peft's save_pretrained, no pickle is read"
    ):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert adapter_config(str(tmp_path)) is not None
