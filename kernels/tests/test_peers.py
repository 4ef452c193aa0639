"""Values and gradients of the losses in float64 beside the installed code of TRL, verl and Liger, where there is some."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import peers
import pytest
import torch
from peers import PaddedBatch
from tars_kernels import Objective, from_padded, objective, reference

LENGTHS, LONGEST = (13, 1, 18, 10), 18


def padded_batch(seed: int = 0) -> PaddedBatch:
    """Ratios on both sides of every bound, none close to one; a token without a rollout log-probability."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), LONGEST)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = (-1.5 - 0.8 * normal()).clamp(max=-0.05)
    number = torch.arange(shape[0] * LONGEST).view(shape)
    steps = torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6, 1.5, 0.03], dtype=torch.float64)
    old = (logprobs + steps[number % len(steps)]).clamp(max=-0.01)
    rollout = old - torch.tensor([0.0, 0.3, 1.1, -0.4, -0.2], dtype=torch.float64)[number % 5]
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).double()
    mask[2, 4:7] = 0
    return PaddedBatch(
        logprobs.requires_grad_(),
        (1.0 + 0.3 * normal()).clamp(min=0.1).requires_grad_(),
        mask,
        torch.tensor([1.0, 3.0, -1.2, 0.7], dtype=torch.float64),
        old,
        rollout.masked_fill(number == 5, torch.nan),
        old + 0.3 * normal(),
    )


def our_loss(batch: PaddedBatch, settings: dict[str, object]):
    arguments = from_padded(
        batch.mask, logprobs=batch.logprobs, entropy=batch.entropies, advantages=batch.advantages, old_logprobs=batch.old,
        rollout_logprobs=batch.rollout, ref_logprobs=batch.ref,
    )  # fmt: skip
    return reference.token_policy_loss(**arguments, **settings)


def assert_same(settings: dict[str, object], peer, tolerance: float = 1e-12):
    batch = padded_batch()
    result = our_loss(batch, settings)
    theirs = peer(batch, Objective(ref_logprobs=batch.ref, **settings))
    loss, metrics = theirs if isinstance(theirs, tuple) else (theirs, {})
    assert result.loss.item() == pytest.approx(loss.item(), rel=tolerance, abs=1e-14)
    leaves = [batch.logprobs, batch.entropies]
    gradients = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (result.loss, loss)]
    for leaf, ours, expected in zip(leaves, *gradients, strict=True):
        ours, expected = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=1e3 * tolerance, atol=1e2 * tolerance)
    return result, metrics


CONSTANT = {"constant": len(LENGTHS) * LONGEST}
TRL = [
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "num_tokens": 100.0, "kl_coef": 0.1},
    {"loss_type": "dapo", "dual_clip": 1.5, "importance_mode": "mask", "kl_coef": 0.1, "kl_bias_correction": False},
    {"loss_type": "dapo", "entropy_coef": 0.05, "top_entropy_quantile": 0.37, "kl_coef": 0.1},
    {"loss_type": "dapo", "importance_mode": "mask", "importance_floor": 0.8, "importance_cap": 1.4},
    {"loss_type": "dapo", "importance_floor": 0.8, "importance_cap": None},
    {"loss_type": "bnpo", "importance_level": "sequence", "importance_mode": "mask", "importance_cap": 1.5},
    {"loss_type": "grpo", "kl_coef": 0.04, "clip_low": 0.1, "clip_high": 0.4},
    {"loss_type": "grpo", "importance_level": "sequence", "entropy_coef": 0.02, "importance_floor": 1e-3},
    {"loss_type": "grpo", "off_policy_threshold": 0.02, "kl_coef": 0.1},
    {"loss_type": "dr_grpo", **CONSTANT, "entropy_coef": 0.01},
    {"loss_type": "cispo", "clip_high": 1.5},
    {"loss_type": "cispo", "clip_high": 1.5, "ratio_level": "sequence", "kl_coef": 0.1},
    {"loss_type": "gspo"},
    {"loss_type": "gspo", "importance_level": "sequence", "kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 1.31},
    {"loss_type": "gspo", "normalise": "token-mean", "top_entropy_quantile": 0.6, "kl_coef": 0.1},
    {"loss_type": "luspo", "kl_coef": 0.1},
    {"loss_type": "sapo", "kl_coef": 0.1},
    {"loss_type": "sapo", "ratio_level": "sequence", "sapo_temperatures": (1.3, 0.9)},
    {"loss_type": "vespo", "kl_coef": 0.1},
    {"loss_type": "vespo", "vespo_positive": (1.5, 2.0), "vespo_negative": (2.5, 1.0), "importance_mode": "mask"},
]


