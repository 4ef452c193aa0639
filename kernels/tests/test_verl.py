"""`integrations.verl.policy_loss` beside verl's own function, value, gradient and metrics."""

from __future__ import annotations

from importlib.util import find_spec

import peers
import pytest
import torch
from tars_kernels.integrations import verl

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="needs verl (pip install --no-deps verl)")


class ActorConfig(dict):
    """What verl's function reads of its actor settings."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.28

    def __init__(self, clip_ratio_c: float, **global_batch_info):
        super().__init__(clip_ratio_c=clip_ratio_c)
        self.global_batch_info = global_batch_info


@pytest.mark.parametrize(
    "batch_info", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 6}, {"loss_scale_factor": 50}], ids=str
)
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradient_and_metrics_are_those_of_verl(mode, batch_info, weighted):
    generator = torch.Generator().manual_seed(0)
    old, advantages, ratios, weights = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.arange(7) < torch.tensor([7, 3, 0, 5])[:, None]
    config = ActorConfig(3.0, **batch_info)
    results = []
    for function in (verl.policy_loss, peers.verl_functions().compute_policy_loss_vanilla):
        logprobs = (old + ratios).requires_grad_()
        given = weights.exp() if weighted else None
        loss, metrics = function(old, logprobs, advantages, mask.double(), mode, config, given)
        loss.backward()
        results.append((loss.detach(), logprobs.grad, metrics))
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = results
    torch.testing.assert_close((loss, gradient), (their_loss, their_gradient), rtol=1e-7, atol=1e-9)
    assert metrics == pytest.approx(their_metrics, rel=1e-5)
    assert min(metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) > 0, "nothing was clipped"
