"""What a forward pass over a part of a rollout hands to the terms of the loss.

Shapes: N completions, T completion tokens, L layers that R_rep looks at, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tars_fast.models.speech_model import PackedBatch


@dataclass(frozen=True)
class Counts:
    """What the losses of a step are divided by: of the rollouts of all processes."""

    num_tokens: int
    """Completion tokens that are not masked: those of completions that were not cut off."""
    num_completions: int
    num_distilled: int
    """Completion tokens that distillation trains on."""


@dataclass(frozen=True)
class ForwardPass:
    """One packed forward pass over some completions of a rollout."""

    rows: list[int]
    """[N] which completions."""
    packed: PackedBatch
    hidden_TD: Tensor
    """Last hidden states at the positions that predict completion tokens; with a gradient where it was enabled."""
    pooled_LND: Tensor | None = None
    """Mean hidden states of each completion, where R_rep was asked for."""


@dataclass(frozen=True)
class MicroBatch:
    """The forward passes over one micro-batch."""

    without_gradient: ForwardPass | None
    """Of completions that cannot have a gradient."""
    with_gradient: ForwardPass | None
    """Of all others, in a graph."""

    @property
    def passes(self) -> list[ForwardPass]:
        return [states for states in (self.without_gradient, self.with_gradient) if states is not None]
