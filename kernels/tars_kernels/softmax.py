"""Log-probabilities and entropies of rows of logits in plain PyTorch, in as few passes over them as it takes.

`reference` specifies what they are; this is what it runs below float64, where no entropy has a gradient and nothing is traced.
Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK, _SHARED_BLOCK = 2**16, 2**22
"""Logits that are gone through at once: their intermediate results stay in the cache. More where threads share the work, who
wait for each other after every step."""


class SoftmaxTerms(torch.autograd.Function):
    """([T] log-probabilities, [T] entropies without a gradient) of softmax((logits + bias) / temperature)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, wants_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = any(ctx.needs_input_grad)
        probabilities = torch.empty_like(logits) if needs_gradient else None
        logprobs, entropies = logits.new_empty(len(logits)), logits.new_zeros(len(logits))
        block_size = _BLOCK if torch.get_num_threads() == 1 else _SHARED_BLOCK
        num_rows = max(1, block_size // max(1, logits.shape[1]))
        scratch = torch.empty_like(logits[:num_rows]) if wants_entropy and not needs_gradient else None
        # Slices that are made all at once: one by one they take a tenth of the time.
        columns = (targets[:, None], logprobs[:, None], entropies)
        blocks = zip(logits.split(num_rows), *(column.split(num_rows) for column in columns), strict=True)
        written = itertools.repeat(scratch) if probabilities is None else probabilities.split(num_rows)
        for (scaled, target, logprob, entropy), probability in zip(blocks, written, strict=False):
            if bias is not None:
                scaled = scaled + bias
            all_logprobs = (scaled if temperature == 1 else scaled / temperature).log_softmax(-1)
            torch.gather(all_logprobs, -1, target, out=logprob)
            if probability is not None:
                probability = torch.exp(all_logprobs, out=probability[: scaled.shape[0]])
                if wants_entropy:
                    # Suppressed tokens, whose 0 * -inf is NaN, have no share in it.
                    torch.nansum(all_logprobs.mul_(probability), -1, out=entropy)
        if wants_entropy:
            entropies.neg_().masked_fill_(logprobs.isnan(), torch.nan)
        ctx.save_for_backward(targets, probabilities)
        ctx.temperature, ctx.bias_type = temperature, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Any) -> Any:
        targets, probabilities = ctx.saved_tensors
        slopes = (upstreams[0] / ctx.temperature)[:, None]
        gradient = (probabilities * -slopes).scatter_add_(-1, targets[:, None], slopes)
        bias_gradient = gradient.sum(0).to(ctx.bias_type) if ctx.needs_input_grad[2] else None
        return gradient, None, bias_gradient, None, None
