"""Layer-wise pooling while the model runs, so that layers x tokens x width is never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tars_kernels.reference import pool_sequences


class LayerPooler:
    """Means of every layer's output over each sequence, taken by forward hooks and without a gradient, as rewards want them.

    Entry l of the result is what Hugging Face calls `hidden_states[l + 1]`: the outputs of layers 1 .. L-1, and for the last
    entry the output of the final norm. Embeddings (`hidden_states[0]`) are not pooled.

        pooler = LayerPooler(model.layers, model.norm)
        with pooler.pooling(positions, cu_seqlens):
            model(...)
        similarity = pooled_similarity(pooler.pooled, pairs)   # [P, L]

    Args:
        layers: the decoder layers, in order.
        final_norm: the norm after the last of them.
    """

    def __init__(self, layers: Sequence[nn.Module], final_norm: nn.Module):
        self._modules = [*layers[:-1], final_norm]
        self._pooled: list[Tensor | None] = []

    @property
    def pooled(self) -> Tensor:
        """[L, N, D] fp32 of the last `pooling` block.

        Raises:
            RuntimeError: a layer did not run inside the block.
        """
        missing = [index for index, entry in enumerate(self._pooled) if entry is None]
        if missing or not self._pooled:
            raise RuntimeError(f"layers {missing or 'all'} did not run inside the pooling block")
        return torch.stack(self._pooled)

    @contextmanager
    def pooling(self, positions: Tensor, cu_seqlens: Tensor) -> Iterator[None]:
        """Pool whatever forward pass runs inside the block.

        Hooks live as long as the block: layers that run again during the backward of gradient checkpointing count once.

        Args:
            positions: [T] int64 places of the packed tokens within the flattened [batch * length] dimension.
            cu_seqlens: [N + 1] int64.
        """
        self._pooled = [None] * len(self._modules)

        def record(index: int):
            def hook(_module, _inputs, output):
                states = output[0] if isinstance(output, tuple) else output
                packed = states.detach().flatten(0, -2)[positions]
                self._pooled[index] = pool_sequences(packed, cu_seqlens)

            return hook

        handles = [module.register_forward_hook(record(index)) for index, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
