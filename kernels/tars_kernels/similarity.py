"""Pooled states of packed sequences and their cosines, for all layers in one pass over the hidden states.

Forward: a grid of layers x sequences x splits of the tokens x blocks of the width reads every state once, through a table of
addresses, since layers are separate tensors; partial sums are added in a fixed order. A program for each pair and layer then
takes the cosine. Backward: the gradient of a pooled vector, constant over its sequence's tokens, is written or added in place.

Shapes: T packed tokens, N sequences, D hidden size, L layers, P pairs, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tars_kernels import reference
from tars_kernels.backend import operator, runs_kernels
from tars_kernels.checks import (
    check_centre,
    check_floats,
    check_layer_states,
    check_packing,
    check_pairs,
    check_pooling,
    check_rows_contiguous,
    check_same_device,
    check_weights,
    choose_layers,
)

_NORM_FLOOR = tl.constexpr(reference.NORM_FLOOR)
_ROWS, _LANES = 8, 512
"""Tile of tokens x width that a program of 128 threads reads at once: four 16-byte loads each for bf16."""
_PROGRAMS = 2048
"""Enough programs to fill a large GPU: tokens are split until there are so many."""
_MAX_SPLITS = 16
_COSINE_BLOCK = 1024
_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def load_base(table, layer, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The address of a layer's first element."""
    base = tl.load(table + layer).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def _token_range(cu_seqlens, sequence, split, T, SPLITS, IS_LAST: tl.constexpr):
    """Where a split of a sequence begins and ends, and the sequence's length; nothing outside of T tokens."""
    start = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), T)
    length = end - start
    if IS_LAST:
        start = tl.maximum(start, end - 1)
    chunk = tl.cdiv(end - start, SPLITS)
    first = tl.minimum(start + split * chunk, end)
    return first, tl.minimum(first + chunk, end), length


@triton.jit
def _place(D, SPLITS, N, LANES: tl.constexpr):
    """This program's block of the width, split, sequence and layer; neighbours read neighbouring columns."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, LANES)
    return pid % blocks, pid // blocks % SPLITS, pid // blocks // SPLITS % N, pid // blocks // SPLITS // N


@triton.jit(do_not_specialize=["N", "T", "M", "SPLITS"])
def _pool_forward(  # noqa: PLR0913
    sums,  # [L, N, S, D]
    table,  # [L] addresses of [T, D] or [M, D]
    positions,  # [T]
    cu_seqlens,  # [N + 1]
    N, T, M, D, row_stride, SPLITS,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_LAST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block, split, sequence, layer = _place(D, SPLITS, N, LANES)
    base = load_base(table, layer, DTYPE, IS_ALIGNED)
    first, last, length = _token_range(cu_seqlens, sequence, split, T, SPLITS, IS_LAST)
    columns = block * LANES + tl.arange(0, LANES)
    inside = columns < D
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = rows < last
        if HAS_POSITIONS:
            rows = tl.load(positions + rows, mask=keep, other=0)
            rows = tl.minimum(tl.maximum(rows, 0), M - 1)
        pointers = base + rows[:, None] * row_stride + columns[None, :]
        acc += tl.load(pointers, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    if not IS_LAST:
        total = tl.where(SPLITS == 1, total / tl.maximum(length, 1).to(tl.float32), total)
    output = sums + ((layer * N + sequence) * SPLITS + split) * D
    tl.store(output + columns, total, mask=inside)


@triton.jit(do_not_specialize=["N", "T", "SPLITS"])
def _pool_finish(  # noqa: PLR0913
    pooled,  # [L, N, D]
    sums,  # [L, N, S, D]
    cu_seqlens,  # [N + 1]
    N, T, D, SPLITS,
    IS_LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, LANES)
    columns = pid % blocks * LANES + tl.arange(0, LANES)
    row = pid // blocks
    total = tl.zeros([LANES], tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + (row * SPLITS + split) * D + columns, mask=columns < D, other=0.0)
    if not IS_LAST:
        sequence = row % N
        _, _, length = _token_range(cu_seqlens, sequence, 0, T, SPLITS, False)
        total /= tl.maximum(length, 1).to(tl.float32)
    tl.store(pooled + row * D + columns, total, mask=columns < D)


@triton.jit(do_not_specialize=["N", "T", "M", "SPLITS"])
def _pool_backward(  # noqa: PLR0913
    table,  # [L] addresses of gradients [T, D] or [M, D]
    pooled_gradient,  # [L, N, D]
    positions,  # [T]
    cu_seqlens,  # [N + 1]
    N, T, M, D, row_stride, SPLITS,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_LAST: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Without ADDS every row of the gradient is written, those of no sequence with 0."""
    block, split, sequence, layer = _place(D, SPLITS, N, LANES)
    base = load_base(table, layer, DTYPE, IS_ALIGNED)
    first, last, length = _token_range(cu_seqlens, sequence, split, T, SPLITS, False)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    if not ADDS:
        first = tl.where((sequence == 0) & (split == 0), 0, first)
        last = tl.where((sequence == N - 1) & (split == SPLITS - 1), T, last)
    columns = block * LANES + tl.arange(0, LANES)
    inside = columns < D
    vector = tl.load(pooled_gradient + (layer * N + sequence) * D + columns, mask=inside, other=0.0)
    if not IS_LAST:
        vector /= tl.maximum(length, 1).to(tl.float32)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    for start in range(first, last, ROWS):
        tokens = start + tl.arange(0, ROWS)
        keep = tokens < last
        counts = (tokens >= begin) & (tokens < end)
        if IS_LAST:
            counts = tokens == end - 1
        rows = tokens
        if HAS_POSITIONS:
            rows = tl.load(positions + tokens, mask=keep, other=0)
            rows = tl.minimum(tl.maximum(rows, 0), M - 1)
        pointers = base + rows[:, None] * row_stride + columns[None, :]
        chosen = keep[:, None] & inside[None, :]
        gradient = tl.where(counts[:, None], vector[None, :], 0.0)
        if ADDS:
            gradient += tl.load(pointers, mask=chosen, other=0.0).to(tl.float32)
        tl.store(pointers, gradient.to(DTYPE), mask=chosen)


