"""Every operation in plain PyTorch: the specification.

Shapes: T packed tokens, N sequences, D hidden size, V vocabulary, L layers, P pairs. Sequences lie one after the other in the
token dimension; `cu_seqlens` [N + 1] holds where each starts, and the total at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """What `linear_policy_loss` returns; only `loss` carries a gradient."""

    loss: Tensor
    """[] the part of the batch's loss that these tokens contribute."""
    logprobs: Tensor
    """[T] fp32 log-probability of each target, in nats; 0 where masked out."""
    entropy: Tensor
    """[T] fp32 entropy of the policy's distribution, in nats; 0 where masked out."""
    clipped_low: Tensor
    """[T] bool: the ratio fell below 1 - clip_low and the clip holds the gradient back."""
    clipped_high: Tensor
    """[T] bool: the ratio rose above 1 + clip_high and the clip holds the gradient back."""
    importance_ratio: Tensor
    """[T] fp32 uncapped exp(old - rollout log-probability); 1 where masked out or without rollout log-probabilities."""


def _sequence_numbers(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] which sequence each packed token belongs to."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=num_tokens)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    importance_cap: float = 2.0,
    temperature: float = 1.0,
    num_tokens: float | Tensor | None = None,
) -> PolicyLoss:
    """Clipped asymmetric policy gradient (DAPO, arXiv 2503.14476, eq. 8-10) of a linear head's distribution.

    `-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)` for each token, r = exp(logprob - old), weighted by the truncated
    importance ratio `min(exp(old - rollout), importance_cap)`, summed over unmasked tokens and divided by `num_tokens`.

    Args:
        hidden: [T, D] states that predict `targets`.
        weight: [V, D] output head.
        targets: [T] int64 sampled tokens.
        advantages: [T], or [N] with `cu_seqlens`.
        cu_seqlens: [N + 1]; needed only for advantages per sequence.
        old_logprobs: [T] of the policy at rollout time; None: this policy, so that r is exactly 1.
        rollout_logprobs: [T] as the rollout engine reports them; None: no importance correction.
        mask: [T] bool, False leaves a token out of loss and normaliser; whatever it holds, NaN included.
        bias: [V] added to the logits; -inf suppresses a token.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.
        importance_cap: largest importance weight.
        temperature: the logits are divided by it.
        num_tokens: unmasked tokens of the whole accumulated batch; None: of these tokens.

    Raises:
        ValueError: `advantages` has neither T nor N entries.
    """
    num_targets = len(targets)
    if advantages.shape != targets.shape:
        if cu_seqlens is None or len(advantages) != len(cu_seqlens) - 1:
            raise ValueError(f"advantages {tuple(advantages.shape)}: neither one a token ({num_targets}) nor one a sequence")
        advantages = advantages[_sequence_numbers(cu_seqlens, num_targets)]
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
    if num_tokens is None:
        num_tokens = keep.sum()

    # Masked rows are zeroed before the first product: 0 * nan would poison the head's gradient.
    logits = F.linear(hidden.masked_fill(~keep[:, None], 0.0), weight).float()
    if bias is not None:
        logits = logits + bias
    all_logprobs = (logits / temperature).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, targets[:, None])[:, 0].masked_fill(~keep, 0.0)
    with torch.no_grad():
        entropy = torch.special.entr(all_logprobs.exp()).sum(-1).masked_fill(~keep, 0.0)
        old = logprobs.detach() if old_logprobs is None else old_logprobs.masked_fill(~keep, 0.0)
        rollout = old if rollout_logprobs is None else rollout_logprobs.masked_fill(~keep, 0.0)
        importance_ratio = (old - rollout).exp()
        advantages = advantages.masked_fill(~keep, 0.0)

    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages) * importance_ratio.clamp(max=importance_cap)
    return PolicyLoss(
        loss=-objective.sum() / num_tokens,
        logprobs=logprobs.detach(),
        entropy=entropy,
        clipped_low=(ratio.detach() < 1 - clip_low) & (advantages < 0),
        clipped_high=(ratio.detach() > 1 + clip_high) & (advantages > 0),
        importance_ratio=importance_ratio,
    )


def pool_sequences(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, D] fp32 mean of packed `states` [T, D] over each sequence; 0 for an empty one."""
    numbers = _sequence_numbers(cu_seqlens, len(states))
    sums = states.new_zeros(len(cu_seqlens) - 1, states.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, numbers, states.float())
    return sums / cu_seqlens.diff().clamp(min=1)[:, None]


def pooled_similarity(pooled: Tensor, pairs: Tensor) -> Tensor:
    """Cosine of pooled states, layer by layer (TARS, R_rep before its mean over layers).

    Args:
        pooled: [L, N, D].
        pairs: [P, 2] int64, sequence numbers.

    Returns:
        [P, L] fp32; 0 where a state is 0.
    """
    left, right = pooled.float()[:, pairs].unbind(2)
    return F.cosine_similarity(left, right, dim=-1).T
