"""Kernels that overwrite what they read, many times over: whatever depends on which warp is faster shows as other bits."""

from __future__ import annotations

import pytest
import tars_kernels
import torch

NUM_TOKENS, REPEATS = 16384, 200


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("vocabulary", [1100, 50257, 156032])
def test_in_place_gives_the_bits_of_a_copy(device, vocabulary, loss_type):
    """Rows without an advantage, clipped rows, and rows with a gradient take turns; in 16 GB of GPU memory at most."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(NUM_TOKENS, vocabulary, device=device, dtype=torch.bfloat16, generator=generator)
    targets = torch.randint(0, vocabulary, (NUM_TOKENS,), device=device, generator=generator)
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.0], device=device).repeat(NUM_TOKENS // 4)
    cu_seqlens = torch.arange(0, NUM_TOKENS + 1, 8, device=device)
    settings = {"cu_seqlens": cu_seqlens, "loss_type": loss_type}
    with torch.no_grad():
        current = tars_kernels.policy_loss(logits, targets, advantages, **settings).logprobs
    # Half of the ratios are far above the clip, where an advantage of 1 has no slope either.
    settings["old_logprobs"] = current - torch.tensor([0.0, 2.0], device=device).repeat_interleave(NUM_TOKENS // 2)

    def once(values: torch.Tensor, *, inplace: bool) -> tuple[torch.Tensor, torch.Tensor]:
        values.requires_grad_()
        result = tars_kernels.policy_loss(values, targets, advantages, inplace=inplace, **settings)
        return result.logprobs, torch.autograd.grad(result.loss, values)[0]

    expected = once(logits.clone(), inplace=False)
    differing = 0
    for _ in range(REPEATS):
        differing += not all(map(torch.equal, once(logits.clone(), inplace=True), expected))
    assert differing == 0, f"{differing} of {REPEATS} runs in place gave other bits"