@triton.jit
def cosine_terms(dot, left_square, right_square):
    """Cosine c of a and b, and what its gradient needs: `dc / da = (b - a dot / a^2) / (|a| |b|)`.

    Returns:
        c, 1 / (|a| |b|), dot / a^2, dot / b^2; all of them 0 where a state has no direction.
    """
    has_direction = (left_square > _NORM_FLOOR * _NORM_FLOOR) & (right_square > _NORM_FLOOR * _NORM_FLOOR)
    left_square = tl.where(has_direction, left_square, 1.0)
    right_square = tl.where(has_direction, right_square, 1.0)
    dot = tl.where(has_direction, dot, 0.0)
    inverse = tl.where(has_direction, 1.0 / (tl.sqrt(left_square) * tl.sqrt(right_square)), 0.0)
    return dot * inverse, inverse, dot / left_square, dot / right_square


@triton.jit(do_not_specialize=["N", "P"])
def _pair_cosines(  # noqa: PLR0913
    cosines, inverses, left_shares, right_shares,  # [P, L], see `cosine_terms`
    pooled,  # [L, N, D]
    pairs,  # [P, 2]
    centre,  # [L, D], or [2, L, D], one after the other for both sides of a pair
    L, N, P, D, side_stride,
    HAS_CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    layer, pair = pid % L, pid // L
    i = tl.load(pairs + 2 * pair).to(tl.int64)
    j = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    exists = (i >= 0) & (i < N) & (j >= 0) & (j < N)
    readable = tl.where(exists, D, 0)
    dots = tl.zeros([BLOCK], tl.float32)
    left_squares = tl.zeros([BLOCK], tl.float32)
    right_squares = tl.zeros([BLOCK], tl.float32)
    left_marks = tl.zeros([BLOCK], tl.int32)
    right_marks = tl.zeros([BLOCK], tl.int32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < readable
        left = tl.load(pooled + (layer * N + i) * D + columns, mask=inside, other=0.0)
        right = tl.load(pooled + (layer * N + j) * D + columns, mask=inside, other=0.0)
        if HAS_CENTRE:
            left_marks |= (left != 0).to(tl.int32)
            right_marks |= (right != 0).to(tl.int32)
            left -= tl.load(centre + layer * D + columns, mask=inside, other=0.0)
            right -= tl.load(centre + side_stride + layer * D + columns, mask=inside, other=0.0)
        dots += left * right
        left_squares += left * left
        right_squares += right * right
    left_square = tl.sum(left_squares, 0)
    right_square = tl.sum(right_squares, 0)
    if HAS_CENTRE:
        # An empty sequence has no direction, wherever the centre lies.
        left_square = tl.where(tl.max(left_marks, 0) != 0, left_square, 0.0)
        right_square = tl.where(tl.max(right_marks, 0) != 0, right_square, 0.0)
    cosine, inverse, left, right = cosine_terms(tl.sum(dots, 0), left_square, right_square)
    tl.store(cosines + pid, tl.where(exists, cosine, float("nan")))
    tl.store(inverses + pid, inverse)
    tl.store(left_shares + pid, left)
    tl.store(right_shares + pid, right)


@triton.jit(do_not_specialize=["N", "P"])
def _pair_cosines_backward(  # noqa: PLR0913
    pooled_gradient,  # [L, N, D]
    upstream, inverses, left_shares, right_shares,  # [P, L]
    pooled,  # [L, N, D]
    pairs,  # [P, 2]
    centre,  # [L, D], or [2, L, D]
    L, N, P, D, side_stride,
    HAS_CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program gathers what all pairs want of one state, in their order."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK)
    columns = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    row = pid // blocks
    layer, sequence = row // N, row % N
    own = tl.load(pooled + row * D + columns, mask=inside, other=0.0)
    gradient = tl.zeros([BLOCK], tl.float32)
    for pair in range(P):
        for side in tl.static_range(2):
            partner = tl.load(pairs + 2 * pair + 1 - side).to(tl.int64)
            # The cosine of a state with itself is constant, unless its sides have centres of their own.
            differs = (partner != sequence) | (side_stride != 0)
            exists = (partner >= 0) & (partner < N)
            if (tl.load(pairs + 2 * pair + side).to(tl.int64) == sequence) & differs & exists:
                slope = tl.load(upstream + pair * L + layer) * tl.load(inverses + pair * L + layer)
                share = tl.load((right_shares if side else left_shares) + pair * L + layer)
                vector = own
                other = tl.load(pooled + (layer * N + partner) * D + columns, mask=inside, other=0.0)
                if HAS_CENTRE:
                    centres = centre + layer * D + columns
                    vector -= tl.load(centres + side * side_stride, mask=inside, other=0.0)
                    other -= tl.load(centres + (1 - side) * side_stride, mask=inside, other=0.0)
                gradient += slope * (other - share * vector)
    tl.store(pooled_gradient + row * D + columns, gradient, mask=inside)


@triton.jit(do_not_specialize=["count", *(f"a{place}" for place in range(32))])
def _write_addresses(  # noqa: PLR0913
    table,  # [32]
    count,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
):  # fmt: skip
    addresses = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
        a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip
    for place in tl.static_range(32):
        tl.store(table + place, addresses[place].to(tl.int64), mask=place < count)


def address_table(tensors: Sequence[Tensor]) -> Tensor:
    """[L] int64 addresses on the tensors' device.

    They travel as arguments of a launch: a copy from the host would, in a captured CUDA graph, read at every replay a memory
    that has long been given to something else.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    table = torch.empty(len(addresses), dtype=torch.int64, device=tensors[0].device)
    for first in range(0, len(addresses), 32):
        part = addresses[first : first + 32]
        # Repeats, since a 0 would be an argument of another type.
        _write_addresses[(1,)](table[first:], len(part), *part, *[part[-1]] * (32 - len(part)), num_warps=1)
    return table


def layer_arguments(name: str, layers: Sequence[Tensor]) -> tuple[Tensor, int, bool, tl.dtype]:
    """Address table, row stride, whether every row starts on 16 bytes, element type.

    Raises:
        ValueError: the layers' memory is laid out in a way that kernels cannot follow.
    """
    first = layers[0]
    for number, layer in enumerate(layers):
        check_floats(f"{name}[{number}]", layer, (None, None))
        check_rows_contiguous(f"{name}[{number}]", layer)
        if layer.stride(0) != first.stride(0):
            raise ValueError(
                f"{name}[{number}]: row stride {layer.stride(0)}, {name}[0] has {first.stride(0)}; call .contiguous()"
            )
    is_aligned = all(layer.data_ptr() % 16 == 0 for layer in layers)
    return address_table(layers), first.stride(0), is_aligned, _TRITON_TYPES[first.dtype]


def _pool(
    states: Sequence[Tensor], cu_seqlens: Tensor, positions: Tensor | None, chosen: Sequence[int], pooling: str
) -> Tensor:
    """[L', N, D] fp32 of the chosen layers, from L tensors [T, D] or from one [L, T, D]."""
    stack = states[0] if states[0].ndim == 3 else states
    layers = [stack[layer] for layer in chosen]
    num_layers, num_sequences, (num_rows, width) = len(layers), len(cu_seqlens) - 1, layers[0].shape
    num_tokens = num_rows if positions is None else len(positions)
    pooled = torch.empty(num_layers, num_sequences, width, dtype=torch.float32, device=layers[0].device)
    if not pooled.numel():
        return pooled
    table, stride, is_aligned, dtype = layer_arguments("hidden_states", layers)
    blocks = triton.cdiv(width, _LANES)
    splits = _num_splits(num_layers * num_sequences * blocks, pooling)
    sums = pooled if splits == 1 else pooled.new_empty(num_layers, num_sequences, splits, width)
    _pool_forward[(num_layers * num_sequences * splits * blocks,)](
        sums, table, positions, cu_seqlens, num_sequences, num_tokens, num_rows, width, stride, splits, DTYPE=dtype,
        IS_ALIGNED=is_aligned, HAS_POSITIONS=positions is not None, IS_LAST=pooling == "last", ROWS=_ROWS, LANES=_LANES,
    )  # fmt: skip
    if splits > 1:
        _pool_finish[(num_layers * num_sequences * blocks,)](
            pooled, sums, cu_seqlens, num_sequences, num_tokens, width, splits, IS_LAST=pooling == "last", LANES=_LANES
        )
    return pooled


def _num_splits(programs: int, pooling: str) -> int:
    return 1 if pooling == "last" else max(1, min(_MAX_SPLITS, _PROGRAMS // programs))


def _add_pooled_gradient(
    gradients: Sequence[Tensor],
    pooled_gradient: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor | None,
    pooling: str,
    adds: bool,
) -> None:
    """Write, or add to what is there, the gradient of pooled vectors [L, N, D] by the states they were pooled from."""
    num_layers, num_sequences, width = pooled_gradient.shape
    num_rows = len(gradients[0])
    num_tokens = num_rows if positions is None else len(positions)
    if not gradients[0].numel():
        return
    if not num_sequences:
        for gradient in gradients if not adds else ():
            gradient.zero_()
        return
    table, stride, is_aligned, dtype = layer_arguments("gradients", gradients)
    blocks = triton.cdiv(width, _LANES)
    splits = _num_splits(num_layers * num_sequences * blocks, "mean")
    _pool_backward[(num_layers * num_sequences * splits * blocks,)](
        table, pooled_gradient, positions, cu_seqlens, num_sequences, num_tokens, num_rows, width, stride, splits, DTYPE=dtype,
        IS_ALIGNED=is_aligned, HAS_POSITIONS=positions is not None, IS_LAST=pooling == "last", ADDS=adds, ROWS=_ROWS,
        LANES=_LANES,
    )  # fmt: skip


def _pool_gradients(  # noqa: PLR0913
    pooled_gradient: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor | None,
    chosen: Sequence[int],
    pooling: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The gradient of each chosen layer [T, D], in rising order, or of the whole stack [L, T, D]."""
    # A layer chosen twice is one memory: its gradients are added one after the other.
    repeats = len(set(chosen)) < len(chosen)
    adds = positions is not None or repeats
    if len(shape) == 3:
        is_complete = not adds and len(chosen) == shape[0]
        gradients = [(torch.empty if is_complete else torch.zeros)(shape, dtype=dtype, device=pooled_gradient.device)]
        layers = dict(enumerate(gradients[0].unbind()))
    else:
        make = torch.zeros if adds else torch.empty
        layers = {layer: make(shape, dtype=dtype, device=pooled_gradient.device) for layer in sorted(set(chosen))}
        gradients = list(layers.values())
    pooled_gradient = pooled_gradient.contiguous()
    places = range(len(chosen))
    for batch in [[place] for place in places] if repeats else [places]:
        _add_pooled_gradient(
            [layers[chosen[place]] for place in batch], pooled_gradient[batch[0] : batch[-1] + 1], cu_seqlens, positions,
            pooling, adds,
        )  # fmt: skip
    return gradients


def _pool_gradients_outputs(pooled_gradient, cu_seqlens, positions, chosen, pooling, shape, dtype):  # noqa: PLR0913
    return [pooled_gradient.new_empty(shape, dtype=dtype) for _ in range(1 if len(shape) == 3 else len(set(chosen)))]


def _save_pooling(ctx, inputs, output):
    states, cu_seqlens, positions, ctx.chosen, ctx.pooling = inputs
    ctx.num_states, ctx.shape, ctx.dtype = len(states), states[0].shape, states[0].dtype
    ctx.save_for_backward(cu_seqlens, positions)


def _pool_operator_backward(ctx, pooled_gradient):
    pooling = *ctx.saved_tensors, ctx.chosen, ctx.pooling
    gradients = _pool_gradients_operator(pooled_gradient, *pooling, ctx.shape, ctx.dtype)
    layers = [0] if len(ctx.shape) == 3 else sorted(set(ctx.chosen))
    by_layer = dict(zip(layers, gradients, strict=True))
    return [by_layer.get(layer) for layer in range(ctx.num_states)], None, None, None, None


_pool_gradients_operator = operator("pool_gradients", _pool_gradients, _pool_gradients_outputs)
_pool_operator = operator(
    "pool",
    _pool,
    lambda states, cu_seqlens, positions, chosen, pooling: states[0].new_empty(
        len(chosen), cu_seqlens.shape[0] - 1, states[0].shape[-1], dtype=torch.float32
    ),
)
_pool_operator.register_autograd(_pool_operator_backward, setup_context=_save_pooling)
add_pooled_gradient = operator("add_pooled_gradient", _add_pooled_gradient, lambda *_: None, mutates=("gradients",))


def _centre_arguments(centre: Tensor | None) -> dict[str, Any]:
    side_stride = centre[0].numel() if centre is not None and centre.ndim == 3 else 0
    return {"centre": centre, "side_stride": side_stride, "HAS_CENTRE": centre is not None}


def _cosines(pooled: Tensor, pairs: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[P, L] cosines, and the three terms of `cosine_terms` that their gradient needs."""
    num_layers, num_sequences, width = pooled.shape
    cosines = torch.empty(len(pairs), num_layers, dtype=torch.float32, device=pooled.device)
    inverses, left_shares, right_shares = (torch.empty_like(cosines) for _ in range(3))
    if cosines.numel():
        _pair_cosines[(cosines.numel(),)](
            cosines, inverses, left_shares, right_shares, pooled, pairs, L=num_layers, N=num_sequences, P=len(pairs), D=width,
            **_centre_arguments(centre), BLOCK=_COSINE_BLOCK,
        )  # fmt: skip
    return cosines, inverses, left_shares, right_shares


def _cosines_gradient(  # noqa: PLR0913
    upstream: Tensor,
    inverses: Tensor,
    left_shares: Tensor,
    right_shares: Tensor,
    pooled: Tensor,
    pairs: Tensor,
    centre: Tensor | None,
) -> Tensor:
    num_layers, num_sequences, width = pooled.shape
    gradient = torch.empty_like(pooled)
    programs = num_layers * num_sequences * triton.cdiv(width, _COSINE_BLOCK)
    if programs:
        _pair_cosines_backward[(programs,)](
            gradient, upstream.contiguous(), inverses, left_shares, right_shares, pooled, pairs, L=num_layers, N=num_sequences,
            P=len(pairs), D=width, **_centre_arguments(centre), BLOCK=_COSINE_BLOCK,
        )  # fmt: skip
    return gradient


def _save_cosines(ctx, inputs, output):
    ctx.save_for_backward(*output[1:], *inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _cosines_operator_backward(ctx, upstream, *_):
    return None if upstream is None else _cosines_gradient_operator(upstream, *ctx.saved_tensors), None, None


_cosines_gradient_operator = operator("cosines_gradient", _cosines_gradient, lambda *tensors: torch.empty_like(tensors[4]))
_cosines_operator = operator(
    "cosines",
    _cosines,
    lambda pooled, pairs, centre: tuple(pooled.new_empty(pairs.shape[0], pooled.shape[0]) for _ in range(4)),
)
_cosines_operator.register_autograd(_cosines_operator_backward, setup_context=_save_cosines)


def pool_sequences(states: Tensor, cu_seqlens: Tensor, *, positions: Tensor | None = None, pooling: str = "mean") -> Tensor:
    if not runs_kernels(states):
        return reference.pool_sequences(states, cu_seqlens, positions=positions, pooling=pooling)
    check_floats("states", states, (None, None))
    check_packing(states, cu_seqlens, positions)
    check_pooling(pooling)
    check_rows_contiguous("states", states)
    positions = None if positions is None else positions.contiguous()
    return _pool_operator([states], cu_seqlens.contiguous(), positions, [0], pooling).squeeze(0)


def pooled_similarity(pooled: Tensor, pairs: Tensor, *, weights: Tensor | None = None, centre: Tensor | None = None) -> Tensor:
    if not runs_kernels(pooled):
        return reference.pooled_similarity(pooled, pairs, weights=weights, centre=centre)
    check_floats("pooled", pooled, (None, None, None))
    check_pairs(pairs, pooled.shape[1])
    check_weights(weights, len(pooled))
    check_centre(centre, pooled)
    check_same_device(("pooled", pooled), pairs=pairs, weights=weights, centre=centre)
    centre = None if centre is None else centre.detach().float().contiguous()
    cosines, *_ = _cosines_operator(pooled.float().contiguous(), pairs.contiguous(), centre)
    return cosines if weights is None else cosines * weights.float()


def layer_similarity(  # noqa: PLR0913
    hidden_states: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor,
    pairs: Tensor,
    *,
    layers: Sequence[int] | None = None,
    weights: Tensor | None = None,
    pooling: str = "mean",
    centre: Tensor | None = None,
) -> Tensor:
    states = check_layer_states("hidden_states", hidden_states)
    if not runs_kernels(states[0]):
        return reference.layer_similarity(
            hidden_states, cu_seqlens, pairs, layers=layers, weights=weights, pooling=pooling, centre=centre
        )
    chosen = choose_layers(layers, len(states))
    check_packing(states[0], cu_seqlens, None)
    check_pooling(pooling)
    inputs = [hidden_states] if isinstance(hidden_states, Tensor) else states
    pooled = _pool_operator(inputs, cu_seqlens.contiguous(), None, chosen, pooling)
    return pooled_similarity(pooled, pairs, weights=weights, centre=centre)


pool_sequences.__doc__ = reference.pool_sequences.__doc__
pooled_similarity.__doc__ = reference.pooled_similarity.__doc__
layer_similarity.__doc__ = reference.layer_similarity.__doc__
