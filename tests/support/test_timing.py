"""The phases of a step, and what is said where one of them runs out of memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tars_fast import train as train_command
from tars_fast.learning import loader
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.selection import Selection
from tars_fast.learning.update import Learner
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import SETTINGS_BY_PHASE, PhaseTimer, explain_out_of_memory
from tars_fast.types import TrainingError

CPU = torch.device("cpu")


@pytest.mark.parametrize("phase", SETTINGS_BY_PHASE)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_phase_and_setting(phase, error):
    with (
        pytest.raises(TrainingError, match=f"out of memory in phase '{phase}'; lower --") as error_info,
        explain_out_of_memory(phase),
    ):
        raise error
    assert SETTINGS_BY_PHASE[phase] in str(error_info.value)


def test_out_of_memory_for_real():
    """torch's own refusal of an allocation no machine can make."""
    with pytest.raises(TrainingError, match="out of memory in phase 'forward'"), PhaseTimer(CPU).phase("forward"):
        torch.empty(2**58)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape mismatch"), explain_out_of_memory("forward"):
        raise RuntimeError("shape mismatch")


def test_every_phase_of_a_step_has_a_remedy(model, questions, config):
    timer = PhaseTimer(CPU)
    engine = TransformersEngine(model, config.rollout_batch_size)
    config = dataclasses.replace(config, questions_per_step=2)
    with loader.RolloutLoader(model, engine, Rewards(config), Selection(questions, config), config) as rollouts:
        sampled = rollouts.next_batch(0, timer).rollout
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=0.0), config)
    train_command.update_policy(learner, learner.begin_rollout(sampled))
    assert {name.removeprefix("seconds/") for name in timer.take() | learner.timer.take()} <= SETTINGS_BY_PHASE.keys()
