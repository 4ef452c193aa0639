"""Softmax over one row of logits by one program: the parts that the log-probability and policy-loss kernels share.

A row is swept in tiles of [ROWS, LANES]. Maximum, sum of exponentials and entropy sum are kept for each lane, so that a sweep
needs one exponential an element (plus 1 / ROWS to rescale) and no reduction across threads before its end. The target stays out
of the sums: `1 - p(target)` is then a sum of small numbers, not a difference of large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1.0e30)
"""Start of running maxima: below any logit, and finite, so that a lane of suppressed tokens does not become inf - inf."""
_UNDERFLOW = tl.constexpr(-200.0)
"""2 to this power is 0 in fp32; keeps 0 * -inf out of sums."""


def tile(vocabulary: int) -> dict[str, int]:
    """Launch settings of row kernels: threads each hold 4 x 16 bytes of bf16 in flight where rows are long."""
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
def load_tile(row, bias, start, V, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
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
def scan_row(row, bias, target, V, scale, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
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
def write_gradient(
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
