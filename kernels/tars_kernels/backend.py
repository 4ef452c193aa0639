"""Which implementation runs: Triton kernels, or the same operation in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

HAS_TRITON = find_spec("triton") is not None
"""Triton has no packages for macOS and Windows; every operation then runs in plain PyTorch."""
runs_anywhere = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Launch kernels for tensors of any device: under Triton's interpreter, which runs them on the CPU for tests. Triton reads
the variable once, when kernels are defined."""
_reference_depth = 0


@contextmanager
def use_reference(active: bool = True) -> Iterator[None]:
    """Run every operation in plain PyTorch inside the block, on CUDA too: to compare, or to rule kernels out.

    Args:
        active: False leaves everything as it is, for a setting to decide.
    """
    global _reference_depth
    _reference_depth += active
    try:
        yield
    finally:
        _reference_depth -= active


def runs_kernels(tensor: Tensor) -> bool:
    """Whether operations on `tensor` launch kernels: on CUDA, and on the CPU under Triton's interpreter."""
    return HAS_TRITON and not _reference_depth and (tensor.is_cuda or runs_anywhere)


def _without_autocast(tensor: Tensor | None) -> AbstractContextManager[None]:
    if tensor is None or tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def isolated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run on the device of the first tensor, which need not be the current one, and without autocast.

    Autocast would take fp32 products, whose precision is the point of them, in bf16.
    """

    @wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with torch.cuda.device_of(first) if first is not None else nullcontext(), _without_autocast(first):
            return function(*args, **kwargs)

    return guarded
