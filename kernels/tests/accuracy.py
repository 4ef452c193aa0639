"""The rule of accuracy: a kernel's error against float64 is at most three times PyTorch's own in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 3.0


def run(operation: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device):
    """Outputs and gradients, in float64 on the CPU, of `operation` on `inputs` in `dtype`.

    The gradient is that of a weighted sum of the first output, so that what comes from upstream is not 1.
    """
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    outputs = operation(*leaves)
    upstream = torch.linspace(0.4, 1.6, outputs[0].numel(), dtype=torch.float64).view(outputs[0].shape)
    gradients = torch.autograd.grad((outputs[0] * upstream.to(outputs[0])).sum(), leaves)
    return [tensor.detach().double().cpu() for tensor in (*outputs, *gradients)]


def assert_accurate(
    ours: Sequence[Tensor], pytorchs: Sequence[Tensor], truth: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> None:
    """Compare results entry by entry.

    Args:
        dtypes: of each result, for the allowance of one unit in the last place of its largest entry: where PyTorch happens to
            be exact, a result that rounds the other way is as good.
    """
    for place, (our, pytorch, true, dtype) in enumerate(zip(ours, pytorchs, truth, dtypes, strict=True)):
        assert our.shape == true.shape
        both_infinite = torch.isinf(true) & (our == true)
        error = (our - true).masked_fill(both_infinite, 0.0).abs()
        pytorch_error = (pytorch - true).masked_fill(both_infinite, 0.0).abs().nan_to_num(nan=0.0)
        finite = true[torch.isfinite(true)]
        allowance = torch.finfo(dtype).eps * (finite.abs().max() if len(finite) else 0.0)
        if true.numel() == 1:
            # One number, a sum of terms of size 1 that cancel: how well PyTorch hits it is luck.
            allowance = 4 * torch.finfo(dtype).eps * true.abs().clamp(min=1.0)
        limit = FACTOR * pytorch_error.max() + allowance if error.numel() else 0.0
        worst = error.max() if error.numel() else 0.0
        assert worst <= limit, f"result {place}: error {worst:.3e}, PyTorch's {pytorch_error.max():.3e}, limit {limit:.3e}"
