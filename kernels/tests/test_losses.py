"""Log-probabilities and policy losses: kernels against the specification in float64, over every awkward input we know of."""

from __future__ import annotations

from itertools import product

import pytest
import tars_kernels
import torch
from accuracy import assert_accurate, run
from tars_kernels import reference
from torch.nn.functional import linear

slow = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=slow)]
# Not multiples of anything that a tile has, up to the vocabulary of Qwen2-Audio.
VOCABULARIES = [1000, *(pytest.param(size, marks=slow) for size in (1100, 32000, 50264, 151936)), 156032]


def sample(num_tokens: int, width: int, vocabulary: int, seed: int = 0):
    """Hidden states, head and targets; one row certain of its target, one certain of another, targets at both ends."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    if num_tokens > 4:
        hidden[1] = 9 * weight[targets[1]] * width**0.5 / weight[targets[1]].norm()
        hidden[2] = 9 * weight[(targets[2] + 1) % vocabulary] * width**0.5
    # Rounded first, so that every dtype computes on the same numbers.
    return hidden.bfloat16().float(), weight.bfloat16().float(), targets


def packing(num_tokens: int) -> torch.Tensor:
    """Four sequences, one of them empty, where there are tokens for it."""
    return torch.tensor([0, num_tokens // 3, num_tokens // 3, num_tokens - num_tokens // 4, num_tokens])


def policy_inputs(logprobs: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    """Old, rollout and reference log-probabilities around `logprobs`: ratios on both sides of every bound, none close."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(logprobs)
    not_reported = torch.arange(num_tokens) == 5
    steps = torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6, 1.5, 0.0])
    old = (logprobs.double() + steps[torch.arange(num_tokens) % len(steps)]).clamp(max=-1e-3)
    return {
        "old_logprobs": old,
        "rollout_logprobs": (old - torch.tensor([0.0, 0.3, 1.1, -0.4, 2.0])[torch.arange(num_tokens) % 5]).masked_fill(
            not_reported, torch.nan
        ),
        "ref_logprobs": old + 0.3 * torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        "mask": torch.rand(num_tokens, generator=generator) > 0.2,
    }


def moved(settings: dict[str, object], device, dtype=None) -> dict[str, object]:
    """Settings with their tensors on `device`, floating point ones as `dtype`."""
    return {
        name: value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in settings.items()
    }


def outputs(loss) -> list[torch.Tensor]:
    return [
        loss.loss, loss.logprobs, loss.entropy, loss.clip_low_fraction, loss.clip_high_fraction, loss.importance_mean,
        loss.importance_max, loss.importance_capped_fraction, loss.token_losses,
    ]  # fmt: skip


def eager_logprob(hidden, weight, targets, temperature):
    """As training code writes it: logits in the model's dtype."""
    logprobs = (linear(hidden, weight).float() / temperature).log_softmax(-1)
    return [logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)]


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "width", "vocabulary"), [(1, 64, 1000), (31, 123, 1100), pytest.param(289, 40, 300, marks=slow)]
)
def test_linear_logprob(device, dtype, head, num_tokens, width, vocabulary):
    hidden, weight, targets = sample(num_tokens, width, vocabulary)
    leaves = [hidden] if head == "frozen" else [hidden, weight]

    def ours(hidden, weight=weight):
        weight = weight.to(device, dtype)
        return tars_kernels.linear_logprob(hidden, weight, targets.to(device), temperature=0.7, return_entropy=True)

    def eager(hidden, weight=weight):
        return eager_logprob(hidden, weight.to(dtype), targets, 0.7)

    def truth(hidden, weight=weight):
        return reference.linear_logprob(hidden, weight.double(), targets, temperature=0.7, return_entropy=True)

    assert_accurate(
        run(ours, leaves, dtype, device),
        run(eager, leaves, dtype, torch.device("cpu")),
        run(truth, leaves, torch.float64, torch.device("cpu")),
        [torch.float32, torch.float32, *[dtype] * len(leaves)],
    )


@pytest.mark.parametrize(
    ("head", "entropy_coef"),
    [("frozen", 0.0), pytest.param("frozen", 0.1, marks=slow), pytest.param("trainable", 0.0, marks=slow), ("trainable", 0.1)],
)
def test_blocks_of_tokens_change_nothing(device, monkeypatch, head, entropy_coef):
    """Logits exist for some tokens at a time; here for so few that several blocks, and a part of one, are needed."""
    hidden, weight, targets = (x.to(device) for x in sample(37, 24, 1100))
    results = []
    for logits_rows, product_rows in ((512, 1024), (8, 16)):
        monkeypatch.setitem(tars_kernels.linear_logprob.__globals__, "LOGITS_ROWS", logits_rows)
        monkeypatch.setitem(tars_kernels.linear_logprob.__globals__, "PRODUCT_ROWS", product_rows)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(head == "trainable")]
        result = tars_kernels.linear_policy_loss(
            *leaves, targets, torch.linspace(-1, 1, 37, device=device), entropy_coef=entropy_coef
        )
        results.append([*outputs(result), *torch.autograd.grad(result.loss, [leaf for leaf in leaves if leaf.requires_grad])])
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-7)


