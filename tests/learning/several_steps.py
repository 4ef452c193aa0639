"""Some steps of training on given rollouts, by one process or by each of two: `torchrun several_steps.py GIVEN RESULT`."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from embedded import new_model
from processes import run_two
from steps import divided_rollout
from torch import nn

from tars_fast.config import RunConfig
from tars_fast.learning import gradients
from tars_fast.learning.batch import Rollout
from tars_fast.learning.optimizer import held_parameters, make_optimizer, optimizer_state, own_part
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.train import update_policy
from tars_fast.types import Question

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


CASES = {
    "full": Case(),
    "lora": Case({"lora_rank": 4}),
    # Two updates a rollout, and two backward passes for each micro-batch, of which the second is the anchor's.
    "anchored": Case(settings={"objective": "tars+opd", "teacher": "ema", "text_anchor": "kl", "updates_per_rollout": 2}),
    "bfloat16": Case(dtype=torch.bfloat16),
    "tower, checkpointing": Case({"freeze_audio": False, "gradient_checkpointing": True}, {"freeze_audio": False}),
}


@dataclass
class Taken:
    weights: torch.Tensor
    """[all trained] after the last step."""
    grad_norms: list[float]
    sent: list[tuple[int, bool]]
    """Elements of each reduction, and whether a backward pass was running when it began."""
    num_moments: int
    """That this process held."""
    state: dict[str, torch.Tensor]
    """See `optimizer_state`."""


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
    state = optimizer_state(learner.optimizer, learner.model.trainable_by_name())
    return Taken(trained(learner), grad_norms, sent, sum(held["exp_avg"].numel() for held in moments), state)


def steps_of_two(
    cases: Mapping[str, Case], questions: Sequence[Question], config: RunConfig, folder: Path
) -> tuple[list[tuple[dict[str, Any], list[Any]]], list[Rollout | None]]:
    """(of each of two processes what it took and `step_on_given_gradients`, the rollouts of one process for the same steps).

    The shares differ in size; in the second of three steps the second process has no usable item.
    """
    rollouts, whole = divided_rollout(new_model(freeze_audio=False), (questions[:2], questions[2:3]), config)
    # As if sampled with older weights, so that a difference from these is no error.
    first, second, whole = (replace(one, staleness=1) for one in (*rollouts, whole))
    given, result = folder / "given.pickle", folder / "result"
    given.write_bytes(pickle.dumps((cases, config, ([first, first, first], [second, None, second]))))
    run_two(Path(__file__), given, result)
    return [torch.load(f"{result}{rank}") for rank in range(2)], [whole, first, whole]


def step_on_given_gradients(workers: Workers, dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
    """(weights after three steps, norms), where each of two processes has a part of every gradient, or one has both.

    The parts are multiples of 1/16, so that their sum is exact. Last comes a gradient that is not finite, without a step.
    """
    generator = torch.Generator().manual_seed(7)
    shapes = [(40, 30), (30,), (64, 64), (1,), (50, 20), (30, 40)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make_optimizer(parameters, 0.01, 5, sharded=workers.size > 1)
    optimizer.param_groups[0]["lr"] = 1e-3
    sums = gradients.GradientSum(optimizer, workers)
    norms = []
    for step in range(4):
        for parameter in parameters:
            parts = torch.randint(-8, 8, (2, *parameter.shape), generator=generator) / 16
            parameter.grad = (parts.sum(0) if workers.size == 1 else parts[workers.rank]).to(dtype)
        if step == 3 and workers.rank == workers.size - 1:
            parameters[2].grad[0, 0] = torch.nan
        sums.finish()
        norms.append(sums.clip(1e6).item())
        if step < 3:
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), norms


if __name__ == "__main__":
    given, result = sys.argv[1:]
    gradients.GRADIENT_BUCKET_BYTES = 200_000
    torch.set_num_threads(1)
    with join_workers() as joined, open(given, "rb") as file:
        cases, run_config, shares = pickle.load(file)
        taken = {name: vars(take_steps(case, run_config, shares[joined.rank], joined)) for name, case in cases.items()}
        given_gradients = [step_on_given_gradients(joined, dtype) for dtype in (torch.float32, torch.bfloat16)]
        torch.save((taken, given_gradients), f"{result}{joined.rank}")
