"""One training step, as the tests take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tars_fast.config import RunConfig
from tars_fast.learning.batch import Rollout, RolloutCollector, prepare_batch
from tars_fast.learning.optimizer import optimizer_state
from tars_fast.learning.rewards.reward import completed
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.scored import ScoredRollout
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import ALONE, Workers
from tars_fast.models.checkpoint import CheckpointPart, PendingCheckpoint
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.train import update_policy
from tars_fast.types import Question


def rollout_of(
    model: SpeechModel,
    questions: Sequence[Question],
    config: RunConfig,
    step: int = 0,
    *,
    engine: RolloutEngine | None = None,
    workers: Workers = ALONE,
) -> Rollout:
    """A rollout of all these questions."""
    engine = engine or TransformersEngine(model, config.rollout_batch_size)
    batch = prepare_batch(model, questions)
    with ThreadPoolExecutor(2) as background:
        collector = RolloutCollector(model, engine, Rewards(config), config, background, workers)
        rollout, left_out = collector.collect(batch, step, PhaseTimer(model.device))
    assert not left_out
    return rollout


def divided_rollout(
    model: SpeechModel, shares: Sequence[Sequence[Question]], config: RunConfig
) -> tuple[list[Rollout], Rollout]:
    """(rollouts of two processes, each of its share of the questions; the same completions as one process would have them)."""
    rollouts = [rollout_of(model, share, config, workers=Workers(rank, 2)) for rank, share in enumerate(shares)]
    first, second = rollouts
    num_completions, num_questions = len(first.completions), len(shares[0])
    moved = [dataclasses.replace(one, question=one.question + num_questions) for one in second.completions]
    whole = rollout_of(model, [question for share in shares for question in share], config)
    whole.prompts = first.prompts + second.prompts
    whole.written = first.written + second.written
    whole.completions = first.completions + moved
    whole.references = first.references + [None if r is None else r + num_completions for r in second.references]
    whole.late = {
        "behaviour": completed(torch.cat([one.late["behaviour"].of(range(len(one.completions))) for one in rollouts]))
    }
    whole.questions = first.questions + second.questions
    whole.groups_N = torch.cat([first.groups_N, second.groups_N + first.groups_N.max() + 1])
    whole.completion_rewards = {
        name: torch.cat([one.completion_rewards[name] for one in rollouts]) for name in first.completion_rewards
    }
    return rollouts, whole


def update(
    model: SpeechModel, rollout: Rollout | ScoredRollout, config: RunConfig, learning_rate: float = 0.0
) -> tuple[ScoredRollout, dict[str, float]]:
    """One update by plain gradient descent, which leaves the gradients where they are; a later one of a scored rollout."""
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=learning_rate), config)
    if isinstance(rollout, ScoredRollout):
        learner.begin_rollout(rollout.rollout)
        scored = rollout
    else:
        scored = learner.begin_rollout(rollout)
    return scored, update_policy(learner, scored)


def save_checkpoint(output_dir: Path, step: int, model: SpeechModel, optimizer: torch.optim.Optimizer, extra=None) -> Path:
    """A checkpoint of a single process, waited for."""
    part = CheckpointPart.copy(step, model, optimizer_state(optimizer, model.trainable_by_name()), extra=extra)
    pending = PendingCheckpoint(output_dir, part, model)
    if (failure := pending.failure()) is not None:
        pending.discard()
        raise failure
    return pending.complete()


def base_rewards(rollout: Rollout) -> torch.Tensor:
    """[N] `R_base = R_acc + 0.5 R_fmt`."""
    return rollout.completion_rewards["accuracy"] + 0.5 * rollout.completion_rewards["format"]


def gradients(model: SpeechModel) -> torch.Tensor:
    """Of all trained parameters; those without one have zeros."""
    found = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.trainable_parameters()]
    return torch.cat([gradient.flatten() for gradient in found])
