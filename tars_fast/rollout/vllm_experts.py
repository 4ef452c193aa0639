"""Mixtures of experts in vLLM on the trainer's weights: kernels that take the weights of all experts as they were loaded.

vLLM has several kernels for them. Most store the weights in an order of their own: FlashInfer's and those for ROCm and TPU, and
all of its CPU build. Such a copy, or the same memory in another order, would not be what the trainer computes with. Its Triton
kernel takes them as transformers has them, [E, 2I, D] and [E, D, I]. On a CPU, where no kernel does, PyTorch's grouped product
does the work.

Shapes: N tokens, E experts, K experts of a token, D hidden size, I inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.weights import SharingError


@contextmanager
def whole_experts(*, on_cpu: bool) -> Iterator[None]:
    """Inside the block vLLM builds mixtures of experts with such a kernel, whether or not it has adapters elsewhere."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    backend = UnquantizedMoeBackend.CPU if on_cpu else UnquantizedMoeBackend.TRITON

    def choose(moe_config: object) -> tuple[UnquantizedMoeBackend, type]:
        return backend, _kernel(on_cpu=on_cpu)

    original = method.select_unquantized_moe_backend
    method.select_unquantized_moe_backend = choose
    try:
        yield
    finally:
        method.select_unquantized_moe_backend = original


def check_experts(module: nn.Module, *, on_cpu: bool) -> None:
    """Check that vLLM built every mixture of experts in `module` as `whole_experts` wants it.

    Raises:
        SharingError: another kernel was chosen, whose weights may be in another order.
    """
    for name, layer in module.named_modules():
        if not hasattr(layer, "w13_weight"):
            continue
        kernel = getattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts", None)
        if type(kernel) is not _kernel(on_cpu=on_cpu):
            raise SharingError(
                f"{name}: vLLM computes experts by {type(kernel).__name__}, which may keep their weights in an order of its own; "
                "use --engine transformers"
            )


@cache
def _kernel(*, on_cpu: bool) -> type:
    """The class of vLLM's that computes the experts' products."""
    if not on_cpu:
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        return TritonExperts
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    class GroupedExperts(CPUUnquantizedExperts):  # type: ignore[misc]  # vLLM's types are not read
        """Leaves the weights as they were loaded."""

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            pass

        def apply(self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, **routed: Any) -> None:
            output.copy_(grouped_experts(hidden_states, w1, w2, routed["topk_ids"], routed["topk_weights"]))

    return GroupedExperts


def grouped_experts(hidden_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The weighted sum of each token's experts, each a gated unit with SiLU.

    Args:
        gate_up: [E, 2I, D]
        down: [E, D, I]
        experts_NK: which.
        weights_NK: of them in the sum.

    Returns:
        [N, D]
    """
    experts, order = experts_NK.flatten().sort()
    rows = order // experts_NK.shape[1]
    ends = torch.bincount(experts, minlength=len(gate_up)).cumsum(0).int()
    gate, up = nn.functional.grouped_mm(hidden_ND[rows], gate_up.mT, offs=ends).chunk(2, -1)
    products = nn.functional.grouped_mm(nn.functional.silu(gate) * up, down.mT, offs=ends)
    products = products * weights_NK.flatten()[order, None].to(products.dtype)
    return torch.zeros_like(hidden_ND).index_add_(0, rows, products)
