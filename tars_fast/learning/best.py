"""The best step of a run by a figure of its validation items, and whether it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BestStep:
    """The evaluation while training in which a figure was largest; the one before the first step counts too."""

    metric: str | None
    """Name of the figure; larger is better. None: there is no best step."""
    patience: int = 0
    """Evaluations in a row whose figure is not larger, after which the run ends; 0: it goes on."""
    step: int | None = None
    """0: no step was better than the model before training."""
    value: float = -math.inf
    num_waited: int = 0
    """Evaluations since that have the figure."""

    def record(self, metrics: Mapping[str, float]) -> bool:
        """Look at an evaluation's `validation/<name>` and `step`; returns whether it is the best one so far."""
        if self.metric is None:
            return False
        value = metrics.get(f"validation/{self.metric}")
        if value is None:
            return False
        if value > self.value:
            self.step, self.value, self.num_waited = int(metrics["step"]), value, 0
            return True
        self.num_waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return 0 < self.patience <= self.num_waited

    def extra(self) -> dict[str, object]:
        """What a checkpoint holds of it."""
        return {"best": [self.step, self.value, self.num_waited]} if self.metric is not None else {}

    def load_extra(self, extra: Mapping[str, Any]) -> None:
        """Go on from what `extra` returned. Raises LookupError or ValueError where it is of another run."""
        if self.metric is not None:
            self.step, self.value, self.num_waited = extra["best"]
