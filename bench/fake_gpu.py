"""CUDA tensors on a machine without a GPU: shapes, strides, dtypes and devices, but no data.

PyTorch's `FakeTensorMode` makes them, with three additions. Autograd's engine would ask the driver for the stream of a CUDA
tensor, so its C++ sees the meta tensors inside, while Python, which chooses what runs, sees the GPU. What is computed on the
host has its data: only a tensor on the GPU is fake. And what is read from the GPU is random, and noted, because the host would
have to wait for it.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config  # FakeTensorMode imports it when it is made, which must not see what is replaced here.
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_ROOT = Path(__file__).parents[1]


class FakeGpu(FakeTensorMode):
    """Inside its block `device="cuda"` makes fake tensors, and operations on them do."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.host_reads: list[str] = []
        """Where the host read from the GPU, and had to wait for it: path and function."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):
            # What C++ makes beside a tensor of the GPU.
            kwargs["device"] = torch.device("cuda", 0)
        given = tree_leaves((args, kwargs))
        on_gpu = [isinstance(value, FakeTensor) or getattr(value, "type", None) == "cuda" for value in given]
        if not any(on_gpu):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._note_read()
            return _random(args[0]).item()
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self._note_read()
            return _random(args[0]).to(kwargs.get("dtype"))
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._note_read()
            return args[0].copy_(_random(args[1]))
        if func is aten.baddbmm.dtype_out:
            # PyTorch's own decomposition of it takes `out_dtype` for `beta`.
            return kwargs["out"]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note_read(self) -> None:
        stack = traceback.extract_stack(sys._getframe(2))
        stack = [frame for frame in stack if frame.filename != __file__]
        ours = [frame for frame in stack if Path(frame.filename).is_relative_to(_ROOT)] or stack
        self.host_reads.append(f"{os.path.relpath(ours[-1].filename, _ROOT)}:{ours[-1].name}")


def _random(tensor: Tensor) -> Tensor:
    """What a tensor on the GPU might hold."""
    if tensor.dtype.is_floating_point:
        return torch.rand(tensor.shape).to(tensor.dtype)
    return torch.ones(tensor.shape, dtype=tensor.dtype)


def _address(tensor: Tensor) -> int:
    """Where the tensor might lie: CUDA's allocations begin on 512 bytes."""
    return (tensor.untyped_storage()._cdata << 9) + tensor.storage_offset() * tensor.element_size()


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without swapping the contents of tensors, which fake ones do not allow."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            moved = None if tensor is None else function(tensor.detach())
            held[name] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return module


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """A GPU of this compute capability."""
    make_subclass = torch.Tensor._make_subclass
    make_tensor = torch.tensor

    def meta_to_cpp(cls: type, data: Tensor, require_grad: bool = False, **kwargs: Any) -> Tensor:
        # Without it the device that C++ sees is that of `data`.
        kwargs.pop("dispatch_device", None)
        return make_subclass(cls, data, require_grad, **kwargs)

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return make_tensor(*args, **kwargs)

    replaced: list[tuple[object, str, Any]] = [
        (torch.Tensor, "_make_subclass", staticmethod(meta_to_cpp)),
        (FakeTensor, "is_cuda", property(lambda tensor: tensor.fake_device.type == "cuda")),
        (FakeTensor, "data_ptr", _address),
        # As on a GPU, one copy: of fake tensors PyTorch asks for one number after the other.
        (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
        (torch, "tensor", unpinned),
        (nn.Module, "_apply", _apply),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch.cuda, "get_device_capability", lambda _device=None: capability),
        (torch.cuda, "current_stream", lambda _device=None: SimpleNamespace(synchronize=lambda: None)),
        (torch.backends.cuda, "is_flash_attention_available", lambda: True),
    ]
    mode = FakeGpu()
    patches = [patch.object(owner, name, value, create=True) for owner, name, value in replaced]
    with warnings.catch_warnings():
        # Of autocast, which is asked to do nothing.
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        try:
            for each in patches:
                each.start()
            with mode:
                yield mode
        finally:
            for each in reversed(patches):
                each.stop()
