"""Token distillation between two streams of hidden states; logits of both exist for 512 tokens at a time.

Forward: for a block of tokens the logits of student and teacher by cuBLAS in fp32, one kernel over both (`_divergence_rows`),
and, for a frozen head, a third product with what it writes, the derivative of each token's divergence by its logits. It leaves
the derivative by the hidden state, [T, D], so that the backward of any loss of the divergences is elementwise: 6 T V D
operations in all. A trainable head has both logits computed again in the backward pass, since its gradient depends on the loss,
whose weights may depend on all divergences of a sequence: 12 T V D. Of a head in parts, on the processes of a group, each block
is gone through step by step, between which processes exchange some numbers a token; no product is taken twice for it.

With x a token's logits over the temperature, p the student's and q the teacher's distribution, the derivatives by x are
reverse_kl: p (r - mean of r under p), r = log p - log q; forward_kl: p - q; jsd: (1 - beta) p (s - mean of s under p),
s = log p - log (beta q + (1 - beta) p).

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from tars_kernels import reference
from tars_kernels.backend import isolated, operator, runs_kernels
from tars_kernels.checks import check_rows_contiguous, check_temperature
from tars_kernels.divergence import LOWEST_LOGIT, Distillation, DistillationLoss, DistillationSettings, Heads
from tars_kernels.linear_logprob import (
    LOGITS_ROWS,
    PRODUCT_ROWS,
    blocks,
    head_gradients,
    head_gradients_outputs,
    logits_fp32,
    product_fp32,
)
from tars_kernels.objective import shows_settings
from tars_kernels.rows import LN2, LOG2E, is_aligned, load_tile, padded_rows, power, store_tile
from tars_kernels.vocabulary_parallel import gathered, shared_by_parts, sum_of_parts

_LOWEST = tl.constexpr(LOWEST_LOGIT)
_REVERSE, _FORWARD, _JSD = (tl.constexpr(kind) for kind in (0, 1, 2))
_KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
_SMALLEST = tl.constexpr(1.0e-30)
"""Probabilities below add nothing to a divergence that fp32 could show, and their quotients may not be finite."""


def tile(vocabulary: int) -> dict[str, int]:
    """Tile and warps; half of what a row of logits takes alone, for there are two, and as wide as a store of bf16 wants it."""
    if vocabulary <= 4096:
        return {"ROWS": 1, "LANES": max(128, min(1024, triton.next_power_of_2(vocabulary))), "num_warps": 4}
    return {"ROWS": 2, "LANES": 4096, "num_warps": 16}


@triton.jit
def _finite(x):
    # By a comparison that lets NaN through.
    return tl.where(x < _LOWEST, _LOWEST, x)


@triton.jit
def _scan_rows(  # noqa: PLR0913
    row, bias, teacher_row, teacher_bias, V, scale,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, ALIGNED: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One sweep over a token's logits x and y of student and teacher; `scale` turns logits into powers of 2.

    Returns:
        top, total: the student's largest logit, and the sum of 2 ** ((x - top) * scale).
        teacher_top, teacher_total: the same of the teacher.
        gap: mean of (x - top) - (y - teacher_top), in logits: under the student's distribution, for forward_kl the teacher's.
    """
    tops = tl.full([LANES], _LOWEST, tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    teacher_tops = tl.full([LANES], _LOWEST, tl.float32)
    teacher_sums = tl.zeros([LANES], tl.float32)
    gaps = tl.zeros([LANES], tl.float32)
    for start in range(0, V, ROWS * LANES):
        x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, KEEP)
        y = load_tile(teacher_row, teacher_bias, start, V, HAS_TEACHER_BIAS, ROWS, LANES, 0, ALIGNED, KEEP)
        higher = tl.maximum(tops, tl.max(x, 0))
        teacher_higher = tl.maximum(teacher_tops, tl.max(y, 0))
        e, _ = power(x - higher[None, :], scale)
        f, _ = power(y - teacher_higher[None, :], scale)
        factor, _ = power(tops - higher, scale)
        teacher_factor, _ = power(teacher_tops - teacher_higher, scale)
        if KIND != _JSD:
            gap = (_finite(x) - higher[None, :]) - (_finite(y) - teacher_higher[None, :])
            shift = (tops - higher) - (teacher_tops - teacher_higher)
            if KIND == _REVERSE:
                gaps = (gaps + shift * sums) * factor + tl.sum(e * gap, 0)
            else:
                gaps = (gaps + shift * teacher_sums) * teacher_factor + tl.sum(f * gap, 0)
        sums = sums * factor + tl.sum(e, 0)
        teacher_sums = teacher_sums * teacher_factor + tl.sum(f, 0)
        tops = higher
        teacher_tops = teacher_higher
    top = tl.max(tops, 0)
    teacher_top = tl.max(teacher_tops, 0)
    factor, _ = power(tops - top, scale)
    teacher_factor, _ = power(teacher_tops - teacher_top, scale)
    shift = (tops - top) - (teacher_tops - teacher_top)
    total = tl.sum(sums * factor, 0)
    teacher_total = tl.sum(teacher_sums * teacher_factor, 0)
    if KIND == _REVERSE:
        gap = tl.sum((gaps + shift * sums) * factor, 0) / total
    else:
        gap = tl.sum((gaps + shift * teacher_sums) * teacher_factor, 0) / teacher_total
    return top, total, teacher_top, teacher_total, gap


