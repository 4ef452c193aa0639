"""Log-probabilities of a linear head's distribution; logits exist for 512 tokens at a time, whatever the batch.

Forward: logits of a block of tokens by cuBLAS in fp32, one pass over them for log-probability and entropy (`rows.py`), and,
for a frozen head, a second product with the probabilities. It leaves for every token the mean head row of the other tokens,
`mean_t = sum over v != y of p_v W_v / (1 - p_y)`, from which the gradient of any loss of the log-probability is elementwise:
`d logprob_t / d hidden_t = (1 - p_y) (W_y - mean_t) / temperature`. That is 4 T V D operations for forward and backward. A
trainable head has its logits computed again in the backward pass, since their gradient depends on the loss: 8 T V D.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tars_kernels import reference
from tars_kernels.backend import operator, runs_kernels
from tars_kernels.checks import (
    check_head,
    check_rows_contiguous,
    check_same_device,
    check_targets,
    check_temperature,
    head_parameters,
)
from tars_kernels.rows import LogitRows, RowPowers, RowTerms, padded_rows, sweep_rows, write_rows_gradient

LOGITS_ROWS = 512
"""Tokens whose fp32 logits exist at once: 0.32 GB at a vocabulary of 156,032."""
PRODUCT_ROWS = 1024
"""Tokens whose probabilities meet the head in one product: enough 128-row tiles at D 4096 to fill a large GPU."""
GRADIENT_ROWS = 4096
"""Tokens whose gradient meets a trainable head in one product: every one reads and writes its fp32 gradient [V, D], 5 GB."""


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


def product_fp32(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right`, accumulated and returned in fp32; only CUDA's products do so without copies of their operands."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product_fp32(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add `left @ right` to `total` in place, in fp32; the first of several products is written over what stands there."""
    beta = 0.0 if first else 1.0
    if left.is_cuda and left.dtype != torch.float32:
        # As a batch of one: `addmm` takes no fp32 total for bf16 factors in every version.
        batch = total[None]
        torch.baddbmm(batch, left[None], right[None], out_dtype=torch.float32, beta=beta, out=batch)
    else:
        torch.addmm(total, left.float(), right.float(), beta=beta, out=total)


