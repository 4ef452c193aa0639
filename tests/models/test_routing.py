"""Mixtures of experts in the trainer: grouped products against the plain loop, and the engine's choice of experts replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_qwen3_omni
from torch import nn

from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.routing import NOT_KNOWN, pack_routing
from tars_fast.models.speech_model import SpeechModel, load_module, make_trainable
from tars_fast.rollout.vllm_experts import grouped_experts
from tars_fast.types import Completion, Modality, Prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_qwen3_omni(tmp_path_factory.mktemp("qwen3-omni")))


@pytest.fixture
def model(folder) -> SpeechModel:
    prompts = load_prompt_format(find_preset(folder), folder)
    return SpeechModel(load_module(prompts, folder, CPU, torch.float32), prompts)


def block_of(model: SpeechModel, layer: int = 0) -> Any:
    return model.language_model.layers[layer].mlp


def plain_loop(block: Any, hidden_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert, as the report writes it."""
    rows = []
    for hidden, numbers, weights in zip(hidden_ND, experts_NK, weights_NK, strict=True):
        row = torch.zeros_like(hidden)
        for number, weight in zip(numbers, weights, strict=True):
            gate, up = (block.experts.gate_up_proj[number] @ hidden).chunk(2)
            row = row + weight * (block.experts.down_proj[number] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def test_experts_are_grouped_and_equal_the_plain_loop_gradients_included(model):
    block = block_of(model).requires_grad_(True)
    assert block.experts.config._experts_implementation == "grouped_mm"
    hidden_ND = torch.randn(11, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for grouped in (True, False):
        _, weights_NK, experts_NK = block.gate(hidden_ND)
        out_ND = block(hidden_ND[None])[0] if grouped else plain_loop(block, hidden_ND, experts_NK, weights_NK)
        inputs = [hidden_ND, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
        found.append([out_ND, *torch.autograd.grad(out_ND.square().sum(), inputs)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def test_frozen_experts_keep_nothing_that_only_their_weights_gradient_needs(model):
    """Of the [N * K, D] rows that the experts read nothing stays: they are needed for the gradient of frozen weights alone."""
    block, kept = block_of(model), []
    hidden_ND = torch.randn(40, 64, requires_grad=True)
    _, weights_NK, experts_NK = block.gate(hidden_ND)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(tuple(value.shape)) or value, lambda value: value):
        block.experts(hidden_ND, experts_NK, weights_NK.detach())
    assert (80, 32) in kept, "inner states, for the gradient of what the experts read"
    assert (80, 64) not in kept


def test_the_engines_experts_on_a_cpu_equal_the_trainers(model):
    block = block_of(model)
    hidden_ND = torch.randn(23, 64)
    with torch.no_grad():
        _, weights_NK, experts_NK = block.gate(hidden_ND)
        # A model may leave experts without a token.
        experts_NK = experts_NK.clamp(max=5)
        ours = grouped_experts(hidden_ND, block.experts.gate_up_proj, block.experts.down_proj, experts_NK.int(), weights_NK)
        torch.testing.assert_close(ours, plain_loop(block, hidden_ND, experts_NK, weights_NK), rtol=1e-4, atol=1e-5)


def given(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """[P + T - 1, L, K] two different experts of eight for each token and layer."""
    draws = torch.rand(num_tokens, 3, 8, generator=torch.Generator().manual_seed(seed))
    return draws.topk(2).indices.to(torch.int16)


def make_row(model: SpeechModel, *, routed: bool = True, experts: bool = True) -> Any:
    """Two completions of one prompt, and one of another that the engine says nothing of."""
    prompts = [Prompt(Modality.TEXT, (5, 6, 7)), Prompt(Modality.TEXT, (8, 9))]
    first = given(6)
    # Those of the prompt are the same for both.
    second = torch.cat([first[:3], given(2, seed=1)])
    completions = [
        Completion(0, Modality.TEXT, (10, 11, 12, 13), (), "", False, first if experts else None),
        Completion(0, Modality.TEXT, (14, 15, 16), (), "", False, second if experts else None),
        Completion(1, Modality.TEXT, (17,), (), "", False),
    ]
    return model.pack([prompts[0], prompts[0], prompts[1]], completions, routed=routed)


def experts_of_pass(model: SpeechModel, packed: Any) -> torch.Tensor:
    """[S, L, K] experts that a forward pass sends its tokens through."""
    seen: list[torch.Tensor] = []
    blocks = [block_of(model, number).experts for number in range(3)]
    handles = [block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1])) for block in blocks]
    with torch.no_grad():
        model.forward(packed)
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def test_the_engines_choice_is_laid_out_like_the_row(model):
    routed = make_row(model).routed_experts
    nobody = torch.full((1, 3, 2), NOT_KNOWN, dtype=torch.int16)
    first, last = given(6), given(2, seed=1)
    # Prompts first; of every completion the last token goes through no layer of the engine's.
    expected = torch.cat([first[:3], nobody, nobody, first[3:], nobody, last, nobody, nobody])
    assert torch.equal(routed, expected)
    assert make_row(model, experts=False).routed_experts is None
    assert make_row(model, routed=False).routed_experts is None, "sampled from another prompt"
    assert pack_routing([2], [[None]], [[3]]) is None


def test_replay_sends_tokens_through_the_engines_experts_and_counts_those_that_differ(model):
    routing = model.routing
    own = experts_of_pass(model, make_row(model, routed=False))
    assert routing.take_counts() == [(0, 0)] * 3, "there was nothing to compare with"
    packed = make_row(model)
    known = packed.routed_experts[:, 0, 0] != NOT_KNOWN
    assert torch.equal(experts_of_pass(model, packed), own), "it is only compared"
    differ = (own.sort(-1).values != packed.routed_experts.sort(-1).values).any(-1)[known].sum(0).tolist()
    assert routing.take_counts() == [(number, 8) for number in differ]
    assert min(differ) > 0
    routing.set_replay(replays=True)
    replayed = experts_of_pass(model, packed)
    assert torch.equal(replayed[known], packed.routed_experts[known].long())
    assert torch.equal(replayed[~known][:, 0], own[~known][:, 0]), "where nothing is known the router chooses"


def test_replaying_the_own_choice_changes_no_bit(model):
    packed = make_row(model, routed=False)
    with torch.no_grad():
        expected = model.forward(packed)
        own = experts_of_pass(model, packed).to(torch.int16)
        model.routing.set_replay(replays=True)
        object.__setattr__(packed, "routed_experts", own)
        assert torch.equal(model.forward(packed), expected)
    assert model.routing.take_counts() == [(0, len(own))] * 3


def test_replayed_experts_are_weighted_by_the_trainers_router_with_its_gradient(model):
    model.routing.set_replay(replays=True)
    block, router = block_of(model), block_of(model).gate.requires_grad_(True)
    hidden_ND = torch.randn(6, 64)
    experts_NK = given(6)[:, 0].long()
    router.given_experts = experts_NK
    scores_NK = (hidden_ND @ router.weight.T).softmax(-1).gather(-1, experts_NK)
    expected = plain_loop(block, hidden_ND, experts_NK, scores_NK / scores_NK.sum(-1, keepdim=True))
    found = block(hidden_ND[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), router.weight)[0] for out in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert gradients[1].abs().max() > 0


def test_a_layer_computed_again_in_the_backward_pass_takes_the_same_experts(folder):
    gradients = []
    for checkpointing in (False, True):
        prompts = load_prompt_format(find_preset(folder), folder)
        model = SpeechModel(load_module(prompts, folder, CPU, torch.float32), prompts)
        make_trainable(model, lora_rank=0, lora_alpha=1.0, freeze_audio=True, gradient_checkpointing=checkpointing)
        model.routing.set_replay(replays=True)
        hidden_TD = model.forward(make_row(model))
        # Another pass before the backward pass of the first, as of completions without a gradient.
        with torch.no_grad():
            model.forward(make_row(model, routed=False))
        hidden_TD.pow(2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_copy_in_another_thread_has_a_routing_of_its_own(model):
    copied = model.copy_sharing_weights()
    model.routing.set_replay(replays=True)
    experts_of_pass(model, make_row(model))
    assert copied.routing.take_counts() == [(0, 0)] * 3
    routed = make_row(model)
    known = routed.routed_experts[:, 0, 0] != NOT_KNOWN
    assert not torch.equal(experts_of_pass(copied, routed)[known], routed.routed_experts[known].long()), "it replays nothing"
    assert model.language_model.layers[0].mlp.gate.weight is copied.language_model.layers[0].mlp.gate.weight