@triton.jit
def _mixture_terms(x, y, scale, inverse_total, teacher_inverse_total, beta):
    """Of logits less their row's largest: p, q, and the logarithms to base 2 of p / m and q / m, finite where p or q is 0."""
    e, _ = power(x, scale)
    f, _ = power(y, scale)
    p = e * inverse_total
    q = f * teacher_inverse_total
    inverse = 1.0 / tl.maximum(beta * q + (1.0 - beta) * p, _SMALLEST)
    log_p = tl.log2(tl.maximum(p, _SMALLEST) * inverse)
    log_q = tl.log2(tl.maximum(q, _SMALLEST) * inverse)
    return p, q, log_p, log_q


@triton.jit
def _derivative(x, y, scale, inverse_total, teacher_inverse_total, centre, beta, KIND: tl.constexpr):  # noqa: PLR0913
    """Of the divergence, by the student's logits over the temperature; x, y less their row's largest, `centre` see `_Terms`."""
    if KIND == _REVERSE:
        e, _ = power(x, scale)
        g = (e * inverse_total) * ((_finite(x) - _finite(y)) - centre) * (scale * LN2)
    elif KIND == _FORWARD:
        e, _ = power(x, scale)
        f, _ = power(y, scale)
        g = e * inverse_total - f * teacher_inverse_total
    else:
        p, _, log_p, _ = _mixture_terms(x, y, scale, inverse_total, teacher_inverse_total, beta)
        g = ((1.0 - beta) * LN2) * p * (log_p - centre)
    return g


