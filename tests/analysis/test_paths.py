"""Similarity along the alignment path, its probes and its correlation with the gap, where the truth is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tars_fast.analysis import paths
from tars_fast.analysis.drift import CORRELATED, over_models
from tars_fast.analysis.paths import METRICS, PathIntervention, compare_tokens, critical_tokens, monotonicity


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_planted_alignment_is_found_with_its_score():
    """Words along the axes; of each, one audio token three times as long, between tokens that no word is like."""
    words = torch.stack([torch.eye(12)[:8], torch.eye(12)[:8] * 2])
    order = torch.tensor([2, 0, 1, 3, 4, 7, 5, 6])
    speech = torch.zeros(2, 24, 12)
    # Of no word, as similar to all as to none, and farther from each than three times its length.
    speech[:] = 9 * torch.eye(12)[8]
    speech[0, 3 * torch.arange(8)] = 3 * words[0]
    speech[1, 3 * torch.arange(8)] = 3 * words[1, order]
    found = compare_tokens(speech, words)
    assert found["path_cosine"] == pytest.approx([1, 1])
    assert found["path_distance"] == pytest.approx([2, 4])
    assert found["same_path"].tolist() == [1, 1]
    places = 3 * order.argsort().numpy()
    for name in ("monotonicity_cosine", "monotonicity_distance"):
        assert found[name] == pytest.approx([1, spearmanr(np.arange(8), places).statistic])


def test_most_similar_and_nearest_are_two_paths():
    words = 2.0 * torch.eye(6)[:5]
    # Same direction, far away; another direction, near; the near ones in the reverse order.
    near = words + 0.5 * torch.eye(6)[5]
    found = compare_tokens(torch.cat([20 * words, near.flip(0)])[None], words[None])
    assert found["path_cosine"] == pytest.approx([1])
    assert found["path_distance"] == pytest.approx([0.5])
    assert found["same_path"].tolist() == [0]
    assert found["monotonicity_cosine"] == pytest.approx([1])
    assert found["monotonicity_distance"] == pytest.approx([-1])


@pytest.mark.parametrize("doubles", [paths._DOUBLES, 2000, 1])
def test_figures_are_the_papers_formulas_in_float64(doubles, monkeypatch):
    """States in bfloat16 with a large common part, as hidden states have one; all layers at once, two, one at a time."""
    monkeypatch.setattr(paths, "_DOUBLES", doubles)
    speech, text = (
        (noise(3, count, 32, seed=count) + 20 * noise(32, seed=9)).bfloat16().double().numpy() for count in (19, 11)
    )
    found = compare_tokens(*(torch.tensor(states).bfloat16() for states in (speech, text)))
    for layer, (x, y) in enumerate(zip(speech, text, strict=True)):
        cosine = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in y] for a in x])
        distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in y] for a in x])
        a, b = x.mean(0), y.mean(0)
        places = cosine.argmax(0), distance.argmin(0)
        expected = {
            "sequence_cosine": a @ b / np.sqrt(a @ a * (b @ b)),
            "sequence_distance": np.sqrt(((a - b) ** 2).sum()),
            "path_cosine": cosine.max(0).mean(),
            "path_distance": distance.min(0).mean(),
            "monotonicity_cosine": spearmanr(np.arange(11), places[0]).statistic,
            "monotonicity_distance": spearmanr(np.arange(11), places[1]).statistic,
            "same_path": (places[0] == places[1]).mean(),
        }
        assert tuple(expected) == METRICS
        for name, value in expected.items():
            assert found[name][layer] == pytest.approx(value, rel=1e-9), name


def test_words_that_share_a_token_have_ties_and_one_token_for_all_no_order():
    places = np.array([[4, 4, 7, 9, 9, 9], [3, 3, 3, 3, 3, 3]])
    found = monotonicity(places)
    assert found[0] == pytest.approx(spearmanr(np.arange(6), places[0]).statistic)
    assert np.isnan(found[1])


def test_critical_tokens_are_the_least_similar_ones_of_the_path():
    """Word j's token is at an angle that grows with (3 j mod 7); two words share a token; three tokens are on no path."""
    words = torch.eye(9)[:7]
    angles = torch.tensor([0.1 * (3 * number % 7 + 1) for number in range(7)])
    tokens = angles.cos()[:, None] * words + angles.sin()[:, None] * torch.eye(9)[7]
    speech = torch.cat([torch.eye(9)[8].repeat(3, 1), tokens])
    places, found = critical_tokens(5 * speech, words)
    expected = angles.argsort(descending=True)
    assert found.tolist() == expected.tolist()
    assert places.tolist() == (3 + expected).tolist()
    # A word like the second one, but less so, takes nothing from it.
    twin = words[1] + 0.3 * words[6]
    places, found = critical_tokens(speech, torch.cat([words[:6], twin[None]]))
    assert sorted(zip(places.tolist(), found.tolist(), strict=True)) == [(3 + number, number) for number in range(6)]
    least = PathIntervention("angle", 0, 2).target(speech, words, torch.arange(10) + 100)
    assert least.places.tolist() == (103 + expected[:2]).tolist()
    assert torch.equal(least.words, words[expected[:2]])
    assert len(PathIntervention("angle", 0, None).target(speech, words, torch.arange(10)).places) == 7


