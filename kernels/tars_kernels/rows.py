"""Softmax over rows of logits, one program a row: what the log-probability and policy-loss kernels share.

A row is read in tiles of [ROWS, LANES]. Maximum, sum of exponentials and entropy sum are kept for each lane, so that one pass
needs one exponential an element (plus 1 / ROWS to rescale) and no reduction across threads before its end. The target is left
out of the sums: `1 - p(target)` is then a sum of small numbers, not a difference of large ones.

`sweep_rows` and `write_rows_gradient` launch the kernels that read logits once for log-probabilities, and once more for their
gradient. Shapes: T tokens, V vocabulary.

Functions that Triton compiles, here and in the other modules, take every pointer, size and flag as an argument of its own,
because that is how a kernel is launched; so do functions that are made operators (`backend.operator`), whose schemas know no
objects, and public operations, whose every option is a keyword. They are exempt from the limit on the number of arguments
(`noqa: PLR0913`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1.0e30)
"""Start of running maxima: below any logit, and finite, so that a lane of suppressed tokens does not become inf - inf."""
_UNDERFLOW = tl.constexpr(-200.0)
"""2 to this power is 0 in fp32; keeps 0 * -inf out of sums."""


def tile(vocabulary: int) -> dict[str, int]:
    """Tile and warps of row kernels; for long rows each thread has 4 reads of 16 bytes of bf16 in flight."""
    if vocabulary <= 4096:
        return {"ROWS": 1, "LANES": max(128, min(1024, triton.next_power_of_2(vocabulary))), "num_warps": 4}
    return {"ROWS": 4, "LANES": 4096, "num_warps": 16}


@triton.jit
def tile_columns(start, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES] int32 columns from `start`."""
    return start + tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _log1p(x):
    # The hardware's logarithm has an absolute, not a relative, error near 1.
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * 0.25)))
    return tl.where(x < 0.0078125, series, tl.log(1.0 + x))


