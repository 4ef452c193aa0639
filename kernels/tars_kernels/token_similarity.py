"""Cosine between two versions of the same tokens' states, all layers in one launch.

Shapes: T tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tars_kernels import reference
from tars_kernels.backend import operator, runs_kernels
from tars_kernels.checks import check_versions, choose_layers
from tars_kernels.similarity import cosine_terms, layer_arguments, load_base

_ROWS, _LANES = 2, 1024


@triton.jit
def _place(T, ROWS: tl.constexpr):
    """This program's layer and tokens [ROWS]."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, ROWS)
    return pid // blocks, pid % blocks * ROWS + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=["T"])
def _token_cosines(  # noqa: PLR0913
    cosines, inverses, x_shares, y_shares,  # [L, T], see `cosine_terms`
    x_table, y_table,  # [L] addresses of [T, D]
    T, D, x_stride, y_stride,
    X_DTYPE: tl.constexpr, Y_DTYPE: tl.constexpr, X_ALIGNED: tl.constexpr, Y_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    layer, rows = _place(T, ROWS)
    x_rows = load_base(x_table, layer, X_DTYPE, X_ALIGNED) + rows[:, None] * x_stride
    y_rows = load_base(y_table, layer, Y_DTYPE, Y_ALIGNED) + rows[:, None] * y_stride
    dots = tl.zeros([ROWS, LANES], tl.float32)
    x_squares = tl.zeros([ROWS, LANES], tl.float32)
    y_squares = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, D, LANES):
        columns = start + tl.arange(0, LANES)[None, :]
        inside = (rows[:, None] < T) & (columns < D)
        x = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_rows + columns, mask=inside, other=0.0).to(tl.float32)
        dots += x * y
        x_squares += x * x
        y_squares += y * y
    cosine, inverse, x_share, y_share = cosine_terms(tl.sum(dots, 1), tl.sum(x_squares, 1), tl.sum(y_squares, 1))
    output = layer * T + rows
    tl.store(cosines + output, cosine, mask=rows < T)
    tl.store(inverses + output, inverse, mask=rows < T)
    tl.store(x_shares + output, x_share, mask=rows < T)
    tl.store(y_shares + output, y_share, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _token_cosines_backward(  # noqa: PLR0913
    gradients,  # [L, T, D] by the states of the first table
    upstream, inverses, shares,  # [L, T]; shares of the first table's states
    x_table, y_table,  # [L] addresses of [T, D]
    T, D, x_stride, y_stride,
    X_DTYPE: tl.constexpr, Y_DTYPE: tl.constexpr, X_ALIGNED: tl.constexpr, Y_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    layer, rows = _place(T, ROWS)
    x_rows = load_base(x_table, layer, X_DTYPE, X_ALIGNED) + rows[:, None] * x_stride
    y_rows = load_base(y_table, layer, Y_DTYPE, Y_ALIGNED) + rows[:, None] * y_stride
    values = layer * T + rows
    slope = tl.load(upstream + values, mask=rows < T, other=0.0) * tl.load(inverses + values, mask=rows < T, other=0.0)
    share = tl.load(shares + values, mask=rows < T, other=0.0)
    for start in range(0, D, LANES):
        columns = start + tl.arange(0, LANES)[None, :]
        inside = (rows[:, None] < T) & (columns < D)
        x = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_rows + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = slope[:, None] * (y - share[:, None] * x)
        tl.store(gradients + values[:, None] * D + columns, gradient.to(gradients.dtype.element_ty), mask=inside)


def _grid(cosines: Tensor) -> tuple[int]:
    num_layers, num_tokens = cosines.shape
    return (num_layers * triton.cdiv(num_tokens, _ROWS),)


def _table_arguments(x: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, object]:
    x_table, x_stride, x_aligned, x_type = layer_arguments("x_layers", x)
    y_table, y_stride, y_aligned, y_type = layer_arguments("y_layers", y)
    num_tokens, width = x[0].shape
    return {
        "x_table": x_table, "y_table": y_table, "T": num_tokens, "D": width, "x_stride": x_stride, "y_stride": y_stride,
        "X_DTYPE": x_type, "Y_DTYPE": y_type, "X_ALIGNED": x_aligned, "Y_ALIGNED": y_aligned,
    }  # fmt: skip


def _cosines(x: Sequence[Tensor], y: Sequence[Tensor], chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[L', T] of the chosen layers, and the three terms of `cosine_terms` that their gradient needs."""
    cosines = torch.empty(len(chosen), len(x[0]), dtype=torch.float32, device=x[0].device)
    inverses, x_shares, y_shares = (torch.empty_like(cosines) for _ in range(3))
    if cosines.numel():
        arguments = _table_arguments([x[layer] for layer in chosen], [y[layer] for layer in chosen])
        _token_cosines[_grid(cosines)](cosines, inverses, x_shares, y_shares, **arguments, ROWS=_ROWS, LANES=_LANES)
    return cosines, inverses, x_shares, y_shares


def _cosines_gradient(
    upstream: Tensor, inverses: Tensor, shares: Tensor, own: Sequence[Tensor], other: Sequence[Tensor]
) -> Tensor:
    """[L', T, D] by the layers `own` of one side."""
    gradient = own[0].new_empty(len(own), *own[0].shape)
    if gradient.numel():
        _token_cosines_backward[_grid(inverses)](
            gradient, upstream.contiguous(), inverses, shares, **_table_arguments(own, other), ROWS=_ROWS, LANES=_LANES
        )
    return gradient


def _save_cosines(ctx, inputs, output):
    x, y, ctx.chosen = inputs
    ctx.num_layers = len(x)
    ctx.save_for_backward(*output[1:], *x, *y)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _cosines_operator_backward(ctx, upstream, *_):
    inverses, x_shares, y_shares, *states = ctx.saved_tensors
    sides = states[: ctx.num_layers], states[ctx.num_layers :]
    gradients: list[list[Tensor | None]] = []
    for shares, own, other, needed in zip((x_shares, y_shares), sides, sides[::-1], ctx.needs_input_grad[:2], strict=True):
        gradients.append([None] * ctx.num_layers)
        if upstream is not None and any(needed):
            chosen = [[side[layer] for layer in ctx.chosen] for side in (own, other)]
            parts = _cosines_gradient_operator(upstream, inverses, shares, *chosen)
            for layer, part in zip(ctx.chosen, parts.unbind(), strict=True):
                known = gradients[-1][layer]
                gradients[-1][layer] = part if known is None else known + part
    return *gradients, None


_cosines_gradient_operator = operator(
    "token_cosines_gradient",
    _cosines_gradient,
    lambda upstream, inverses, shares, own, other: own[0].new_empty(len(own), *own[0].shape),
)
_cosines_operator = operator(
    "token_cosines",
    _cosines,
    lambda x, y, chosen: tuple(x[0].new_empty(len(chosen), x[0].shape[0], dtype=torch.float32) for _ in range(4)),
)
_cosines_operator.register_autograd(_cosines_operator_backward, setup_context=_save_cosines)


def token_similarity(
    x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor], *, layers: Sequence[int] | None = None
) -> Tensor:
    x, y = check_versions(x_layers, y_layers)
    if not runs_kernels(x[0]):
        return reference.token_similarity(x, y, layers=layers)
    return _cosines_operator(x, y, choose_layers(layers, len(x)))[0]


token_similarity.__doc__ = reference.token_similarity.__doc__
