"""What is used of transformers' classes, as types: those leave most of it to whatever a checkpoint holds.

Nothing is made of these classes; models and tokenizers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Decoder(nn.Module):
    """The stack of layers of a language model, called with embeddings."""

    layers: nn.ModuleList
    norm: nn.Module
    embed_tokens: nn.Embedding
    config: Any


class PolicyModule(nn.Module):
    """A model with a head."""

    config: Any
    generation_config: Any
    device: torch.device
    dtype: torch.dtype
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Linear]
    tie_weights: Callable[[], None]
    gradient_checkpointing_enable: Callable[[dict[str, Any]], None]
    save_pretrained: Callable[..., None]


class Tokenizer(Protocol):
    """Of a checkpoint."""

    chat_template: str | None
    eos_token: str
    eos_token_id: int | None
    pad_token_id: int | None

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, object]], *, chat_template: str, add_generation_prompt: bool, tokenize: bool
    ) -> str: ...

    def save_pretrained(self, save_directory: Any) -> object: ...
