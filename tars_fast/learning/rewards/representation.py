"""R_rep: whether a spoken completion's hidden states are like those of its written reference.

Shapes: N completions, L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tars_kernels import pooled_similarity
from torch import Tensor


def representation_rewards(pooled_LND: Tensor, references: Sequence[int | None]) -> Tensor:
    """[N] cosine of each completion's pooled states with its reference's, averaged over layers; 0 without a reference.

    Args:
        pooled_LND: mean over the completion's tokens of each layer's output states.
        references: index, within these N, of each completion's reference.
    """
    rewards = pooled_LND.new_zeros(len(references))
    speech = [index for index, reference in enumerate(references) if reference is not None]
    if speech:
        pairs = torch.tensor([(index, references[index]) for index in speech], device=pooled_LND.device)
        rewards[speech] = pooled_similarity(pooled_LND, pairs).mean(-1)
    return rewards
