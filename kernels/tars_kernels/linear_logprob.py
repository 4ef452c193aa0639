"""Log-probabilities of a linear head's distribution; logits exist for 512 tokens at a time, whatever the batch.

Forward: logits of a block of tokens by cuBLAS in fp32, one pass over them for log-probability and entropy (`rows.py`), and,
for a frozen head, a second product with the probabilities. It leaves for every token the mean head row of the other tokens,
`mean_t = sum over v != y of p_v W_v / (1 - p_y)`, from which the gradient of any loss of the log-probability is elementwise:
`d logprob_t / d hidden_t = (1 - p_y) (W_y - mean_t) / temperature`. That is 4 T V D operations for forward and backward. A
trainable head has its logits computed again in the backward pass, since their gradient depends on the loss: 8 T V D.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tars_kernels import reference
from tars_kernels.backend import isolated, runs_kernels
from tars_kernels.checks import (
    check_head,
    check_rows_contiguous,
    check_same_device,
    check_targets,
    check_temperature,
    head_parameters,
)
from tars_kernels.rows import LogitRows, RowPowers, RowTerms, sweep_rows, write_rows_gradient

LOGITS_ROWS = 512
"""Tokens whose fp32 logits exist at once: 0.32 GB at a vocabulary of 156,032."""
PRODUCT_ROWS = 1024
"""Tokens whose probabilities meet the head in one product: enough 128-row tiles at D 4096 to fill a large GPU."""


@triton.jit
def _hidden_gradient(  # noqa: PLR0913
    gradient,  # [T, D], written
    means,  # [T, D]
    entropy_means,  # [T, D]
    weight,  # [V, D]
    targets, slopes, entropy_slopes, rests,  # [T]
    V, D, weight_stride, inverse_temperature,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + pid).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    pull = slope * tl.load(rests + pid)
    # A target outside the vocabulary has a `rest` of NaN; its row is never read.
    readable = tl.where((target >= 0) & (target < V), D, 0)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        chosen = columns < D
        own = tl.load(weight + target * weight_stride + columns, mask=columns < readable, other=0.0).to(tl.float32)
        g = pull * (own - tl.load(means + pid * D + columns, mask=chosen, other=0.0).to(tl.float32))
        # What a zero slope multiplies may be NaN.
        g = tl.where(slope == 0, 0.0, g)
        if HAS_ENTROPY:
            entropy_slope = tl.load(entropy_slopes + pid) * inverse_temperature
            e = tl.load(entropy_means + pid * D + columns, mask=chosen, other=0.0).to(tl.float32)
            g -= tl.where(entropy_slope == 0, 0.0, entropy_slope * e)
        tl.store(gradient + pid * D + columns, g.to(gradient.dtype.element_ty), mask=chosen)


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, accumulated and returned in fp32; only CUDA's products do so without copies of their operands."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class _Options(NamedTuple):
    inverse_temperature: float
    frozen_gradient: bool
    """The gradient by hidden states is wanted, and none by the head: what it needs is taken in the forward pass."""
    entropy_gradient: bool


class _LinearLogprob(torch.autograd.Function):
    """([T] log-probabilities, [T] entropies) from hidden states."""

    @staticmethod
    @isolated
    def forward(ctx, hidden, weight, bias, targets, options):
        frozen_gradient, entropy_gradient = options.frozen_gradient, options.entropy_gradient
        num_tokens = len(hidden)
        vocabulary = len(weight)
        terms = RowTerms.empty(num_tokens, hidden.device)
        inverse_others = torch.empty_like(terms.logprobs)
        means = torch.empty_like(hidden) if frozen_gradient else None
        entropy_means = torch.empty_like(hidden) if frozen_gradient and entropy_gradient else None
        for outer in blocks(0, num_tokens, PRODUCT_ROWS if frozen_gradient else num_tokens or 1):
            shape = (outer.stop - outer.start, vocabulary)
            powers = torch.empty(shape, dtype=hidden.dtype, device=hidden.device) if frozen_gradient else None
            entropy_powers = None if powers is None or entropy_means is None else torch.empty_like(powers)
            for inner in blocks(outer.start, outer.stop, LOGITS_ROWS):
                logits = product_fp32(hidden[inner], weight.T)
                written = slice(inner.start - outer.start, inner.stop - outer.start)
                row_powers = None
                if powers is not None:
                    row_powers = RowPowers(
                        inverse_others[inner], powers[written], None if entropy_powers is None else entropy_powers[written]
                    )
                rows = LogitRows(logits, bias, targets[inner], options.inverse_temperature)
                sweep_rows(rows, terms.part(inner), row_powers)
                del logits, rows
            if means is not None and powers is not None:
                means[outer] = product_fp32(powers, weight).mul_(inverse_others[outer, None])
            if entropy_means is not None and entropy_powers is not None:
                entropy_means[outer] = product_fp32(entropy_powers, weight)
        if frozen_gradient:
            ctx.save_for_backward(weight, targets, terms.rests, means, entropy_means)
        else:
            # Copies of what is returned, because the caller may change it.
            saved = terms._replace(logprobs=terms.logprobs.clone(), entropies=terms.entropies.clone())
            ctx.save_for_backward(hidden, weight, bias, targets, *saved)
        ctx.options = options
        if not entropy_gradient:
            ctx.mark_non_differentiable(terms.entropies)
        ctx.set_materialize_grads(False)
        return terms.logprobs, terms.entropies

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        slopes, entropy_slopes = upstreams
        inverse_temperature = ctx.options.inverse_temperature
        has_entropy = ctx.options.entropy_gradient and entropy_slopes is not None
        entropy_slopes = entropy_slopes.contiguous() if has_entropy else None
        if ctx.options.frozen_gradient:
            weight, targets, rests, means, entropy_means = ctx.saved_tensors
            slopes = torch.zeros_like(rests) if slopes is None else slopes.contiguous()
            gradient = torch.empty_like(means)
            num_tokens, num_features = means.shape
            if num_tokens:
                _hidden_gradient[(num_tokens,)](
                    gradient, means, entropy_means, weight, targets, slopes, entropy_slopes, rests, len(weight), num_features,
                    weight.stride(0), inverse_temperature, HAS_ENTROPY=has_entropy,
                    BLOCK=min(2048, triton.next_power_of_2(num_features)),
                )  # fmt: skip
            return gradient, None, None, None, None

        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        terms = RowTerms(*saved)
        slopes = torch.zeros_like(terms.logprobs) if slopes is None else slopes.contiguous()
        num_tokens = len(hidden)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for tokens in blocks(0, num_tokens, LOGITS_ROWS):
            logits = product_fp32(hidden[tokens], weight.T)
            gradient = logits if hidden.dtype == torch.float32 else torch.empty_like(logits, dtype=hidden.dtype)
            rows = LogitRows(logits, bias, targets[tokens], inverse_temperature)
            block_entropy_slopes = None if entropy_slopes is None else entropy_slopes[tokens]
            write_rows_gradient(gradient, rows, terms.part(tokens), slopes[tokens], block_entropy_slopes)
            if hidden_gradient is not None:
                hidden_gradient[tokens] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient += product_fp32(gradient.T, hidden[tokens])
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=torch.float32)
            del logits, gradient, rows
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None, None,
        )  # fmt: skip


def logprob_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """([T] log-probabilities, [T] entropies); arguments are checked already. `linear_policy_loss` starts from it."""
    recording = torch.is_grad_enabled()
    trainable_head = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    frozen_gradient = recording and hidden.requires_grad and not trainable_head
    return _LinearLogprob.apply(
        hidden.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        targets.contiguous(),
        _Options(1.0 / temperature, frozen_gradient, entropy_gradient),
    )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if not runs_kernels(hidden):
        return reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, return_entropy=return_entropy
        )
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=False)
    check_same_device(("hidden", hidden), targets=targets)
    check_rows_contiguous("weight", weight)
    check_targets(targets, len(hidden), len(weight))
    check_temperature(temperature)
    logprobs, entropy = logprob_and_entropy(hidden, weight, bias, targets, temperature, entropy_gradient=False)
    return (logprobs, entropy) if return_entropy else logprobs


linear_logprob.__doc__ = reference.linear_logprob.__doc__
