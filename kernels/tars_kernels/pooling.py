"""Layer-wise pooling while the model runs, so that layers x tokens x width is never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tars_kernels import operations
from tars_kernels.backend import runs_kernels
from tars_kernels.checks import check_integers, check_pooling, choose_layers


class _Tap(torch.autograd.Function):
    """(states, pooled): states pass through, and what comes back for `pooled` is added to their gradient.

    Integers are kept on `ctx` instead of being saved: saved tensors inside a checkpointed layer would have to be saved again
    when it is computed again, after the hooks are gone.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cu_seqlens: Tensor, positions: Tensor | None, pooling: str) -> tuple[Tensor, Tensor]:
        ctx.cu_seqlens, ctx.positions, ctx.pooling = cu_seqlens, positions, pooling
        ctx.shape, ctx.dtype, ctx.runs_kernels = states.shape, states.dtype, runs_kernels(states)
        ctx.set_materialize_grads(False)
        pooled = operations.pool_sequences(states.flatten(0, -2), cu_seqlens, positions=positions, pooling=pooling)
        return states.view_as(states), pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Any) -> Any:
        states_gradient, pooled_gradient = upstreams
        if pooled_gradient is None:
            return states_gradient, None, None, None
        if states_gradient is None:
            gradient = torch.zeros(ctx.shape, dtype=ctx.dtype, device=pooled_gradient.device)
        else:
            gradient = states_gradient.clone(memory_format=torch.contiguous_format)
        flat = gradient.view(-1, ctx.shape[-1])
        if ctx.runs_kernels:
            operations.add_pooled_gradient(
                [flat], pooled_gradient[None].contiguous(), ctx.cu_seqlens, ctx.positions, ctx.pooling, True
            )
        else:
            with torch.enable_grad():
                states = torch.zeros_like(flat, requires_grad=True)
                pooled = operations.pool_sequences(states, ctx.cu_seqlens, positions=ctx.positions, pooling=ctx.pooling)
            flat += torch.autograd.grad(pooled, states, pooled_gradient)[0]
        return gradient, None, None, None


class LayerPooler:
    """One vector for each sequence and layer, taken by forward hooks while the model runs.

    Entry l of the result is what Hugging Face calls `hidden_states[l + 1]`: the outputs of layers 1 .. L-1, and for the last
    entry the output of the final norm. Embeddings (`hidden_states[0]`) are not pooled.

        pooler = LayerPooler(model.layers, model.norm)
        with pooler.pooling(cu_seqlens, positions=positions):
            model(...)
        similarity = pooled_similarity(pooler.pooled, pairs)   # [P, L]

    Layers that run again in the backward pass of gradient checkpointing count once.

    Args:
        model_layers: the decoder layers, in order.
        final_norm: the norm after the last of them.
        layers: which entries to pool, counted from 0; None: all of them.
        pooling: mean over a sequence's tokens, or its last token.
        differentiable: carry a gradient, for similarity as a loss; without it, as a reward wants it, nothing is recorded.
            Checkpointed layers need `use_reentrant=False`.

    Raises:
        ValueError: an entry that does not exist, or another way of pooling.
    """

    def __init__(
        self,
        model_layers: Sequence[nn.Module] | nn.ModuleList,
        final_norm: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        pooling: str = "mean",
        differentiable: bool = False,
    ):
        check_pooling(pooling)
        modules = [*model_layers[:-1], final_norm]
        self._layers = choose_layers(layers, len(modules))
        self._modules = [modules[layer] for layer in self._layers]
        self._pooling = pooling
        self._differentiable = differentiable
        self._pooled: list[Tensor | None] = []

    @property
    def pooled(self) -> Tensor:
        """[L, N, D] fp32 of the last `pooling` block.

        Raises:
            RuntimeError: a layer did not run inside the block.
        """
        missing = [layer for layer, entry in zip(self._layers, self._pooled, strict=False) if entry is None]
        pooled = [entry for entry in self._pooled if entry is not None]
        if missing or not self._pooled:
            raise RuntimeError(f"{f'layers {missing}' if missing else 'the model'} did not run inside the pooling block")
        return torch.stack(pooled)

    @contextmanager
    def pooling(self, cu_seqlens: Tensor, *, positions: Tensor | None = None) -> Iterator[None]:
        """Pool the forward pass that runs inside the block; of several the last one counts.

        Args:
            cu_seqlens: [N + 1] boundaries of the packed sequences.
            positions: [T] int64 places of the packed tokens within the flattened [batch * length] dimension, none of them
                twice; None: every place, in order.

        Raises:
            ValueError: boundaries that are no integers; while the model runs, boundaries or positions that do not fit.
            RuntimeError: while the model runs: a gradient is wanted, and reentrant checkpointing would lose it.
        """
        self._pooled = [None] * len(self._modules)
        check_integers("cu_seqlens", cu_seqlens, (None,))
        cu_seqlens = cu_seqlens.contiguous()
        positions = None if positions is None else positions.contiguous()
        records_gradient = self._differentiable and torch.is_grad_enabled()

        def record(index: int) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                states = output[0] if isinstance(output, tuple) else output
                if not records_gradient:
                    flat = states.detach().flatten(0, -2)
                    self._pooled[index] = operations.pool_sequences(
                        flat, cu_seqlens, positions=positions, pooling=self._pooling
                    )
                    return None
                if not torch.is_grad_enabled():
                    raise RuntimeError(
                        f"layer {self._layers[index]} runs without recording a gradient; use_reentrant=False makes gradient "
                        "checkpointing record it"
                    )
                states, self._pooled[index] = _Tap.apply(states, cu_seqlens, positions, self._pooling)
                return (states, *output[1:]) if isinstance(output, tuple) else states

            return hook

        handles = [module.register_forward_hook(record(index)) for index, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