def test_entropy_is_detached_unless_it_is_wanted(device):
    hidden, weight, targets = (x.to(device) for x in sample(6, 24, 1100))
    for implementation in (tars_kernels, reference):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = implementation.linear_logprob(leaf, weight, targets, return_entropy=True)
        assert logprobs.requires_grad
        assert not entropy.requires_grad
        gradients = []
        for entropy_coef in (0.0, 0.5):
            loss = implementation.linear_policy_loss(
                leaf, weight, targets, torch.zeros(6, device=device), entropy_coef=entropy_coef
            )
            assert not loss.entropy.requires_grad
            gradients.append(torch.autograd.grad(loss.loss, leaf)[0])
        assert not gradients[0].any()
        assert gradients[1].any()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies(device, vocabulary):
    hidden, weight, targets = sample(7, 24, vocabulary)
    mask = torch.arange(7) != 4

    def loss_of(implementation, dtype, device):
        def loss(logits):
            result = implementation.policy_loss(
                logits, targets.to(device), torch.linspace(-1, 1, 7, dtype=dtype, device=device), mask=mask.to(device)
            )
            return [result.loss, result.logprobs, result.entropy]

        return loss

    logits = hidden @ weight.T
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        rounded = logits.to(dtype).float()
        assert_accurate(
            run(loss_of(tars_kernels, torch.float32, device), [rounded], dtype, device),
            run(loss_of(reference, torch.float32, cpu), [rounded], dtype, cpu),
            run(loss_of(reference, torch.float64, cpu), [rounded], torch.float64, cpu),
            [torch.float32] * 3 + [dtype],
        )


OBJECTIVES = [
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "num_tokens": 100, "kl_coef": 0.1},
    {"loss_type": "dapo", "dual_clip": 1.5, "importance_mode": "mask", "temperature": 1.4},
    {"loss_type": "dapo", "entropy_coef": 0.05, "scale": 0.25},
    {"loss_type": "grpo", "kl_coef": 0.04, "clip_low": 0.1, "clip_high": 0.4, "kl_bias_correction": False},
    {"loss_type": "grpo", "importance_level": "sequence", "entropy_coef": 0.02},
    {"loss_type": "bnpo", "importance_level": "sequence", "importance_mode": "mask", "importance_cap": 1.5},
    {"loss_type": "dr_grpo", "constant": 4 * 40, "entropy_coef": 0.01},
    {"loss_type": "cispo", "clip_high": 1.5, "cispo_low": 0.9},
    {"loss_type": "gspo"},
    {"loss_type": "gspo", "importance_level": "sequence", "kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 1.4},
    {"loss_type": "sapo", "kl_coef": 0.1, "kl_estimator": "k2"},
    {"loss": "dppo-kl", "clip_low": 1e-4, "clip_high": 1e-3, "dual_clip": 1.5},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.1, "kl_coef": 0.1},
]
MORE_OBJECTIVES = [
    {"loss_type": "dapo", "importance_mode": "mask", "importance_floor": 0.8, "importance_cap": 1.4},
    {"loss_type": "dapo", "importance_floor": 0.8, "importance_cap": None},
    *[{"kl_coef": 0.1, "kl_estimator": name} for name in ("k1", "k1+", "k3+")],
    {"loss_type": "grpo", "off_policy_threshold": 0.02, "kl_coef": 0.1, "num_sequences": 7},
    {"loss_type": "luspo", "kl_coef": 0.1},
    {"loss_type": "gspo", "ratio_level": "sequence-token", "kl_coef": 0.1},
    {"loss_type": "gspo", "normalise": "token-mean", "top_entropy_quantile": 0.6},
    {"loss_type": "cispo", "clip_high": 1.5, "ratio_level": "sequence", "kl_coef": 0.1},
    {"loss_type": "sapo", "ratio_level": "sequence", "sapo_temperatures": (1.3, 0.9)},
    {"loss_type": "vespo", "kl_coef": 0.1},
    {"loss_type": "vespo", "importance_mode": "mask", "vespo_positive": (1.5, 2.0), "vespo_negative": (2.5, 1.0)},
    {"loss": "dppo-tv", "clip_low": 0.01, "clip_high": 0.02},
    {"loss_type": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "kl_coef": 0.1},
    {"loss_type": "gmpo", "off_policy_threshold": 0.02, "importance_mode": "mask"},
    {"loss": "reinforce", "normalise": "sequence-sum"},
    {"loss_type": "dapo", "importance_weights": "made below"},
    {"loss_type": "vespo", "importance_weights": "made below", "off_policy_threshold": 0.02},
]
"""What the others leave out, for losses from log-probabilities, which cost little."""


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)])
@pytest.mark.parametrize("settings", [*OBJECTIVES, *MORE_OBJECTIVES], ids=str)
def test_losses_from_logprobs(device, settings, dtype):
    """Sequences longer than a program's block of tokens among them; gradients by log-probabilities and entropies."""
    num_tokens = 2300
    generator = torch.Generator().manual_seed(3)
    logprobs = (-1.5 - torch.randn(num_tokens, generator=generator)).clamp(max=-0.05).to(dtype).float()
    entropy = (1 + 0.3 * torch.randn(num_tokens, generator=generator)).clamp(min=0.1).to(dtype).float()
    options = {name: value for name, value in settings.items() if name != "temperature"}
    fixed = policy_inputs(logprobs) | {"cu_seqlens": torch.tensor([0, 0, 1, 40, 1400, 1403, 2300])} | options
    # Small steps in long sequences: of a sum of large ones the rounding alone would be left to compare. vespo's exponential
    # of such a sum has none.
    late, step = torch.arange(num_tokens) > 40, 0.0 if options.get("loss_type") == "vespo" else 1e-4
    for name, steps in (("old_logprobs", 2), ("rollout_logprobs", 3)):
        fixed[name] = torch.where(late, logprobs.double() * (1 - steps * step), fixed[name])
    if "importance_weights" in settings:
        fixed["importance_weights"] = torch.where(late, 1.0, torch.rand(num_tokens, generator=generator))
    advantages = torch.tensor([2.0, 1.0, 0.3, -1.2, 0.7, 0.0])

    def results_of(implementation, real, leaf_dtype, device):
        options = moved(fixed, device, real)

        def loss(logprobs, entropy=entropy):
            arguments = {"entropy": entropy.to(device, leaf_dtype), **options}
            result = implementation.token_policy_loss(logprobs, advantages.to(device, real), **arguments)
            return [*outputs(result), result.kl]

        leaves = [logprobs, entropy] if "entropy_coef" in settings else [logprobs]
        return run(loss, leaves, leaf_dtype, device)

    cpu = torch.device("cpu")
    ours = results_of(tars_kernels, torch.float32, dtype, device)
    assert_accurate(
        ours,
        results_of(reference, torch.float32, dtype, cpu),
        results_of(reference, torch.float64, torch.float64, cpu),
        [torch.float32] * 10 + [dtype] * (len(ours) - 10),
    )


