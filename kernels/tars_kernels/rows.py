"""Softmax over rows of logits, one program a row: what the log-probability and policy-loss kernels share.

A row is read in tiles of [ROWS, LANES]. Maximum, sum of exponentials and entropy sum are kept for each lane, so that one pass
needs one exponential an element (plus 1 / ROWS to rescale) and no reduction across threads before its end. The target is left
out of the sums: `1 - p(target)` is then a sum of small numbers, not a difference of large ones.

Rows are read in whole chunks of 16 bytes, also where V is no multiple of 8 and a row begins inside of one: its first tile then
starts up to 15 bytes before it (`shift`), and what belongs to neighbours is left out in the first and last tile only.

`sweep_rows` and `write_rows_gradient` launch the kernels that read logits once for log-probabilities, and once more for their
gradient. Shapes: T tokens, V vocabulary.

Functions that Triton compiles, here and in the other modules, take every pointer, size and flag as an argument of its own,
because that is how a kernel is launched; so do functions that are made operators (`backend.operator`), whose schemas know no
objects, and public operations, whose every option is a keyword. They are exempt from the limit on the number of arguments
(`noqa: PLR0913`).
"""

from __future__ import annotations

import json
from pathlib import Path
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


_LONG_ROWS = {"ROWS": 4, "LANES": 4096, "num_warps": 16}
"""For rows of more than 4,096: each thread has 4 reads of 16 bytes of bf16 in flight."""
TUNED_TILES: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "tiles.json").read_text(encoding="utf-8"))
"""In the place of `_LONG_ROWS`, by compute capability ("9.0"), where `bench/tune.sh` found another one faster."""