@pytest.mark.slow  # Importing it takes 5 s.
@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize("settings", TRL, ids=str)
def test_trl(settings):
    # It rounds the temperatures of sapo to float32.
    result, metrics = assert_same(settings, peers.trl_loss, 1e-7 if settings["loss_type"] == "sapo" else 1e-12)
    num_tokens = padded_batch().mask.sum()
    if "kl" in metrics:
        assert (result.kl.sum() / num_tokens).item() == pytest.approx(metrics["kl"], rel=1e-6)
    if Objective(**settings | {"kl_coef": 0.0}).formula.ratio_level == "token":
        for ours, theirs in (("clip_low_fraction", "clip_ratio/low_mean"), ("clip_high_fraction", "clip_ratio/high_mean")):
            if theirs in metrics:
                assert getattr(result, ours).item() == pytest.approx(metrics[theirs], rel=1e-6)
        if "cispo_clip_ratio" in metrics:
            assert result.clip_high_fraction.item() == pytest.approx(metrics["cispo_clip_ratio"], rel=1e-6)


WITHOUT = {"kl_bias_correction": False}
VERL = [
    {"loss_type": "dapo", "dual_clip": 3.0},
    {"loss_type": "dapo", "num_tokens": 100.0, "kl_coef": 0.1, **WITHOUT},
    *[{"loss_type": "dapo", "kl_coef": 0.1, "kl_estimator": name, **WITHOUT} for name in ("k1", "k2", "k1+", "k3+")],
    {"loss_type": "grpo", "importance_mode": "mask", "importance_floor": 0.8, "importance_cap": 1.4},
    {"loss_type": "grpo", "importance_level": "sequence", "num_sequences": 7},
    {"loss_type": "dr_grpo", **CONSTANT},
    {"loss_type": "dapo", "normalise": "sequence-sum"},
    {"loss_type": "cispo", "clip_high": 1.5, "cispo_low": 0.9},
    {"loss_type": "gspo", "ratio_level": "sequence-token"},
    {"loss_type": "gspo", "ratio_level": "sequence-token", "normalise": "token-mean", "kl_coef": 0.1, **WITHOUT},
    {"loss_type": "sapo"},
    {"loss": "dppo-tv", "clip_low": 0.03, "clip_high": 0.05, "dual_clip": 1.5},
    {"loss": "dppo-kl", "clip_low": 0.01, "clip_high": 0.02, "dual_clip": 20.0},
    {"loss_type": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
    {"loss": "reinforce", "normalise": "sequence-sum"},
]


@pytest.mark.skipif(find_spec("verl") is None, reason="needs verl (pip install --no-deps verl)")
@pytest.mark.parametrize("settings", VERL, ids=str)
def test_verl(settings):
    """verl adds 1e-8 to the numbers it divides by."""
    assert_same(settings, peers.verl_loss, tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("liger_kernel") is None or find_spec("trl") is None, reason="needs liger-kernel and trl")
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "kl_coef": 0.1, "dual_clip": 1.5},
        {"loss_type": "grpo", "kl_coef": 0.1, **WITHOUT, "importance_level": "sequence"},
        {"loss_type": "dr_grpo", **CONSTANT},
        {"loss_type": "gspo", "kl_coef": 0.1},
        {"loss_type": "luspo", "importance_level": "sequence"},
        {"loss_type": "cispo", "clip_high": 1.5},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
    ],
    ids=str,
)
def test_liger(settings):
    assert_same(settings, peers.liger_loss)


PAGE = Path(__file__).parents[2] / "docs" / "policy-losses.md"
SOURCES = {
    "trl": ["trainer/grpo_config.py", "trainer/grpo_trainer.py"],
    "verl": ["workers/config/actor.py", "trainer/ppo/core_algos.py", "trainer/ppo/rollout_corr_helper.py"],
    "liger_kernel": ["chunked_loss/grpo_loss.py"],
}


def tables() -> list[list[list[str]]]:
    """Rows of cells of every table of the page."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE)
    return [[row.strip("| \n").split(" | ") for row in block.splitlines()[2:]] for block in blocks]


def test_the_page_names_every_option():
    presets, options = tables()
    assert [tuple(cell.strip("`") for cell in row) for row in presets] == [
        (name, *formula) for name, formula in objective.PRESETS.items()
    ]
    kinds = (objective.LossName, objective.RatioLevel, objective.Normalise, objective.KlEstimator)
    expected = [field.name for field in fields(Objective)] + [value for kind in kinds for value in get_args(kind)]
    assert sorted(row[0].strip("`") for row in options) == sorted(expected)


@pytest.mark.parametrize(("column", "package"), list(enumerate(SOURCES, 1)), ids=SOURCES)
def test_the_peers_have_what_the_page_says(column, package):
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    (folder,) = find_spec(package).submodule_search_locations
    words = {word for path in SOURCES[package] for word in re.findall(r"\w+", (Path(folder) / path).read_text())}
    named = {part for row in tables()[1] for name in re.findall("`([^`]+)`", row[column]) for part in name.split(".")}
    assert named - words - {"num_tokens"} == set()
