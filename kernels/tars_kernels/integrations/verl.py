"""verl's clipped actor loss by `token_policy_loss`: `register_policy_loss("tars")(policy_loss)`, then `loss_mode: tars`.

Written for verl 0.9, whose `compute_policy_loss_vanilla` it equals; nothing of verl is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tars_kernels.objective import from_padded
from tars_kernels.operations import token_policy_loss


def policy_loss(  # noqa: PLR0913
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of verl's actor, and its metrics; all tensors [B, S].

    Args:
        loss_agg_mode: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm or seq-mean-token-mean.
        config: verl's ActorConfig, for `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c` (at least 1 +
            `clip_ratio_high`) and `global_batch_info`.

    Raises:
        ValueError: another way to aggregate, or a setting out of range.
    """
    low, high = (config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high))
    dual_clip = config.get("clip_ratio_c", 3.0)
    vectors: dict[str, Any] = {"old_logprobs": old_log_prob, "logprobs": log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        vectors["importance_weights"] = rollout_is_weights
    result = token_policy_loss(
        **from_padded(response_mask, **vectors),
        **_normaliser(loss_agg_mode, response_mask, **config.global_batch_info),
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
    )
    with torch.no_grad():
        keep = response_mask.bool()
        rise = (log_prob - old_log_prob).masked_fill(~keep, 0.0).clamp(-20.0, 20.0)
        above = keep & (advantages < 0) & (rise.exp() > dual_clip)
        means = torch.stack([-rise.sum(), above.sum()]) / keep.sum()
        values = torch.cat([means, (result.clip_low_fraction + result.clip_high_fraction)[None]]).tolist()
    names = ("actor/ppo_kl", "actor/pg_clipfrac_lower", "actor/pg_clipfrac")
    return result.loss, dict(zip(names, values, strict=True))


def _normaliser(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> dict[str, Any]:
    """verl's `agg_loss` in our settings: data-parallel workers average gradients, so each scales its part by their number."""
    if mode in ("token-mean", "token-sum"):
        num_tokens = 1 if mode == "token-sum" else batch_num_tokens
        return {"normalise": "token-mean", "num_tokens": num_tokens, "scale": float(dp_size)}
    if mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"loss_agg_mode: {mode!r}; must be one that verl's agg_loss knows")
    scale = float(dp_size)
    if mode.endswith("norm"):
        scale /= mask.shape[1] if loss_scale_factor is None else loss_scale_factor
    # Of sequences that are masked out whole verl counts none.
    num_sequences = mask.bool().any(1).sum() if global_batch_size is None else global_batch_size
    normalise = "sequence-mean" if mode == "seq-mean-token-mean" else "sequence-sum"
    return {"normalise": normalise, "num_sequences": num_sequences, "scale": scale}
