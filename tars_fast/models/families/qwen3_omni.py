"""Qwen3-Omni: its thinker, a mixture of experts, without talker, code2wav and vision tower, which are not loaded.

Its parts have the names of Qwen2.5-Omni's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen, qwen2_5_omni
from tars_fast.models.families.base import Features
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset

_CHUNK = 100
"""Mel frames that the tower's convolutions see at once, a second (`n_window` of 50, twice)."""
_TOKENS_PER_CHUNK = 13


def _num_audio_tokens(feature_extractor: Any, samples: int) -> int:
    """Audio tokens of a clip: each second has 13, of a rest the frames are halved three times."""
    chunks, rest = divmod(samples // feature_extractor.hop_length, _CHUNK)
    return _TOKENS_PER_CHUNK * chunks + (rest + 7) // 8


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    # As long as the clip, without a window around it.
    batch = feature_extractor(
        wave, sampling_rate=SAMPLE_RATE, return_attention_mask=True, padding=True, truncation=False, return_tensors="pt"
    )
    return Features(batch.input_features[0], batch.attention_mask[0], _num_audio_tokens(feature_extractor, len(wave)))


def _encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    # The tower pads the last second of a clip to the longest second of the batch, and convolutions reach over the edge: a clip
    # of less than a second would be another one beside a longer clip.
    short = [number for number, clip in enumerate(clips) if len(clip.mask) < _CHUNK]
    long = [number for number in range(len(clips)) if number not in short]
    embedded: dict[int, Tensor] = {}
    for numbers in (*([number] for number in short), long):
        states = qwen2_5_omni.encode_clips(module, [clips[number] for number in numbers])
        embedded |= dict(zip(numbers, states, strict=True))
    return [embedded[number] for number in range(len(clips))]


_DECODER_NAMES, *_OTHER_NAMES = qwen2_5_omni.FAMILY.engine_names or ()

FAMILY = dataclasses.replace(
    qwen2_5_omni.FAMILY,
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    audio_token="<|audio_pad|>",
    features=_features,
    encode_clips=_encode_clips,
    num_audio_tokens=_num_audio_tokens,
    # 40 minutes, as its report has it (arXiv 2509.17765); the tower itself has no end.
    max_audio_seconds=2400.0,
    other_parts=("talker.", "code2wav."),
    saved_config_entries={},
    engine_names=(dataclasses.replace(_DECODER_NAMES, parameters=qwen.EXPERTS), *_OTHER_NAMES),
)

_INSTRUCT = dataclasses.replace(
    PAPER,
    source="Qwen/Qwen3-Omni-30B-A3B-Instruct",
    family=FAMILY,
    architecture=Architecture(
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_key_value_heads=4,
        intermediate_size=768,
        vocabulary_size=152064,
        tied_head=False,
        biased_attention=False,
        fused_layers=False,
        num_other_parameters=647_927_168,
        max_tokens=65536,
        head_dim=128,
        normed_attention=True,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=768,
    ),
)
PRESETS: dict[str, Preset] = {
    "qwen3-omni-30b": _INSTRUCT,
    "qwen3-omni-30b-thinking": dataclasses.replace(_INSTRUCT, source="Qwen/Qwen3-Omni-30B-A3B-Thinking"),
}
