"""One training step, as the tests take it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tars_fast.config import RunConfig
from tars_fast.learning.batch import Rollout, collect_rollout, prepare_batch
from tars_fast.learning.rewards import HashedNgrams
from tars_fast.learning.update import Scored, update_policy
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.types import Question


def rollout_of(
    model: SpeechModel,
    questions: Sequence[Question],
    config: RunConfig,
    step: int = 0,
    *,
    engine: RolloutEngine | None = None,
    timer: PhaseTimer | None = None,
    workers: Workers = ALONE,
) -> Rollout:
    """A rollout of all these questions."""
    engine = engine or TransformersEngine(model, config.rollout_batch_size)
    timer = timer or PhaseTimer(model.device)
    batch = prepare_batch(model, questions)
    with ThreadPoolExecutor(2) as background:
        rollout, left_out = collect_rollout(model, engine, HashedNgrams(), batch, config, step, timer, background, workers)
    assert not left_out
    return rollout


def update(
    model: SpeechModel, rollout: Rollout, config: RunConfig, scored: Scored | None = None, learning_rate: float = 0.0
) -> tuple[Scored, dict[str, float]]:
    """One update by plain gradient descent, which leaves the gradients where they are."""
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=learning_rate)
    return update_policy(model, optimizer, rollout, scored, config, PhaseTimer(model.device))


def gradients(model: SpeechModel) -> torch.Tensor:
    """Of all trained parameters; those without one have zeros."""
    found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.trainable_parameters()]
    return torch.cat([gradient.flatten() for gradient in found])
