"""What the families of Qwen's audio models share: Whisper's features, stop tokens, and the names of fused weights.

Shapes: N recordings, M mel bins, F mel frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.families.base import Features

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's fused module, and the modules of transformers whose rows it stacks, in order."""
EXPERTS = {"gate_up_proj": "routed_experts.w13_weight", "down_proj": "routed_experts.w2_weight"}
"""transformers' weights of all experts, [E, 2I, D] and [E, D, I], and vLLM's, in the same order."""
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def whisper_features(feature_extractor: Any, wave: np.ndarray, samples: int) -> Features:
    """The log-mel spectrogram of a clip padded to `samples`."""
    batch = feature_extractor(
        wave,
        sampling_rate=SAMPLE_RATE,
        return_attention_mask=True,
        padding="max_length",
        max_length=samples,
        return_tensors="pt",
    )
    return Features(batch.input_features[0], batch.attention_mask[0], num_audio_tokens(feature_extractor, len(wave)))


def num_audio_tokens(feature_extractor: Any, samples: int) -> int:
    """Audio tokens of a clip: both towers halve its frames twice (transformers' `_get_feat_extract_output_lengths`)."""
    frames = -(-samples // feature_extractor.hop_length)
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def user_turn(num_recordings: int, instruction: str) -> list[dict[str, str]]:
    """The parts of the user's message, as Qwen's chat templates take them."""
    return [{"type": "audio"}] * num_recordings + ([{"type": "text", "text": instruction}] if instruction else [])
