"""A length penalty: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass

from tars_fast.learning.rewards.inputs import RewardInput


@dataclass(frozen=True, eq=False)
class SoftOverlong:
    """0 for completions shorter than `longest - buffer` tokens, from there falling linearly to -1 at `longest`."""

    longest: int
    """Tokens: --max-new-tokens."""
    buffer: int

    def __call__(self, completions: list[RewardInput]) -> list[float]:
        allowed = self.longest - self.buffer
        return [min(0.0, (allowed - len(one.token_ids)) / self.buffer) for one in completions]
