"""Audio Flamingo 3: Whisper's tower over windows of 30 s, a projector, and a Qwen2 language model.

transformers builds it of Qwen2-Audio's parts, so that they have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen, qwen2_audio
from tars_fast.models.families.base import Features
from tars_fast.models.families.windows import encode_windows
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    samples = feature_extractor.n_samples
    # Each window has a spectrogram of its own, scaled by its own loudest sound.
    windows = [
        qwen.whisper_features(feature_extractor, wave[start : start + samples], samples)
        for start in range(0, len(wave), samples)
    ]
    values = torch.cat([window.values for window in windows], 1)
    return Features(values, torch.cat([window.mask for window in windows]), sum(window.num_tokens for window in windows))


def _encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    get_audio_features: Any = module.get_audio_features
    return encode_windows(
        module, clips, lambda features, mask: get_audio_features(features, mask, return_dict=True).pooler_output
    )


FAMILY = dataclasses.replace(
    qwen2_audio.FAMILY,
    model_types=("audioflamingo3",),
    model_class="AudioFlamingo3ForConditionalGeneration",
    audio_token="<sound>",
    features=_features,
    encode_clips=_encode_clips,
    # The checkpoint's template writes a single placeholder for any number of audio parts, and a string as it is.
    user_turn=lambda num_recordings, instruction: "<sound>" * num_recordings + instruction,
    default_template=lambda: None,
    max_audio_seconds=600.0,
)

PRESETS: dict[str, Preset] = {
    "audio-flamingo-3": dataclasses.replace(
        PAPER,
        source="nvidia/audio-flamingo-3-hf",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocabulary_size=151672,
            tied_head=False,
            biased_attention=True,
            fused_layers=False,
            num_other_parameters=654_408_704,
            max_tokens=32768,
        ),
    ),
}