@triton.jit
def load_tile(  # noqa: PLR0913
    row, bias, start, V, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """[ROWS, LANES] logits from column `start`; -inf beyond the row. Only its last tile pays for the bounds."""
    columns = tile_columns(start, ROWS, LANES)
    if start + ROWS * LANES <= V:
        x = tl.load(row + columns).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns).to(tl.float32)
    else:
        x = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_tile(row, values, start, V, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Write a tile, without what lies beyond the row."""
    columns = tile_columns(start, ROWS, LANES)
    values = values.to(row.dtype.element_ty)
    if start + ROWS * LANES <= V:
        tl.store(row + columns, values)
    else:
        tl.store(row + columns, values, mask=columns < V)


@triton.jit
def overwrite(row, target, value, V):
    """Put `value` where a tile was written before, by whichever thread; nowhere for a target outside the vocabulary."""
    tl.debug_barrier()
    tl.store(row + target, value.to(row.dtype.element_ty), mask=(target >= 0) & (target < V))


@triton.jit
def power(difference, scale):
    """2 ** x and x = difference * scale, bounded from below by a comparison that lets NaN through.

    Logits are scaled after the subtraction, which is nearly exact, so that a large common offset costs no precision.
    """
    x = difference * scale
    x = tl.where(x < _UNDERFLOW, _UNDERFLOW, x)
    return tl.exp2(x), x


@triton.jit
def load_target(row, bias, target, V, HAS_BIAS: tl.constexpr):
    """The target's logit; NaN for a target outside the vocabulary, which is never read."""
    inside = (target >= 0) & (target < V)
    x = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def scan_row(  # noqa: PLR0913
    row, bias, target, V, scale, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """One sweep over a row; `scale` turns logits into powers of 2.

    Returns:
        top: largest logit of all tokens but the target.
        others: sum of 2 ** ((logit - top) * scale) of all tokens but the target.
        logprob, entropy: of the row, in nats.
        rest: 1 - p(target).
        peak, total: the largest logit of all, and the sum of 2 ** ((logit - peak) * scale).
    """
    tops = tl.full([LANES], _LOWEST, tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    moments = tl.zeros([LANES], tl.float32)
    for start in range(0, V, ROWS * LANES):
        x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES)
        if (start <= target) & (target < start + ROWS * LANES):
            x = tl.where(tile_columns(start, ROWS, LANES) == target.to(tl.int32), float("-inf"), x)
        higher = tl.maximum(tops, tl.max(x, 0))
        e, d = power(x - higher[None, :], scale)
        factor, shift = power(tops - higher, scale)
        moments = (moments + shift * sums) * factor + tl.sum(e * d, 0)
        sums = sums * factor + tl.sum(e, 0)
        tops = higher
    top = tl.max(tops, 0)
    factor, shift = power(tops - top, scale)
    moment = tl.sum((moments + shift * sums) * factor, 0)
    others = tl.sum(sums * factor, 0)

    own = load_target(row, bias, target, V, HAS_BIAS)
    peak = tl.where(own < top, top, own)
    factor, shift = power(top - peak, scale)
    moment = (moment + shift * others) * factor
    rest = others * factor
    own_power, own_shift = power(own - peak, scale)
    total = rest + own_power
    log_total = tl.where(own < top, tl.log(total), _log1p(rest))
    logprob = (own - peak) * scale * LN2 - log_total
    entropy = log_total - LN2 * (moment + own_power * own_shift) / total
    return top, others, logprob, entropy, rest / total, peak, total


@triton.jit
def write_gradient(  # noqa: PLR0913
    gradient, row, bias, target, V, scale, peak, total, rest, logprob, entropy, slope, entropy_slope,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradient of `slope * logprob + entropy_slope * entropy` by the logits, both slopes already over the temperature."""
    factor = -slope / total
    inverse = 1.0 / total
    log_total = tl.log(total)
    for start in range(0, V, ROWS * LANES):
        x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES)
        if HAS_ENTROPY:
            e, shift = power(x - peak, scale)
            g = e * factor - entropy_slope * (e * inverse) * (shift * LN2 - log_total + entropy)
        else:
            g = tl.exp2((x - peak) * scale) * factor
        store_tile(gradient, g, start, V, ROWS, LANES)
    own = slope * rest
    if HAS_ENTROPY:
        own -= entropy_slope * tl.where(rest < 1, (1.0 - rest) * (logprob + entropy), 0.0)
    overwrite(gradient, target, own, V)


@triton.jit
def fill_row(output, V, ROWS: tl.constexpr, LANES: tl.constexpr):
    """A row of zeros."""
    zeros = tl.zeros([ROWS, LANES], output.dtype.element_ty)
    for start in range(0, V, ROWS * LANES):
        store_tile(output, zeros, start, V, ROWS, LANES)


@triton.jit
def _rows_forward(  # noqa: PLR0913
    logits,  # [T, V]
    bias,  # [V]
    targets,  # [T]
    logprobs, entropies, rests, peaks, totals, inverse_others,  # [T], written
    powers, entropy_powers,  # [T, V], written
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
def _rows_backward(  # noqa: PLR0913
    gradient,  # [T, V], written
    logits,  # [T, V]
    bias,  # [V]
    targets, slopes, entropy_slopes, logprobs, entropies, rests, peaks, totals,  # [T]
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


class LogitRows(NamedTuple):
    """Rows of logits, and what else their softmax depends on."""

    logits: Tensor
    """[T, V]"""
    bias: Tensor | None
    """[V] added to every row."""
    targets: Tensor
    """[T]"""
    inverse_temperature: float


class RowTerms(NamedTuple):
    """What one pass over rows finds, and their gradient needs; all [T] fp32."""

    logprobs: Tensor
    """Of the targets, in nats."""
    entropies: Tensor
    """In nats."""
    rests: Tensor
    """1 - p(target)."""
    peaks: Tensor
    """Largest logit."""
    totals: Tensor
    """Sum of exp((logit - peak) / temperature)."""

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> RowTerms:
        return cls(*(torch.empty(num_tokens, dtype=torch.float32, device=device) for _ in cls._fields))

    def part(self, tokens: slice) -> RowTerms:
        """Views of some tokens."""
        return RowTerms(*(term[tokens] for term in self))


class RowPowers(NamedTuple):
    """What one pass over rows also writes for the gradient through a frozen head, see `linear_logprob.py`."""

    inverse_others: Tensor
    """[T] 1 / sum of a row of `powers`."""
    powers: Tensor
    """[T, V] exp((logit - largest) / temperature) of all tokens but the target, which is 0 and does not count as largest."""
    entropy_powers: Tensor | None
    """[T, V] p * (log p + entropy), minus the entropy's gradient by the scaled logits; None where it is not wanted."""


def sweep_rows(rows: LogitRows, terms: RowTerms, written: RowPowers | None = None) -> None:
    """Read every row once, and write `terms` and, where given, `written`."""
    num_tokens, vocabulary = rows.logits.shape
    if num_tokens:
        inverse_others, powers, entropy_powers = (None, None, None) if written is None else written
        _rows_forward[(num_tokens,)](
            rows.logits, rows.bias, rows.targets, *terms, inverse_others, powers, entropy_powers, vocabulary,
            rows.logits.stride(0), rows.inverse_temperature, HAS_BIAS=rows.bias is not None, HAS_POWERS=powers is not None,
            HAS_ENTROPY=entropy_powers is not None, **tile(vocabulary),
        )  # fmt: skip


def write_rows_gradient(
    gradient: Tensor, rows: LogitRows, terms: RowTerms, slopes: Tensor, entropy_slopes: Tensor | None
) -> None:
    """Write the gradient of `slopes * logprobs + entropy_slopes * entropies` by the logits.

    Args:
        gradient: [T, V], which may be the memory of the logits.
        terms: of `sweep_rows`.
        slopes: [T]
        entropy_slopes: [T]
    """
    num_tokens, vocabulary = rows.logits.shape
    if num_tokens:
        _rows_backward[(num_tokens,)](
            gradient, rows.logits, rows.bias, rows.targets, slopes, entropy_slopes, *terms, vocabulary, rows.logits.stride(0),
            rows.inverse_temperature, HAS_BIAS=rows.bias is not None, HAS_ENTROPY=entropy_slopes is not None,
            **tile(vocabulary),
        )  # fmt: skip