@triton.jit
def _write_derivative(  # noqa: PLR0913
    output, row, bias, teacher_row, teacher_bias, V, scale, top, total, teacher_top, teacher_total, centre, beta, slope,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Row of the derivative times `slope`."""
    inverse_total = 1.0 / total
    teacher_inverse_total = 1.0 / teacher_total
    for start in range(0, V, ROWS * LANES):
        x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, "evict_first")
        y = load_tile(teacher_row, teacher_bias, start, V, HAS_TEACHER_BIAS, ROWS, LANES, 0, ALIGNED, "evict_first")
        g = _derivative(x - top, y - teacher_top, scale, inverse_total, teacher_inverse_total, centre, beta, KIND)
        store_tile(output, g * slope, start, V, ROWS, LANES)


@triton.jit
def _divergence_rows(  # noqa: PLR0913
    # Written.
    divergences, tops, totals, teacher_tops, teacher_totals, centres,  # [T]
    largest,  # [T]
    derivatives,  # [T, V]
    # Read.
    logits,  # [T, V]
    bias,  # [V]
    teacher_logits,  # [T, V]
    teacher_bias,  # [V]
    V, logits_stride, teacher_stride, derivatives_stride, inverse_temperature, beta,
    KIND: tl.constexpr, HAS_DERIVATIVE: tl.constexpr, HAS_LARGEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, ALIGNED: tl.constexpr, IS_PART: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """With HAS_LARGEST a row of the derivative is divided by its largest entry, so that fp16 does not lose small ones.

    IS_PART: rows are a part of the vocabulary, whose largest logits and totals are read; for jsd, whose sums are of this part.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = logits + pid * logits_stride
    teacher_row = teacher_logits + pid * teacher_stride
    scale = inverse_temperature * LOG2E
    if IS_PART:
        top = tl.load(tops + pid)
        total = tl.load(totals + pid)
        teacher_top = tl.load(teacher_tops + pid)
        teacher_total = tl.load(teacher_totals + pid)
        gap = 0.0
    else:
        top, total, teacher_top, teacher_total, gap = _scan_rows(
            row, bias, teacher_row, teacher_bias, V, scale, KIND, HAS_BIAS, HAS_TEACHER_BIAS, ALIGNED,
            "evict_last" if HAS_DERIVATIVE or KIND == _JSD else "evict_first", ROWS, LANES,
        )  # fmt: skip
    inverse_total = 1.0 / total
    teacher_inverse_total = 1.0 / teacher_total
    centre = gap
    if KIND == _JSD:
        own = tl.zeros([LANES], tl.float32)
        teachers = tl.zeros([LANES], tl.float32)
        for start in range(0, V, ROWS * LANES):
            x = load_tile(
                row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, "evict_last" if HAS_DERIVATIVE else "evict_first"
            )
            y = load_tile(
                teacher_row,
                teacher_bias,
                start,
                V,
                HAS_TEACHER_BIAS,
                ROWS,
                LANES,
                0,
                ALIGNED,
                "evict_last" if HAS_DERIVATIVE else "evict_first",
            )
            p, q, log_p, log_q = _mixture_terms(x - top, y - teacher_top, scale, inverse_total, teacher_inverse_total, beta)
            own += tl.sum(p * log_p, 0)
            teachers += tl.sum(q * log_q, 0)
        centre = tl.sum(own, 0)
        divergence = LN2 * ((1.0 - beta) * centre + beta * tl.sum(teachers, 0))
    else:
        divergence = gap * inverse_temperature - tl.log(total / teacher_total)
        if KIND == _FORWARD:
            divergence = -divergence
    tl.store(divergences + pid, divergence)
    tl.store(tops + pid, top)
    tl.store(totals + pid, total)
    tl.store(teacher_tops + pid, teacher_top)
    tl.store(teacher_totals + pid, teacher_total)
    tl.store(centres + pid, centre)
    if HAS_DERIVATIVE:
        slope = 1.0
        if HAS_LARGEST:
            highest = tl.zeros([LANES], tl.float32)
            for start in range(0, V, ROWS * LANES):
                x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, "evict_last")
                y = load_tile(teacher_row, teacher_bias, start, V, HAS_TEACHER_BIAS, ROWS, LANES, 0, ALIGNED, "evict_last")
                g = _derivative(x - top, y - teacher_top, scale, inverse_total, teacher_inverse_total, centre, beta, KIND)
                highest = tl.maximum(highest, tl.max(tl.abs(g), 0))
            peak = tl.max(highest, 0)
            tl.store(largest + pid, peak)
            slope = 1.0 / tl.where(peak > 0, peak, 1.0)
        _write_derivative(
            derivatives + pid * derivatives_stride, row, bias, teacher_row, teacher_bias, V, scale, top, total, teacher_top,
            teacher_total, centre, beta, slope, KIND, HAS_BIAS, HAS_TEACHER_BIAS, ALIGNED, ROWS, LANES,
        )  # fmt: skip


