"""GRPO's loss as TRL 1.16 computes it, on padded batches: `GRPOTrainer._compute_loss` written anew, one formula a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PaddedBatch(NamedTuple):
    """B completions, padded to S tokens."""

    logprobs: Tensor
    """[B, S], and so all but `advantages`."""
    entropies: Tensor
    mask: Tensor
    """Float."""
    advantages: Tensor
    """[B, 1] or [B, S]"""
    old: Tensor
    rollout: Tensor
    ref: Tensor


@dataclass(frozen=True)
class TrlSettings:
    """By TRL's names, without their prefixes."""

    loss_type: str
    num_tokens: float
    max_length: int
    clip_low: float = 0.2
    clip_high: float = 0.28
    delta: float | None = None
    cap: float = 2.0
    mode: str = "token_truncate"
    beta: float = 0.0
    entropy_coef: float = 0.0


def trl_loss(batch: PaddedBatch, settings: TrlSettings) -> Tensor:
    logprobs, entropies, mask, advantages, old, rollout, ref = batch
    difference = torch.nan_to_num((old - rollout) * mask, nan=0.0)
    if settings.mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    importance = torch.exp(difference)
    importance = (
        importance.clamp(max=settings.cap)
        if settings.mode.endswith("truncate")
        else importance.masked_fill(importance > settings.cap, 0.0)
    )

    log_ratio = logprobs - old
    if settings.loss_type == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if settings.loss_type == "cispo":
        per_token = -coef_1.clamp(max=settings.clip_high).detach() * advantages * logprobs
    else:
        coef_2 = torch.clamp(coef_1, 1 - settings.clip_low, 1 + settings.clip_high)
        if settings.delta is not None:
            coef_1 = torch.clamp(coef_1, max=settings.delta)
        per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token = per_token * importance
    if settings.beta != 0.0:
        per_token = per_token + settings.beta * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
    if settings.loss_type == "grpo":
        loss = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    elif settings.loss_type == "bnpo":
        loss = (per_token * mask).sum() / mask.sum().clamp(min=1.0)
    elif settings.loss_type == "dr_grpo":
        loss = (per_token * mask).sum() / (len(mask) * settings.max_length)
    else:
        loss = (per_token * mask).sum() / settings.num_tokens
    return loss - settings.entropy_coef * (entropies * mask).sum() / mask.sum().clamp(min=1.0)
