"""Operations for aligning speech LLMs, for any project that has torch and triton: `from tars_kernels import policy_loss`.

On CUDA tensors they run as Triton kernels, elsewhere as the plain PyTorch of `reference`, which is their specification.
Gradients are taken once: none of them is differentiable twice.
"""

from tars_kernels import reference
from tars_kernels.backend import use_reference
from tars_kernels.divergence import Distillation, DistillationLoss
from tars_kernels.objective import Objective, PolicyLoss, from_padded
from tars_kernels.operations import (
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
from tars_kernels.pooling import LayerPooler

__all__ = [
    "Distillation",
    "DistillationLoss",
    "LayerPooler",
    "Objective",
    "PolicyLoss",
    "from_padded",
    "layer_similarity",
    "linear_cka",
    "linear_distillation_loss",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
    "pool_sequences",
    "pooled_similarity",
    "reference",
    "token_policy_loss",
    "token_similarity",
    "use_reference",
]
