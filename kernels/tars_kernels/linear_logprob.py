"""Log-probabilities of a linear head's distribution; logits exist for 512 tokens at a time, whatever the batch.

Forward: logits of a block of tokens by cuBLAS in fp32, one pass over them for log-probability and entropy (`rows.py`), and,
for a frozen head, a second product with the probabilities. It leaves for every token the mean head row of the other tokens,
`mean_t = sum over v != y of p_v W_v / (1 - p_y)`, from which the gradient of any loss of the log-probability is elementwise:
`d logprob_t / d hidden_t = (1 - p_y) (W_y - mean_t) / temperature`. That is 4 T V D operations for forward and backward. A
trainable head has its logits computed again in the backward pass, since their gradient depends on the loss: 8 T V D.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tars_kernels import reference
from tars_kernels.backend import operator, runs_kernels
from tars_kernels.checks import (
    check_head,
    check_rows_contiguous,
    check_same_device,
    check_softcap,
    check_targets,
    check_temperature,
    head_parameters,
    kept_tokens,
)
from tars_kernels.rows import LogitRows, RowPowers, RowSlopes, RowTerms, padded_rows, sweep_rows, write_rows_gradient
from tars_kernels.vocabulary_parallel import HeadOptions, HeadTerms, chosen_terms, whole_size, whole_vocabulary

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
    targets, slopes, entropy_slopes, sum_slopes, rests, cap_slopes,  # [T]
    V, D, weight_stride, inverse_temperature,
    HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`cap_slopes`: derivative of the target's capped logit by what it was before."""
    pid = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + pid).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    rest = tl.load(rests + pid)
    pull = slope * rest
    push = pull
    if HAS_SUM:
        sum_slope = tl.load(sum_slopes + pid) * inverse_temperature
        pull += sum_slope * (1.0 - rest)
        push -= sum_slope * rest
        slope = tl.where(sum_slope != 0, 1.0, slope)
    if HAS_SOFTCAP:
        pull *= tl.load(cap_slopes + pid)
    # A target outside the vocabulary has a `rest` of NaN; its row is never read.
    readable = tl.where((target >= 0) & (target < V), D, 0)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        chosen = columns < D
        own = tl.load(weight + target * weight_stride + columns, mask=columns < readable, other=0.0).to(tl.float32)
        mean = tl.load(means + pid * D + columns, mask=chosen, other=0.0).to(tl.float32)
        g = pull * own - push * mean
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
    softcap: float,
    frozen_gradient: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logsumexp, `RowTerms`, and the mean head rows of the other tokens [T, D] for log-probability and entropy.

    The last two are empty where no gradient wants them.

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
            rows = LogitRows(logits, bias, targets[inner], inverse_temperature, softcap)
            sweep_rows(rows, terms.part(inner), row_powers)
            del logits, rows
        if powers is not None:
            means[outer] = product_fp32(powers, weight).mul_(inverse_others[outer, None])
        if entropy_powers is not None:
            entropy_means[outer] = product_fp32(entropy_powers, weight)
    return _logsumexps(terms, inverse_temperature), *terms, means, entropy_means


def _logsumexps(terms: RowTerms, inverse_temperature: float) -> Tensor:
    return terms.peaks * inverse_temperature + terms.totals.log()


def _forward_outputs(hidden, weight, bias, targets, *options):
    frozen_gradient, entropy_gradient = options[-2:]
    terms = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in ("logsumexps", *RowTerms._fields))
    wanted = frozen_gradient, frozen_gradient and entropy_gradient
    return *terms, *(hidden.new_empty(hidden.shape[0] if gradient else 0, hidden.shape[1]) for gradient in wanted)


def _frozen_gradient(  # noqa: PLR0913
    means: Tensor,
    entropy_means: Tensor,
    weight: Tensor,
    targets: Tensor,
    slopes: Sequence[Tensor | None],
    terms: Sequence[Tensor],
    inverse_temperature: float,
    softcap: float,
) -> Tensor:
    """[T, D] by the hidden states under a frozen head."""
    gradient = torch.empty_like(means)
    row_slopes, row_terms = _row_slopes(slopes), RowTerms(*terms)
    cap_slopes = None
    if softcap:
        # The target's logit is what its log-probability is the logarithm of.
        logits = (row_terms.logprobs + _logsumexps(row_terms, inverse_temperature)) / inverse_temperature
        cap_slopes = 1.0 - (logits / softcap).square()
    num_tokens, num_features = means.shape
    if num_tokens:
        _hidden_gradient[(num_tokens,)](
            gradient, means, entropy_means, weight, targets, *row_slopes, row_terms.rests, cap_slopes, len(weight),
            num_features, weight.stride(0), inverse_temperature, HAS_ENTROPY=row_slopes.entropies is not None,
            HAS_SUM=row_slopes.logsumexps is not None, HAS_SOFTCAP=cap_slopes is not None,
            BLOCK=min(2048, triton.next_power_of_2(num_features)),
        )  # fmt: skip
    return gradient


def _row_slopes(slopes: Sequence[Tensor | None]) -> RowSlopes:
    logprobs, entropies, logsumexps = (None if each is None else each.contiguous() for each in slopes)
    assert logprobs is not None, "made of zeros where it is not wanted"
    return RowSlopes(logprobs, entropies, logsumexps)


