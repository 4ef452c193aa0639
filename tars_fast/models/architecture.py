"""The shape of a speech LLM, enough to count its parameters and memory without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tars_fast.types import UserError

VOCABULARY_MULTIPLE = 64
"""Engines pad the vocabulary to a multiple of this."""


@dataclass(frozen=True)
class Architecture:
    """A decoder with gated feed-forward layers, and whatever stands beside it."""

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
    """Of all that is not decoder, embeddings and head: tower and projector."""
    max_tokens: int
    """Longest prompt plus completion."""

    @property
    def key_value_size(self) -> int:
        """Width of the keys of one token in one layer."""
        return self.num_key_value_heads * self.hidden_size // self.num_heads

    @property
    def padded_vocabulary_size(self) -> int:
        return -(-self.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def num_text_parameters(self, *, padded: bool = False) -> int:
        """Of decoder, embeddings and head, with the engine's padding of the vocabulary if asked for."""
        hidden, keys = self.hidden_size, self.key_value_size
        attention = 2 * hidden * hidden + 2 * hidden * keys + (hidden + 2 * keys if self.biased_attention else 0)
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        rows = self.padded_vocabulary_size if padded else self.vocabulary_size
        return self.num_layers * layer + hidden + rows * hidden * (1 if self.tied_head else 2)

    def num_lora_parameters(self, rank: int) -> int:
        """Of adapters on every linear layer of the decoder."""
        hidden, keys, inner = self.hidden_size, self.key_value_size, self.intermediate_size
        ends = 2 * hidden + inner + hidden
        if self.fused_layers:
            ends += 2 * hidden + 2 * keys + hidden + 2 * inner
        else:
            ends += 2 * hidden + 2 * (hidden + keys) + 2 * (hidden + inner)
        return self.num_layers * rank * ends

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
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
    """Numbers, from 0, of the layers that `--representation-layers` names; None: all of them.

    Of 32 layers shallow are 1 to 10, middle 11 to 20, deep 21 to 30, last 31 and 32 (paper, Fig. 3).

    Raises:
        UserError: the model does not have them.
    """
    if given == "all":
        return None
    if given in LAYER_PARTS:
        if num_layers < len(LAYER_PARTS):
            raise UserError(f"--representation-layers {given}: a model of {num_layers} layers has no such parts; give numbers")
        # A model of four layers has one for each part.
        num_before = num_layers - (2 if num_layers > len(LAYER_PARTS) else 1)
        ends = [round(num_before * third / 3) for third in range(4)] + [num_layers]
        part = LAYER_PARTS.index(given)
        return range(ends[part], ends[part + 1])
    first, _, last = given.partition("-")
    layers = range(int(first) - 1, int(last or first))
    if not layers or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise UserError(f"--representation-layers {given}: the model has layers 1 to {num_layers}")
    return layers
