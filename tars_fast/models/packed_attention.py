"""Attention over packed groups, in which the completions of a prompt share it.

A row holds every prompt once, then all completions; a completion attends to its own prompt and to its own earlier tokens.
The function is registered with transformers, so that its model classes run on packed rows unchanged. A call without `groups`,
as from audio towers, gets PyTorch's scaled dot-product attention.

On CUDA in half precision a layer makes two calls of FlashAttention (`flash_attention.py`) over sequences of different
lengths, without mask or padding: every prompt and completion attends to itself, causally; the completions of a group attend to
its prompt. The two parts of a completion's softmax are merged by their log-sum-exps, and the backward pass of either part only
needs the merged result (Liu et al. 2023, ring attention). Elsewhere each group is two calls of masked attention.

Shapes: S tokens of the row, P of them in prompts, T in completions, R groups, N completions, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from tars_fast.models.flash_attention import (
    AttentionResult,
    FlashAttention,
    QueryKeyValue,
    VarlenSequences,
    find_flash_attention,
)
from tars_fast.models.key_values import KeyValues
from tars_fast.models.modules import Decoder

PACKED_ATTENTION = "tars_fast_packed"
"""The name under which transformers finds `packed_attention`."""


@dataclass(frozen=True)
class PackedGroups:
    """Where prompts and completions are in a row: P prompt tokens, group by group, then T completion tokens likewise."""

    prompt_lengths: tuple[int, ...]
    """[R] tokens of each prompt."""
    completion_lengths: tuple[tuple[int, ...], ...]
    """[R, N] tokens of each completion of each group."""
    device: torch.device

    @cached_property
    def group_lengths(self) -> tuple[int, ...]:
        """[R] tokens of all completions of each group."""
        return tuple(map(sum, self.completion_lengths))

    @cached_property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @cached_property
    def within_sequences(self) -> VarlenSequences:
        """Attention of every prompt and completion to itself."""
        lengths = [*self.prompt_lengths, *(length for group in self.completion_lengths for length in group)]
        return VarlenSequences.of(lengths, lengths, self.device, causal=True)

    @cached_property
    def to_prompts(self) -> VarlenSequences:
        """Attention of each group's completions to its prompt."""
        return VarlenSequences.of(self.group_lengths, self.prompt_lengths, self.device, causal=False)

    def masks(self, dtype: torch.dtype) -> list[Tensor]:
        """For each group the additive mask [1, 1, group, prompt + group] of its completions; made once for all layers."""
        if dtype not in self._masks:
            self._masks[dtype] = [self._mask(number, dtype) for number in range(len(self.prompt_lengths))]
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, list[Tensor]]:
        return {}

    def _mask(self, number: int, dtype: torch.dtype) -> Tensor:
        lengths = torch.tensor(self.completion_lengths[number], device=self.device)
        segments = torch.arange(len(lengths), device=self.device)
        # Without the size the host would wait for a GPU to add up the lengths.
        segments = segments.repeat_interleave(lengths, output_size=self.group_lengths[number])
        own = (segments[:, None] == segments).tril()
        seen = torch.cat([own.new_ones(len(own), self.prompt_lengths[number]), own], dim=1)
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]


class SharedPromptAttention(torch.autograd.Function):
    """[S, H, E] attention of packed groups, from [S, H, E] queries and [S, H', E] keys and values, H' dividing H."""

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd calls it with what `apply` is called with
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float, flash: FlashAttention
    ) -> Tensor:
        split = groups.num_prompt_tokens
        output, log_sums = flash.forward(QueryKeyValue(query, key, value), groups.within_sequences, scale)
        to_prompts = QueryKeyValue(query[split:], key[:split], value[:split])
        prompt_output, prompt_sums = flash.forward(to_prompts, groups.to_prompts, scale)
        merged = torch.logaddexp(log_sums[:, split:], prompt_sums)
        # [T, H, 1] the prompt's share of each softmax.
        share = (prompt_sums - merged).exp_().T[..., None]
        output[split:] = torch.lerp(output[split:].to(share), prompt_output.to(share), share)
        log_sums[:, split:] = merged
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.scale, ctx.flash = groups, scale, flash
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstreams: Any) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        groups, split = ctx.groups, ctx.groups.num_prompt_tokens
        gradient = upstreams[0].contiguous()
        states, result = QueryKeyValue(query, key, value), AttentionResult(output, log_sums)
        gradients = ctx.flash.backward(gradient, states, result, groups.within_sequences, ctx.scale)
        states = QueryKeyValue(query[split:], key[:split], value[:split])
        result = AttentionResult(output[split:], log_sums[:, split:].contiguous())
        through_prompts = ctx.flash.backward(gradient[split:], states, result, groups.to_prompts, ctx.scale)
        gradients.query[split:] += through_prompts.query
        gradients.key[:split] += through_prompts.key
        gradients.value[:split] += through_prompts.value
        return *gradients, None, None, None


def packed_attention(  # noqa: PLR0913  # transformers calls it with these
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
    """Attention as transformers' `AttentionInterface` calls it, for the trainer, for sampling, or plain.

    Args:
        module: the layer's attention, whose number `key_values` needs.
        query: [1, H, S, E]; `key` and `value` are [1, H', S, E]. Without `groups` any batch size.
        attention_mask: used where neither `groups` nor `key_values` is given.
        groups: prompts and completions in the row.
        key_values: the KV cache while completions are sampled.

    Returns:
        ([1, S, H, E], None)
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if key_values is not None:
        return key_values.attend(cast(int, module.layer_idx), query, key, value, scaling), None
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    flash = find_flash_attention(query.device, query.dtype, query.shape[-1])
    if flash is not None:
        rows = (states[0].transpose(0, 1) for states in (query, key, value))
        return SharedPromptAttention.apply(*rows, groups, scaling, flash)[None], None
    number = len(groups.prompt_lengths)
    # One split instead of slices, because the gradient of every slice would be as large as the row.
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
    """Make a decoder of transformers use `packed_attention`; calls without `groups` and `key_values` work as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    decoder.config._attn_implementation = PACKED_ATTENTION
