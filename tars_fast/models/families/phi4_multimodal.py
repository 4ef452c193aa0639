"""Phi-4-multimodal: a conformer as audio tower, and a LoRA adapter for speech that is part of the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.architecture import Architecture
from tars_fast.models.families.base import Family, Features
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset


def _encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    model: Any = module.model
    audio = model.embed_tokens_extend.audio_embed
    embedded = []
    # One clip at a time, because the tower's convolutions would see the padding of a batch.
    for clip in clips:
        places = torch.full((1, clip.num_tokens), module.config.audio_config.audio_token_id, device=module.device)
        holes = torch.zeros(1, clip.num_tokens, module.config.hidden_size, device=module.device, dtype=module.dtype)
        embedded.append(audio(places, holes, clip.values[None].to(module.device), audio_embed_sizes=[clip.num_tokens])[0])
    return embedded


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    values = feature_extractor([wave], sampling_rate=SAMPLE_RATE, return_tensors="pt").audio_input_features[0]
    return Features(values, torch.ones(len(values)), _num_audio_tokens(feature_extractor, len(wave)))


def _num_audio_tokens(feature_extractor: Any, samples: int) -> int:
    """Audio tokens of a clip (transformers' `Phi4MultimodalFeatureExtractor._compute_audio_embed_size`)."""
    frames = (samples - feature_extractor.win_length) // feature_extractor.hop_length + 1
    frames *= feature_extractor.audio_feat_stride
    return math.ceil(math.ceil(frames / feature_extractor.audio_compression_rate) / feature_extractor.audio_downsample_rate)


FAMILY = Family(
    model_types=("phi4_multimodal",),
    model_class="Phi4MultimodalForCausalLM",
    language_model="model",
    decoder_aliases=(),
    audio_parts=("model.embed_tokens_extend.audio_embed",),
    audio_token="<|audio|>",
    stop_tokens=("<|end|>", "<|endoftext|>"),
    features=_features,
    encode_clips=_encode_clips,
    num_audio_tokens=_num_audio_tokens,
    # The checkpoint's template joins strings; only later revisions understand lists of parts.
    user_turn=lambda num_recordings, instruction: "<|audio|>" * num_recordings + instruction,
    # At 12.5 audio tokens a second this leaves room for prompt and completion within 4,096 tokens, see `Family.max_tokens`.
    max_audio_seconds=200.0,
    unused_parts=("model.embed_tokens_extend.image_embed",),
    adapter_folder="speech-lora",
    engine_refusal="vLLM knows only the remote-code variant of Phi-4-multimodal, transformers' native one has other names",
)

PRESETS: dict[str, Preset] = {
    "phi-4-multimodal": dataclasses.replace(
        PAPER,
        # The revision whose weights transformers reads without remote code.
        source="microsoft/Phi-4-multimodal-instruct@refs/pr/70",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=3072,
            num_layers=32,
            num_heads=24,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocabulary_size=200064,
            tied_head=True,
            biased_attention=False,
            fused_layers=True,
            num_other_parameters=466_432_256,
            max_tokens=4096,
        ),
    ),
}