@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
def test_what_papers_and_trl_say_in_small(device, implementation):
    """Numbers worked out by hand."""

    def gradient_of(logprobs, advantages, **settings):
        leaf = torch.tensor(logprobs, device=device).requires_grad_()
        vectors = {
            name: torch.tensor(value, device=device) if isinstance(value, list) else value for name, value in settings.items()
        }
        result = implementation.token_policy_loss(leaf, torch.tensor(advantages, device=device), **vectors)
        return result.loss.item(), torch.autograd.grad(result.loss, leaf)[0].tolist()

    # TRL multiplies its KL by the ratio, gradient included: 1 - e^0.5 from KL, and KL itself, e^0.5 - 1.5.
    kl = {"old_logprobs": [-1.0], "ref_logprobs": [-0.5], "kl_coef": 1.0}
    assert gradient_of([-1.0], [0.0], **kl)[1] == pytest.approx([-0.5], abs=1e-6)
    assert gradient_of([-1.0], [0.0], **kl, kl_bias_correction=False)[1] == pytest.approx([-0.648721], abs=1e-6)
    # GSPO is a mean over sequences, however long: +1 and -1 cancel.
    five = {"logprobs": [-1.0] * 5, "advantages": [1.0, -1.0], "cu_seqlens": [0, 1, 5]}
    assert gradient_of(**five, loss_type="gspo")[0] == 0.0
    assert gradient_of(**five, loss_type="gspo", normalise="token-mean")[0] == pytest.approx(0.6)
    # Ratios beyond what fp32 holds are clipped on one side, and finite on the other.
    assert gradient_of([-1.0], [1.0], old_logprobs=[-101.0]) == (pytest.approx(-1.28), [0.0])
    for settings in ({}, {"loss": "sapo"}, {"loss": "cispo", "clip_high": 3.0}, kl):
        loss, gradient = gradient_of([-1.0], [-1.0], **{**settings, "old_logprobs": [-101.0]})
        assert torch.isfinite(torch.tensor([loss, *gradient])).all()
    # The mean entropy of the half of the tokens with most of it.
    half = {"entropy": [1.0, 3.0], "top_entropy_quantile": 0.5, "entropy_coef": 1.0}
    assert gradient_of([-1.0, -1.0], [1.0, 2.0], **half) == (-4.0, [0.0, -1.0])
    # Two tokens, two sequences, one of them empty: one advantage a token, or one a sequence.
    pair = {"logprobs": [-1.0, -1.0], "advantages": [3.0, 5.0], "cu_seqlens": [0, 2, 2]}
    assert gradient_of(**pair, advantage_level="token")[0] == -4.0
    assert gradient_of(**pair, advantage_level="sequence")[0] == -3.0


def test_padded_batches(device):
    """The same loss of a batch as TRL and verl hold it and of its packed tokens, with a mask of any dtype."""
    generator = torch.Generator(device).manual_seed(0)
    lengths, longest = torch.tensor([3, 7, 0], device=device), 7
    mask = torch.arange(longest, device=device) < lengths[:, None]
    logprobs, old = (-torch.rand(3, longest, generator=generator, device=device) for _ in range(2))
    advantages = torch.tensor([1.0, -0.5, 2.0], device=device)
    weights = torch.tensor([[0.5], [1.5], [1.0]], device=device)
    expected = tars_kernels.token_policy_loss(
        logprobs[mask], advantages, old_logprobs=old[mask], importance_weights=weights.expand_as(mask)[mask],
        cu_seqlens=torch.tensor([0, 3, 10, 10], device=device), loss_type="gspo",
    )  # fmt: skip
    for dtype in (torch.bool, torch.int64, torch.float32):
        for drop_padding in (False, True):
            padded = tars_kernels.from_padded(
                mask.to(dtype), drop_padding=drop_padding, logprobs=logprobs.masked_fill(~mask, torch.nan),
                advantages=advantages[:, None], old_logprobs=old, importance_weights=weights,
            )  # fmt: skip
            result = tars_kernels.token_policy_loss(**padded, loss_type="gspo")
            torch.testing.assert_close(result.loss, expected.loss)
            flat = result.token_losses if drop_padding else result.token_losses.view_as(mask)[mask]
            torch.testing.assert_close(flat, expected.token_losses)
    per_token = tars_kernels.from_padded(mask, logprobs=logprobs, advantages=advantages[:, None].expand_as(mask))
    assert per_token["advantage_level"] == "token"
    assert len(per_token["advantages"]) == mask.numel()
    with pytest.raises(ValueError, match=r"logprobs: shape \(3, 6\); must be \[3, 7\]"):
        tars_kernels.from_padded(mask, logprobs=logprobs[:, 1:])
    if device.type == "cpu":
        with pytest.raises(ValueError, match="mask: holds numbers below 0"):
            tars_kernels.from_padded((~mask).float() * -1e4, logprobs=logprobs)


