"""Advantages: rewards centred within (question, modality), without division by the deviation (Dr. GRPO); others are settings.

Shapes: N completions, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tars_fast.types import Modality

_ROUNDING = 1e-5
"""Differences that are none where values are scaled: R_rep of the same completion, sampled twice, differs by some 1e-7."""


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


def with_group_means(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """[N] values with the mean of their group's other ones in the place of NaN: there they make no difference; 0 where a whole
    group is NaN."""
    known_N = ~values_N.isnan()
    if known_N.all():
        return values_N
    num_groups = int(groups_N.max()) + 1
    sums = torch.zeros(num_groups, dtype=torch.double).index_add_(0, groups_N, values_N.double().nan_to_num(0.0))
    counts = torch.bincount(groups_N[known_N], minlength=num_groups).clamp(min=1)
    return values_N.where(known_N, (sums / counts)[groups_N].to(values_N.dtype))


def advantages_of(rewards_N: Tensor, groups_N: Tensor, kind: str) -> Tensor:
    """[N] what each completion's reward is worth beside its group's others.

    Args:
        kind: centred, `r - mean`; standardised, over the group's population deviation (GRPO, arXiv 2402.03300; TRL and verl
            take the sample deviation, which is larger by sqrt(n / (n - 1))); leave-one-out, `r - mean of the others` (RLOO,
            arXiv 2402.14740); rank, the rank from 0 to 1 less the ranks' mean.
    """
    if kind == "leave-one-out":
        sizes = torch.bincount(groups_N)[groups_N]
        return centred_advantages(rewards_N, groups_N) * (sizes / (sizes - 1).clamp(min=1)).to(rewards_N.dtype)
    scaling = {"centred": "none", "standardised": "z-score", "rank": "rank"}[kind]
    return centred_advantages(scaled_in_groups(rewards_N, groups_N, scaling), groups_N)


def scaled_in_groups(values_N: Tensor, groups_N: Tensor, scaling: str) -> Tensor:
    """[N] values as they count within their group: how many deviations from its mean, or which rank from 0 to 1.

    A group whose values agree gets zeros; equal values share a rank. Values that differ by rounding alone are equal here, or
    a group of the same completions would learn from it.

    Args:
        scaling: z-score, rank, or none for the values themselves.
    """
    if scaling == "none":
        return values_N
    centred = centred_advantages(values_N, groups_N).double()
    if scaling == "z-score":
        deviations = group_means(centred.square(), groups_N).sqrt()[groups_N]
        return (centred / deviations).where(deviations > _ROUNDING, 0.0).to(values_N.dtype)
    same = groups_N[:, None] == groups_N
    more = values_N - values_N[:, None]
    above = ((more > _ROUNDING).float() - (more < -_ROUNDING).float()) * same
    others = (same.sum(1) - 1).clamp(min=1)
    # From -others to others: how many have less, minus how many have more.
    ranks = (others - above.sum(1)) / (2 * others)
    return ranks.where(group_means(above.abs().sum(1), groups_N)[groups_N] > 0, 0.0)


def disagreeing_groups(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """[G] bool: whether a group's values differ, i.e. whether any of its completions has an advantage."""
    num_groups = int(groups_N.max()) + 1
    low = values_N.new_full((num_groups,), torch.inf).scatter_reduce_(0, groups_N, values_N, "amin")
    high = values_N.new_full((num_groups,), -torch.inf).scatter_reduce_(0, groups_N, values_N, "amax")
    return high > low
