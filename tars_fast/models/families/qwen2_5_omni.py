"""Qwen2.5-Omni: its thinker, without the talker and the vision tower, which are not loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen
from tars_fast.models.families.base import Family, Features, batch_clips, stack_features
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset
from tars_fast.models.weights import WeightMapping
from tars_fast.support.requirements import is_at_least


def encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    """See `Family.encode_clips`."""
    get_audio_features: Any = module.get_audio_features
    embedded = []
    for batch in batch_clips(clips):
        features, mask = stack_features(module, batch)
        states = get_audio_features(features, feature_attention_mask=mask).last_hidden_state
        embedded += [state.clone() for state in states.split([clip.num_tokens for clip in batch])]
    return embedded


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    # The checkpoint's own window is 300 s; one analysis window of silence behind the clip gives the same spectrogram.
    samples = len(wave) + feature_extractor.n_fft
    return qwen.whisper_features(
        feature_extractor, wave, -(-samples // feature_extractor.hop_length) * feature_extractor.hop_length
    )


# From transformers 5.21 on, decoder and towers are modules of `model`.
_OMNI, _OMNI_DECODER = ("model.", "model.language_model") if is_at_least("transformers", "5.21") else ("", "model")

FAMILY = Family(
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    language_model=_OMNI_DECODER,
    decoder_aliases=("model", "model.language_model", "language_model", "thinker.model", "thinker.model.language_model"),
    audio_parts=(f"{_OMNI}audio_tower",),
    audio_token="<|AUDIO|>",
    stop_tokens=qwen.STOP_TOKENS,
    features=_features,
    encode_clips=encode_clips,
    num_audio_tokens=qwen.num_audio_tokens,
    user_turn=qwen.user_turn,
    unused_parts=(f"{_OMNI}visual",),
    nested_config="thinker_config",
    published_prefixes=((f"{_OMNI_DECODER}.", "model."), (_OMNI, "")),
    nested_prefix="thinker.",
    saved_config_entries={"enable_audio_output": False},
    engine_names=(
        WeightMapping(f"{_OMNI_DECODER}.", "language_model.model.", fused=qwen.FUSED),
        WeightMapping("lm_head", "language_model.lm_head"),
        WeightMapping(f"{_OMNI}audio_tower.", "audio_tower."),
    ),
)

PRESETS: dict[str, Preset] = {
    "qwen2.5-omni-7b": dataclasses.replace(
        PAPER,
        source="Qwen/Qwen2.5-Omni-7B",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocabulary_size=152064,
            tied_head=False,
            biased_attention=True,
            fused_layers=False,
            num_other_parameters=639_647_232,
            max_tokens=32768,
        ),
    ),
    "qwen2.5-omni-3b": dataclasses.replace(
        PAPER,
        source="Qwen/Qwen2.5-Omni-3B",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=2048,
            num_layers=36,
            num_heads=16,
            num_key_value_heads=2,
            intermediate_size=11008,
            vocabulary_size=151936,
            tied_head=False,
            biased_attention=True,
            fused_layers=False,
            num_other_parameters=637_676_544,
            max_tokens=32768,
        ),
    ),
}
