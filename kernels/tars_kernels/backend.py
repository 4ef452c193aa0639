"""Which implementation runs: Triton kernels, or the same operation in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

HAS_TRITON = find_spec("triton") is not None
"""Triton has no packages for macOS and Windows; every operation then runs in plain PyTorch."""
runs_anywhere = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Launch kernels for tensors of any device: under Triton's interpreter, which runs them on the CPU for tests. Triton reads
the variable once, when kernels are defined."""
walks_launches = False
"""Operators go through their launches for tensors without data too: for tools that compile what would be launched."""
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


def _on_device_of(tensor: Tensor | None) -> AbstractContextManager[None]:
    # What is traced launches nothing.
    is_fake = isinstance(tensor, FakeTensor) and not walks_launches
    if tensor is None or not tensor.is_cuda or torch.compiler.is_compiling() or is_fake:
        return nullcontext()
    return torch.cuda.device_of(tensor)


def isolated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run on the device of the first tensor, which need not be the current one, and without autocast.

    Autocast would take fp32 products, whose precision is the point of them, in bf16.
    """

    @wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with _on_device_of(first), _without_autocast(first):
            return function(*args, **kwargs)

    return guarded


def operator(name: str, run: Callable[..., Any], outputs: Callable[..., Any], *, mutates: Sequence[str] = ()) -> Any:
    """`run` as the operator `tars_kernels::name`, one node to whatever traces: torch.compile, export, fake tensors.

    Args:
        run: launches kernels; its annotations say what the operator takes.
        outputs: of the same arguments, empty tensors like those that `run` returns.
        mutates: names of the arguments that are written.

    Returns:
        a function like `run`, whose gradient is given to it with `register_autograd`.
    """
    guarded = isolated(run)
    made = torch.library.custom_op(f"tars_kernels::{name}", guarded, mutates_args=mutates)

    @made.register_fake
    def without_data(*args: Any) -> Any:
        return guarded(*args) if walks_launches else outputs(*args)

    return made
