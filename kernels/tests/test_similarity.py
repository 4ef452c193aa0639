"""Pooled and token similarity, alignment of layers, and pooling while a model runs."""

from __future__ import annotations

import pytest
import tars_kernels
import torch
from accuracy import assert_accurate, run
from tars_kernels import LayerPooler, reference
from torch import nn
from torch.utils.checkpoint import checkpoint

slow = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=slow)]
CPU = torch.device("cpu")
PAIRS = torch.tensor([[0, 2], [2, 0], [0, 1], [3, 3], [0, 2]])


def states(num_layers: int, num_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Layers with a large common component, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randn(num_layers, num_tokens, width, generator=generator)
    layers[..., 0] += 8
    return layers.bfloat16().float()


@pytest.mark.parametrize(
    ("stacked", "dtype"),
    [
        (True, torch.float32),
        (False, torch.bfloat16),
        *(
            pytest.param(*case, marks=slow)
            for case in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float16), (False, torch.float16))
        ),
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layers", [pytest.param(None, marks=slow), [1, 4, -1], pytest.param([2, 2], marks=slow)], ids=str)
@pytest.mark.parametrize("size", [(77, 123), pytest.param((30, 600), marks=slow)], ids="{0[0]}-{0[1]}".format)
def test_layer_similarity(device, dtype, pooling, layers, stacked, size):
    num_tokens, width = size
    inputs = states(6, num_tokens, width)
    cu_seqlens = torch.tensor([0, num_tokens // 3, num_tokens // 3, num_tokens - 1, num_tokens])
    weights = torch.linspace(0.5, 1.0, 6 if layers is None else len(layers))

    def similarity_of(implementation, device):
        def similarity(leaf):
            return [
                implementation.layer_similarity(
                    leaf if stacked else list(leaf), cu_seqlens.to(device), PAIRS.to(device), layers=layers,
                    weights=weights.to(device), pooling=pooling,
                )
            ]  # fmt: skip

        return similarity

    # All layers are judged together: in one alone, PyTorch's error is now and then far below what rounding allows.
    assert_accurate(
        run(similarity_of(tars_kernels, device), [inputs], dtype, device),
        run(similarity_of(reference, CPU), [inputs], dtype, CPU),
        run(similarity_of(reference, CPU), [inputs], torch.float64, CPU),
        [torch.float32, dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sides", [1, 2])
def test_centred_similarity(device, num_sides, dtype):
    """A mean of all states, or one for each side of the pairs; one sequence is empty, one is paired with itself."""
    pairs = torch.cat([PAIRS, torch.tensor([[1, 0]])])
    inputs, weights = states(3, 77, 123), torch.linspace(0.5, 1.0, 2)
    cu_seqlens = torch.tensor([0, 25, 25, 76, 77])
    centre = torch.stack([inputs.mean(1), inputs[:, :25].mean(1)])[:, 1:]
    centre = centre if num_sides == 2 else centre[0]

    def similarity_of(implementation, device):
        return lambda leaf: [
            implementation.layer_similarity(
                leaf, cu_seqlens.to(device), pairs.to(device), layers=[1, 2], weights=weights.to(device),
                centre=centre.to(device, torch.promote_types(leaf.dtype, torch.float32)),
            )
        ]  # fmt: skip

    ours = run(similarity_of(tars_kernels, device), [inputs], dtype, device)
    truth = run(similarity_of(reference, CPU), [inputs], torch.float64, CPU)
    assert_accurate(ours, run(similarity_of(reference, CPU), [inputs], dtype, CPU), truth, [torch.float32, dtype])
    assert not ours[0][[2, 5]].any(), "an empty sequence has got the direction of the centre"
    centres = centre.double() if num_sides == 2 else centre.double().expand(2, -1, -1)
    for pair, (i, j) in enumerate(pairs.tolist()):
        means = [inputs[1:, cu_seqlens[n] : cu_seqlens[n + 1]].double().mean(1) for n in (i, j)]
        expected = torch.cosine_similarity(means[0] - centres[0], means[1] - centres[1], dim=-1)
        if 1 not in (i, j):
            torch.testing.assert_close(truth[0][pair], expected * weights.double())


def test_layers_that_were_not_chosen_have_no_gradient(device):
    layers = [layer.to(device).requires_grad_() for layer in states(3, 30, 16)]
    tars_kernels.layer_similarity(
        layers, torch.tensor([0, 9, 30], device=device), PAIRS[2:3].to(device), layers=[1]
    ).sum().backward()
    assert layers[0].grad is layers[2].grad is None
    assert layers[1].grad.any()


def test_layer_similarity_is_the_cosine_of_means(device):
    """Against the sentence of the paper, sequence by sequence; the empty completion has no direction."""
    inputs = states(4, 30, 16).double()
    cu_seqlens = [0, 10, 10, 29, 30]
    result = tars_kernels.layer_similarity(inputs.float().to(device), torch.tensor(cu_seqlens).to(device), PAIRS.to(device))
    for pair, (i, j) in enumerate(PAIRS.tolist()):
        for layer in range(4):
            means = [inputs[layer, cu_seqlens[n] : cu_seqlens[n + 1]].mean(0) for n in (i, j)]
            expected = 0.0 if 1 in (i, j) else torch.cosine_similarity(*means, dim=0).item()
            assert result[pair, layer].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("num_sequences", "programs"), [(1, 1), (3, 1), (100, 1), (1, 2048), (3, 2048), pytest.param(100, 2048, marks=slow)]
)
def test_pooling_does_not_depend_on_how_it_is_split(device, monkeypatch, num_sequences, programs):
    """As many programs as one for each sequence, and many more."""
    monkeypatch.setitem(tars_kernels.pool_sequences.__globals__, "_PROGRAMS", programs)
    inputs = torch.randn(301, 40)
    cu_seqlens = torch.linspace(0, 301, num_sequences + 1).long()
    for pooling in ("mean", "last"):
        pooled = tars_kernels.pool_sequences(inputs.to(device), cu_seqlens.to(device), pooling=pooling)
        expected = reference.pool_sequences(inputs.double(), cu_seqlens, pooling=pooling)
        torch.testing.assert_close(pooled.double().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_int32_boundaries_are_the_same(device):
    inputs, cu_seqlens = states(2, 30, 16).to(device), torch.tensor([0, 12, 12, 29, 30], device=device)
    both = [
        tars_kernels.layer_similarity(inputs, boundaries, PAIRS.to(device)) for boundaries in (cu_seqlens, cu_seqlens.int())
    ]
    assert torch.equal(*both)


def test_states_without_a_direction(device):
    """Zero states, states that vanish in fp32's squares, and large ones: 0 without a gradient, 0, and 1."""
    inputs = torch.zeros(3, 2, 8)
    inputs[1], inputs[2] = 1e-25, 1e15
    leaf = inputs.to(device).requires_grad_()
    cu_seqlens, pairs = torch.tensor([0, 1, 2], device=device), torch.tensor([[0, 1]], device=device)
    similarity = tars_kernels.layer_similarity(leaf, cu_seqlens, pairs)
    similarity.sum().backward()
    torch.testing.assert_close(similarity.cpu(), torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[:2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [None, [-1, 0]], ids=str)
def test_token_similarity(device, dtype, layers):
    x = states(2, 77, 123)
    y = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).bfloat16().float()

    def similarity_of(implementation):
        return lambda x, y: [implementation.token_similarity(x, y, layers=layers)]

    assert_accurate(
        run(similarity_of(tars_kernels), [x, y], dtype, device),
        run(similarity_of(reference), [x, y], dtype, CPU),
        run(similarity_of(reference), [x, y], torch.float64, CPU),
        [torch.float32, dtype, dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cka(device, dtype):
    x, y = states(2, 77, 123), states(3, 77, 40, seed=1)
    y[0] = x[1, :, :40]

    def cka_of(implementation):
        return lambda x, y: [implementation.linear_cka(x, y)]

    assert_accurate(
        run(cka_of(tars_kernels), [x, y], dtype, device),
        run(cka_of(reference), [x, y], dtype, CPU),
        run(cka_of(reference), [x, y], torch.float64, CPU),
        [torch.float32, dtype, dtype],
    )


def test_linear_cka_is_the_textbooks(device):
    """HSIC of double-centred Gram matrices, one pair of layers at a time; 1 for a rotated and scaled copy."""
    x, y = states(2, 50, 20).double(), states(3, 50, 12, seed=1).double()
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    centring = torch.eye(50, dtype=torch.float64) - 1 / 50

    def hsic(left, right):
        return torch.trace(left @ left.T @ centring @ right @ right.T @ centring)

    expected = torch.tensor([[hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt() for b in y] for a in x])
    result = tars_kernels.linear_cka(x.float().to(device), list(y.float().to(device)))
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    rotated = tars_kernels.linear_cka(x.float().to(device), (3 * x @ rotation).float().to(device))
    torch.testing.assert_close(rotated.diagonal().cpu(), torch.ones(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4, 1e8])
def test_linear_cka_does_not_depend_on_the_scale(device, scale):
    """Deep residual streams reach norms of several thousand; fourth powers of them leave fp32."""
    x = torch.randn(200, 8) @ torch.randn(8, 64)
    cka = tars_kernels.linear_cka([scale * x.to(device)], [x.to(device)])
    assert cka.item() == pytest.approx(1.0, abs=1e-5)


def test_strided_positions_and_boundaries(device):
    inputs = torch.randn(20, 16, device=device)
    positions = torch.stack([torch.arange(3, 13), torch.zeros(10, dtype=torch.int64)], dim=1).to(device)[:, 0]
    boundaries = torch.tensor([[0, 9], [4, 9], [10, 9]], device=device)[:, 0]
    pooled = tars_kernels.pool_sequences(inputs, boundaries, positions=positions)
    torch.testing.assert_close(pooled, torch.stack([inputs[3:7].mean(0), inputs[7:13].mean(0)]))


@pytest.mark.parametrize(
    "boundaries", [[2, 9, 40], [-5, 9, 12], *(pytest.param(one, marks=slow) for one in ([0, 30, 40], [2, 5, 9]))], ids=str
)
def test_wrong_boundaries_stay_inside_of_memory(device, monkeypatch, boundaries):
    """On CUDA nobody looks at their values; they then count as far as there are tokens."""
    from tars_kernels import checks, objective

    for module in (checks, objective):
        monkeypatch.setattr(module, "check_cu_seqlens", lambda *_: None)
    wrong = torch.tensor(boundaries, device=device)
    right = wrong.clamp(0, 12)
    pairs = torch.tensor([[0, 1]], device=device)
    results = []
    for cu_seqlens in (wrong, right):
        leaf = torch.linspace(-1, 1, 12 * 16, device=device).view(1, 12, 16).requires_grad_()
        similarity = tars_kernels.layer_similarity(leaf, cu_seqlens, pairs)
        similarity.sum().backward()
        logits = torch.zeros(12, 100, device=device)
        targets = torch.arange(12, device=device)
        loss = tars_kernels.policy_loss(logits, targets, torch.ones(2, device=device), cu_seqlens=cu_seqlens, loss_type="gspo")
        results.append([similarity.detach(), leaf.grad, loss.loss])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_of_sequences_that_are_not_there_read_nothing(device, monkeypatch):
    """On CUDA nobody looks at their values; what lies behind the states here is NaN."""
    monkeypatch.setitem(tars_kernels.pooled_similarity.__globals__, "check_pairs", lambda *_: None)
    memory = torch.full((2, 4, 16), torch.nan, device=device)
    memory[0] = torch.linspace(-1, 1, 64, device=device).view(4, 16)
    leaf = memory[:1].requires_grad_()
    cosines = tars_kernels.pooled_similarity(leaf, torch.tensor([[0, 1], [0, 4], [7, 0]], device=device))
    (gradient,) = torch.autograd.grad(cosines.nan_to_num().sum(), leaf)
    expected = tars_kernels.pooled_similarity(leaf, torch.tensor([[0, 1]], device=device))
    assert cosines[:, 0].isnan().tolist() == [False, True, True]
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


class Block(nn.Module):
    """A layer whose output is a tuple, as older decoders have it, and which recomputes itself if asked to."""

    def __init__(self, width: int, reentrant: bool | None):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.reentrant = reentrant

    def __call__(self, states):
        if self.reentrant is None:
            return super().__call__(states)
        # Hooks run inside the checkpointed function, as in transformers' GradientCheckpointingLayer.
        return checkpoint(super().__call__, states, use_reentrant=self.reentrant)

    def forward(self, states):
        return (torch.tanh(self.linear(states)) + states, None)


class Stack(nn.Module):
    """Three layers and a norm; returns what Hugging Face calls `hidden_states[1:]`."""

    def __init__(self, reentrant: bool | None, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width, reentrant) for _ in range(3))
        self.norm = nn.RMSNorm(width)

    def forward(self, states):
        entries = []
        for layer in self.layers:
            states = layer(states)[0]
            entries.append(states)
        entries[-1] = self.norm(states)
        return entries


POSITIONS = torch.tensor([1, 2, 3, 6, 7])
BOUNDARIES = torch.tensor([0, 3, 5, 5])


def pooled_by_hand(entries, pooling):
    if pooling == "mean":
        return torch.stack([torch.stack([e[0, 1:4].mean(0), e[1, 1:3].mean(0), 0 * e[0, 0]]) for e in entries])
    return torch.stack([torch.stack([e[0, 3], e[1, 2], 0 * e[0, 0]]) for e in entries])


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_pooler_takes_what_hidden_states_would_hold(device, reentrant, pooling):
    model = Stack(reentrant).to(device)
    inputs = torch.randn(2, 5, 8, device=device, requires_grad=True)
    pooler = LayerPooler(model.layers, model.norm, pooling=pooling)
    with pooler.pooling(BOUNDARIES.to(device), positions=POSITIONS.to(device)):
        entries = model(inputs)
    pooled = pooler.pooled
    torch.testing.assert_close(pooled, pooled_by_hand(entries, pooling).detach())
    assert not pooled.requires_grad
    entries[-1].square().sum().backward()
    # Layers that run again during the backward pass count once.
    assert torch.equal(pooler.pooled, pooled)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("chosen", [None, [0, -1]], ids=str)
def test_differentiable_pooler(device, reentrant, pooling, chosen):
    """Similarity as a loss beside another loss, with and without recomputed layers: the same gradients as by hand."""
    pairs = torch.tensor([[0, 1], [0, 2]], device=device)
    gradients = []
    for by_hand in (True, False):
        model = Stack(None if by_hand else reentrant).to(device)
        inputs = torch.linspace(-1, 1, 80, device=device).view(2, 5, 8).requires_grad_()
        if by_hand:
            entries = model(inputs)
            pooled = pooled_by_hand(entries, pooling)
            pooled = pooled if chosen is None else pooled[chosen]
            similarity = reference.pooled_similarity(pooled, pairs)
        else:
            pooler = LayerPooler(model.layers, model.norm, layers=chosen, pooling=pooling, differentiable=True)
            with pooler.pooling(BOUNDARIES.to(device), positions=POSITIONS.to(device)):
                entries = model(inputs)
            similarity = tars_kernels.pooled_similarity(pooler.pooled, pairs)
        (similarity.sum() + entries[-1].square().sum()).backward()
        gradients.append([inputs.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_differentiable_pooler_alone_reaches_every_layer(device):
    """Two forward passes before one backward pass, each with its own packing, and no other loss."""
    model = Stack(False).to(device)
    pooler = LayerPooler(model.layers, model.norm, differentiable=True)
    losses, by_hand = [], []
    inputs = torch.randn(2, 5, 8, device=device)
    for boundaries in (BOUNDARIES, torch.tensor([0, 1, 5])):
        with pooler.pooling(boundaries.to(device), positions=POSITIONS.to(device)):
            entries = model(inputs)
        losses.append(pooler.pooled.square().sum())
        flat = [entry.flatten(0, 1)[POSITIONS.to(device)] for entry in entries]
        by_hand.append(sum(reference.pool_sequences(entry, boundaries.to(device)).square().sum() for entry in flat))
    ours = torch.autograd.grad(sum(losses), list(model.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(sum(by_hand), list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_cannot_lose_a_gradient(device):
    model = Stack(True).to(device)
    pooler = LayerPooler(model.layers, model.norm, differentiable=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), pooler.pooling(BOUNDARIES.to(device)):
        model(torch.randn(1, 5, 8, device=device, requires_grad=True))


def test_pooler_says_which_layers_did_not_run(device):
    model = Stack(None).to(device)
    pooler = LayerPooler(model.layers, model.norm)
    with pytest.raises(RuntimeError, match="did not run"):
        _ = pooler.pooled
    with pooler.pooling(torch.tensor([0, 5], device=device)):
        model.layers[0](torch.randn(1, 5, 8, device=device))
    with pytest.raises(RuntimeError, match=r"layers \[1, 2\] did not run"):
        _ = pooler.pooled
