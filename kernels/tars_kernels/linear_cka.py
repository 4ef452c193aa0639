"""Linear centred kernel alignment of all pairs of layers: one launch centres every layer, matrix products do the rest.

Centring the states in fp32 before their Gram matrices, rather than the matrices after, keeps a few large common components of
hidden states from swallowing the differences between tokens.

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
from tars_kernels.checks import check_aligned
from tars_kernels.similarity import layer_arguments, load_base

_ROWS, _LANES = 16, 128


@triton.jit(do_not_specialize=["T"])
def _centre(  # noqa: PLR0913
    centred,  # [L, T, D]
    table,  # [L] addresses of [T, D]
    T, D, row_stride,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program sums a block of columns over all tokens, then subtracts its mean; the second read comes from the cache."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, LANES)
    layer = pid // blocks
    columns = pid % blocks * LANES + tl.arange(0, LANES)[None, :]
    base = load_base(table, layer, DTYPE, IS_ALIGNED)
    sums = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, T, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (rows < T) & (columns < D)
        sums += tl.load(base + rows * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0)[None, :] / T
    for start in range(0, T, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (rows < T) & (columns < D)
        x = tl.load(base + rows * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(centred + (layer * T + rows) * D + columns, x - mean, mask=inside)


def _centred(layers: Sequence[Tensor]) -> Tensor:
    """[L, T, D] fp32 from L tensors."""
    num_tokens, width = layers[0].shape
    centred = torch.empty(len(layers), num_tokens, width, dtype=torch.float32, device=layers[0].device)
    if centred.numel():
        table, stride, is_aligned, dtype = layer_arguments("x_layers", layers)
        _centre[(len(layers) * triton.cdiv(width, _LANES),)](
            centred, table, num_tokens, width, stride, DTYPE=dtype, IS_ALIGNED=is_aligned, ROWS=_ROWS, LANES=_LANES
        )
    return centred


def _save_type(ctx, inputs, output):
    (layers,) = inputs
    ctx.dtype = layers[0].dtype


def _centre_operator_backward(ctx, gradient):
    # Centring is its own adjoint.
    return (list(_centre_operator(gradient.contiguous().unbind()).to(ctx.dtype).unbind()),)


_centre_operator = operator(
    "centre",
    _centred,
    lambda layers: layers[0].new_empty(len(layers), *layers[0].shape, dtype=torch.float32),
)
_centre_operator.register_autograd(_centre_operator_backward, setup_context=_save_type)


def linear_cka(x_layers: Tensor | Sequence[Tensor], y_layers: Tensor | Sequence[Tensor]) -> Tensor:
    x, y = check_aligned(x_layers, y_layers)
    if not runs_kernels(x[0]):
        return reference.linear_cka(x, y)
    return reference.cka_of_centred(_centre_operator(x), _centre_operator(y))


linear_cka.__doc__ = reference.linear_cka.__doc__