def tile(vocabulary: int) -> dict[str, int]:
    """Tile and warps of row kernels on the current device."""
    if vocabulary <= 4096:
        return {"ROWS": 1, "LANES": max(128, min(1024, triton.next_power_of_2(vocabulary))), "num_warps": 4}
    capability = torch.cuda.get_device_capability() if TUNED_TILES and torch.cuda.is_available() else ()
    return TUNED_TILES.get(".".join(map(str, capability)), _LONG_ROWS)


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
def place_row(matrix, stride, ALIGNED: tl.constexpr):
    """The program's row of a matrix, and how many elements before its first column the pointer stands.

    ALIGNED: the matrix begins on 16 bytes, so that a pointer to the chunk in which the row begins is safe to read.
    """
    offset = tl.program_id(0).to(tl.int64) * stride
    if ALIGNED:
        shift = (offset % (128 // matrix.dtype.element_ty.primitive_bitwidth)).to(tl.int32)
        row = tl.multiple_of(matrix + (offset - shift), 16)
    else:
        shift = 0
        row = matrix + offset
    return row, shift


@triton.jit
def load_tile(  # noqa: PLR0913
    row, bias, start, V, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    shift=0, ALIGNED: tl.constexpr = False, KEEP: tl.constexpr = "",
):  # fmt: skip
    """[ROWS, LANES] logits `start` elements behind the pointer of `place_row`; -inf where there are none.

    Only the first and the last tile of a row pay for its bounds.

    KEEP: how long the cache shall hold what is read, in Triton's words: evict_last where a second sweep follows.
    """
    places = tile_columns(start, ROWS, LANES)
    columns = places - shift
    if (start >= shift) & (start + ROWS * LANES <= V + shift):
        x = tl.load(row + places, eviction_policy=KEEP).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns).to(tl.float32)
    else:
        inside = (columns >= 0) & (columns < V)
        if ALIGNED:
            # To the end of the chunk of 16 bytes that a row ends in, whose mask is the same for all of it.
            PER_CHUNK: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
            end = tl.multiple_of((V + shift + PER_CHUNK - 1) // PER_CHUNK * PER_CHUNK, PER_CHUNK)
            x = tl.load(row + places, mask=places < end, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
            x = tl.where(inside, x, float("-inf"))
        else:
            x = tl.load(row + places, mask=inside, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_tile(row, values, start, V, ROWS: tl.constexpr, LANES: tl.constexpr, shift=0):  # noqa: PLR0913
    """Write a tile, without what lies outside of the row."""
    places = tile_columns(start, ROWS, LANES)
    values = values.to(row.dtype.element_ty)
    if (start >= shift) & (start + ROWS * LANES <= V + shift):
        tl.store(row + places, values)
    else:
        tl.store(row + places, values, mask=(places >= shift) & (places < V + shift))


@triton.jit
def overwrite(row, target, value, V, shift=0):
    """Put `value` where a tile was written before, by whichever thread; nowhere for a target outside the vocabulary."""
    tl.debug_barrier()
    tl.store(row + shift + target, value.to(row.dtype.element_ty), mask=(target >= 0) & (target < V))


@triton.jit
def power(difference, scale):
    """2 ** x and x = difference * scale, bounded from below by a comparison that lets NaN through.

    Logits are scaled after the subtraction, which is nearly exact, so that a large common offset costs no precision.
    """
    x = difference * scale
    x = tl.where(x < _UNDERFLOW, _UNDERFLOW, x)
    return tl.exp2(x), x


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap); -inf, which suppresses a token, stays."""
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))
        x = tl.where(x == float("-inf"), x, softcap * tanh)
    return x


@triton.jit
def uncapped_gradient(g, x, softcap, HAS_SOFTCAP: tl.constexpr):
    """The gradient before the cap, from that by the capped logits x."""
    if HAS_SOFTCAP:
        share = x / softcap
        g = tl.where(x == float("-inf"), 0.0, g * (1.0 - share * share))
    return g


@triton.jit
def load_target(row, bias, target, V, HAS_BIAS: tl.constexpr, shift=0):
    """The target's logit; NaN for a target outside the vocabulary, which is never read."""
    inside = (target >= 0) & (target < V)
    x = tl.load(row + shift + target, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def scan_row(  # noqa: PLR0913
    row, bias, target, V, scale, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    shift=0, ALIGNED: tl.constexpr = False, KEEP: tl.constexpr = "", softcap=1.0, HAS_SOFTCAP: tl.constexpr = False,
):  # fmt: skip
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
    place = target + shift
    for start in range(0, V + shift, ROWS * LANES):
        x = capped(load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, shift, ALIGNED, KEEP), softcap, HAS_SOFTCAP)
        if (start <= place) & (place < start + ROWS * LANES):
            x = tl.where(tile_columns(start, ROWS, LANES) == place.to(tl.int32), float("-inf"), x)
        higher = tl.maximum(tops, tl.max(x, 0))
        e, d = power(x - higher[None, :], scale)
        factor, drop = power(tops - higher, scale)
        moments = (moments + drop * sums) * factor + tl.sum(e * d, 0)
        sums = sums * factor + tl.sum(e, 0)
        tops = higher
    top = tl.max(tops, 0)
    factor, drop = power(tops - top, scale)
    moment = tl.sum((moments + drop * sums) * factor, 0)
    others = tl.sum(sums * factor, 0)

    own = capped(load_target(row, bias, target, V, HAS_BIAS, shift), softcap, HAS_SOFTCAP)
    peak = tl.where(own < top, top, own)
    factor, drop = power(top - peak, scale)
    moment = (moment + drop * others) * factor
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
    shift=0, ALIGNED: tl.constexpr = False, sum_slope=0.0, softcap=1.0, HAS_SOFTCAP: tl.constexpr = False,
):  # fmt: skip
    """Gradient of `slope * logprob + entropy_slope * entropy + sum_slope * logsumexp` by the logits.

    The slopes are already over the temperature.
    """
    factor = (sum_slope - slope) / total
    inverse = 1.0 / total
    log_total = tl.log(total)
    for start in range(0, V + shift, ROWS * LANES):
        x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, shift, ALIGNED, "evict_first")
        x = capped(x, softcap, HAS_SOFTCAP)
        if HAS_ENTROPY:
            e, drop = power(x - peak, scale)
            g = e * factor - entropy_slope * (e * inverse) * (drop * LN2 - log_total + entropy)
        else:
            g = tl.exp2((x - peak) * scale) * factor
        store_tile(gradient, uncapped_gradient(g, x, softcap, HAS_SOFTCAP), start, V, ROWS, LANES, shift)
    own = slope * rest
    if sum_slope != 0:
        own += sum_slope * (1.0 - rest)
    if HAS_ENTROPY:
        own -= entropy_slope * tl.where(rest < 1, (1.0 - rest) * (logprob + entropy), 0.0)
    if HAS_SOFTCAP:
        # The target's capped logit, which its log-probability is the logarithm of.
        own = uncapped_gradient(own, peak + (logprob + log_total) / (scale * LN2), softcap, HAS_SOFTCAP)
    overwrite(gradient, target, own, V, shift)


@triton.jit
def fill_row(output, V, ROWS: tl.constexpr, LANES: tl.constexpr, shift=0):
    """A row of zeros."""
    zeros = tl.zeros([ROWS, LANES], output.dtype.element_ty)
    for start in range(0, V + shift, ROWS * LANES):
        store_tile(output, zeros, start, V, ROWS, LANES, shift)


@triton.jit
def _rows_forward(  # noqa: PLR0913
    logits,  # [T, V]
    bias,  # [V]
    targets,  # [T]
    logprobs, entropies, rests, peaks, totals, inverse_others,  # [T], written
    powers, entropy_powers,  # [T, V], written
    V, logits_stride, powers_stride, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_POWERS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """HAS_POWERS: logits and powers have row strides of whole chunks, see `padded_rows`, so that no row is shifted."""
    pid = tl.program_id(0).to(tl.int64)
    row, shift = place_row(logits, logits_stride, ALIGNED)
    scale = inverse_temperature * LOG2E
    target = tl.load(targets + pid).to(tl.int64)
    top, others, logprob, entropy, rest, peak, total = scan_row(
        row, bias, target, V, scale, HAS_BIAS, ROWS, LANES, shift, ALIGNED, "evict_last" if HAS_POWERS else "evict_first",
        softcap, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(logprobs + pid, logprob)
    tl.store(entropies + pid, entropy)
    tl.store(rests + pid, rest)
    tl.store(peaks + pid, peak)
    tl.store(totals + pid, total)
    if HAS_POWERS:
        # The largest of the others becomes 1, so that fp16 does not lose a flat or a very confident distribution.
        tl.store(inverse_others + pid, 1.0 / tl.where(others > 0, others, 1.0))
        row = logits + pid * logits_stride
        powers_row = powers + pid * powers_stride
        for start in range(0, V, ROWS * LANES):
            x = load_tile(
                row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, "evict_last" if HAS_ENTROPY else "evict_first"
            )
            x = capped(x, softcap, HAS_SOFTCAP)
            e = uncapped_gradient(tl.exp2((x - top) * scale), x, softcap, HAS_SOFTCAP)
            store_tile(powers_row, e, start, V, ROWS, LANES)
        overwrite(powers_row, target, tl.zeros([], tl.float32), V)
        # A loop of its own: together they would not fit into registers.
        if HAS_ENTROPY:
            log_total = tl.log(total)
            for start in range(0, V, ROWS * LANES):
                x = load_tile(row, bias, start, V, HAS_BIAS, ROWS, LANES, 0, ALIGNED, "evict_first")
                x = capped(x, softcap, HAS_SOFTCAP)
                e, difference = power(x - peak, scale)
                g = uncapped_gradient(e / total * (difference * LN2 - log_total + entropy), x, softcap, HAS_SOFTCAP)
                store_tile(entropy_powers + pid * powers_stride, g, start, V, ROWS, LANES)


@triton.jit
def _rows_backward(  # noqa: PLR0913
    gradient,  # [T, V], written
    logits,  # [T, V]
    bias,  # [V]
    targets, slopes, entropy_slopes, sum_slopes, logprobs, entropies, rests, peaks, totals,  # [T]
    V, logits_stride, gradient_stride, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SUM: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slope = tl.load(slopes + pid) * inverse_temperature
    entropy_slope = 0.0
    if HAS_ENTROPY:
        entropy_slope = tl.load(entropy_slopes + pid) * inverse_temperature
    sum_slope = 0.0
    if HAS_SUM:
        sum_slope = tl.load(sum_slopes + pid) * inverse_temperature
    row, shift = place_row(logits, logits_stride, ALIGNED)
    gradient_row, gradient_shift = place_row(gradient, gradient_stride, ALIGNED)
    if (slope == 0) & (entropy_slope == 0) & (sum_slope == 0):
        fill_row(gradient_row, V, ROWS, LANES, gradient_shift)
        return
    write_gradient(
        gradient_row, row, bias, tl.load(targets + pid).to(tl.int64), V,
        inverse_temperature * LOG2E, tl.load(peaks + pid), tl.load(totals + pid), tl.load(rests + pid),
        tl.load(logprobs + pid), tl.load(entropies + pid), slope, entropy_slope, HAS_BIAS, HAS_ENTROPY, ROWS, LANES,
        shift, ALIGNED, sum_slope, softcap, HAS_SOFTCAP,
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
    softcap: float = 0.0
    """Logits, bias included, are held within plus and minus this by tanh; 0: they are not."""

    @property
    def options(self) -> dict[str, object]:
        """What both kernels over rows have in common, by name."""
        return {
            "softcap": self.softcap or 1.0,
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.softcap != 0,
            **tile(self.logits.shape[1]),
        }


class RowSlopes(NamedTuple):
    """What the gradient of a loss by rows starts from: the loss's derivatives, [T]."""

    logprobs: Tensor
    entropies: Tensor | None
    logsumexps: Tensor | None

    def part(self, tokens: slice) -> RowSlopes:
        """Views of some tokens."""
        return RowSlopes(self.logprobs[tokens], *(None if slopes is None else slopes[tokens] for slopes in self[1:]))


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


_CHUNK = 16
"""Bytes that a thread reads at once."""
_PADDING = 64
"""Elements to whose multiple rows of our own are lengthened."""


def padded_rows(num_rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_rows, V], unwritten, whose rows begin on a multiple of 128 bytes: odd ones are slow to read, and to multiply."""
    memory = torch.empty(num_rows, triton.cdiv(vocabulary, _PADDING) * _PADDING, dtype=dtype, device=device)
    # Products in bf16 on a CPU multiply what stands between rows by 0.
    memory[:, vocabulary:] = 0
    return memory[:, :vocabulary]


def is_aligned(*matrices: Tensor) -> bool:
    """Whether rows of these may be read and written by whole chunks: all begin on one, and their rows stand alike to them."""
    first = matrices[0]
    whole = [each.stride(0) * each.element_size() % _CHUNK == 0 for each in matrices]
    alike = all(each.stride(0) == first.stride(0) and each.dtype == first.dtype for each in matrices)
    return all(each.data_ptr() % _CHUNK == 0 for each in matrices) and (all(whole) or alike)


def sweep_rows(rows: LogitRows, terms: RowTerms, written: RowPowers | None = None) -> None:
    """Read every row once, and write `terms` and, where given, `written`."""
    num_tokens, vocabulary = rows.logits.shape
    if num_tokens:
        inverse_others, powers, entropy_powers = (None, None, None) if written is None else written
        _rows_forward[(num_tokens,)](
            rows.logits, rows.bias, rows.targets, *terms, inverse_others, powers, entropy_powers, vocabulary,
            rows.logits.stride(0), 0 if powers is None else powers.stride(0), rows.inverse_temperature,
            HAS_POWERS=powers is not None, HAS_ENTROPY=entropy_powers is not None, ALIGNED=is_aligned(rows.logits),
            **rows.options,
        )  # fmt: skip


def write_rows_gradient(gradient: Tensor, rows: LogitRows, terms: RowTerms, slopes: RowSlopes) -> None:
    """Write the gradient by the logits.

    Args:
        gradient: [T, V], which may be the memory of the logits.
        terms: of `sweep_rows`.
        slopes: of the loss by what `terms` holds.
    """
    num_tokens, vocabulary = rows.logits.shape
    if num_tokens:
        _rows_backward[(num_tokens,)](
            gradient, rows.logits, rows.bias, rows.targets, *slopes, *terms, vocabulary, rows.logits.stride(0),
            gradient.stride(0), rows.inverse_temperature, HAS_ENTROPY=slopes.entropies is not None,
            HAS_SUM=slopes.logsumexps is not None, ALIGNED=is_aligned(rows.logits, gradient), **rows.options,
        )  # fmt: skip
