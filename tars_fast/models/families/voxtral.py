"""Voxtral: Whisper's tower over windows of 30 s, a projector of four frames to a token, and a Llama language model.

transformers builds it of Qwen2-Audio's parts, so that they have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen, qwen2_audio
from tars_fast.models.families.base import Features
from tars_fast.models.families.windows import encode_windows
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset

_FRAMES_PER_TOKEN = 8
# Published checkpoints have none: mistral-common, which writes their prompts, refuses a system prompt beside a recording. Here
# it opens the first user's turn, of a written prompt too, as Mistral's formats before version 7 have it.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ '\\n\\n' if loop.previtem and loop.previtem['role'] == 'system' else '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '[BEGIN_AUDIO][AUDIO]' if part['type'] == 'audio' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '[/INST]' if message['role'] == 'user' }}{% endif %}{% endfor %}"
)


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    samples = _num_windows(feature_extractor, len(wave)) * feature_extractor.n_samples
    padded = qwen.whisper_features(feature_extractor, wave, samples)
    return dataclasses.replace(padded, num_tokens=_num_audio_tokens(feature_extractor, len(wave)))


def _num_windows(feature_extractor: Any, samples: int) -> int:
    return -(-samples // feature_extractor.n_samples)


def _num_audio_tokens(feature_extractor: Any, samples: int) -> int:
    """Audio tokens of a clip, silence that fills its last window included, which the tower takes for sound."""
    return _num_windows(feature_extractor, samples) * feature_extractor.nb_max_frames // _FRAMES_PER_TOKEN


def _encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    get_audio_features: Any = module.get_audio_features
    return encode_windows(module, clips, lambda features, _: get_audio_features(features, return_dict=True).pooler_output)


FAMILY = dataclasses.replace(
    qwen2_audio.FAMILY,
    model_types=("voxtral",),
    model_class="VoxtralForConditionalGeneration",
    audio_token="[AUDIO]",
    stop_tokens=("</s>",),
    features=_features,
    encode_clips=_encode_clips,
    num_audio_tokens=_num_audio_tokens,
    default_template=lambda: _TEMPLATE,
    # What its card names for questions.
    max_audio_seconds=2400.0,
    # transformers reads tekken.json itself, and encodes the names of special tokens, which mistral-common's tokenizer does not.
    tokenizer_settings={
        "mistral_format": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
)

PRESETS: dict[str, Preset] = {
    "voxtral-mini-3b": dataclasses.replace(
        PAPER,
        source="mistralai/Voxtral-Mini-3B-2507",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=3072,
            num_layers=30,
            num_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocabulary_size=131072,
            tied_head=False,
            biased_attention=False,
            fused_layers=False,
            num_other_parameters=662_134_784,
            max_tokens=131072,
            head_dim=128,
        ),
    ),
    "voxtral-small-24b": dataclasses.replace(
        PAPER,
        source="mistralai/Voxtral-Small-24B-2507",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=5120,
            num_layers=40,
            num_heads=32,
            num_key_value_heads=8,
            intermediate_size=32768,
            vocabulary_size=131072,
            tied_head=False,
            biased_attention=False,
            fused_layers=False,
            num_other_parameters=689_397_760,
            max_tokens=131072,
            head_dim=128,
        ),
    ),
}
