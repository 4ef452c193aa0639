"""Some steps of training on given rollouts, by one process or by each of two: `torchrun several_steps.py GIVEN RESULT`."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from conftest import new_model
from tars_fast.config import RunConfig
from tars_fast.learning import gradients
from tars_fast.learning.batch import Rollout
from tars_fast.learning.optimizer import gather_state, held_parameters, make_optimizer, own_part
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.train import update_policy

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    model: dict[str, Any] = field(default_factory=dict)
    """See `new_model`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run."""
    dtype: torch.dtype = torch.float32

    def make(self, config: RunConfig, workers: Workers) -> Learner:
        # The same adapters everywhere, as a run makes them.
        torch.manual_seed(0)
        model = new_model(**self.model)
        model.module.to(self.dtype)
        lora_rank = self.model.get("lora_rank", 0)
        config = replace(config, lora_rank=lora_rank, **self.settings)
        sharded = workers.size > 1 and not lora_rank
        optimizer = make_optimizer(model.trainable_parameters(), 0.01, 5, sharded=sharded)
        return Learner(model, optimizer, config, workers)


@dataclass
class Taken:
    weights: torch.Tensor
    """[all trained] after the last step."""
    grad_norms: list[float]
    sent: list[tuple[int, bool]]
    """Elements of each reduction, and whether a backward pass was running when it began."""
    num_moments: int
    """That this process held."""
    state: dict[str, Any] | None
    """Of the optimiser, whole."""


def trained(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in learner.model.trainable_parameters()])


def take_steps(case: Case, config: RunConfig, rollouts: list[Rollout | None], workers: Workers) -> Taken:
    """One step on each rollout; what is in place before is in place after it."""
    learner = case.make(config, workers)
    parameters = held_parameters(learner.optimizer)
    places = [parameter.data_ptr() for parameter in parameters]
    learner.optimizer.param_groups[0]["lr"] = LEARNING_RATE
    sent: list[tuple[int, bool]] = []
    reduces = torch.distributed.reduce, torch.distributed.all_reduce

    def watched(reduce):
        def call(flat, *arguments, **settings):
            if settings.get("async_op"):
                sent.append((flat.numel(), torch._C._current_graph_task_id() >= 0))
            return reduce(flat, *arguments, **settings)

        return call

    torch.distributed.reduce, torch.distributed.all_reduce = map(watched, reduces)
    grad_norms = []
    for step, rollout in enumerate(rollouts):
        scored = learner.begin_rollout(rollout, step)
        for _ in range(learner.config.updates_per_rollout):
            grad_norms.append(update_policy(learner, scored)["grad_norm"])
            own = {id(parameter) for parameter in held_parameters(own_part(learner.optimizer))}
            assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in parameters)
    torch.distributed.reduce, torch.distributed.all_reduce = reduces
    assert places == [parameter.data_ptr() for parameter in parameters]
    workers.check_same(parameters)
    moments = own_part(learner.optimizer).state.values()
    gather_state(learner.optimizer)
    state = learner.optimizer.state_dict() if workers.is_first else None
    return Taken(trained(learner), grad_norms, sent, sum(held["exp_avg"].numel() for held in moments), state)


if __name__ == "__main__":
    given, result = sys.argv[1:]
    gradients.GRADIENT_BUCKET_BYTES = 200_000
    torch.set_num_threads(1)
    with join_workers() as joined, open(given, "rb") as file:
        cases, run_config, shares = pickle.load(file)
        taken = {name: vars(take_steps(case, run_config, shares[joined.rank], joined)) for name, case in cases.items()}
        torch.save(taken, f"{result}{joined.rank}")