def _trainable_gradients(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    terms: Sequence[Tensor],
    slopes: Sequence[Tensor | None],
    inverse_temperature: float,
    softcap: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """By hidden states, head and bias, empty where not needed; logits are computed again."""
    row_terms, row_slopes = RowTerms(*terms), _row_slopes(slopes)

    def write(tokens: slice, written: Tensor) -> None:
        rows = LogitRows(logits_fp32(hidden[tokens], weight), bias, targets[tokens], inverse_temperature, softcap)
        write_rows_gradient(written, rows, row_terms.part(tokens), row_slopes.part(tokens))

    return head_gradients(hidden, weight, bias, needs, write)


def head_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], write: Callable[[slice, Tensor], None]
) -> list[Tensor]:
    """By hidden states, head and bias, empty where not needed.

    Args:
        write: puts the gradient by the logits of some tokens into the memory that it is handed.
    """
    needs_hidden, needs_weight, needs_bias = needs
    hidden_gradient = torch.empty_like(hidden if needs_hidden else hidden[:0])
    weight_gradient = empty_gradient(weight if needs_weight else weight[:0], len(hidden))
    bias_gradient = torch.zeros(len(weight) if needs_bias else 0, dtype=torch.float32, device=hidden.device)
    for outer in blocks(0, len(hidden), GRADIENT_ROWS):
        gradient = padded_rows(outer.stop - outer.start, len(weight), hidden.dtype, hidden.device)
        for tokens in blocks(outer.start, outer.stop, LOGITS_ROWS):
            write(tokens, gradient[tokens.start - outer.start : tokens.stop - outer.start])
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
    return head_gradients_outputs(hidden, weight, bias, rest[-1])


def head_gradients_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    """Shapes of what `head_gradients` returns."""
    like = hidden, weight, weight.new_empty(weight.shape[0], dtype=torch.float32) if bias is None else bias
    return [one.new_empty(one.shape[0] if need else 0, *one.shape[1:]) for one, need in zip(like, needs, strict=True)]


def _save_forward(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.inverse_temperature, ctx.softcap, ctx.frozen_gradient, ctx.entropy_gradient = inputs
    terms = RowTerms(*output[1 : 1 + len(RowTerms._fields)])
    if ctx.frozen_gradient:
        ctx.save_for_backward(weight, targets, *output[1:])
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, *terms)
    ctx.mark_non_differentiable(*output[2 if not ctx.entropy_gradient else 3 :])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, sum_slopes, slopes, entropy_slopes, *_):
    if not ctx.entropy_gradient:
        entropy_slopes = None
    no_gradients = (None,) * 5
    any_slopes = next((each for each in (slopes, entropy_slopes, sum_slopes) if each is not None), None)
    if any_slopes is None:
        return None, None, None, *no_gradients
    all_slopes = [torch.zeros_like(any_slopes) if slopes is None else slopes, entropy_slopes, sum_slopes]
    if ctx.frozen_gradient:
        weight, targets, *terms, means, entropy_means = ctx.saved_tensors
        gradient = _frozen_gradient_operator(
            means, entropy_means, weight, targets, all_slopes, terms, ctx.inverse_temperature, ctx.softcap
        )
        return gradient, None, None, *no_gradients
    hidden, weight, bias, targets, *terms = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = _trainable_gradients_operator(
        hidden, weight, bias, targets, terms, all_slopes, ctx.inverse_temperature, ctx.softcap, needs
    )
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *no_gradients


_frozen_gradient_operator = operator(
    "linear_logprob_frozen_gradient", _frozen_gradient, lambda means, *_: torch.empty_like(means)
)
_trainable_gradients_operator = operator("linear_logprob_gradients", _trainable_gradients, _trainable_gradients_outputs)
_forward_operator = operator("linear_logprob", _forward, _forward_outputs)
_forward_operator.register_autograd(_forward_backward, setup_context=_save_forward)


def head_terms(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions) -> HeadTerms:
    """Of every token; arguments are checked already. `linear_policy_loss` starts from it."""
    recording = torch.is_grad_enabled()
    trainable_head = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    bias = None if bias is None else bias.contiguous()

    def part_of(hidden: Tensor, targets: Tensor) -> HeadTerms:
        logsumexps, logprobs, entropies, *_ = _forward_operator(
            hidden.contiguous(),
            weight,
            bias,
            targets.contiguous(),
            1.0 / options.temperature,
            options.softcap,
            recording and hidden.requires_grad and not trainable_head,
            options.entropy_gradient,
        )
        # Copies, because the gradient needs the originals and the caller may change these.
        return HeadTerms(logprobs.clone(), entropies.clone(), logsumexps.clone())

    return whole_vocabulary(part_of, hidden, targets, len(weight), options.group)


def linear_logprob(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
    group: ProcessGroup | None = None,
    return_entropy: bool = False,
    return_logsumexp: bool = False,
    entropy_gradient: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    if not runs_kernels(hidden):
        return reference.linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, mask=mask, ignore_index=ignore_index, softcap=softcap,
            group=group, return_entropy=return_entropy, return_logsumexp=return_logsumexp, entropy_gradient=entropy_gradient,
        )  # fmt: skip
    weight, bias = head_parameters(weight, bias)
    check_head(hidden, weight, bias, allow_float64=False)
    check_same_device(("hidden", hidden), targets=targets, mask=mask)
    check_rows_contiguous("weight", weight)
    keep = kept_tokens(targets, mask, ignore_index)
    check_targets(targets, len(hidden), whole_size(weight, group), keep)
    check_temperature(temperature)
    hidden = hidden.to(weight.dtype)
    check_softcap(softcap)
    options = HeadOptions(temperature, softcap or 0.0, entropy_gradient, group)
    return chosen_terms(
        lambda hidden, targets: head_terms(hidden, weight, bias, targets, options), hidden, targets, keep,
        (True, return_entropy, return_logsumexp),
    )  # fmt: skip


linear_logprob.__doc__ = reference.linear_logprob.__doc__