def test_kl_of_tokens_is_among_the_results(device):
    hidden, weight, targets = (x.to(device) for x in sample(12, 24, 1100))
    options = {"mask": torch.arange(12, device=device) != 4}
    options["ref_logprobs"] = tars_kernels.linear_logprob(hidden, weight, targets) + torch.linspace(-1, 1, 12, device=device)
    for name, first in (("policy_loss", (hidden @ weight.T,)), ("linear_policy_loss", (hidden, weight))):
        arguments = (*first, targets, torch.linspace(-1, 1, 12, device=device))
        ours, theirs = (getattr(module, name)(*arguments, **options) for module in (tars_kernels, reference))
        torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-4, atol=1e-6)
        assert ours.kl[4] == 0
        assert ours.kl.count_nonzero() == 11


def test_a_scale_given_before_rounds_once(device):
    """A third, as of three accumulated batches: taken in the forward pass, or of the bf16 gradient afterwards."""
    hidden, weight, targets = (x.to(device) for x in sample(9, 24, 1100))
    logits = (hidden @ weight.T).bfloat16()

    def gradient(logits, scale, factor):
        leaf = logits.clone().requires_grad_()
        loss = tars_kernels.policy_loss(leaf, targets, torch.ones(9, device=device), scale=scale, entropy_coef=0.1).loss
        return loss.detach(), torch.autograd.grad(loss * factor, leaf)[0]

    loss, exact = gradient(logits.float(), 1.0, 1 / 3)
    for scale in (1 / 3, torch.tensor(1 / 3, device=device)):
        scaled_loss, once = gradient(logits, scale, 1.0)
        torch.testing.assert_close(scaled_loss, loss / 3)
        assert (once != exact.bfloat16()).float().mean() < 0.01
    twice = gradient(logits, 1.0, 1 / 3)[1]
    assert (twice != exact.bfloat16()).float().mean() > 0.1


IN_TURN = [
    pytest.param(
        start, settings, dtype, marks=() if number % 6 == place and number % 2 == 0 else slow, id=f"{start}-{settings}-{dtype}"
    )
    for number, settings in enumerate(OBJECTIVES)
    for place, (dtype, start) in enumerate(product([torch.float32, torch.bfloat16, torch.float16], ["logits", "hidden"]))
    if dtype == torch.bfloat16 or number % 6 == place or (number + place) % 2
]
"""Each objective from each start in bfloat16, and in turns in the other dtypes; the fast tier has one of them for
every second objective."""


