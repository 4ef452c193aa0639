"""The operations under their public names: kernels where Triton is installed, else the reference itself."""

from __future__ import annotations

from tars_kernels.backend import HAS_TRITON

if HAS_TRITON:
    from tars_kernels.distillation import linear_distillation_loss
    from tars_kernels.linear_cka import linear_cka
    from tars_kernels.linear_logprob import linear_logprob
    from tars_kernels.policy_loss import linear_policy_loss, policy_loss, token_policy_loss
    from tars_kernels.similarity import add_pooled_gradient, layer_similarity, pool_sequences, pooled_similarity
    from tars_kernels.token_similarity import token_similarity
else:
    from tars_kernels.reference import (
        layer_similarity,
        linear_cka,
        linear_distillation_loss,
        linear_logprob,
        linear_policy_loss,
        policy_loss,
        pool_sequences,
        pooled_similarity,
        token_policy_loss,
        token_similarity,
    )

__all__ = [
    "add_pooled_gradient",
    "layer_similarity",
    "linear_cka",
    "linear_distillation_loss",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
    "pool_sequences",
    "pooled_similarity",
    "token_policy_loss",
    "token_similarity",
]
