"""The sizes of a speech LLM: all that counting its parameters and planning its memory needs, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tars_fast.types import UserError

VOCABULARY_MULTIPLE = 64
"""Engines pad the vocabulary to a multiple of this."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder with gated feed-forward layers, and the number of all other parameters."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocabulary_size: int
    tied_head: bool
    biased_attention: bool
    """Query, key and value have a bias."""
    fused_layers: bool
    """Query, key and value are one linear layer, gate and up another."""
    num_other_parameters: int
    """Parameters outside decoder, embeddings and head: those of audio tower and projector."""
    max_tokens: int
    """Longest prompt plus completion."""
    head_dim: int | None = None
    """Width of one head; None: the hidden size shared out among the heads."""

    @property
    def query_size(self) -> int:
        """Numbers in the queries of one token in one layer."""
        return self.hidden_size if self.head_dim is None else self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Numbers in the keys of one token in one layer."""
        return self.num_key_value_heads * self.query_size // self.num_heads

    @property
    def padded_vocabulary_size(self) -> int:
        return -(-self.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def num_text_parameters(self, *, padded: bool = False) -> int:
        """Parameters of decoder, embeddings and head.

        Args:
            padded: whether the vocabulary is padded, as engines do.
        """
        hidden, queries, keys = self.hidden_size, self.query_size, self.key_value_size
        attention = 2 * hidden * queries + 2 * hidden * keys + (queries + 2 * keys if self.biased_attention else 0)
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        rows = self.padded_vocabulary_size if padded else self.vocabulary_size
        return self.num_layers * layer + hidden + rows * hidden * (1 if self.tied_head else 2)

    def num_lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the decoder."""
        hidden, queries, keys, inner = self.hidden_size, self.query_size, self.key_value_size, self.intermediate_size
        ends = queries + hidden + inner + hidden
        if self.fused_layers:
            ends += hidden + queries + 2 * keys + hidden + 2 * inner
        else:
            ends += hidden + queries + 2 * (hidden + keys) + 2 * (hidden + inner)
        return self.num_layers * rank * ends

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.key_value_size * dtype_bytes


LAYER_PARTS = ("shallow", "middle", "deep", "last")

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def check_layers(given: str) -> None:
    """Raises UserError where `--representation-layers` is none of the forms that `find_layers` knows."""
    if given not in ("all", *LAYER_PARTS) and _RANGE.fullmatch(given) is None:
        raise UserError(
            f"--representation-layers {given}: all, {', '.join(LAYER_PARTS)}, a layer, or a range of them such as 11-20"
        )


def find_layers(given: str, num_layers: int) -> range | None:
    """The layers that `--representation-layers` names, counted from 0; None for all of them.

    Of 32 layers, `shallow` are 1 to 10, `middle` 11 to 20, `deep` 21 to 30, `last` 31 and 32 (paper, Fig. 3).

    Args:
        given: `all`, a part, a layer's number from 1, or a range like `5-8`.
        num_layers: of the model.

    Raises:
        UserError: the model has no such layers.
    """
    if given == "all":
        return None
    if given in LAYER_PARTS:
        if num_layers < len(LAYER_PARTS):
            raise UserError(f"--representation-layers {given}: a model of {num_layers} layers has no such parts; give numbers")
        # In a model of four layers each part is one layer.
        num_before = num_layers - (2 if num_layers > len(LAYER_PARTS) else 1)
        ends = [round(num_before * third / 3) for third in range(4)] + [num_layers]
        part = LAYER_PARTS.index(given)
        return range(ends[part], ends[part + 1])
    first, _, last = given.partition("-")
    layers = range(int(first) - 1, int(last or first))
    if not layers or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise UserError(f"--representation-layers {given}: the model has layers 1 to {num_layers}")
    return layers