@pytest.mark.parametrize(("start", "settings", "dtype"), IN_TURN)
def test_losses(device, start, settings, dtype):
    hidden, weight, targets = sample(77, 123, 1100)
    with torch.no_grad():
        temperature = settings.get("temperature", 1.0)
        truth_logprobs = reference.linear_logprob(hidden.double(), weight.double(), targets, temperature=temperature)
    fixed = policy_inputs(truth_logprobs) | {"cu_seqlens": packing(77), **settings}
    advantages = torch.tensor([1.0, 0.3, -1.2, 0.7])
    cpu = torch.device("cpu")
    logits = (hidden @ weight.T).to(dtype).float()
    rounded = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    if start == "logits":
        fixed |= policy_inputs(rounded.double())

    def loss_of(implementation, real, device):
        options = moved(fixed, device, real)
        arguments = (targets.to(device), advantages.to(device, real))
        if start == "logits":
            return lambda logits: outputs(implementation.policy_loss(logits, *arguments, **options))
        return lambda hidden: outputs(
            implementation.linear_policy_loss(hidden, weight.to(device, hidden.dtype), *arguments, **options)
        )

    def eager(leaf):
        if start == "logits":
            return loss_of(reference, torch.float32, cpu)(leaf)
        options = moved(fixed, cpu, torch.float32)
        logits = linear(leaf, weight.to(leaf.dtype)).float()
        return outputs(reference.policy_loss(logits, targets, advantages, **options))

    leaf = [logits if start == "logits" else hidden]
    assert_accurate(
        run(loss_of(tars_kernels, torch.float32, device), leaf, dtype, device),
        run(eager, leaf, dtype, cpu),
        run(loss_of(reference, torch.float64, cpu), leaf, torch.float64, cpu),
        [torch.float32] * 9 + [dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_train_a_head_with_its_bias(device, dtype):
    hidden, weight, targets = sample(31, 123, 1100)
    bias = torch.linspace(-1, 1, 1100).bfloat16().float()
    with torch.no_grad():
        fixed = policy_inputs(reference.linear_logprob(hidden, weight, targets, bias=bias)) | {"entropy_coef": 0.1}

    def loss_of(implementation, real, device):
        options = moved(fixed, device, real)
        arguments = targets.to(device), torch.linspace(-1, 1, 31, dtype=real, device=device)
        return lambda hidden, weight, bias: outputs(
            implementation.linear_policy_loss(hidden, weight, *arguments, bias=bias, **options)
        )

    def eager(hidden, weight, bias):
        options = moved(fixed, torch.device("cpu"), torch.float32)
        return outputs(
            reference.policy_loss(linear(hidden, weight, bias).float(), targets, torch.linspace(-1, 1, 31), **options)
        )

    cpu = torch.device("cpu")
    assert_accurate(
        run(loss_of(tars_kernels, torch.float32, device), [hidden, weight, bias], dtype, device),
        run(eager, [hidden, weight, bias], dtype, cpu),
        run(loss_of(reference, torch.float64, cpu), [hidden, weight, bias], torch.float64, cpu),
        [torch.float32] * 9 + [dtype] * 3,
    )


@pytest.mark.parametrize("shift", [-110.0, 110.0])
def test_shifted_logits(device, shift):
    """A running maximum that starts at 0 breaks rows of negative logits."""
    hidden, weight, targets = sample(9, 24, 1100)
    logits = (4 * hidden @ weight.T).clamp(-20, 20) + shift

    def loss_of(implementation, device):
        def loss(logits):
            result = implementation.policy_loss(logits, targets.to(device), torch.ones(9, device=device).to(logits))
            return [result.loss, result.logprobs, result.entropy]

        return loss

    cpu = torch.device("cpu")
    assert_accurate(
        run(loss_of(tars_kernels, device), [logits], torch.float32, device),
        run(loss_of(reference, cpu), [logits], torch.float32, cpu),
        run(loss_of(reference, cpu), [logits], torch.float64, cpu),
        [torch.float32] * 4,
    )


def test_a_confident_row_keeps_its_gradient(device):
    """At p = 0.9995 the gradient is a thousandth of the head's rows: onehot - p in bf16 would miss it by per cents."""
    hidden, weight, targets = sample(5, 64, 1100)
    target = targets[1]
    hidden[1] = weight[target] / weight[target].norm() ** 2 * 16
    hidden = hidden.bfloat16()
    ours, truth = hidden.to(device, copy=True).requires_grad_(), hidden.double().requires_grad_()
    logprob = tars_kernels.linear_logprob(ours, weight.bfloat16().to(device), targets.to(device))[1]
    logprob.backward()
    reference.linear_logprob(truth, weight.double(), targets)[1].backward()
    assert 0.999 < logprob.exp() < 0.9999
    gradient = ours.grad[1].double().cpu()
    assert (gradient - truth.grad[1]).norm() <= 4e-3 * truth.grad[1].norm()


def test_ratio_exactly_at_its_bounds(device):
    """With both clips at 0 an unchanged policy's ratio is exactly its bounds: nothing is held back, as in PyTorch's clamp."""
    hidden, weight, targets = sample(6, 24, 1100)
    logits = (hidden @ weight.T).to(device).requires_grad_()
    old = tars_kernels.policy_loss(logits, targets.to(device), torch.ones(6, device=device)).logprobs
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0, 0.5], device=device)
    result = tars_kernels.policy_loss(logits, targets.to(device), advantages, old_logprobs=old, clip_low=0.0, clip_high=0.0)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    plain = tars_kernels.policy_loss(logits, targets.to(device), advantages)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.loss, logits)[0])
    assert result.clip_low_fraction == result.clip_high_fraction == 0
    assert gradient[2].abs().max() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "held"), [(1.29, 1, True), (1.27, 1, False), (0.79, -1, True), (0.81, -1, False)]
)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_clip_holds_back_on_its_side_only(device, loss_type, ratio, advantage, held):
    hidden, weight, targets = sample(6, 24, 1100)
    logits, targets = (hidden @ weight.T).to(device), targets.to(device)
    cu_seqlens = torch.tensor([0, 6], device=device)
    old = tars_kernels.policy_loss(logits, targets, torch.ones(6, device=device)).logprobs - torch.tensor(ratio).log()
    for sign in (advantage, -advantage):
        leaf = logits.clone().requires_grad_()
        advantages = torch.full((6,), float(sign), device=device)
        result = tars_kernels.policy_loss(
            leaf, targets, advantages, old_logprobs=old, cu_seqlens=cu_seqlens, loss_type=loss_type
        )
        result.loss.backward()
        is_held = held and sign == advantage
        assert (leaf.grad.abs().max() == 0) == is_held
        assert result.clip_high_fraction == float(is_held and ratio > 1)
        assert result.clip_low_fraction == float(is_held and ratio < 1)


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=slow), "gspo"])
@pytest.mark.parametrize("start", ["logits", "hidden"])
def test_whatever_masked_slots_hold_stays_out(device, start, loss_type):
    hidden, weight, targets = (x.to(device) for x in sample(12, 24, 1100))
    mask = torch.ones(12, dtype=torch.bool, device=device)
    mask[4:8] = False
    cu_seqlens = torch.tensor([0, 5, 8, 12], device=device)
    settings = {"mask": mask, "cu_seqlens": cu_seqlens, "loss_type": loss_type, "entropy_coef": 0.1, "kl_coef": 0.1}
    advantages = torch.linspace(-1, 1, 12, device=device)
    names = ("old_logprobs", "rollout_logprobs", "ref_logprobs")
    vectors = {name: tars_kernels.linear_logprob(hidden, weight, targets) + 0.01 * place for place, name in enumerate(names)}

    def gradient_of(first, targets, advantages, vectors):
        leaves = [(first if start == "hidden" else first @ weight.T).requires_grad_(), weight.clone().requires_grad_()]
        if start == "hidden":
            result = tars_kernels.linear_policy_loss(*leaves, targets, advantages, **vectors, **settings)
        else:
            result = tars_kernels.policy_loss(leaves[0], targets, advantages, **vectors, **settings)
        return result, torch.autograd.grad(result.loss, leaves, allow_unused=True)

    clean, clean_gradients = gradient_of(hidden.clone(), targets, advantages, vectors)
    hidden = hidden.clone()
    hidden[4], hidden[5], hidden[6] = torch.nan, torch.inf, -torch.inf
    targets = targets.masked_fill(~mask, -100)
    advantages = advantages.masked_fill(~mask, torch.nan)
    vectors = {name: vector.masked_fill(~mask, torch.inf) for name, vector in vectors.items()}
    poisoned, gradients = gradient_of(hidden, targets, advantages, vectors)
    assert torch.isfinite(poisoned.loss)
    for ours, theirs in zip(outputs(poisoned), outputs(clean), strict=True):
        assert torch.equal(ours, theirs)
    assert poisoned.logprobs[4:8].tolist() == poisoned.entropy[4:8].tolist() == [0.0] * 4
    for ours, theirs in zip(gradients, clean_gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=slow), "gspo"])
