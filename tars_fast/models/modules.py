"""Types for what this package uses of transformers' models and tokenizers, which have few types themselves.

For type checkers only: no object is made of these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Decoder(nn.Module):
    """The layers of a language model without its head, called with embeddings."""

    layers: nn.ModuleList
    norm: nn.Module
    embed_tokens: nn.Embedding
    config: Any


class PolicyModule(nn.Module):
    """A speech LLM with its language-model head."""

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
    """A checkpoint's tokenizer."""

    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, object]
    eos_token: str
    eos_token_id: int | None
    pad_token_id: int | None

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]: ...

    def save_pretrained(self, save_directory: Any) -> object: ...
