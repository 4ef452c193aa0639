"""Qwen3-Omni: its thinker, a mixture of experts, without talker, code2wav and vision tower, which are not loaded.

Shapes: M mel bins, F mel frames, N recordings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen
from tars_fast.models.families.base import Family, Features, batch_clips, stack_features
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset
from tars_fast.models.weights import WeightMapping
from tars_fast.support.requirements import is_at_least

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
    get_audio_features: Any = module.get_audio_features
    embedded: dict[int, Tensor] = {}
    # The tower pads the last second of a clip to the longest second of the batch, and convolutions reach over the edge: a clip
    # of less than a second would be another one beside a longer clip.
    short = [number for number, clip in enumerate(clips) if len(clip.mask) < _CHUNK]
    long = [number for number in range(len(clips)) if number not in short]
    for numbers in (*([number] for number in short), long):
        states: list[Tensor] = []
        for batch in batch_clips([clips[number] for number in numbers]):
            features, mask = stack_features(module, batch)
            output = get_audio_features(features, feature_attention_mask=mask).last_hidden_state
            states += [state.clone() for state in output.split([clip.num_tokens for clip in batch])]
        embedded |= dict(zip(numbers, states, strict=True))
    return [embedded[number] for number in range(len(clips))]


# From transformers 5.21 on, decoder and towers are modules of `model`.
_OMNI, _OMNI_DECODER = ("model.", "model.language_model") if is_at_least("transformers", "5.21") else ("", "model")

FAMILY = Family(
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    language_model=_OMNI_DECODER,
    decoder_aliases=("model", "model.language_model", "language_model", "thinker.model", "thinker.model.language_model"),
    audio_parts=(f"{_OMNI}audio_tower",),
    audio_token="<|audio_pad|>",
    stop_tokens=qwen.STOP_TOKENS,
    features=_features,
    encode_clips=_encode_clips,
    num_audio_tokens=_num_audio_tokens,
    user_turn=qwen.user_turn,
    # 40 minutes, as its report has it (arXiv 2509.17765); the tower itself has no end.
    max_audio_seconds=2400.0,
    unused_parts=(f"{_OMNI}visual",),
    nested_config="thinker_config",
    published_prefixes=((f"{_OMNI_DECODER}.", "model."), (_OMNI, "")),
    nested_prefix="thinker.",
    other_parts=("talker.", "code2wav."),
    engine_names=(
        WeightMapping(
            f"{_OMNI_DECODER}.",
            "language_model.model.",
            fused=qwen.FUSED,
            parameters=qwen.EXPERTS,
        ),
        WeightMapping("lm_head", "language_model.lm_head"),
        WeightMapping(f"{_OMNI}audio_tower.", "audio_tower."),
    ),
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