def test_everything_masked_or_nothing_there(device, loss_type):
    hidden, weight, targets = (x.to(device) for x in sample(6, 24, 1100))
    cu_seqlens = torch.tensor([0, 6, 6], device=device)
    for rows in (6, 0):
        leaf = hidden[:rows].clone().requires_grad_()
        result = tars_kernels.linear_policy_loss(
            leaf, weight, targets[:rows], torch.ones(2, device=device), cu_seqlens=cu_seqlens.clamp(max=rows),
            mask=torch.zeros(rows, dtype=torch.bool, device=device), loss_type=loss_type,
        )  # fmt: skip
        result.loss.backward()
        assert [value.item() for value in outputs(result) if value.ndim == 0] == [0.0] * 6
        assert not leaf.grad.any()
        logits = torch.zeros(rows, 1100, device=device, requires_grad=True)
        result = tars_kernels.policy_loss(
            logits, targets[:rows], torch.ones(2, device=device), cu_seqlens=cu_seqlens.clamp(max=rows),
            mask=torch.zeros(rows, dtype=torch.bool, device=device), loss_type=loss_type,
        )  # fmt: skip
        result.loss.backward()
        assert result.loss == 0
        assert not logits.grad.any()


def test_a_suppressed_token_has_no_probability(device):
    hidden, weight, targets = sample(9, 24, 1100)
    targets[targets == 500] = 501
    bias = torch.zeros(1100)
    bias[500] = -torch.inf
    hidden, weight, targets, bias = (x.to(device) for x in (hidden, weight, targets, bias))
    kept = torch.arange(1100, device=device) != 500
    logits = hidden @ weight.T
    expected = torch.distributions.Categorical(logits=logits[:, kept].double())
    leaf, head = logits.clone().requires_grad_(), weight.clone().requires_grad_()
    from_logits = tars_kernels.policy_loss(leaf, targets, torch.ones(9, device=device), bias=bias, entropy_coef=0.1)
    from_hidden = tars_kernels.linear_policy_loss(hidden, head, targets, torch.ones(9, device=device), bias=bias)
    from_hidden.loss.backward()
    from_logits.loss.backward()
    for result in (from_logits, from_hidden):
        torch.testing.assert_close(result.entropy.double(), expected.entropy(), rtol=1e-5, atol=1e-5)
        places = targets - (targets > 500).long()
        torch.testing.assert_close(result.logprobs.double(), expected.log_prob(places), rtol=1e-5, atol=1e-5)
    assert not leaf.grad[:, 500].any()
    assert not head.grad[500].any()
    assert torch.isfinite(leaf.grad).all()
    assert torch.isfinite(head.grad).all()