def logits_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    """[T, V] `hidden @ weight.T` in fp32, in rows that begin on whole chunks of memory."""
    return product_fp32(hidden, weight.T, padded_rows(len(hidden), len(weight), torch.float32, hidden.device))


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _forward(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    inverse_temperature: float,
    frozen_gradient: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowTerms`, and the mean head rows of the other tokens [T, D] for log-probability and entropy, empty where not wanted.

    Args:
        frozen_gradient: the gradient by hidden states is wanted, and none by the head: take what it needs here.
    """
    num_tokens, width = hidden.shape
    vocabulary = len(weight)
    terms = RowTerms.empty(num_tokens, hidden.device)
    inverse_others = torch.empty_like(terms.logprobs)
    means = torch.empty(num_tokens if frozen_gradient else 0, width, dtype=hidden.dtype, device=hidden.device)
    entropy_means = torch.empty_like(means[: num_tokens if entropy_gradient else 0])
    for outer in blocks(0, num_tokens, PRODUCT_ROWS if frozen_gradient else num_tokens or 1):
        shape = (outer.stop - outer.start, vocabulary, hidden.dtype, hidden.device)
        powers = padded_rows(*shape) if frozen_gradient else None
        entropy_powers = padded_rows(*shape) if frozen_gradient and entropy_gradient else None
        for inner in blocks(outer.start, outer.stop, LOGITS_ROWS):
            logits = logits_fp32(hidden[inner], weight)
            written = slice(inner.start - outer.start, inner.stop - outer.start)
            row_powers = None
            if powers is not None:
                row_powers = RowPowers(
                    inverse_others[inner], powers[written], None if entropy_powers is None else entropy_powers[written]
                )
            rows = LogitRows(logits, bias, targets[inner], inverse_temperature)
            sweep_rows(rows, terms.part(inner), row_powers)
            del logits, rows
        if powers is not None:
            means[outer] = product_fp32(powers, weight).mul_(inverse_others[outer, None])
        if entropy_powers is not None:
            entropy_means[outer] = product_fp32(entropy_powers, weight)
    return *terms, means, entropy_means


def _forward_outputs(hidden, weight, bias, targets, inverse_temperature, frozen_gradient, entropy_gradient):  # noqa: PLR0913
    terms = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in RowTerms._fields)
    wanted = frozen_gradient, frozen_gradient and entropy_gradient
    return *terms, *(hidden.new_empty(hidden.shape[0] if gradient else 0, hidden.shape[1]) for gradient in wanted)


def _frozen_gradient(  # noqa: PLR0913
    means: Tensor,
    entropy_means: Tensor,
    weight: Tensor,
    targets: Tensor,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    rests: Tensor,
    inverse_temperature: float,
) -> Tensor:
    """[T, D] by the hidden states under a frozen head."""
    gradient = torch.empty_like(means)
    num_tokens, num_features = means.shape
    if num_tokens:
        _hidden_gradient[(num_tokens,)](
            gradient, means, entropy_means, weight, targets, slopes.contiguous(),
            None if entropy_slopes is None else entropy_slopes.contiguous(), rests, len(weight), num_features,
            weight.stride(0), inverse_temperature, HAS_ENTROPY=entropy_slopes is not None,
            BLOCK=min(2048, triton.next_power_of_2(num_features)),
        )  # fmt: skip
    return gradient


def _trainable_gradients(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    terms: Sequence[Tensor],
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    inverse_temperature: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """By hidden states, head and bias, empty where not needed; logits are computed again."""
    row_terms = RowTerms(*terms)
    slopes = slopes.contiguous()
    entropy_slopes = None if entropy_slopes is None else entropy_slopes.contiguous()
    needs_hidden, needs_weight, needs_bias = needs
    hidden_gradient = torch.empty_like(hidden if needs_hidden else hidden[:0])
    weight_gradient = empty_gradient(weight if needs_weight else weight[:0], len(hidden))
    bias_gradient = torch.zeros(len(weight) if needs_bias else 0, dtype=torch.float32, device=hidden.device)
    for outer in blocks(0, len(hidden), GRADIENT_ROWS):
        gradient = padded_rows(outer.stop - outer.start, len(weight), hidden.dtype, hidden.device)
        for tokens in blocks(outer.start, outer.stop, LOGITS_ROWS):
            logits = logits_fp32(hidden[tokens], weight)
            written = gradient[tokens.start - outer.start : tokens.stop - outer.start]
            rows = LogitRows(logits, bias, targets[tokens], inverse_temperature)
            block_entropy_slopes = None if entropy_slopes is None else entropy_slopes[tokens]
            write_rows_gradient(written, rows, row_terms.part(tokens), slopes[tokens], block_entropy_slopes)
            del logits, rows
        if needs_hidden:
            torch.mm(gradient, weight, out=hidden_gradient[outer])
        if needs_weight:
            add_product_fp32(weight_gradient, gradient.T, hidden[outer], first=outer.start == 0)
        if needs_bias:
            bias_gradient += gradient.sum(0, dtype=torch.float32)
        del gradient
    return [hidden_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(torch.float32 if bias is None else bias.dtype)]


def empty_gradient(weight: Tensor, num_tokens: int) -> Tensor:
    """fp32 memory for the gradient of `weight`, which the first product of tokens writes; zeros where there are no tokens."""
    return (torch.empty_like if num_tokens else torch.zeros_like)(weight, dtype=torch.float32)


def _trainable_gradients_outputs(hidden, weight, bias, *rest):
    needs = rest[-1]
    like = hidden, weight, weight.new_empty(weight.shape[0], dtype=torch.float32) if bias is None else bias
    return [one.new_empty(one.shape[0] if need else 0, *one.shape[1:]) for one, need in zip(like, needs, strict=True)]


def _save_forward(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.inverse_temperature, ctx.frozen_gradient, ctx.entropy_gradient = inputs
    terms = RowTerms(*output[: len(RowTerms._fields)])
    if ctx.frozen_gradient:
        ctx.save_for_backward(weight, targets, terms.rests, *output[len(terms) :])
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, *terms)
    ctx.mark_non_differentiable(*output[1 if not ctx.entropy_gradient else 2 :])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, slopes, entropy_slopes, *_):
    if not ctx.entropy_gradient:
        entropy_slopes = None
    no_gradients = None, None, None, None
    if slopes is None and entropy_slopes is None:
        return None, None, None, *no_gradients
    slopes = torch.zeros_like(entropy_slopes) if slopes is None else slopes
    if ctx.frozen_gradient:
        weight, targets, rests, means, entropy_means = ctx.saved_tensors
        gradient = _frozen_gradient_operator(
            means, entropy_means, weight, targets, slopes, entropy_slopes, rests, ctx.inverse_temperature
        )
        return gradient, None, None, *no_gradients
    hidden, weight, bias, targets, *terms = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = _trainable_gradients_operator(
        hidden, weight, bias, targets, terms, slopes, entropy_slopes, ctx.inverse_temperature, needs
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *no_gradients


_frozen_gradient_operator = operator(
    "linear_logprob_frozen_gradient", _frozen_gradient, lambda means, *_: torch.empty_like(means)
)
_trainable_gradients_operator = operator("linear_logprob_gradients", _trainable_gradients, _trainable_gradients_outputs)
_forward_operator = operator("linear_logprob", _forward, _forward_outputs)
_forward_operator.register_autograd(_forward_backward, setup_context=_save_forward)


def logprob_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """([T] log-probabilities, [T] entropies); arguments are checked already. `linear_policy_loss` starts from it."""
    recording = torch.is_grad_enabled()
    trainable_head = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    frozen_gradient = recording and hidden.requires_grad and not trainable_head
    logprobs, entropies, *_ = _forward_operator(
        hidden.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        targets.contiguous(),
        1.0 / temperature,
        frozen_gradient,
        entropy_gradient,
    )
    # Copies, because the gradient needs the originals and the caller may change these.
    return logprobs.clone(), entropies.clone()


def linear_logprob(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if not runs_kernels(hidden):
        return reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, return_entropy=return_entropy,
            entropy_gradient=entropy_gradient,
        )  # fmt: skip
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=False)
    check_same_device(("hidden", hidden), targets=targets)
    check_rows_contiguous("weight", weight)
    check_targets(targets, len(hidden), len(weight))
    check_temperature(temperature)
    logprobs, entropy = logprob_and_entropy(hidden, weight, bias, targets, temperature, entropy_gradient=entropy_gradient)
    return (logprobs, entropy) if return_entropy else logprobs


linear_logprob.__doc__ = reference.linear_logprob.__doc__
