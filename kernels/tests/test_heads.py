"""What `linear_logprob` does beside log-probabilities: masks, capped logits, z-loss, heads in parts on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tars_kernels
import torch
from parts import found_by_parts
from tars_kernels import reference

slow = pytest.mark.slow


def sample(num_tokens: int = 9, width: int = 24, vocabulary: int = 1100):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    # Certain of its target; logits reach 30.
    hidden[1] = 30 * weight[targets[1]] / weight[targets[1]].norm() ** 2
    return hidden, weight, targets


def terms_and_gradients(implementation, hidden, weight, targets, trainable, **options):
    """Every output, and the gradients of a sum of all of them with different weights."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    terms = implementation.linear_logprob(
        *leaves, targets, return_entropy=True, return_logsumexp=True, entropy_gradient=True, **options
    )
    weights = torch.linspace(0.5, 1.5, len(hidden)).to(terms[0])
    loss = (weights * terms[0]).sum() + (weights.flip(0) * terms[1]).sum() + (0.01 * terms[2].square()).sum()
    gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
    return [x.detach() for x in (*terms, *gradients)]


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_capped_logits_and_logsumexp(device, softcap, trainable):
    """Against float64, with a suppressed token, and beside PyTorch's tanh."""
    hidden, weight, targets = sample()
    bias = torch.linspace(-1, 1, 1100)
    bias[(targets[0] + 1) % 1100] = -torch.inf
    options = {"softcap": softcap, "temperature": 0.8}
    ours = terms_and_gradients(
        tars_kernels, *(x.to(device) for x in (hidden, weight, targets)), trainable, bias=bias.to(device), **options
    )
    truth = terms_and_gradients(reference, hidden.double(), weight.double(), targets, trainable, bias=bias.double(), **options)
    logits = hidden.double() @ weight.double().T + bias
    if softcap:
        logits = torch.where(logits == -torch.inf, logits, softcap * (logits / softcap).tanh())
    torch.testing.assert_close(truth[2], (logits / 0.8).logsumexp(-1))
    torch.testing.assert_close(truth[0], (logits / 0.8).log_softmax(-1)[torch.arange(9), targets])
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our.double().cpu(), true, rtol=2e-5, atol=2e-5 * true.abs().max().item())


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_policy_loss_with_capped_logits_and_z_loss(device, trainable):
    """Against float64, and by hand: the mean over what the mask leaves, or over the whole batch's tokens, times the scale."""
    hidden, weight, targets = sample()
    mask = torch.arange(9) != 5
    options = {"softcap": 5.0, "z_coef": 0.01, "temperature": 0.8, "num_tokens": 20, "scale": 0.5}
    results = []
    for implementation, home, dtype in ((tars_kernels, device, torch.float32), (reference, "cpu", torch.float64)):
        leaves = [hidden.to(home, dtype).requires_grad_(), weight.to(home, dtype).requires_grad_(trainable)]
        given = (targets.to(home), torch.linspace(-1, 1, 9, device=home))
        loss = implementation.linear_policy_loss(*leaves, *given, mask=mask.to(home), **options).loss
        gradients = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        results.append([x.detach().double().cpu() for x in (loss, *gradients)])
    for our, true in zip(*results, strict=True):
        torch.testing.assert_close(our, true, rtol=2e-5, atol=2e-5 * true.abs().max().item())
    logits = 5 * (hidden.double() @ weight.double().T / 5).tanh() / 0.8
    plain = reference.policy_loss(logits, targets, torch.linspace(-1, 1, 9), mask=mask, num_tokens=20, scale=0.5).loss
    z_loss = 0.5 * 0.01 * logits.logsumexp(-1).square()[mask].sum() / 20
    torch.testing.assert_close(results[1][0], plain + z_loss)


