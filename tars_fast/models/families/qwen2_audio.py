"""Qwen2-Audio: Whisper's tower over windows of 30 s, a projector, and a Qwen2 language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen
from tars_fast.models.families.base import Family, Features, stack_features
from tars_fast.models.modules import PolicyModule
from tars_fast.models.preset import PAPER, Preset
from tars_fast.models.weights import WeightMapping


def encode_frames(module: PolicyModule, features: Tensor, feature_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's states, which the projector takes.

    transformers' forward of the tower takes whole windows only, and computes what fills them up, which nothing attends to.

    Args:
        module: a `Qwen2AudioForConditionalGeneration`.
        features: [N, M, F] log-mel spectrogram, F up to the tower's window.
        feature_mask: [N, F], 1 where there is speech.

    Returns:
        ([N, A, E] states, E the tower's width, [N] number of audio tokens of each recording).
    """
    from transformers.masking_utils import create_bidirectional_mask

    model: Any = module.model
    tower = model.audio_tower
    frame_lengths, token_lengths = tower._get_feat_extract_output_lengths(feature_mask.sum(-1))
    states = F.gelu(tower.conv1(features.to(tower.conv1.weight.dtype)))
    states = F.gelu(tower.conv2(states)).mT
    num_positions = states.shape[1]
    states = states + tower.embed_positions.weight[:num_positions]
    is_speech = torch.arange(num_positions, device=features.device) < frame_lengths[:, None]
    attention_mask = create_bidirectional_mask(config=tower.config, inputs_embeds=states, attention_mask=is_speech.long())
    for layer in tower.layers:
        states = layer(states, attention_mask)
    return tower.layer_norm(tower.avg_pooler(states.mT).mT), token_lengths


def embed_audio(module: PolicyModule, features: Tensor, feature_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Audio embeddings by Qwen2-Audio's tower and projector: `encode_frames`, with [N, A, D] embeddings for the states."""
    model: Any = module.model
    states, token_lengths = encode_frames(module, features, feature_mask)
    return model.multi_modal_projector(states), token_lengths


def _encode_clips(module: PolicyModule, clips: Sequence[Features]) -> list[Tensor]:
    embedded = []
    for clip in clips:
        # Not together: in its last bits a recording's embeddings would depend on those beside it, which a resumed run has not.
        (states,), _ = embed_audio(module, *stack_features(module, [clip]))
        embedded.append(states[: clip.num_tokens].clone())
    return embedded


def _features(feature_extractor: Any, wave: np.ndarray) -> Features:
    window = qwen.whisper_features(feature_extractor, wave, feature_extractor.n_samples)
    # The tower's last position of the clip sees up to this frame, the next ones nothing of it.
    num_frames = 2 * ((int(window.mask.sum()) - 1) // 2 + 1) + 1
    return Features(window.values[:, :num_frames].clone(), window.mask[:num_frames].clone(), window.num_tokens)


def _template() -> str:
    """The chat template of transformers' processor, because the published checkpoint has none."""
    from transformers import Qwen2AudioProcessor

    template: Any = Qwen2AudioProcessor.default_chat_template
    return template.fget(None)


FAMILY = Family(
    model_types=("qwen2_audio",),
    model_class="Qwen2AudioForConditionalGeneration",
    language_model="model.language_model",
    decoder_aliases=("language_model", "language_model.model"),
    audio_parts=("model.audio_tower", "model.multi_modal_projector"),
    audio_token="<|AUDIO|>",
    stop_tokens=qwen.STOP_TOKENS,
    features=_features,
    encode_clips=_encode_clips,
    num_audio_tokens=qwen.num_audio_tokens,
    user_turn=qwen.user_turn,
    default_template=_template,
    frozen_parts=("model.audio_tower.embed_positions",),
    published_prefixes=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ),
    engine_names=(
        WeightMapping("model.language_model.", "language_model.model.", fused=qwen.FUSED),
        WeightMapping("lm_head", "language_model.lm_head"),
        WeightMapping("model.audio_tower.", "audio_tower."),
        WeightMapping("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)

PRESETS: dict[str, Preset] = {
    "qwen2-audio-7b": dataclasses.replace(
        PAPER,
        source="Qwen/Qwen2-Audio-7B-Instruct",
        family=FAMILY,
        architecture=Architecture(
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_key_value_heads=32,
            intermediate_size=11008,
            vocabulary_size=156032,
            tied_head=False,
            biased_attention=True,
            fused_layers=False,
            num_other_parameters=642_215_936,
            max_tokens=8192,
        ),
    ),
}
