"""The shape of a speech LLM, enough to count its parameters and memory without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

VOCABULARY_MULTIPLE = 64
"""Engines pad the vocabulary to a multiple of this."""


@dataclass(frozen=True)
class Architecture:
    """A Whisper-like audio tower, a linear projector and a Qwen2 decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocabulary_size: int
    tied_head: bool
    audio_width: int
    audio_layers: int
    audio_intermediate_size: int
    audio_mel_bins: int
    audio_positions: int
    max_tokens: int
    """Longest prompt plus completion."""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Self:
        """Read a folder's config.json."""
        from transformers import Qwen2AudioConfig

        return cls.from_config(Qwen2AudioConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))

    @classmethod
    def from_config(cls, config) -> Self:
        """Of a transformers `Qwen2AudioConfig`."""
        text, audio = config.text_config, config.audio_config
        return cls(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            intermediate_size=text.intermediate_size,
            vocabulary_size=text.vocab_size,
            tied_head=bool(text.tie_word_embeddings),
            audio_width=audio.d_model,
            audio_layers=audio.encoder_layers,
            audio_intermediate_size=audio.encoder_ffn_dim,
            audio_mel_bins=audio.num_mel_bins,
            audio_positions=audio.max_source_positions,
            max_tokens=text.max_position_embeddings,
        )

    @property
    def key_value_size(self) -> int:
        """Width of the keys of one token in one layer."""
        return self.num_key_value_heads * self.hidden_size // self.num_heads

    @property
    def max_audio_tokens(self) -> int:
        """Of the longest recording; the tower halves its positions once more."""
        return self.audio_positions // 2

    @property
    def padded_vocabulary_size(self) -> int:
        return -(-self.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def num_text_parameters(self, *, padded: bool = False) -> int:
        """Of decoder, embeddings and head, with the engine's padding of the vocabulary if asked for."""
        hidden, keys = self.hidden_size, self.key_value_size
        attention = 2 * hidden * hidden + hidden + 2 * (hidden * keys + keys)
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        rows = self.padded_vocabulary_size if padded else self.vocabulary_size
        return self.num_layers * layer + hidden + rows * hidden * (1 if self.tied_head else 2)

    @property
    def num_audio_parameters(self) -> int:
        """Of tower and projector."""
        width, inner = self.audio_width, self.audio_intermediate_size
        layer = 4 * width * width + 3 * width + 2 * width * inner + inner + width + 4 * width
        convolutions = 3 * width * (self.audio_mel_bins + width) + 2 * width
        tower = self.audio_layers * layer + convolutions + self.audio_positions * width + 2 * width
        return tower + width * self.hidden_size + self.hidden_size

    def num_lora_parameters(self, rank: int) -> int:
        """Of adapters on every linear layer of the decoder."""
        hidden, keys, inner = self.hidden_size, self.key_value_size, self.intermediate_size
        ends = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
        return self.num_layers * rank * ends

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        return 2 * self.num_layers * self.key_value_size * dtype_bytes


QWEN2_AUDIO_7B = Architecture(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_key_value_heads=32,
    intermediate_size=11008,
    vocabulary_size=156032,
    tied_head=False,
    audio_width=1280,
    audio_layers=32,
    audio_intermediate_size=5120,
    audio_mel_bins=128,
    audio_positions=1500,
    max_tokens=8192,
)
