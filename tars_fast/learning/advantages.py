"""Advantages: rewards centred within (question, modality), without division by the deviation (Dr. GRPO).

Shapes: N completions, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tars_fast.types import Modality


def group_indices(questions: Sequence[int], modalities: Sequence[Modality]) -> Tensor:
    """[N] int64: completions of the same question and modality share a number, counted from 0 in order of appearance."""
    numbers: dict[tuple[int, Modality], int] = {}
    return torch.tensor(
        [numbers.setdefault(key, len(numbers)) for key in zip(questions, modalities, strict=True)], dtype=torch.long
    )


def group_means(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """[G] mean of `values_N` over each group; `groups_N` as `group_indices` numbers them."""
    num_groups = int(groups_N.max()) + 1
    sums = values_N.new_zeros(num_groups).index_add_(0, groups_N, values_N)
    return sums / torch.bincount(groups_N, minlength=num_groups)


def centred_advantages(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """[N] `A = r - mean(r of the group)` (docs/method.md, Advantages). Truncated completions count in the mean.

    Computed in float64: a group whose rewards agree gets exact zeros, not rounding noise to train on.
    """
    exact = rewards_N.double()
    return (exact - group_means(exact, groups_N)[groups_N]).to(rewards_N.dtype)


def disagreeing_groups(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """[G] bool: whether a group's values differ, i.e. whether any of its completions has an advantage."""
    num_groups = int(groups_N.max()) + 1
    low = values_N.new_full((num_groups,), torch.inf).scatter_reduce_(0, groups_N, values_N, "amin")
    high = values_N.new_full((num_groups,), -torch.inf).scatter_reduce_(0, groups_N, values_N, "amax")
    return high > low