@triton.jit
def _divergence_rows_backward(  # noqa: PLR0913
    gradient,  # [T, V], written
    slopes, tops, totals, teacher_tops, teacher_totals, centres,  # [T]
    logits,  # [T, V]
    bias,  # [V]
    teacher_logits,  # [T, V]
    teacher_bias,  # [V]
    V, logits_stride, teacher_stride, gradient_stride, inverse_temperature, beta,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradient of `slopes * divergences` by the logits."""
    pid = tl.program_id(0).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    _write_derivative(
        gradient + pid * gradient_stride, logits + pid * logits_stride, bias, teacher_logits + pid * teacher_stride,
        teacher_bias, V, inverse_temperature * LOG2E, tl.load(tops + pid), tl.load(totals + pid),
        tl.load(teacher_tops + pid), tl.load(teacher_totals + pid), tl.load(centres + pid), beta, slope,
        KIND, HAS_BIAS, HAS_TEACHER_BIAS, ALIGNED, ROWS, LANES,
    )  # fmt: skip


@triton.jit
def _scale_directions(  # noqa: PLR0913
    gradient,  # [T, D], written
    directions,  # [T, D]
    slopes, largest,  # [T]
    D, inverse_temperature,
    HAS_LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    if HAS_LARGEST:
        slope *= tl.load(largest + pid)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        direction = tl.load(directions + pid * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        # What a zero slope multiplies may be infinite.
        g = tl.where(slope == 0, 0.0, slope * direction)
        tl.store(gradient + pid * D + columns, g.to(gradient.dtype.element_ty), mask=columns < D)


class _Terms(NamedTuple):
    """What one pass over both rows finds; all [T] fp32."""

    divergences: Tensor
    """In nats."""
    tops: Tensor
    """The student's largest logit."""
    totals: Tensor
    """Sum of exp((logit - largest) / temperature)."""
    teacher_tops: Tensor
    teacher_totals: Tensor
    centres: Tensor
    """Mean under p of what the derivative subtracts from each entry: of (x - top) - (y - teacher_top) in logits for reverse_kl,
    of log2(p / m) for jsd; forward_kl needs none."""

    def part(self, tokens: slice) -> _Terms:
        """Views of some tokens."""
        return _Terms(*(term[tokens] for term in self))


class _Options(NamedTuple):
    kind: int
    beta: float
    inverse_temperature: float


def _row_arguments(hidden: Tensor, teacher_hidden: Tensor, heads: Heads, options: _Options) -> dict[str, Any]:
    """What both kernels have in common, by name; takes the products with the heads."""
    logits = logits_fp32(hidden, heads.weight)
    teacher_logits = logits_fp32(teacher_hidden, heads.teacher_weight)
    vocabulary = logits.shape[1]
    return {
        "logits": logits, "bias": heads.bias, "teacher_logits": teacher_logits, "teacher_bias": heads.teacher_bias,
        "V": vocabulary, "logits_stride": logits.stride(0), "teacher_stride": teacher_logits.stride(0),
        "inverse_temperature": options.inverse_temperature, "beta": options.beta, "KIND": options.kind,
        "HAS_BIAS": heads.bias is not None, "HAS_TEACHER_BIAS": heads.teacher_bias is not None,
        "ALIGNED": is_aligned(logits, teacher_logits), **tile(vocabulary),
    }  # fmt: skip


def _launch_in_parts(terms: _Terms, derivatives: Tensor | None, arguments: dict[str, Any], group: ProcessGroup) -> None:
    """Terms of some tokens over the whole vocabulary, from the parts of it that processes hold, and own derivatives [T, V]."""
    grid, kind = (len(terms.tops),), arguments["KIND"]
    nothing = {"largest": None, "derivatives": None, "derivatives_stride": 0, "HAS_DERIVATIVE": False, "HAS_LARGEST": False}
    scan = arguments | {"KIND": _KINDS["reverse_kl"] if kind == _KINDS["jsd"] else kind}
    _divergence_rows[grid](**terms._asdict(), **nothing, **scan, IS_PART=False)
    parts = _Terms(*gathered(torch.stack(terms), group).unbind(1))
    for own, whole in zip(terms, _combined(parts, scan["KIND"], arguments["inverse_temperature"]), strict=True):
        own.copy_(whole)
    if kind == _KINDS["jsd"]:
        _divergence_rows[grid](**terms._asdict(), **nothing, **arguments, IS_PART=True)
        for own in (terms.divergences, terms.centres):
            own.copy_(sum_of_parts(own, group))
    if derivatives is not None:
        slopes = torch.full_like(terms.tops, 1.0 / arguments["inverse_temperature"])
        _divergence_rows_backward[grid](derivatives, slopes, *terms[1:], gradient_stride=derivatives.stride(0), **arguments)


def _combined(parts: _Terms, kind: int, inverse_temperature: float) -> _Terms:
    """Terms of the whole vocabulary from those of its parts, [parts, T] each; of reverse_kl or forward_kl."""

    def whole(tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top and total [T], and the probability of each part [parts, T]."""
        top = tops.amax(0)
        shares = totals * ((tops - top) * inverse_temperature).exp()
        return top, shares.sum(0), shares / shares.sum(0)

    top, total, probabilities = whole(parts.tops, parts.totals)
    teacher_top, teacher_total, teacher_probabilities = whole(parts.teacher_tops, parts.teacher_totals)
    gaps = parts.centres + (parts.tops - top) - (parts.teacher_tops - teacher_top)
    weights = probabilities if kind == _KINDS["reverse_kl"] else teacher_probabilities
    # A part that is suppressed whole has no mean of its own.
    gap = torch.where(weights > 0, weights * gaps, 0.0).sum(0)
    divergence = gap * inverse_temperature - (total / teacher_total).log()
    divergence = divergence if kind == _KINDS["reverse_kl"] else -divergence
    return _Terms(divergence, top, total, teacher_top, teacher_total, gap)


def _forward(  # noqa: PLR0913
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    kind: int,
    beta: float,
    inverse_temperature: float,
    frozen_gradient: bool,
) -> list[Tensor]:
    """`_Terms`, and for the gradient through a frozen head directions [T, D] and, for fp16, their scale [T], else empty.

    Args:
        frozen_gradient: the gradient by hidden states is wanted, and none by the head: it is taken here.
    """
    heads = Heads(weight, bias, teacher_weight, teacher_bias)
    return _forward_in_blocks(hidden, teacher_hidden, heads, _Options(kind, beta, inverse_temperature), frozen_gradient, None)


def _forward_in_blocks(
    hidden: Tensor,
    teacher_hidden: Tensor,
    heads: Heads,
    options: _Options,
    frozen_gradient: bool,
    group: ProcessGroup | None,
) -> list[Tensor]:
    num_tokens, vocabulary = len(hidden), len(heads.weight)
    terms = _Terms(*(torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in _Terms._fields))
    directions = hidden.new_empty(num_tokens if frozen_gradient else 0, hidden.shape[1])
    scales = frozen_gradient and hidden.dtype == torch.float16
    largest = terms.tops.new_empty(num_tokens if scales else 0)
    for outer in blocks(0, num_tokens, PRODUCT_ROWS if frozen_gradient else num_tokens or 1):
        num_rows = outer.stop - outer.start
        dtype = torch.float32 if scales and group is not None else hidden.dtype
        derivatives = padded_rows(num_rows, vocabulary, dtype, hidden.device) if frozen_gradient else None
        for inner in blocks(outer.start, outer.stop, LOGITS_ROWS):
            written = slice(inner.start - outer.start, inner.stop - outer.start)
            arguments = _row_arguments(hidden[inner], teacher_hidden[inner], heads, options)
            own = None if derivatives is None else derivatives[written]
            if group is None:
                _divergence_rows[(inner.stop - inner.start,)](
                    *terms.part(inner), largest[inner] if scales else None, own,
                    derivatives_stride=0 if own is None else own.stride(0), **arguments, HAS_DERIVATIVE=frozen_gradient,
                    HAS_LARGEST=scales, IS_PART=False,
                )  # fmt: skip
            else:
                _launch_in_parts(terms.part(inner), own, arguments, group)
            del arguments
        if derivatives is not None:
            product = product_fp32(derivatives, heads.weight)
            if scales and group is not None:
                largest[outer] = product.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
                product /= largest[outer, None]
            directions[outer] = product
    return [*terms, directions, largest]


def _forward_outputs(hidden, *arguments):
    frozen_gradient = arguments[-1]
    num_tokens = hidden.shape[0]
    scales = frozen_gradient and hidden.dtype == torch.float16
    terms = [hidden.new_empty(num_tokens, dtype=torch.float32) for _ in _Terms._fields]
    directions = hidden.new_empty(num_tokens if frozen_gradient else 0, hidden.shape[1])
    return [*terms, directions, hidden.new_empty(num_tokens if scales else 0, dtype=torch.float32)]


def _frozen_gradient(directions: Tensor, largest: Tensor, slopes: Tensor, inverse_temperature: float) -> Tensor:
    """[T, D] by the hidden states under a frozen head."""
    gradient = torch.empty_like(directions)
    num_tokens, num_features = directions.shape
    if num_tokens:
        _scale_directions[(num_tokens,)](
            gradient, directions, slopes.contiguous(), largest, num_features, inverse_temperature,
            HAS_LARGEST=directions.dtype == torch.float16, BLOCK=min(2048, triton.next_power_of_2(num_features)),
        )  # fmt: skip
    return gradient


def _trainable_gradients(  # noqa: PLR0913
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    terms: Sequence[Tensor],
    slopes: Tensor,
    kind: int,
    beta: float,
    inverse_temperature: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """By hidden states, head and bias, empty where not needed; logits are computed again."""
    heads = Heads(weight, bias, teacher_weight, teacher_bias)
    options = _Options(kind, beta, inverse_temperature)
    slopes = slopes.contiguous()

    def write(tokens: slice, written: Tensor) -> None:
        arguments = _row_arguments(hidden[tokens], teacher_hidden[tokens], heads, options)
        _divergence_rows_backward[(len(written),)](
            written, slopes[tokens], *_Terms(*terms).part(tokens)[1:], gradient_stride=written.stride(0), **arguments
        )

    return head_gradients(hidden, weight, bias, needs, write)


def _trainable_gradients_outputs(hidden, teacher_hidden, weight, bias, *arguments):
    return head_gradients_outputs(hidden, weight, bias, arguments[-1])


def _save_forward(ctx, inputs, output):
    *tensors, ctx.kind, ctx.beta, ctx.inverse_temperature, ctx.frozen_gradient = inputs
    ctx.save_for_backward(*(output[-2:] if ctx.frozen_gradient else [*tensors, *output[:-2]]))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _forward_backward(ctx, gradients):
    slopes = gradients[0]
    no_gradients = (None,) * 4
    if slopes is None:
        return *(None,) * 6, *no_gradients
    if ctx.frozen_gradient:
        gradient = _frozen_gradient_operator(*ctx.saved_tensors, slopes, ctx.inverse_temperature)
        return gradient, *(None,) * 5, *no_gradients
    tensors, terms = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    needs = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    found = _trainable_gradients_operator(*tensors, list(terms), slopes, ctx.kind, ctx.beta, ctx.inverse_temperature, needs)
    hidden, weight, bias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return hidden, None, weight, bias, None, None, *no_gradients


_frozen_gradient_operator = operator(
    "linear_distillation_frozen_gradient", _frozen_gradient, lambda directions, *_: torch.empty_like(directions)
)
_trainable_gradients_operator = operator("linear_distillation_gradients", _trainable_gradients, _trainable_gradients_outputs)
_forward_operator = operator("linear_distillation", _forward, _forward_outputs)
_forward_operator.register_autograd(_forward_backward, setup_context=_save_forward)


class _InParts(torch.autograd.Function):
    """`_forward_operator` of heads whose vocabulary lies in parts on the processes of a group, which no operator takes."""

    @staticmethod
    @isolated
    def forward(ctx: Any, *inputs: Any) -> Any:
        *tensors, kind, beta, inverse_temperature, frozen_gradient, group = inputs
        options = _Options(kind, beta, inverse_temperature)
        output = tuple(_forward_in_blocks(tensors[0], tensors[1], Heads(*tensors[2:]), options, frozen_gradient, group))
        _save_forward(ctx, inputs[:-1], output)
        return output

    @staticmethod
    @once_differentiable
    @isolated
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_forward_backward(ctx, gradients), None


def linear_distillation_loss(  # noqa: PLR0913
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor | nn.Module,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | nn.Module | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    **distillation: Unpack[DistillationSettings],
) -> DistillationLoss:
    if not runs_kernels(hidden):
        return reference.linear_distillation_loss(
            hidden, teacher_hidden, weight, bias=bias, teacher_weight=teacher_weight, temperature=temperature, group=group,
            **distillation,
        )  # fmt: skip
    settings = Distillation.from_keywords(distillation)
    heads = settings.heads(weight, bias, teacher_weight)
    settings.check(hidden, teacher_hidden, heads, allow_float64=False)
    check_temperature(temperature)
    check_rows_contiguous("weight", heads.weight)
    check_rows_contiguous("teacher_weight", heads.teacher_weight)
    recording = torch.is_grad_enabled()
    trainable_head = recording and (heads.weight.requires_grad or (heads.bias is not None and heads.bias.requires_grad))
    frozen_gradient = recording and hidden.requires_grad and not trainable_head
    bias, teacher_bias = (None if each is None else each.contiguous() for each in (heads.bias, heads.teacher_bias))
    inputs = (
        shared_by_parts(settings.blank(hidden), group).to(heads.weight.dtype).contiguous(),
        settings.blank(teacher_hidden).detach().to(heads.teacher_weight.dtype).contiguous(), heads.weight, bias,
        heads.teacher_weight, teacher_bias, _KINDS[settings.divergence], settings.beta, 1.0 / temperature, frozen_gradient,
    )  # fmt: skip
    divergences, *_ = _forward_operator(*inputs) if group is None else _InParts.apply(*inputs, group)
    # A copy, because the gradient may need the original and the caller may change this one.
    return settings.loss(divergences.clone())


linear_distillation_loss.__doc__ = reference.linear_distillation_loss.__doc__
shows_settings(linear_distillation_loss, Distillation)
