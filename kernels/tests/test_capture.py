"""CUDA graphs: every operation, gradient included, may be captured and replayed with other values in its inputs."""

from __future__ import annotations

import pytest
import tars_kernels
import torch
from tars_kernels import LayerPooler
from tars_kernels.similarity import address_table
from torch import nn

T, D, V = 77, 64, 1100


def made(device, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator).to(device)

    return {
        "hidden": normal(T, D),
        "teacher": normal(T, D),
        "weight": normal(V, D) / 8,
        "targets": integers(V, T),
        "advantages": normal(T),
        "old": normal(T) - 7,
        "mask": normal(T) > -1,
        "cu_seqlens": torch.tensor([0, 20 + seed, 20 + seed, T], device=device),
        "positions": torch.randperm(T, generator=generator).to(device),
        "pairs": torch.tensor([[0, 2], [2, seed], [1, 2]], device=device),
        "states": normal(40, T, D),
    }


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def policy(start, trainable=False, inplace=False, **settings):
    def step(x):
        hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_(trainable)
        options = {"cu_seqlens": x["cu_seqlens"], "mask": x["mask"], "old_logprobs": x["old"], **settings}
        if start == "hidden":
            result = tars_kernels.linear_policy_loss(hidden, weight, x["targets"], x["advantages"], **options)
        else:
            result = tars_kernels.policy_loss(hidden @ weight.T, x["targets"], x["advantages"], inplace=inplace, **options)
        return [result.logprobs, result.clip_high_fraction, *gradients(result.loss, hidden, *([weight] if trainable else []))]

    return step


def distillation(trainable, **settings):
    def step(x):
        hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_(trainable)
        result = tars_kernels.linear_distillation_loss(
            hidden, x["teacher"], weight, cu_seqlens=x["cu_seqlens"], mask=x["mask"], **settings
        )
        return [result.divergences.detach(), *gradients(result.loss, hidden, *([weight] if trainable else []))]

    return step


def logprob(x):
    hidden = x["hidden"].detach().requires_grad_()
    values, entropy = tars_kernels.linear_logprob(hidden, x["weight"], x["targets"], return_entropy=True)
    return [entropy, *gradients(values.sum(), hidden)]


def of_states(operation):
    def step(x):
        states = x["states"].detach().requires_grad_()
        return gradients(operation(x, states).square().sum(), states)

    return step


def pooler(x):
    layers = [nn.Identity(), nn.Identity()]
    pooling = LayerPooler(layers[:1], layers[1], differentiable=True)
    hidden = x["hidden"].detach().requires_grad_()
    with pooling.pooling(x["cu_seqlens"], positions=x["positions"]):
        states = layers[1](layers[0](hidden))
    return gradients(pooling.pooled.sum() + states.square().sum(), hidden)


STEPS = {
    "policy_loss": policy("logits"),
    "policy_loss-inplace": policy("logits", inplace=True),
    "policy_loss-gspo": policy("logits", loss_type="gspo"),
    "linear_policy_loss": policy("hidden", num_tokens=100.0),
    "linear_policy_loss-grpo-trainable": policy("hidden", trainable=True, loss_type="grpo", entropy_coef=0.1),
    "linear_logprob": logprob,
    "linear_distillation_loss": distillation(False, top_tokens=20, decay=2.0),
    "linear_distillation_loss-trainable": distillation(True, divergence="jsd", num_tokens=50, normalise="token"),
    "layer_similarity-stack": of_states(lambda x, states: tars_kernels.layer_similarity(states, x["cu_seqlens"], x["pairs"])),
    "layer_similarity-list": of_states(
        lambda x, states: tars_kernels.layer_similarity(list(states), x["cu_seqlens"], x["pairs"], pooling="last")
    ),
    "pool_sequences": of_states(
        lambda x, states: tars_kernels.pool_sequences(states[0], x["cu_seqlens"], positions=x["positions"])
    ),
    "pooled_similarity": of_states(lambda x, states: tars_kernels.pooled_similarity(states, x["pairs"])),
    "token_similarity": of_states(lambda _, states: tars_kernels.token_similarity(states[:33], states[7:])),
    "linear_cka": of_states(lambda _, states: tars_kernels.linear_cka(states[:3], states[3:5])),
    "LayerPooler": pooler,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_captured_graph_replays_with_other_inputs(device, name):
    step, inputs, others = STEPS[name], made(device, 0), made(device, 1)
    # Kernels are compiled, and libraries take their memory, before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs)
    # Memory that the capture borrowed and gave back belongs to others by the time of a replay.
    borrowed = [torch.full((size,), -1, dtype=torch.int64).pin_memory() for size in (1, 32, 40, 512) for _ in range(8)]
    borrowed += [torch.full((size,), -1, dtype=torch.int64, device=device) for size in (40, 512, 1 << 20) for _ in range(8)]
    for key, value in inputs.items():
        value.copy_(others[key])
    for _ in range(2):
        graph.replay()
    for result, expected in zip(results, step(others), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    del borrowed


@pytest.mark.parametrize("number", [1, 32, 33, 70])
def test_tables_hold_addresses(device, number):
    """Written on the device itself, for a copy out of the host's memory would be read again whenever a graph is replayed."""
    layers = [torch.zeros(place % 3 + 1, device=device) for place in range(number)]
    assert address_table(layers).tolist() == [layer.data_ptr() for layer in layers]
