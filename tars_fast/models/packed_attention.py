"""Attention over packed question groups: every prompt once, its completions behind all prompts, none sees another's tokens.

Registered with transformers, so that its model classes run on packed rows as they are. A call without `groups` (audio
towers) gets PyTorch's scaled dot-product attention.

On CUDA in half precision a layer is two calls of FlashAttention as PyTorch ships it, over ragged sequences without mask or
padding: every prompt and completion with itself, causally, and the completions with their prompt. Both halves of a completion's
softmax are merged by their log-sum-exp; the backward pass of either half needs nothing but the merged result (Liu et al. 2023,
ring attention). Elsewhere each group is two calls of masked attention.

Shapes: S tokens of the row, P of them in prompts, T in completions, R groups, N completions, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from tars_fast.models.key_values import KeyValues
from tars_fast.models.modules import Decoder

PACKED_ATTENTION = "tars_fast_packed"
"""Name among transformers' attention implementations."""


@dataclass(frozen=True)
class PackedGroups:
    """Where prompts and completions stand in a row: P prompt tokens, group by group, then T completion tokens likewise."""

    prompt_lengths: tuple[int, ...]
    """[R]"""
    completion_lengths: tuple[tuple[int, ...], ...]
    """Of each completion of each group."""
    device: torch.device

    @cached_property
    def group_lengths(self) -> tuple[int, ...]:
        """[R] tokens of each group's completions together."""
        return tuple(map(sum, self.completion_lengths))

    @cached_property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @cached_property
    def alone(self) -> _Ragged:
        """Every prompt and completion with itself."""
        lengths = [*self.prompt_lengths, *(length for group in self.completion_lengths for length in group)]
        return _Ragged.of(lengths, lengths, self.device)

    @cached_property
    def under_prompt(self) -> _Ragged:
        """The completions of each group with its prompt."""
        return _Ragged.of(self.group_lengths, self.prompt_lengths, self.device)

    def masks(self, dtype: torch.dtype) -> list[Tensor]:
        """[1, 1, group, prompt + group] additive mask of each group's completions; made once, for all layers."""
        if dtype not in self._masks:
            self._masks[dtype] = [self._mask(number, dtype) for number in range(len(self.prompt_lengths))]
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, list[Tensor]]:
        return {}

    def _mask(self, number: int, dtype: torch.dtype) -> Tensor:
        lengths = torch.tensor(self.completion_lengths[number], device=self.device)
        segments = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
        own = (segments[:, None] == segments).tril()
        seen = torch.cat([own.new_ones(len(own), self.prompt_lengths[number]), own], dim=1)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]


@dataclass(frozen=True)
class _Ragged:
    """Sequences behind each other, as FlashAttention takes them."""

    query_bounds: Tensor
    """[sequences + 1] int32"""
    key_bounds: Tensor
    max_query: int
    max_key: int

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> _Ragged:
        query_bounds, key_bounds = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (query_lengths, key_lengths)
        )
        return cls(query_bounds, key_bounds, max(query_lengths), max(key_lengths))


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: _Ragged, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """([queries, H, E] attention, [H, queries] fp32 log-sum-exp) by PyTorch's FlashAttention."""
    bounds, longest = (sequences.query_bounds, sequences.key_bounds), (sequences.max_query, sequences.max_key)
    output, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, *longest, 0.0, causal, False, scale=scale
    )
    return output, log_sums


def flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    sequences: _Ragged,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `output` and `log_sums` may be those of a softmax over more keys than these."""
    bounds, longest = (sequences.query_bounds, sequences.key_bounds), (sequences.max_query, sequences.max_key)
    # Where dropout drew its numbers from, and a place that is never read.
    random_state, unused = torch.empty(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, log_sums, *bounds, *longest, 0.0, causal, random_state, unused, scale=scale
    )


class SharedPromptAttention(torch.autograd.Function):
    """[S, H, E] attention of packed groups, from [S, H, E] queries and [S, H', E] keys and values, H' dividing H."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float) -> Tensor:
        split = groups.num_prompt_tokens
        output, log_sums = flash_forward(query, key, value, groups.alone, causal=True, scale=scale)
        prompt_output, prompt_sums = flash_forward(
            query[split:], key[:split], value[:split], groups.under_prompt, causal=False, scale=scale
        )
        merged = torch.logaddexp(log_sums[:, split:], prompt_sums)
        # [T, H, 1] the prompt's part of each softmax.
        share = (prompt_sums - merged).exp_().T[..., None]
        output[split:] = torch.lerp(output[split:].to(share), prompt_output.to(share), share)
        log_sums[:, split:] = merged
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.scale = groups, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstreams: Any) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        groups, split = ctx.groups, ctx.groups.num_prompt_tokens
        gradient = upstreams[0].contiguous()
        gradients = flash_backward(gradient, query, key, value, output, log_sums, groups.alone, causal=True, scale=ctx.scale)
        of_completions, of_prompt_keys, of_prompt_values = flash_backward(
            gradient[split:], query[split:], key[:split], value[:split], output[split:], log_sums[:, split:].contiguous(),
            groups.under_prompt, causal=False, scale=ctx.scale,
        )  # fmt: skip
        gradients[0][split:] += of_completions
        gradients[1][:split] += of_prompt_keys
        gradients[2][:split] += of_prompt_values
        return *gradients, None, None


def uses_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether PyTorch's FlashAttention takes these, on GPUs from Ampere on."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.backends.cuda.is_flash_attention_available()
        and head_size % 8 == 0
        and head_size <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    groups: PackedGroups | None = None,
    key_values: KeyValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        query: [1, H, S, E], keys and values [1, H', S, E]; of any shape without groups.
        groups: what the row holds; the mask is ignored then.
        key_values: of completions that are being sampled; the mask is ignored then.

    Returns:
        ([1, S, H, E], None)
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if key_values is not None:
        return key_values.attend(cast(int, module.layer_idx), query, key, value, scaling), None
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if uses_flash(query.device, query.dtype, query.shape[-1]):
        rows = (states[0].transpose(0, 1) for states in (query, key, value))
        return SharedPromptAttention.apply(*rows, groups, scaling)[None], None
    number = len(groups.prompt_lengths)
    # Split in one go: the gradient of a slice is as large as the row.
    queries, keys, values = (
        states.split([*groups.prompt_lengths, *groups.group_lengths], dim=2) for states in (query, key, value)
    )
    outputs = [
        sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)[0]
        for query, key, value in zip(queries[:number], keys[:number], values[:number], strict=True)
    ]
    for group, mask in enumerate(groups.masks(query.dtype)):
        query = queries[number + group]
        key, value = (torch.cat([states[group], states[number + group]], dim=2) for states in (keys, values))
        outputs.append(sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0])
    return torch.cat(outputs, dim=1), None


def use_packed_attention(decoder: Decoder) -> None:
    """Make a decoder stack of transformers attend by `packed_attention`; calls without `groups` mask and attend as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    decoder.config._attn_implementation = PACKED_ATTENTION
