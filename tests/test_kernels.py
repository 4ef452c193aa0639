"""The reference operations against float64 and against autograd written out; case list: ratio, clip, mask, packing."""

from __future__ import annotations

import pytest
import torch
from tars_kernels import LayerPooler, linear_policy_loss, pool_sequences, pooled_similarity
from torch import nn

T, D, V = 77, 24, 123  # Odd sizes: no power of two hides an off-by-one.


def inputs(dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, dtype=dtype, generator=generator)
    weight = torch.randn(V, D, dtype=dtype, generator=generator) / 3
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[0], targets[1] = 0, V - 1
    advantages = torch.randn(T, dtype=dtype, generator=generator)
    return hidden, weight, targets, advantages


def naive_loss(hidden, weight, targets, advantages, old, rollout, mask, low, high, cap, temperature):
    """Token by token in float64, as the paper writes it."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for t in range(len(targets)):
        if not mask[t]:
            continue
        count += 1
        logits = weight.double() @ hidden[t].double() / temperature
        logprob = logits[targets[t]] - torch.logsumexp(logits, 0)
        ratio = torch.exp(logprob - old[t].double())
        importance = min(torch.exp(old[t].double() - rollout[t].double()).item(), cap)
        surrogate = torch.minimum(ratio * advantages[t], ratio.clamp(1 - low, 1 + high) * advantages[t])
        total = total - surrogate * importance
    return total / count


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_match_float64(dtype, temperature):
    hidden, weight, targets, advantages = inputs()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        current = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    # Ratios between about 0.4 and 2.7, so that both clips and the cap are at work.
    old = current + 0.5 * torch.randn(T, generator=generator, dtype=torch.float64)
    rollout = old + 0.5 * torch.randn(T, generator=generator, dtype=torch.float64)
    mask = torch.rand(T, generator=generator) > 0.3
    truth_inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    truth = naive_loss(*truth_inputs, targets, advantages, old, rollout, mask, 0.2, 0.28, 2.0, temperature)
    truth.backward()
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    result = linear_policy_loss(
        *leaves, targets, advantages.float(), old_logprobs=old.float(), rollout_logprobs=rollout.float(), mask=mask,
        temperature=temperature,
    )  # fmt: skip
    result.loss.backward()
    # bf16 keeps 8 bits of mantissa; its rounded inputs alone move the loss by a few 1e-3.
    tolerance = 2e-6 if dtype is torch.float32 else 3e-2
    assert result.loss.item() == pytest.approx(truth.item(), abs=tolerance)
    for leaf, true_leaf in zip(leaves, truth_inputs, strict=True):
        scale = true_leaf.grad.abs().max()
        assert (leaf.grad.double() - true_leaf.grad).abs().max() <= (1e-5 if dtype is torch.float32 else 8e-2) * scale
    assert result.clipped_low.any()
    assert result.clipped_high.any()
    assert (result.importance_ratio > 2.0).any()


def test_clip_is_exact_at_its_bounds():
    """At ratio 1.28 with A > 0 and 0.8 with A < 0 the gradient stops; on the other side of the objective it goes on."""
    hidden, weight, targets, _ = inputs(torch.float64)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ratios = torch.tensor([1.29, 1.27, 0.79, 0.81] + [1.0] * (T - 4), dtype=torch.float64)
    hidden.requires_grad_()
    for sign, stopped in ((1.0, {0}), (-1.0, {2})):
        hidden.grad = None
        advantages = torch.full((T,), sign, dtype=torch.float64)
        result = linear_policy_loss(hidden, weight, targets, advantages, old_logprobs=logprobs - ratios.log())
        result.loss.backward()
        flat = {row for row in range(T) if hidden.grad[row].abs().max() == 0}
        assert flat == stopped
        assert set((result.clipped_low | result.clipped_high).nonzero()[:, 0].tolist()) == stopped


def test_on_policy_gradient_is_plain_policy_gradient():
    hidden, weight, targets, advantages = inputs()
    first, second = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_policy_loss(first, weight, targets, advantages).loss.backward()
    logprobs = (second @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (-(logprobs * advantages).sum() / T).backward()
    torch.testing.assert_close(first.grad, second.grad, atol=1e-7, rtol=1e-5)


def test_whatever_masked_slots_hold_stays_out():
    hidden, weight, targets, advantages = inputs(torch.float32)
    mask = torch.ones(T, dtype=torch.bool)
    mask[5:9] = False
    clean = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_policy_loss(*clean, targets, advantages, mask=mask).loss.backward()
    hidden[5], hidden[6] = torch.nan, torch.inf
    advantages[7] = torch.nan
    old = torch.full((T,), torch.nan)
    with torch.no_grad():
        old[mask] = (hidden[mask] @ weight.T).log_softmax(-1).gather(-1, targets[mask, None])[:, 0]
    poisoned = [hidden.requires_grad_(), weight.requires_grad_()]
    result = linear_policy_loss(*poisoned, targets, advantages, old_logprobs=old, rollout_logprobs=old, mask=mask)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert result.logprobs[5:9].tolist() == result.entropy[5:9].tolist() == [0.0] * 4
    for leaf, reference in zip(poisoned, clean, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad, atol=1e-6, rtol=1e-4)


def test_suppressed_token_has_no_probability_and_finite_entropy():
    hidden, weight, targets, advantages = inputs(torch.float32)
    targets[targets == 50] = 51
    bias = torch.zeros(V)
    bias[50] = -torch.inf
    weight.requires_grad_()
    result = linear_policy_loss(hidden, weight, targets, advantages, bias=bias)
    result.loss.backward()
    assert weight.grad[50].abs().max() == 0
    kept = torch.arange(V) != 50
    logits = hidden.double() @ weight.detach().double()[kept].T
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(result.entropy.double(), distribution.entropy(), atol=1e-5, rtol=1e-5)


def test_advantages_per_sequence_and_global_normaliser():
    hidden, weight, targets, _ = inputs()
    cu_seqlens = torch.tensor([0, 10, 10, 40, T])
    per_sequence = torch.tensor([1.0, 9.0, -2.0, 0.5], dtype=torch.float64)
    per_token = per_sequence.repeat_interleave(cu_seqlens.diff())
    first = linear_policy_loss(hidden, weight, targets, per_sequence, cu_seqlens=cu_seqlens)
    second = linear_policy_loss(hidden, weight, targets, per_token)
    assert first.loss == second.loss
    halves = [
        linear_policy_loss(hidden[rows], weight, targets[rows], per_token[rows], num_tokens=T).loss
        for rows in (slice(0, 31), slice(31, T))
    ]
    assert sum(halves).item() == pytest.approx(first.loss.item(), abs=1e-12)
    with pytest.raises(ValueError, match="advantages"):
        linear_policy_loss(hidden, weight, targets, per_sequence)


def test_everything_masked_gives_zero_not_nan():
    hidden, weight, targets, advantages = inputs(torch.float32)
    hidden.requires_grad_()
    nothing = torch.zeros(T, dtype=torch.bool)
    result = linear_policy_loss(hidden, weight, targets, advantages, mask=nothing, num_tokens=1)
    result.loss.backward()
    assert result.loss == 0
    assert hidden.grad.abs().max() == 0


def test_pooling_of_packed_sequences():
    states = torch.arange(12.0).view(6, 2)
    pooled = pool_sequences(states, torch.tensor([0, 1, 1, 6]))
    assert pooled.tolist() == [[0.0, 1.0], [0.0, 0.0], [6.0, 7.0]]


def test_similarity_is_the_cosine_of_each_layer():
    pooled = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]])
    similarity = pooled_similarity(pooled, torch.tensor([[0, 1], [0, 2]]))
    torch.testing.assert_close(similarity, torch.tensor([[0.5**0.5, 0.0], [0.0, 1.0]]))


class Stack(nn.Module):
    """Three layers and a norm, as decoders have them; optionally with gradient checkpointing."""

    def __init__(self, checkpointing: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.RMSNorm(8)
        self.checkpointing = checkpointing

    def forward(self, states):
        entries = []
        for layer in self.layers:
            if self.checkpointing:
                states = torch.utils.checkpoint.checkpoint(layer, states, use_reentrant=False)
            else:
                states = layer(states)
            entries.append(states)
        entries[-1] = self.norm(states)
        return entries


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pooler_takes_what_hidden_states_would_hold(checkpointing):
    model = Stack(checkpointing)
    states = torch.randn(2, 5, 8, requires_grad=True)
    positions, cu_seqlens = torch.tensor([1, 2, 3, 6, 7]), torch.tensor([0, 3, 5])
    pooler = LayerPooler(model.layers, model.norm)
    with pooler.pooling(positions, cu_seqlens):
        entries = model(states)
    expected = torch.stack([torch.stack([e[0, 1:4].mean(0), e[1, 1:3].mean(0)]) for e in entries])
    pooled = pooler.pooled
    torch.testing.assert_close(pooled, expected.detach())
    entries[-1].square().sum().backward()
    assert torch.equal(pooler.pooled, pooled)  # Layers that run again during the backward count once.


def test_pooler_carries_no_gradient_and_leaves_no_hooks():
    model = Stack(checkpointing=False)
    pooler = LayerPooler(model.layers, model.norm)
    with pytest.raises(RuntimeError, match="did not run"):
        _ = pooler.pooled
    with pooler.pooling(torch.tensor([0]), torch.tensor([0, 1])):
        model(torch.randn(1, 5, 8))
    assert not pooler.pooled.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
