"""Log-probabilities of a linear head's distribution; logits live for 512 tokens at a time, whatever the batch.

Forward: logits of a block of tokens by cuBLAS in fp32, one Triton sweep for log-probability and entropy, and, for a frozen
head, a second product with the probabilities. It leaves for every token the mean head row of the other tokens,
`mean_t = sum over v != y of p_v W_v / (1 - p_y)`, from which the gradient of any loss of the log-probability is elementwise:
`d logprob_t / d hidden_t = (1 - p_y) (W_y - mean_t) / temperature`. That is 4 T V D operations for forward and backward. A
trainable head has its logits computed again in the backward pass, since their gradient depends on the loss: 8 T V D.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
from tars_kernels.rows import LN2, LOG2E, fill_row, load_tile, overwrite, power, scan_row, store_tile, tile, write_gradient

_LOGITS_ROWS = 512
"""Tokens whose fp32 logits exist at once: 0.32 GB at a vocabulary of 156,032."""
_PRODUCT_ROWS = 1024
"""Tokens whose probabilities meet the head in one product: enough 128-row tiles at D 4096 to fill a large GPU."""


@triton.jit
def rows_forward(
    logits,  # [rows, V]
    bias,  # [V]
    targets, logprobs, entropies, rests, peaks, totals, inverse_others,  # [rows]
    powers,  # [rows, V]
    entropy_powers,  # [rows, V]
    V, logits_stride, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_POWERS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = logits + pid * logits_stride
    scale = inverse_temperature * LOG2E
    target = tl.load(targets + pid).to(tl.int64)
    top, others, logprob, entropy, rest, peak, total = scan_row(row, bias, target, V, scale, HAS_BIAS, ROWS, LANES)
    tl.store(logprobs + pid, logprob)
    tl.store(entropies + pid, entropy)
    tl.store(rests + pid, rest)
    tl.store(peaks + pid, peak)
    tl.store(totals + pid, total)
    if HAS_POWERS:
        # The largest of the others becomes 1, so that fp16 does not lose a flat or a very confident distribution.
        tl.store(inverse_others + pid, 1.0 / tl.where(others > 0, others, 1.0))
        for start in range(0, V, ROWS * LANES):
            x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES)
            store_tile(powers + pid * V, tl.exp2((x - top) * scale), start, V, ROWS, LANES)
        overwrite(powers + pid * V, target, tl.zeros([], tl.float32), V)
        # A loop of its own: together they would not fit into registers.
        if HAS_ENTROPY:
            log_total = tl.log(total)
            for start in range(0, V, ROWS * LANES):
                e, shift = power(load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES) - peak, scale)
                store_tile(entropy_powers + pid * V, e / total * (shift * LN2 - log_total + entropy), start, V, ROWS, LANES)


@triton.jit
def _rows_backward(
    gradient,  # [rows, V]
    logits,  # [rows, V]
    bias,  # [V]
    targets, slopes, entropy_slopes, logprobs, entropies, rests, peaks, totals,  # [rows]
    V, logits_stride, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    entropy_slope = 0.0
    if HAS_ENTROPY:
        entropy_slope = tl.load(entropy_slopes + pid) * inverse_temperature
    if (slope == 0) & (entropy_slope == 0):
        fill_row(gradient + pid * V, V, ROWS, LANES)
        return
    write_gradient(
        gradient + pid * V, logits + pid * logits_stride, bias, tl.load(targets + pid).to(tl.int64), V,
        inverse_temperature * LOG2E, tl.load(peaks + pid), tl.load(totals + pid), tl.load(rests + pid),
        tl.load(logprobs + pid), tl.load(entropies + pid), slope, entropy_slope, HAS_BIAS, HAS_ENTROPY, ROWS, LANES,
    )  # fmt: skip


@triton.jit
def _hidden_gradient(
    gradient,  # [T, D]
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


def rows_gradient(
    gradient: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    row_values: Sequence[Tensor],
    inverse_temperature: float,
) -> None:
    """Write the gradient [T, V] by logits [T, V], which may be the same memory, of log-probabilities with these slopes [T].

    Args:
        row_values: log-probabilities, entropies and the rest of what the forward sweep left, all [T].
    """
    num_tokens, vocabulary = logits.shape
    if num_tokens:
        _rows_backward[(num_tokens,)](
            gradient, logits, bias, targets, slopes, entropy_slopes, *row_values, vocabulary, logits.stride(0),
            inverse_temperature, HAS_BIAS=bias is not None, HAS_ENTROPY=entropy_slopes is not None, **tile(vocabulary),
        )  # fmt: skip


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    @isolated
    def forward(ctx, hidden, weight, bias, targets, inverse_temperature, frozen_gradient, entropy_gradient):
        num_tokens = len(hidden)
        vocabulary = len(weight)
        logprobs, entropies, rests, peaks, totals, inverse_others = (
            torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(6)
        )
        means = torch.empty_like(hidden) if frozen_gradient else None
        entropy_means = torch.empty_like(hidden) if frozen_gradient and entropy_gradient else None
        for outer in _blocks(0, num_tokens, _PRODUCT_ROWS if frozen_gradient else num_tokens or 1):
            shape = (outer.stop - outer.start, vocabulary)
            powers = torch.empty(shape, dtype=hidden.dtype, device=hidden.device) if frozen_gradient else None
            entropy_powers = None if powers is None or entropy_means is None else torch.empty_like(powers)
            for inner in _blocks(outer.start, outer.stop, _LOGITS_ROWS):
                logits = product_fp32(hidden[inner], weight.T)
                written = slice(inner.start - outer.start, inner.stop - outer.start)
                rows_forward[(len(logits),)](
                    logits, bias, targets[inner], logprobs[inner], entropies[inner], rests[inner], peaks[inner],
                    totals[inner], inverse_others[inner], None if powers is None else powers[written],
                    None if entropy_powers is None else entropy_powers[written], vocabulary, vocabulary, inverse_temperature,
                    HAS_BIAS=bias is not None, HAS_POWERS=frozen_gradient, HAS_ENTROPY=entropy_powers is not None,
                    **tile(vocabulary),
                )  # fmt: skip
                del logits
            if means is not None and powers is not None:
                means[outer] = product_fp32(powers, weight).mul_(inverse_others[outer, None])
            if entropy_means is not None and entropy_powers is not None:
                entropy_means[outer] = product_fp32(entropy_powers, weight)
        if frozen_gradient:
            ctx.save_for_backward(weight, targets, rests, means, entropy_means)
        else:
            # Copies of what goes out, which may be changed there.
            row_values = (logprobs.clone(), entropies.clone(), rests, peaks, totals)
            ctx.save_for_backward(hidden, weight, bias, targets, *row_values)
        ctx.inverse_temperature = inverse_temperature
        ctx.frozen_gradient = frozen_gradient
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *upstreams: Any) -> Any:
        slopes, entropy_slopes = upstreams
        has_entropy = ctx.entropy_gradient and entropy_slopes is not None
        entropy_slopes = entropy_slopes.contiguous() if has_entropy else None
        if ctx.frozen_gradient:
            weight, targets, rests, means, entropy_means = ctx.saved_tensors
            slopes = torch.zeros_like(rests) if slopes is None else slopes.contiguous()
            gradient = torch.empty_like(means)
            num_tokens, num_features = means.shape
            if num_tokens:
                _hidden_gradient[(num_tokens,)](
                    gradient, means, entropy_means, weight, targets, slopes, entropy_slopes, rests, len(weight), num_features,
                    weight.stride(0), ctx.inverse_temperature, HAS_ENTROPY=has_entropy,
                    BLOCK=min(2048, triton.next_power_of_2(num_features)),
                )  # fmt: skip
            return gradient, None, None, None, None, None, None

        hidden, weight, bias, targets, *row_values = ctx.saved_tensors
        slopes = torch.zeros_like(row_values[0]) if slopes is None else slopes.contiguous()
        num_tokens = len(hidden)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for rows in _blocks(0, num_tokens, _LOGITS_ROWS):
            logits = product_fp32(hidden[rows], weight.T)
            gradient = logits if hidden.dtype == torch.float32 else torch.empty_like(logits, dtype=hidden.dtype)
            rows_gradient(
                gradient, logits, bias, targets[rows], slopes[rows], None if entropy_slopes is None else entropy_slopes[rows],
                [values[rows] for values in row_values], ctx.inverse_temperature,
            )  # fmt: skip
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient += product_fp32(gradient.T, hidden[rows])
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=torch.float32)
            del logits, gradient
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


def logprob_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """[T] log-probabilities and [T] entropies of checked arguments; what `linear_policy_loss` stands on."""
    recording = torch.is_grad_enabled()
    trainable_head = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    frozen_gradient = recording and hidden.requires_grad and not trainable_head
    return _LinearLogprob.apply(
        hidden.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        targets.contiguous(),
        1.0 / temperature,
        frozen_gradient,
        entropy_gradient,
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
