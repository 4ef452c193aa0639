"""The sizes of a speech LLM: all that counting its parameters and planning its memory needs, without its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tars_fast.types import UserError

VOCABULARY_MULTIPLE = 64
"""Engines pad the vocabulary to a multiple of this."""


_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
_EXPERTS = ("experts", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""What the layers of experts are called, here and elsewhere."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder with gated feed-forward layers, or with mixtures of them, and the number of all other parameters."""

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
    """Numbers in the query of one head; None: `hidden_size / num_heads`."""
    normed_attention: bool = False
    """Queries and keys have a norm over the numbers of a head."""
    num_experts: int = 0
    """Feed-forward layers that a router chooses from, in each layer; 0: there is one, and no router."""
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    """`intermediate_size` of one expert."""

    @property
    def head_size(self) -> int:
        """Numbers in the query, key or value of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def key_value_size(self) -> int:
        """Numbers in the keys of one token in one layer."""
        return self.num_key_value_heads * self.head_size

    @property
    def padded_vocabulary_size(self) -> int:
        return -(-self.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer, by name. A parameter that holds all experts is none."""
        hidden, queries, keys, inner = (
            self.hidden_size,
            self.num_heads * self.head_size,
            self.key_value_size,
            self.intermediate_size,
        )
        if self.fused_layers:
            attention = {"qkv_proj": (hidden, queries + 2 * keys)}
            feed_forward = {"gate_up_proj": (hidden, 2 * inner)}
        else:
            attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
            feed_forward = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        attention["o_proj"], feed_forward["down_proj"] = (queries, hidden), (inner, hidden)
        return attention if self.num_experts else attention | feed_forward

    def text_parameter_sizes(self, *, padded: bool = False) -> list[int]:
        """Numbers in each parameter of decoder, embeddings and head.

        Args:
            padded: whether the vocabulary is padded, as engines do.
        """
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        layer = [inputs * outputs for inputs, outputs in self.linear_layers.values()] + [hidden] * 2
        if self.biased_attention:
            layer += [self.num_heads * self.head_size] + [self.key_value_size] * 2
        if self.normed_attention:
            layer += [self.head_size] * 2
        if self.num_experts:
            # All experts of a layer are two parameters; the router has a row for each.
            layer += [self.num_experts * size for size in (2 * hidden * inner, hidden * inner, hidden)]
        rows = self.padded_vocabulary_size if padded else self.vocabulary_size
        return self.num_layers * layer + [hidden] + [rows * hidden] * (1 if self.tied_head else 2)

    def num_text_parameters(self, *, padded: bool = False) -> int:
        """Sum of `text_parameter_sizes`."""
        return sum(self.text_parameter_sizes(padded=padded))

    def find_lora_targets(self, given: str | None) -> tuple[str, ...]:
        """Names of the `linear_layers` that `--lora-targets` asks for; None: all, of a mixture of experts attention's.

        Raises:
            UserError: there is no such layer, or it is one of experts.
        """
        found = tuple(self.linear_layers)
        if given is None:
            return found
        if given == "attention":
            return tuple(name for name in found if name in _ATTENTION)
        names = (_EXPERTS if self.num_experts else found) if given == "all-linear" else tuple(given.split(","))
        if self.num_experts and not {*_EXPERTS}.isdisjoint(names):
            raise UserError(
                f"--lora-targets {given}: the experts of this model are one parameter together, not linear layers, and take no "
                f"adapter; give attention, or some of {', '.join(found)}"
            )
        unknown = [name for name in names if name not in found]
        if unknown:
            raise UserError(f"--lora-targets {given}: the model has no linear layer {unknown[0]!r}; it has {', '.join(found)}")
        return tuple(name for name in found if name in names)

    def num_lora_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """Parameters of LoRA on some of the `linear_layers`, in all decoder layers."""
        return self.num_layers * rank * sum(sum(self.linear_layers[name]) for name in targets)

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


def sharding_refusal(architecture: Architecture, size: int) -> str | None:
    """Why a model's weights cannot be cut into `size` parts, with the remedy; None where they can."""
    if architecture.num_experts or architecture.fused_layers or architecture.normed_attention:
        return "layers of this architecture cannot be cut yet; leave it out"
    counts = {
        "attention heads": architecture.num_heads,
        "key and value heads": architecture.num_key_value_heads,
        "inner features": architecture.intermediate_size,
        "tokens of the padded vocabulary": architecture.padded_vocabulary_size,
    }
    for name, number in counts.items():
        if number % size:
            divisor = math.gcd(*counts.values())
            return f"the model's {number} {name} cannot be shared evenly; give a divisor of {divisor}, or leave it out"
    return None


def check_parts(size: int, architecture: Architecture, engine_name: str) -> None:
    """Raises UserError where `size` parts are asked of weights or of an engine that have none."""
    if size == 1:
        return
    if engine_name != "vllm":
        raise UserError(f"--tensor-parallel {size}: needs rollouts by vLLM; add --engine vllm")
    refusal = sharding_refusal(architecture, size)
    if refusal is not None:
        raise UserError(f"--tensor-parallel {size}: {refusal}")