def test_interventions_take_direction_or_length_and_leave_the_other():
    states, words = noise(6, 16).bfloat16(), 4 * noise(6, 16, seed=1)
    angle, length = (PathIntervention(kind, 1, 3)(states, words) for kind in ("angle", "length"))
    assert angle.dtype == length.dtype == torch.bfloat16
    for changed, kept in ((angle, states), (length, words)):
        torch.testing.assert_close(changed.float().norm(dim=-1), kept.float().norm(dim=-1), rtol=0.01, atol=0)
    assert torch.cosine_similarity(angle.float(), words, dim=-1).min() > 0.999
    assert torch.cosine_similarity(length.float(), states.float(), dim=-1).min() > 0.999
    assert torch.cosine_similarity(angle.float(), states.float(), dim=-1).max() < 0.9
    assert [PathIntervention("angle", 2, number).name for number in (3, None)] == ["angle_2_lowest_3", "angle_2_all"]


def models_rows(gaps: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Rows [R] and [R, 3] of models with these gaps [models, R]: figures that follow the gap, oppose it, and are the same."""
    rows = []
    for number, gap in enumerate(gaps):
        own = {"speech_accuracy": 0.9 - gap, "text_accuracy": 0.9 + 0 * gap, "accuracy_gap": gap}
        layers = np.stack([2 * gap + 1, 5 - gap, 0.1 + 0 * gap], axis=1)
        own |= {name: layers.copy() for name in CORRELATED}
        own["path_cosine"] = np.stack([-gap, -gap, -gap * 3], axis=1)
        own["same_path"] = np.full((len(gap), 3), 0.1)
        own["own_pooled"] = np.stack([np.full(len(gap), (0.3, 0.1, 0.9, 0.2)[number])] * 3, axis=1)
        rows.append(own)
    return rows


def test_correlation_over_models_is_with_the_gap():
    gaps = np.random.default_rng(0).uniform(0.1, 0.6, (4, 1021))
    made = over_models(dict(zip("abcd", models_rows(gaps), strict=True)))
    assert list(made["models"]) == list("abcd")
    assert made["models"]["b"]["accuracy_gap"] == pytest.approx(gaps[1, 0])
    assert made["models"]["b"]["path_cosine"] == pytest.approx(-5 / 3 * gaps[1, 0])
    found = made["correlation"]
    assert found["path_cosine"]["mean"] == pytest.approx(-1)
    assert found["path_cosine"]["mean_ci95"] == pytest.approx([-1, -1])
    assert found["sequence_distance"]["layers"][:2] == pytest.approx([1, -1])
    assert np.isnan(found["sequence_distance"]["layers"][2]), "0.1 for every model: rounding is no correlation"
    assert np.isnan(found["same_path"]["mean"])
    expected = np.corrcoef([0.3, 0.1, 0.9, 0.2], gaps[:, 0])[0, 1]
    assert found["own_pooled"]["layers"] == pytest.approx([expected] * 3)
    low, high = found["own_pooled"]["mean_ci95"]
    assert low < 0 < high


def test_no_correlation_where_the_gap_or_a_figure_is_the_same():
    """Three times 0.1 has a mean that is not 0.1, by rounding, which must not be correlated."""
    made = over_models(dict(zip("abc", models_rows(np.full((3, 1021), 0.1)), strict=True)))
    assert np.isnan(made["correlation"]["own_pooled"]["mean"])
    varied = models_rows(np.random.default_rng(0).uniform(0.1, 0.6, (3, 1021)))
    made = over_models(dict(zip("abc", varied, strict=True)))
    assert np.isnan(made["correlation"]["same_path"]["layers"]).all()
