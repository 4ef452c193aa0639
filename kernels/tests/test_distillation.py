"""Token distillation: against float64, against PyTorch's own divergences, against Liger's, and over awkward inputs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tars_kernels
import torch
from accuracy import assert_accurate, run
from parts import found_by_parts
from tars_kernels import reference
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import linear

slow = pytest.mark.slow
CPU = torch.device("cpu")
KINDS = ("reverse_kl", "forward_kl", "jsd")


def sample(num_tokens: int, width: int, vocabulary: int):
    """States of student and teacher, and the head; one row where both are certain, one where they differ in what of."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    teacher = hidden + 0.5 * torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    if num_tokens > 4:
        certain = 16 * weight[:2] / weight[:2].norm(dim=1, keepdim=True) ** 2
        hidden[1], teacher[1] = certain[0], 0.9 * certain[0]
        hidden[2], teacher[2] = certain[0], certain[1]
    # Rounded first, so that every dtype computes on the same numbers.
    return hidden.bfloat16().float(), teacher.bfloat16().float(), weight.bfloat16().float()


def eager(hidden, teacher, weight, kind, temperature, beta):
    """[T] as training code writes it: logits in the model's dtype, then PyTorch's log_softmax and kl_div in fp32."""
    logprobs, teachers = ((linear(x, weight).float() / temperature).log_softmax(-1) for x in (hidden, teacher))
    return reference._divergences(logprobs, teachers, tars_kernels.Distillation(divergence=kind, beta=beta))


@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [(7, 123, 1100), pytest.param((1, 64, 1000), marks=slow), pytest.param((77, 40, 5003), marks=slow)], ids=str
)
def test_divergences(device, kind, dtype, head, sizes):
    hidden, teacher, weight = sample(*sizes)
    leaves = [hidden] if head == "frozen" else [hidden, weight]

    def divergences_of(implementation, device):
        def divergences(hidden, weight=weight):
            others = (x.to(device, hidden.dtype) for x in (teacher, weight))
            return [
                implementation.linear_distillation_loss(hidden, *others, divergence=kind, temperature=0.7, beta=0.3).divergences
            ]

        return divergences

    assert_accurate(
        run(divergences_of(tars_kernels, device), leaves, dtype, device),
        run(
            lambda hidden, weight=weight: [eager(hidden, teacher.to(dtype), weight.to(dtype), kind, 0.7, 0.3)],
            leaves, dtype, CPU,
        ),
        run(divergences_of(reference, CPU), leaves, torch.float64, CPU),
        [torch.float32, *[dtype] * len(leaves)],
    )  # fmt: skip


