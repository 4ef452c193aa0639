"""Gradients and steps of two processes against those of one: sharded in full fine-tuning, replicated with LoRA."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from several_steps import CASES, Taken, step_on_given_gradients, steps_of_two, take_steps, trained
from torch import nn

from tars_fast.learning.gradients import make_buckets
from tars_fast.learning.workers import ALONE
from tars_fast.models.memory import largest_share

QUICK = ("full", "lora")


@pytest.fixture(scope="module", params=[QUICK, (*CASES,)[2:]])
def names(request) -> tuple[str, ...]:
    return request.param


@pytest.mark.slow
def test_two_processes_become_what_one_becomes(questions, config, tmp_path, names):
    """Shares of different sizes in several micro-batches; in one step the second process has no usable item."""
    config = dataclasses.replace(config, tokens_per_micro_batch=512)
    cases = {name: CASES[name] for name in names}
    of_two, of_one = steps_of_two(cases, questions, config, tmp_path)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        weights, norms = step_on_given_gradients(ALONE, dtype)
        for _, given_gradients in of_two:
            assert torch.equal(given_gradients[number][0], weights), "the same draws, whoever rounds a weight"
            assert given_gradients[number][1] == pytest.approx(norms, rel=1e-6 if number == 0 else 0.01, nan_ok=True)
    for name, case in cases.items():
        alone = take_steps(case, config, of_one, ALONE)
        start = trained(case.make(config, ALONE))
        ranks = [Taken(**taken[name]) for taken, _ in of_two]
        assert torch.equal(ranks[0].weights, ranks[1].weights)
        assert ranks[0].grad_norms == ranks[1].grad_norms
        # Sums in another order; in bfloat16 gradients have 8 bits, and weights are rounded at random.
        exact = case.dtype == torch.float32
        assert ranks[0].grad_norms == pytest.approx(alone.grad_norms, rel=1e-4 if exact else 0.02)
        change = alone.weights - start
        assert (ranks[0].weights - alone.weights).norm() < (0.01 if exact else 0.5) * change.norm(), name
        is_full = "lora_rank" not in case.model
        if is_full:
            held = [taken.num_moments for taken in ranks]
            assert sum(held) == len(start)
            sizes = [parameter.numel() for parameter in case.make(config, ALONE).model.trainable_parameters()]
            assert max(held) == largest_share(sizes, 2) < 0.55 * len(start), "as the memory plan counts them"
        else:
            assert all(taken.num_moments == len(start) for taken in ranks)
            assert ranks[0].sent == [(len(start), False)] * len(alone.grad_norms), "one call an update"
        # All send the same in the same order, those with a backward pass while it runs.
        sizes = [[size for size, _ in taken.sent] for taken in ranks]
        assert sizes[0] == sizes[1]
        assert sum(sizes[0]) == len(start) * len(alone.grad_norms)
        if is_full:
            share = [sum(size for size, inside in taken.sent if inside) / sum(sizes[0]) for taken in ranks]
            assert share[0] > 0.9
            assert 0.4 < share[1] < 0.7, "not in the step without a backward pass"
        # A checkpoint of all has everything once.
        parts = [taken.state for taken in ranks]
        assert (parts[0].keys() & parts[1].keys()) == (set() if is_full else alone.state.keys())
        assert {n: value.shape for n, value in (parts[0] | parts[1]).items()} == {n: v.shape for n, v in alone.state.items()}
        assert all(value == len(alone.grad_norms) for n, value in parts[0].items() if n.endswith(".step"))


def test_buckets_are_of_one_owner_and_dtype_and_in_the_order_in_which_they_fill():
    sizes = (10, 10, 50, 10, 10, 10)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[3] = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    owners = (0, 1, 0, 0, 0, 1)
    buckets = make_buckets(list(zip(parameters, owners, strict=True)), 80)
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    found = [(bucket.owner, [places[id(parameter)] for parameter in bucket.parameters]) for bucket in buckets]
    assert found == [(0, [0]), (0, [2]), (0, [3]), (0, [4]), (1, [1, 5])]
    (one,) = make_buckets([(parameter, None) for parameter in parameters[:3]], None)
    assert one.parameters == parameters[:3]
