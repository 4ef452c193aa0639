"""R_rep: whether a spoken completion's hidden states are like those of its written reference.

Shapes: N completions, L layers, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tars_kernels import pooled_similarity
from torch import Tensor

from tars_fast.learning.rewards.inputs import Needs, RewardInput
from tars_fast.learning.workers import Workers

_KEPT = 0.9
"""What the running mean keeps of itself at each step: it is that of some ten steps."""


class RunningMeans:
    """Running means of pooled states, of spoken and of written completions: what all states of a modality have in common.

    Not in the paper. Subtracted, R_rep spreads wider over the completions of a group, which is what an advantage is made of.
    """

    def __init__(self) -> None:
        self.means: Tensor | None = None
        """[2, L, D] of the steps before this one; None in the first, whose cosines are those of the states as they are."""
        self._sums: Tensor | None = None
        self._counts = torch.zeros(2)

    def add(self, pooled_LND: Tensor, is_speech_N: Tensor) -> None:
        """Count completions of this step in, from its next step on."""
        chosen = torch.stack([is_speech_N, ~is_speech_N]).to(pooled_LND)
        sums = torch.einsum("mn,lnd->mld", chosen, pooled_LND).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts += chosen.sum(1).cpu()

    def finish_step(self, workers: Workers) -> None:
        """Take this step's completions, of all processes, into the means."""
        parts = [(sums, counts) for sums, counts in workers.gather((self._sums, self._counts)) if sums is not None]
        self._sums, self._counts = None, torch.zeros(2)
        if not parts:
            return
        counts = torch.stack([counts for _, counts in parts]).sum(0)[:, None, None]
        means = torch.stack([sums for sums, _ in parts]).sum(0) / counts.clamp(min=1)
        if self.means is not None:
            means = torch.where(counts > 0, self.means.lerp(means, 1 - _KEPT), self.means)
        self.means = means


@dataclass(eq=False)
class Representation:
    """Cosine of each spoken completion's pooled states with its reference's, averaged over layers."""

    needs: Needs
    """States of --representation-layers, and a reference."""
    means: RunningMeans | None = None
    """What is subtracted before the cosine; None: nothing."""

    def __call__(self, completions: list[RewardInput]) -> list[float]:
        pairs = [(one.states, one.reference.states) for one in completions if one.reference is not None]
        states = [state for pair in pairs for state in pair if state is not None]
        pooled_LND = torch.stack(states, dim=1)
        places = torch.arange(len(states), device=pooled_LND.device).view(-1, 2)
        centre = None if self.means is None or self.means.means is None else self.means.means.to(pooled_LND.device)
        return [*pooled_similarity(pooled_LND, places, centre=centre).mean(-1).tolist()]
