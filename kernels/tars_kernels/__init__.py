"""Operations for aligning speech LLMs, for any project that has torch: `from tars_kernels import LayerPooler`.

`reference` is the specification of every operation in plain PyTorch, on CPU and CUDA alike.
"""

from tars_kernels.pooling import LayerPooler
from tars_kernels.reference import PolicyLoss, linear_policy_loss, pool_sequences, pooled_similarity

__all__ = ["LayerPooler", "PolicyLoss", "linear_policy_loss", "pool_sequences", "pooled_similarity"]