def test_the_specification_is_torchs_own_divergence():
    hidden, teacher, weight = (x.double() for x in sample(7, 24, 123))
    student, teachers = (Categorical(logits=linear(x, weight) / 0.8) for x in (hidden, teacher))
    mixture = Categorical(probs=0.3 * teachers.probs + 0.7 * student.probs)
    expected = {
        "reverse_kl": kl_divergence(student, teachers),
        "forward_kl": kl_divergence(teachers, student),
        "jsd": 0.3 * kl_divergence(teachers, mixture) + 0.7 * kl_divergence(student, mixture),
    }
    for kind, divergences in expected.items():
        result = reference.linear_distillation_loss(hidden, teacher, weight, divergence=kind, beta=0.3, temperature=0.8)
        torch.testing.assert_close(result.divergences, divergences, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(result.loss, divergences.mean(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
def test_ligers_loss(kind, beta):
    """Its fused linear JSD, whose beta of 0 and 1 are the two KLs; value and gradients by states and head."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, teacher, weight = (x.double() for x in sample(7, 24, 123))
    labels = torch.arange(7)
    labels[3] = -100
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=0.8, compiled=False, chunk_size=3
    )
    leaves = [[hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    theirs = loss(*leaves[0], teacher, weight, labels)
    ours = reference.linear_distillation_loss(
        leaves[1][0], teacher, leaves[1][1], teacher_weight=weight, divergence=kind, beta=beta if kind == "jsd" else 0.5,
        temperature=0.8, mask=labels != -100,
    ).loss  # fmt: skip
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(ours, leaves[1]), torch.autograd.grad(theirs, leaves[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def distilled(implementation, hidden, teacher, weight, trainable, **options):
    """Loss, divergences and the gradients by states and, if it is trainable, the head."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    result = implementation.linear_distillation_loss(
        leaves[0], teacher, leaves[1], temperature=0.7, beta=0.3,
        token_weights=torch.linspace(0.5, 1.5, len(hidden), device=hidden.device), **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(result.loss, [leaf for leaf in leaves if leaf.requires_grad])
    return [x.detach() for x in (result.loss, result.divergences, *gradients)]


@pytest.mark.parametrize(
    ("implementation", "dtype", "head", "kind"),
    [
        (tars_kernels, torch.float32, "frozen", "reverse_kl"),
        (tars_kernels, torch.float32, "trainable", "jsd"),
        *((reference, torch.float64, "trainable", kind) for kind in KINDS),
        pytest.param(tars_kernels, torch.float32, "trainable", "reverse_kl", marks=slow),
        pytest.param(tars_kernels, torch.float32, "frozen", "forward_kl", marks=slow),
        *(pytest.param(tars_kernels, torch.float16, "frozen", kind, marks=slow) for kind in KINDS),
        pytest.param(tars_kernels, torch.float16, "trainable", "jsd", marks=slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parts_of_a_vocabulary_make_the_whole(device, monkeypatch, implementation, kind, head, dtype):
    """Two parts of one head, and four of two heads, of which one is suppressed whole; gradients by hidden states add up."""
    hidden, teacher, weight = (x.to(device, dtype) for x in sample(5, 40, 1100))
    bias = torch.zeros(1100, device=device)
    bias[825:] = -torch.inf
    for number, options in ((2, {}), (4, {"bias": bias, "teacher_weight": weight.roll(1, 0), "teacher_bias": bias})):
        whole = distilled(
            reference, *(x.double() for x in (hidden, teacher, weight)), head == "trainable", divergence=kind,
            **{name: value.double() for name, value in options.items()},
        )  # fmt: skip

        def part(rank, group, number=number, options=options):
            own = {name: value.chunk(number)[rank] for name, value in options.items()}
            states = hidden, teacher, weight.chunk(number)[rank]
            return distilled(implementation, *states, head == "trainable", divergence=kind, group=group, **own)

        found = found_by_parts(monkeypatch, number, 4 if implementation is reference else 3, part)
        # Of fp16 the gradient is rounded once by every part.
        tolerance = {torch.float16: 2e-3, torch.float32: 5e-5, torch.float64: 1e-10}[dtype]
        tolerance = {"rtol": 10 * tolerance, "atol": tolerance}
        for results in found:
            for result, expected in zip(results[:2], whole[:2], strict=True):
                torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
        gradient = sum(results[2].double() for results in found)
        torch.testing.assert_close(gradient, whole[2], **tolerance)
        if head == "trainable":
            torch.testing.assert_close(torch.cat([results[3] for results in found]).double(), whole[3], **tolerance)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("jsd", 0.3), ("reverse_kl", 1.0)])
def test_ligers_kernel(device, kind, beta):
    """Its Triton function, which the benchmarks time; interpreted where there is no GPU."""
    liger = pytest.importorskip("liger_kernel.ops")
    hidden, teacher, weight = (x.to(device) for x in sample(7, 24, 1100))
    labels = torch.arange(7, device=device)
    labels[3] = -100
    leaves = [[hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    theirs = liger.LigerFusedLinearJSDFunction.apply(*leaves[0], teacher, weight, labels, beta, -100, 0.8)
    ours = tars_kernels.linear_distillation_loss(
        leaves[1][0], teacher, leaves[1][1], teacher_weight=weight, divergence=kind, beta=beta if kind == "jsd" else 0.5,
        temperature=0.8, mask=labels != -100,
    ).loss  # fmt: skip
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(ours, leaves[1]), torch.autograd.grad(theirs, leaves[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_tokens_count_as_cord_says(device, normalise):
    """The k largest of each sequence twice, all with a linear decay over its unmasked tokens; against a loop over sequences."""
    hidden, teacher, weight = (x.to(device) for x in sample(17, 24, 1100))
    boundaries, mask = [0, 6, 6, 7, 17], torch.ones(17, dtype=torch.bool)
    mask[[2, 9]] = False
    own = torch.linspace(0.5, 1.5, 17)
    leaf = hidden.clone().requires_grad_()
    result = tars_kernels.linear_distillation_loss(
        leaf, teacher, weight, cu_seqlens=torch.tensor(boundaries, device=device), mask=mask.to(device), top_tokens=3,
        decay=2.0, token_weights=own.to(device), normalise=normalise,
    )  # fmt: skip
    divergences = result.divergences.detach().cpu()
    expected = torch.zeros(17)
    for start, stop in pairwise(boundaries):
        kept = [token for token in range(start, stop) if mask[token]]
        largest = sorted(kept, key=lambda token: -divergences[token])[:3]
        for place, token in enumerate(kept):
            decay = 2.0 - place / (len(kept) - 1) if len(kept) > 1 else 2.0
            expected[token] = own[token] * decay * (2.0 if token in largest else 1.0)
            expected[token] /= 15 if normalise == "token" else 4 * len(kept)
    torch.testing.assert_close(result.weights.cpu(), expected)
    assert result.loss.item() == pytest.approx((expected * divergences).sum().item(), rel=1e-5)
    assert divergences[mask].min() > 0
    assert divergences[~mask].abs().max() == 0
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    exact = hidden.double().requires_grad_()
    plain = reference.linear_distillation_loss(exact, teacher.double(), weight.double()).divergences
    (true,) = torch.autograd.grad((plain * expected.to(plain)).sum(), exact)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up(device):
    hidden, teacher, weight = (x.to(device) for x in sample(12, 24, 1100))
    whole = tars_kernels.linear_distillation_loss(hidden, teacher, weight).loss
    parts = [
        tars_kernels.linear_distillation_loss(hidden[rows], teacher[rows], weight, num_tokens=number).loss
        for rows, number in ((slice(0, 5), 12), (slice(5, 12), torch.tensor(12.0, device=device)))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_the_teacher_gets_no_gradient_and_may_have_a_head_of_its_own(device, head):
    hidden, _, weight = sample(7, 24, 1100)
    teacher, teacher_weight = torch.randn(7, 40).bfloat16().float(), torch.randn(1100, 40).bfloat16().float() / 6
    biases = torch.linspace(-1, 1, 1100), torch.linspace(1, 0, 1100)
    results = []
    for implementation, dtype, home in ((tars_kernels, torch.float32, device), (reference, torch.float64, CPU)):
        leaves = [x.to(home, dtype).requires_grad_() for x in (hidden, weight, biases[0], teacher, teacher_weight, biases[1])]
        for leaf in leaves[1:3]:
            leaf.requires_grad_(head == "trainable")
        student = [leaf for leaf in leaves[:3] if leaf.requires_grad]
        result = implementation.linear_distillation_loss(
            leaves[0], leaves[3], leaves[1], bias=leaves[2], teacher_weight=leaves[4], teacher_bias=leaves[5], divergence="jsd"
        )
        gradients = torch.autograd.grad(result.loss, [*student, *leaves[3:]], allow_unused=True)
        assert gradients[-3:] == (None, None, None)
        results.append([x.double().cpu() for x in (result.divergences.detach(), *gradients[:-3])])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


def test_one_head_for_both_gets_the_students_gradient_alone(device):
    hidden, teacher, weight = (x.to(device) for x in sample(7, 24, 1100))
    head = weight.clone().requires_grad_()
    shared = tars_kernels.linear_distillation_loss(hidden, teacher, head).loss
    apart = tars_kernels.linear_distillation_loss(hidden, teacher, head, teacher_weight=weight).loss
    assert torch.equal(*(torch.autograd.grad(loss, head)[0] for loss in (shared, apart)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [-110.0, 110.0])
def test_shifted_logits(device, kind, shift):
    """A running maximum that starts at 0 breaks rows of negative logits; and only the teacher's are shifted in one row."""
    hidden, teacher, weight = (x.to(device) for x in sample(6, 24, 1100))
    bias = torch.full((1100,), shift, device=device)
    plain = tars_kernels.linear_distillation_loss(hidden, teacher, weight, divergence=kind).divergences
    for options in ({"bias": bias}, {"teacher_bias": bias}):
        shifted = tars_kernels.linear_distillation_loss(hidden, teacher, weight, divergence=kind, **options).divergences
        torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_a_token_suppressed_for_both_counts_nothing(device, kind, head):
    hidden, teacher, weight = (x.to(device) for x in sample(6, 24, 1100))
    bias = torch.zeros(1100, device=device)
    bias[500], bias[1024:] = -torch.inf, -torch.inf
    kept = torch.isfinite(bias)
    results = []
    for implementation, weights, biases in (
        (tars_kernels, weight, bias),
        (reference, weight, bias),
        (tars_kernels, weight[kept], None),
    ):
        leaf, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_(head == "trainable")
        result = implementation.linear_distillation_loss(leaf, teacher, weights, bias=biases, divergence=kind)
        result.loss.backward()
        results.append([result.divergences.detach(), leaf.grad])
        if head == "trainable" and biases is not None:
            assert not weights.grad[~kept].any()
    for other in results[:2]:
        for one, expected in zip(other, results[2], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_whatever_masked_slots_hold_stays_out(device, head):
    hidden, teacher, weight = (x.to(device) for x in sample(9, 24, 1100))
    mask = torch.arange(9, device=device) % 3 != 1
    options = {"mask": mask, "cu_seqlens": torch.tensor([0, 4, 9], device=device), "top_tokens": 2, "decay": 2.0}
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        leaves = [
            hidden.masked_fill(~mask[:, None], poison).requires_grad_(),
            weight.clone().requires_grad_(head == "trainable"),
        ]
        own = torch.ones(9, device=device).masked_fill(~mask, poison)
        result = tars_kernels.linear_distillation_loss(
            leaves[0], teacher.masked_fill(~mask[:, None], poison), leaves[1], token_weights=own, **options
        )
        gradients = torch.autograd.grad(result.loss, [leaf for leaf in leaves if leaf.requires_grad])
        results.append([result.loss, result.divergences, result.weights, *gradients])
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            assert torch.equal(one, expected)
    assert torch.isfinite(results[0][0])
    assert not results[0][3][~mask].any()


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_everything_masked_or_nothing_there(device, normalise):
    hidden, teacher, weight = (x.to(device) for x in sample(6, 24, 1100))
    for rows in (6, 0):
        leaf = hidden[:rows].clone().requires_grad_()
        result = tars_kernels.linear_distillation_loss(
            leaf, teacher[:rows], weight, cu_seqlens=torch.tensor([0, rows, rows], device=device), top_tokens=2, decay=2.0,
            mask=torch.zeros(rows, dtype=torch.bool, device=device), normalise=normalise,
        )  # fmt: skip
        result.loss.backward()
        assert result.loss == 0
        assert not leaf.grad.any()
        assert not result.divergences.any()


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_blocks_of_tokens_change_nothing(device, monkeypatch, head):
    hidden, teacher, weight = (x.to(device) for x in sample(13, 24, 1100))
    results = []
    for logits_rows, product_rows in ((512, 1024), (3, 6)):
        for name, value in (("LOGITS_ROWS", logits_rows), ("PRODUCT_ROWS", product_rows)):
            # The gradients of a trainable head are those of linear_logprob.
            for operation in (tars_kernels.linear_distillation_loss, tars_kernels.linear_logprob):
                monkeypatch.setitem(operation.__globals__, name, value)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(head == "trainable")]
        result = tars_kernels.linear_distillation_loss(leaves[0], teacher, leaves[1])
        gradients = torch.autograd.grad(result.loss, [leaf for leaf in leaves if leaf.requires_grad])
        results.append([result.loss, result.divergences, *gradients])
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-7)


def test_a_teacher_that_is_the_student_costs_nothing(device):
    hidden, _, weight = (x.to(device) for x in sample(6, 24, 1100))
    for kind in KINDS:
        leaf = hidden.clone().requires_grad_()
        result = tars_kernels.linear_distillation_loss(leaf, hidden, weight, divergence=kind)
        result.loss.backward()
        assert result.divergences.abs().max() < 1e-6
        assert leaf.grad.abs().max() < 1e-6


def test_divergences_make_a_loss_of_your_own_and_may_be_changed(device):
    hidden, teacher, weight = (x.to(device) for x in sample(6, 24, 1100))
    for trainable in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        result = tars_kernels.linear_distillation_loss(leaves[0], teacher, leaves[1])
        own = (result.divergences / 6).sum()
        expected = torch.autograd.grad(result.loss, leaves[0], retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(own, leaves[0])[0], expected)
        result = tars_kernels.linear_distillation_loss(leaves[0], teacher, leaves[1])
        with torch.no_grad():
            result.divergences.zero_()
        result.loss.backward()
        torch.testing.assert_close(leaves[0].grad, expected)


def test_the_same_bits_twice(device):
    hidden, teacher, weight = (x.to(device, torch.bfloat16) for x in sample(9, 24, 1100))
    results = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        result = tars_kernels.linear_distillation_loss(
            leaves[0], teacher, leaves[1], cu_seqlens=torch.tensor([0, 4, 9], device=device), top_tokens=5, decay=2.0
        )
        results.append([result.loss, result.divergences, result.weights, *torch.autograd.grad(3 * result.loss, leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_layouts_of_memory(device):
    """States with a row stride, every second column of a head's table, a bias that is every second entry of another."""
    hidden, teacher, weight = (x.to(device) for x in sample(6, 24, 1100))
    bias = torch.linspace(-1, 1, 2200, device=device)[::2]
    wide = torch.full((1100, 40), torch.nan, device=device)
    wide[:, :24] = weight
    plain = tars_kernels.linear_distillation_loss(hidden, teacher, weight, bias=bias.contiguous())
    padded = torch.cat([hidden, hidden], dim=1)[:, :24]
    other = tars_kernels.linear_distillation_loss(padded, teacher.T.contiguous().T, wide[:, :24], bias=bias)
    assert torch.equal(plain.divergences, other.divergences)
