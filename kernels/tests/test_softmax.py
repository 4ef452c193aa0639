"""What plain PyTorch runs for log-probabilities and entropies, against what specifies them, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from tars_kernels.reference import specified_softmax_terms
from tars_kernels.softmax import SoftmaxTerms


@pytest.mark.parametrize("shift", [-110.0, 0.0, 110.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", ["none", "learnt", "suppressing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_fast_softmax_is_the_specified_one(bias, temperature, shift, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(7, 33, generator=generator, dtype=torch.float64) + shift
    # A row that is all but certain, a row that is flat.
    logits[0, 3], logits[1] = 60.0 + shift, shift
    added = torch.randn(33, generator=generator, dtype=torch.float64)
    if bias == "suppressing":
        added[[5, 32]] = -torch.inf
    targets = torch.tensor([3, 0, 31, 7, 8, 9, 10])
    slopes = torch.linspace(-1, 2, 7, dtype=torch.float64)
    results = []
    for function, kind in ((SoftmaxTerms.apply, dtype), (specified_softmax_terms, torch.float64)):
        leaf = logits.to(kind).requires_grad_()
        own = None if bias == "none" else added.to(kind).requires_grad_()
        last = kind == torch.float64 and function is specified_softmax_terms
        logprobs, entropies = function(leaf, targets, own, temperature, not last)
        assert not entropies.requires_grad
        (logprobs * slopes.to(kind)).sum().backward()
        results.append([logprobs, entropies, leaf.grad, *([] if own is None else [own.grad])])
    # 110 more on every logit leaves fp32 fewer bits for their differences.
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * (1 + 3 * (shift != 0)))


def test_what_is_not_finite_shows():
    """A suppressed token has no share in the entropy, a NaN has all of it; also where the target itself is suppressed."""
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, :4], logits[3, 1] = torch.nan, -torch.inf, -torch.inf
    for requires_grad in (False, True):
        logprobs, entropies = SoftmaxTerms.apply(
            logits.clone().requires_grad_(requires_grad), torch.tensor([0, 0, 4, 1]), None, 1.0, True
        )
        assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False, False]
        torch.testing.assert_close(entropies[[0, 2, 3]], torch.tensor([5.0, 1.0, 4.0]).log())