def test_the_head_itself_brings_its_bias(device):
    hidden, weight, targets = (x.to(device) for x in sample(9, 24, 1100))
    head = torch.nn.Linear(24, 1100, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    both = [
        tars_kernels.linear_logprob(hidden, head, targets),
        tars_kernels.linear_logprob(hidden, weight, targets, bias=head.bias),
    ]
    assert torch.equal(*both)


class _Placed(torch.autograd.Function):
    """Copies values to a place of a memory."""

    @staticmethod
    def forward(ctx, values, memory, offset):
        placed = values.new_tensor([]).set_(memory.untyped_storage(), offset, values.shape, values.stride())
        return placed.copy_(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(), None, None


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("vocabulary", [1003, 5003])
def test_rows_that_begin_anywhere(device, vocabulary, offset):
    """Rows of odd length, each at another place within its chunk of 16 bytes, in a memory that begins on one or does not."""
    hidden, weight, targets = (x.to(device) for x in sample(9, 24, vocabulary))
    advantages = torch.linspace(-1, 1, 9, device=device)
    values = (hidden @ weight.T).bfloat16()
    results = []
    for inplace in (False, True):
        memory = torch.full((10 * vocabulary,), torch.nan, dtype=torch.bfloat16, device=device)
        leaf = values.clone().requires_grad_()
        logits = _Placed.apply(leaf, memory, offset)
        loss = tars_kernels.policy_loss(logits, targets, advantages, inplace=inplace)
        (gradient,) = torch.autograd.grad(2 * loss.loss, leaf)
        results.append([loss.loss.detach(), loss.logprobs, gradient])
        assert torch.isnan(memory[:offset]).all()
        assert torch.isnan(memory[offset + 9 * vocabulary :]).all()
        assert torch.equal(memory[offset : offset + 9 * vocabulary].view_as(values), gradient if inplace else values)
    for plain, overwritten in zip(*results, strict=True):
        assert torch.equal(plain, overwritten)
    exact = values.double().requires_grad_()
    truth = reference.policy_loss(exact, targets, advantages.double())
    (true,) = torch.autograd.grad(2 * truth.loss, exact)
    torch.testing.assert_close(results[0][1].double(), truth.logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][2].double(), true, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("start", ["logits", "hidden"])
def test_layouts_of_memory(device, start):
    """Rows with a stride, and vectors that are every second entry of another."""
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    values = hidden if start == "hidden" else hidden @ weight.T
    wide = torch.full((8, values.shape[1] + 40), torch.nan, device=device)
    wide[:, : values.shape[1]] = values
    strided = wide[:, : values.shape[1]]
    advantages = torch.linspace(-1, 1, 16, device=device)[::2]
    spread = targets.repeat_interleave(2)[::2]

    def loss(first, targets, advantages):
        arguments = (first, targets, advantages) if start == "logits" else (first, weight, targets, advantages)
        return getattr(tars_kernels, "policy_loss" if start == "logits" else "linear_policy_loss")(*arguments)

    leaves = [values.clone().requires_grad_(), strided.detach().requires_grad_()]
    plain = loss(leaves[0], targets, advantages.contiguous())
    other = loss(leaves[1], spread, advantages)
    assert torch.equal(plain.loss, other.loss)
    gradients = [torch.autograd.grad(result.loss, leaf)[0] for result, leaf in zip((plain, other), leaves, strict=True)]
    assert torch.equal(*gradients)


def test_vectors_with_a_stride(device):
    """Columns of a table, as a data pipeline may hand them over; the reference does not care, nor do kernels."""
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    logits = hidden @ weight.T

    def columns(vector):
        return torch.stack([vector, 7 - vector], dim=1).to(device)[:, 0]

    settings = {
        "bias": columns(torch.linspace(-1, 1, 1100)),
        "cu_seqlens": columns(torch.tensor([0, 3, 8])),
        "mask": columns((torch.arange(8) != 5).long()).bool(),
        "old_logprobs": columns(torch.linspace(-9, -5, 8)),
        "loss_type": "gspo",
    }
    advantages = columns(torch.tensor([1.0, -0.5]))
    with torch.no_grad():
        for name, first in (("policy_loss", (logits,)), ("linear_policy_loss", (hidden, weight))):
            ours = getattr(tars_kernels, name)(*first, targets, advantages, **settings)
            theirs = getattr(reference, name)(*first, targets, advantages, **settings)
            for one, other in zip(outputs(ours), outputs(theirs), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
def test_what_comes_out_may_be_changed_and_what_goes_in_is_given(device, implementation):
    """Results edited in place before the backward pass; old log-probabilities and advantages that hang on a graph."""
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    for trainable in (False, True):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        advantages = torch.linspace(-1, 1, 8, device=device).requires_grad_()
        old = implementation.linear_logprob(leaf, head, targets)
        result = implementation.linear_policy_loss(leaf, head, targets, advantages, old_logprobs=old)
        expected = torch.autograd.grad(result.loss, leaf, retain_graph=trainable)[0]
        result = implementation.linear_policy_loss(leaf, head, targets, advantages, old_logprobs=old)
        result.logprobs.clamp_(min=-1.0)
        result.entropy.zero_()
        gradients = torch.autograd.grad(result.loss, [leaf, advantages], allow_unused=True)
        assert torch.equal(gradients[0], expected)
        assert gradients[1] is None


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_inplace_overwrites_logits_only_when_asked(device, loss_type):
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    cu_seqlens = torch.tensor([0, 8], device=device)
    kept = (hidden @ weight.T).requires_grad_()
    before = kept.detach().clone()
    options = {"cu_seqlens": cu_seqlens, "loss_type": loss_type}
    tars_kernels.policy_loss(kept, targets, torch.ones(1, device=device), **options).loss.backward()
    assert torch.equal(kept, before)
    base = hidden.clone().requires_grad_()
    logits = base @ weight.T
    address = logits.data_ptr()
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    tars_kernels.policy_loss(logits, targets, torch.ones(1, device=device), inplace=True, **options).loss.backward()
    assert seen == [address]
    torch.testing.assert_close(base.grad, kept.grad @ weight, rtol=1e-5, atol=1e-7)


def test_a_second_backward_is_refused_or_right(device):
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    logits = (hidden @ weight.T).requires_grad_()
    loss = tars_kernels.policy_loss(logits, targets, torch.ones(8, device=device)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
        loss.backward()
    leaf = hidden.clone().requires_grad_()
    loss = tars_kernels.linear_policy_loss(leaf, weight, targets, torch.ones(8, device=device)).loss
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * first)


# The interpreter runs programs one after the other, so only a GPU could fail.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "gspo", "importance_level": "sequence"}, {"entropy_coef": 0.1}], ids=str
)
def test_the_same_bits_twice(device, settings):
    hidden, weight, targets = (
        x.to(device, torch.bfloat16) if x.is_floating_point() else x.to(device) for x in sample(77, 123, 1100)
    )
    options = moved(policy_inputs(tars_kernels.linear_logprob(hidden, weight, targets).cpu()), device, torch.float32)
    options |= {"cu_seqlens": packing(77).to(device), **settings}
    advantages = torch.linspace(-1, 1, 4, device=device)
    results = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), (hidden @ weight.T).requires_grad_()]
        losses = [
            tars_kernels.linear_policy_loss(leaves[0], weight, targets, advantages, **options),
            tars_kernels.policy_loss(leaves[1], targets, advantages, **options),
        ]
        gradients = [torch.autograd.grad(3 * loss.loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
        results.append([*outputs(losses[0]), *outputs(losses[1]), *gradients])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "luspo"])
