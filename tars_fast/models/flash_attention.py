"""FlashAttention over sequences of different lengths, by the fastest of the packages that are installed.

Each package has a forward pass that returns the log-sum-exp of its softmax, and a backward pass that takes one.
`packed_attention.py` needs the two apart, because a backward pass over some of the keys takes the log-sum-exp over all of them;
the packages' own autograd functions would drop the gradient that comes through the log-sum-exp.

Shapes: H heads, H' heads of keys and values, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tars_fast.support.cli import first_line
from tars_fast.support.requirements import installed, is_at_least

_OLDEST_FLASH_ATTN = "2.7"
"""The first release whose functions take the arguments that are passed here."""


@dataclass(frozen=True)
class VarlenSequences:
    """Sequences of different lengths, one after the other, as FlashAttention takes them."""

    bounds: tuple[Tensor, Tensor]
    """[sequences + 1] int32 boundaries of the queries, and of the keys."""
    longest: tuple[int, int]
    """Most queries of a sequence, and most keys."""
    causal: bool

    @classmethod
    def of(
        cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device, *, causal: bool
    ) -> VarlenSequences:
        query_bounds, key_bounds = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (query_lengths, key_lengths)
        )
        return cls((query_bounds, key_bounds), (max(query_lengths), max(key_lengths)), causal)


class QueryKeyValue(NamedTuple):
    """What attention takes: queries of some tokens, keys and values of others or the same."""

    query: Tensor
    """[queries, H, E]"""
    key: Tensor
    """[keys, H', E]"""
    value: Tensor
    """[keys, H', E]"""


class AttentionResult(NamedTuple):
    """What FlashAttention returns, and its backward pass takes."""

    output: Tensor
    """[queries, H, E]"""
    log_sums: Tensor
    """[H, queries] fp32 log-sum-exp of the scaled scores."""


@dataclass(frozen=True)
class FlashAttention:
    """The two passes of one package, both without autograd."""

    name: str
    """As the first line of a run shows it."""
    forward: Callable[[QueryKeyValue, VarlenSequences, float], AttentionResult]
    """(states, sequences, factor of the scores) -> attention of every sequence."""
    backward: Callable[[Tensor, QueryKeyValue, AttentionResult, VarlenSequences, float], QueryKeyValue]
    """(gradient of the output, states, result, sequences, factor) -> gradients of query, key and value.

    The result is that of `forward`, or of a softmax over more keys than those in the states."""


def find_flash_attention(device: torch.device, dtype: torch.dtype, head_size: int) -> FlashAttention | None:
    """The kernels for states of this kind, the same at every call; None where there are none.

    They are for half precision on GPUs from Ampere on.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size % 8 or head_size > 256:
        return None
    capability = torch.cuda.get_device_capability(device)
    return _fastest(capability) if capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available() else None


@cache
def _fastest(capability: tuple[int, int]) -> FlashAttention:
    """FlashAttention 3 on Hopper, else flash-attn 2, else what PyTorch ships; the name says which cannot be used, and why."""
    unusable = ""
    found = {
        "flash_attn_interface": _flash_attention_3 if capability == (9, 0) and find_spec("flash_attn_interface") else None,
        "flash-attn": _flash_attention_2 if installed("flash-attn") else None,
    }
    for package, load in found.items():
        if load is not None:
            try:
                return load()
            # Whatever a package raises while it is imported that was built for another PyTorch.
            except Exception as error:
                unusable += f", as {package} cannot be used ({first_line(error)})"
    return replace(OF_TORCH, name=OF_TORCH.name + unusable)


def _forward_of_torch(states: QueryKeyValue, sequences: VarlenSequences, scale: float) -> AttentionResult:
    output, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        *states, *sequences.bounds, *sequences.longest, 0.0, sequences.causal, False, scale=scale
    )
    return AttentionResult(output, log_sums)


def _backward_of_torch(
    gradient: Tensor, states: QueryKeyValue, result: AttentionResult, sequences: VarlenSequences, scale: float
) -> QueryKeyValue:
    # The state of dropout's random numbers, and an argument that is never read.
    random_state, unused = (
        torch.empty(2, dtype=torch.uint64, device=gradient.device),
        torch.empty(0, device=gradient.device),
    )
    return QueryKeyValue(
        *torch.ops.aten._flash_attention_backward(
            gradient, *states, *result, *sequences.bounds, *sequences.longest, 0.0, sequences.causal, random_state, unused,
            scale=scale,
        )
    )  # fmt: skip


OF_TORCH = FlashAttention("PyTorch's FlashAttention", _forward_of_torch, _backward_of_torch)


def _flash_attention_2() -> FlashAttention:
    """`flash_attn`: what its own autograd functions call."""
    if not is_at_least("flash-attn", _OLDEST_FLASH_ATTN):
        raise ImportError(f"{installed('flash-attn')} is older than {_OLDEST_FLASH_ATTN}")
    package = import_module("flash_attn.flash_attn_interface")
    run_forward, run_backward = package._flash_attn_varlen_forward, package._flash_attn_varlen_backward

    def forward(states: QueryKeyValue, sequences: VarlenSequences, scale: float) -> AttentionResult:
        output, log_sums, *_ = run_forward(*states, *sequences.bounds, *sequences.longest, 0.0, scale, sequences.causal)
        return AttentionResult(output, log_sums)

    def backward(
        gradient: Tensor, states: QueryKeyValue, result: AttentionResult, sequences: VarlenSequences, scale: float
    ) -> QueryKeyValue:
        gradients = QueryKeyValue(*map(torch.empty_like, states))
        run_backward(
            gradient, *states, *result, *gradients, *sequences.bounds, *sequences.longest, 0.0, scale, sequences.causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return gradients

    return FlashAttention(f"flash-attn {installed('flash-attn')}", forward, backward)


def _flash_attention_3() -> FlashAttention:
    """`flash_attn_interface`: the operators that it registers, whose arguments its Python functions have in varying order."""
    import_module("flash_attn_interface")
    run_forward, run_backward = torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd

    def forward(states: QueryKeyValue, sequences: VarlenSequences, scale: float) -> AttentionResult:
        output, log_sums, *_ = run_forward(
            *states,
            # New keys and values of a cache, values of another size, a place for the output.
            None, None, None, None,
            *sequences.bounds,
            # Bounds of new keys, and how many queries and keys of each sequence are in use.
            None, None, None,
            *sequences.longest,
            # A cache in pages: pages, rows, padding. Rotary embedding: cosines, sines, lengths. Scales of fp8 states.
            None, None, None, None, None, None, None, None, None,
            scale, sequences.causal, num_splits=1,
        )  # fmt: skip
        return AttentionResult(output, log_sums)

    def backward(
        gradient: Tensor, states: QueryKeyValue, result: AttentionResult, sequences: VarlenSequences, scale: float
    ) -> QueryKeyValue:
        gradients = QueryKeyValue(*map(torch.empty_like, states))
        run_backward(
            gradient, *states, *result, *gradients, *sequences.bounds, None, None, *sequences.longest, scale, sequences.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return gradients

    return FlashAttention("FlashAttention 3", forward, backward)