def test_a_cap_far_away_changes_nothing(device):
    hidden, weight, targets = (x.to(device) for x in sample())
    plain, capped = (
        terms_and_gradients(tars_kernels, hidden, weight, targets, False, softcap=softcap) for softcap in (None, 1e5)
    )
    for one, other in zip(plain, capped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-2 * one.abs().max().item())


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
def test_whatever_masked_and_ignored_slots_hold_stays_out(device, implementation, trainable):
    hidden, weight, targets = (x.to(device) for x in sample())
    mask = torch.arange(9, device=device) != 3
    keep = mask & (torch.arange(9, device=device) != 5)
    clean = terms_and_gradients(
        implementation, hidden.masked_fill(~keep[:, None], 0.0), weight, targets.masked_fill(~keep, 0), trainable, mask=keep
    )
    hidden = hidden.masked_fill(~mask[:, None], torch.nan)
    targets = targets.clone()
    targets[3], targets[5] = 10**9, -100
    poisoned = terms_and_gradients(implementation, hidden, weight, targets, trainable, mask=mask, ignore_index=-100)
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)
    assert all(not term[~keep].any() for term in poisoned[:4])
    with pytest.raises(ValueError, match="mask: dtype"):
        implementation.linear_logprob(hidden, weight, targets, mask=hidden[:, 0])
    with pytest.raises(ValueError, match="softcap: -1"):
        implementation.linear_logprob(hidden, weight, targets, mask=keep, softcap=-1)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
def test_parts_of_a_vocabulary_make_the_whole(device, monkeypatch, implementation, trainable):
    """Two and four parts, the confident row in one of them; the gradients by hidden states add up."""
    hidden, weight, targets = (x.to(device) for x in sample())
    whole = terms_and_gradients(implementation, hidden, weight, targets, trainable, temperature=0.8)
    for number in (2, 4):

        def part(rank, group, number=number):
            own = weight.chunk(number)[rank]
            return terms_and_gradients(implementation, hidden, own, targets, trainable, temperature=0.8, group=group)

        found = found_by_parts(monkeypatch, number, 2, part)
        for results in found:
            for result, expected in zip(results[:3], whole[:3], strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        gradient = sum(results[3] for results in found)
        torch.testing.assert_close(gradient, whole[3], rtol=1e-4, atol=1e-5)
        if trainable:
            torch.testing.assert_close(torch.cat([results[4] for results in found]), whole[4], rtol=1e-4, atol=1e-5)


TWO_PROCESSES = """
    import sys
    sys.path.insert(0, {tests!r})
    import conftest
    import torch
    import torch.distributed as dist
    import tars_kernels
    from test_distillation import distilled
    from test_heads import sample, terms_and_gradients

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
    hidden, weight, targets = sample()
    own = weight.chunk(2)[rank].contiguous()
    for implementation in (tars_kernels, tars_kernels.reference):
        for trainable in (False, True):
            whole = terms_and_gradients(implementation, hidden, weight, targets, trainable)
            part = terms_and_gradients(implementation, hidden, own, targets, trainable, group=dist.group.WORLD)
            expected = [*whole[:4], *(x.chunk(2)[rank] for x in whole[4:])]
            for result, true in zip(part, expected, strict=True):
                torch.testing.assert_close(result, true, rtol=1e-4, atol=1e-5)
            for loss_type in ("dapo", "gspo"):
                gradients = []
                for head, group in ((weight, None), (own, dist.group.WORLD)):
                    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_(trainable)]
                    loss = implementation.linear_policy_loss(
                        *leaves, targets, torch.linspace(-1, 1, 9), cu_seqlens=torch.tensor([0, 4, 9]), loss_type=loss_type,
                        mask=torch.arange(9) != 5, entropy_coef=0.1, softcap=5.0, z_coef=0.01, group=group,
                    )
                    loss.loss.backward()
                    gradients.append([loss.loss.detach(), loss.entropy, *(x.grad for x in leaves if x.grad is not None)])
                if trainable:
                    gradients[0][3] = gradients[0][3].chunk(2)[rank]
                for result, true in zip(*gradients, strict=True):
                    torch.testing.assert_close(result, true, rtol=1e-4, atol=1e-5)
            for kind in ("reverse_kl", "forward_kl", "jsd"):
                whole = distilled(implementation, hidden, hidden.flip(0), weight, trainable, divergence=kind)
                part = distilled(
                    implementation, hidden, hidden.flip(0), own, trainable, divergence=kind, group=dist.group.WORLD
                )
                expected = [*whole[:3], *(x.chunk(2)[rank] for x in whole[3:])]
                for result, true in zip(part, expected, strict=True):
                    torch.testing.assert_close(result, true, rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()
    print("equal")
"""


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="its processes run under Triton's interpreter, as where there is no GPU")
def test_two_processes_with_half_of_a_vocabulary_each(tmp_path):
    """Log-probabilities, policy losses and distillation, by kernels and by the specification, over gloo."""
    code = textwrap.dedent(TWO_PROCESSES).format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in done]
    # What one process says when the other has failed is of no interest.
    assert all(output.endswith("equal\n") for output in outputs), "\n".join(output[-2000:] for output in outputs)