def test_micro_batches_add_up(device, loss_type):
    hidden, weight, targets = (x.to(device) for x in sample(40, 24, 1100))
    options = {"entropy_coef": 0.1, "loss_type": loss_type, "advantage_level": "token"}
    advantages = torch.linspace(-1, 1, 40, device=device)
    boundaries = torch.tensor([0, 5, 13, 40], device=device)
    whole = reference.linear_policy_loss(hidden, weight, targets, advantages, cu_seqlens=boundaries, **options).loss
    options["num_tokens"] = torch.tensor(40.0, device=device)
    if loss_type != "dapo":
        options["num_sequences"] = 3
    parts = [
        tars_kernels.linear_policy_loss(
            hidden[rows], weight, targets[rows], advantages[rows], cu_seqlens=cu_seqlens - cu_seqlens[0], **options
        ).loss
        for rows, cu_seqlens in ((slice(0, 13), boundaries[:3]), (slice(13, 40), boundaries[2:]))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_fp16_gradients_survive_a_loss_scale(device):
    """Unscaled, the gradient of a large batch is below fp16's smallest number; a loss scaler is there to prevent that."""
    hidden, weight, targets = (x.to(device) for x in sample(8, 24, 1100))
    scale = 2.0**18
    logits = (hidden @ weight.T).half().requires_grad_()
    loss = tars_kernels.policy_loss(logits, targets, torch.ones(8, device=device), num_tokens=50_000).loss
    (loss * scale).backward()
    exact = logits.detach().double().requires_grad_()
    reference.policy_loss(exact, targets, torch.ones(8, device=device).double(), num_tokens=50_000).loss.backward()
    error = (logits.grad.double() / scale - exact.grad).abs().max(-1).values
    assert (error <= 2e-3 * exact.grad.abs().max(-1).values).all()


@pytest.mark.gpu
def test_more_than_two_billion_logits(device):
    """In 10 GB of GPU memory."""
    vocabulary, num_tokens = 156032, 14000
    logits = torch.randn(num_tokens, vocabulary, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (num_tokens,), device=device)
    advantages = torch.ones(num_tokens, device=device)
    result = tars_kernels.policy_loss(logits, targets, advantages)
    result.loss.backward()
    last = slice(num_tokens - 3, num_tokens)
    with torch.no_grad():
        expected = logits[last].float().log_softmax(-1).gather(-1, targets[last, None])[:, 0]
    torch.testing.assert_close(result.logprobs[last], expected, rtol=1e-5, atol=1e-5)
    alone = logits[last].detach().clone().requires_grad_()
    tars_kernels.policy_loss(alone, targets[last], advantages[last], num_tokens=num_tokens).loss.backward()
    assert torch.equal(logits.grad[last], alone.grad)


@pytest.mark.gpu
def test_nothing_stops_the_host(device):
    hidden, weight, targets = (x.to(device) for x in sample(77, 128, 1100))
    options = moved(policy_inputs(tars_kernels.linear_logprob(hidden, weight, targets).cpu()), device, torch.float32)
    options["cu_seqlens"] = packing(77).to(device)
    advantages = torch.linspace(-1, 1, 4, device=device)
    states = torch.randn(3, 77, 128, device=device, requires_grad=True)
    pairs = torch.tensor([[0, 2], [2, 3]], device=device)

    def everything():
        leaf = hidden.clone().requires_grad_()
        for settings in ({}, {"loss_type": "gspo"}, {"loss_type": "grpo"}):
            tars_kernels.linear_policy_loss(leaf, weight, targets, advantages, **options, **settings).loss.backward()
            logits = (hidden @ weight.T).requires_grad_()
            tars_kernels.policy_loss(logits, targets, advantages, **options, **settings).loss.backward()
        tars_kernels.layer_similarity(list(states), options["cu_seqlens"], pairs).sum().backward()
        tars_kernels.token_similarity(states, states.detach()).sum().backward()
        tars_kernels.linear_cka(states, states).sum().backward()

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
