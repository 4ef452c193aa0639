"""Full fine-tuning in bfloat16: steps far below a weight's last bit must add up as they would in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tars_fast.learning.optimizer import StochasticAdamW, make_optimizer, stochastic_round


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_is_unbiased_and_to_a_neighbour():
    values = torch.randn(2000, generator=generator()) * torch.logspace(-20, 20, 2000)
    draws = torch.stack([stochastic_round(values, generator(seed)) for seed in range(400)])
    assert draws.dtype == torch.bfloat16
    down = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((draws == down) | (draws == up)).all()
    # The mean of 400 draws deviates by at most half a gap / 20 in the standard deviation.
    deviation = (draws.double().mean(0) - values) / (up - down).abs()
    assert deviation.abs().max() < 5 * 0.5 / 400**0.5
    assert deviation.mean().abs() < 5 * 0.5 / (400 * 2000) ** 0.5


def test_what_bf16_holds_exactly_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, 2.0**-120])
    assert torch.equal(stochastic_round(values, generator()).float(), values)


def test_nan_stays_nan_whatever_its_bits():
    """CUDA's own NaN has all bits set, where noise would carry into the sign."""
    values = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(values, generator()).isnan().all()


@pytest.mark.parametrize("learning_rate", [1e-6, pytest.param(1e-5, marks=pytest.mark.slow)])
def test_realised_update_is_the_intended_one(learning_rate):
    """200 steps against the same steps in float64; plain rounding to the nearest, the control, loses nearly all of it."""
    torch.manual_seed(0)
    start = (0.02 * torch.randn(512, 512)).bfloat16()
    gradients = [torch.randn(512, 512) * 0.1 + 0.05 * start.float().sign() for _ in range(8)]
    exact, rounded, nearest = (
        nn.Parameter(start.clone().to(dtype)) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    settings = {"lr": learning_rate, "weight_decay": 0.01}
    optimizers = [
        torch.optim.AdamW([exact], **settings),
        StochasticAdamW([rounded], **settings),
        torch.optim.AdamW([nearest], **settings),
    ]
    for step in range(200):
        for parameter, optimizer in zip((exact, rounded, nearest), optimizers, strict=True):
            parameter.grad = gradients[step % 8].to(parameter.dtype)
            optimizer.step()
    intended = exact.detach() - start.double()
    realised = [(parameter.detach().double() - start.double()) for parameter in (rounded, nearest)]
    share = [((change * intended).sum() / (intended * intended).sum()).item() for change in realised]
    assert share[0] == pytest.approx(1, abs=0.02)
    assert share[1] < 0.5, "rounding to the nearest would have done: the test shows nothing"


def test_equals_adamw_where_rounding_does_not_matter():
    """Steps as large as the weights, so that half a per cent of rounding hides nothing else."""
    torch.manual_seed(1)
    start = torch.randn(64, 64).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    settings = {"lr": 0.3, "weight_decay": 0.1}
    pair = ((ours, StochasticAdamW([ours], **settings)), (theirs, torch.optim.AdamW([theirs], **settings)))
    for _ in range(5):
        gradient = torch.randn(64, 64).bfloat16()
        for parameter, optimizer in pair:
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    torch.testing.assert_close(ours.float(), theirs.detach(), rtol=0.03, atol=0.03)


def test_resumed_steps_equal_unbroken_ones():
    """Moments stay float32 through a checkpoint, and each step's draws depend on its number."""
    torch.manual_seed(2)
    gradients = [torch.randn(32, 32).bfloat16() for _ in range(6)]
    unbroken = nn.Parameter(torch.ones(32, 32).bfloat16())
    optimizer = make_optimizer([unbroken], weight_decay=0.01, seed=3)
    states = []
    for gradient in gradients:
        states.append((unbroken.detach().clone(), optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 1e-3
        unbroken.grad = gradient
        optimizer.step()
        if len(states) == 3:
            middle = (unbroken.detach().clone(), {k: v for k, v in optimizer.state_dict().items()})
            saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, middle[1])
    resumed = nn.Parameter(middle[0].clone())
    second = make_optimizer([resumed], weight_decay=0.01, seed=3)
    second.load_state_dict(saved)
    assert second.state[resumed]["exp_avg"].dtype == torch.float32
    for gradient in gradients[3:]:
        second.param_groups[0]["lr"] = 1e-3
        resumed.grad = gradient
        second.step()
    assert torch.equal(resumed, unbroken)


def test_float32_gets_torchs_own():
    assert type(make_optimizer([nn.Parameter(torch.ones(2))], 0.0, 0)) is torch.optim.AdamW
