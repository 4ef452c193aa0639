"""Alignment and CKA against known truths: copies, rotations, noise, a planted shift, a planted stretch, float64 textbooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tars_fast.analysis.alignment import (
    MOST_PAIRS,
    NUM_HALVINGS,
    NUM_RESAMPLES,
    StreamedMeans,
    band_widths,
    best_layers,
    compare_layers,
    content_span,
    correlation,
    debiased,
    describe_layers,
    interval,
    relative_pairs,
    resampling,
    thinned,
    warp,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streamed(items, name: str = "d") -> StreamedMeans:
    """Means over (speech [L, T, D], text [L, T, D]) of each item, one item at a time."""
    means = StreamedMeans()
    for number, (speech, text) in enumerate(items):
        values = {key: value[None] for key, value in vars(compare_layers(speech, text)).items()}
        means.add(resampling(0, f"{name} {number}")[None], values)
    return means


def textbook_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019, on the Gram matrices, centred on both sides."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def textbook_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, written out."""
    n, one = len(x), np.ones(len(x))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return total / (n * (n - 3))


def test_estimators_equal_the_textbook_in_float64():
    """States with a large common component, as hidden states have one, in which fp32 Gram matrices would drown."""
    speech, text = noise(3, 23, 40) + 30 * noise(40, seed=9), noise(2, 23, 17, seed=1) + 30 * noise(17, seed=8)
    text[:, :, :9] += speech[:2, :, :9]
    made = compare_layers(speech, text)
    x, y = speech.double().numpy(), text.double().numpy()
    for i in range(3):
        np.testing.assert_allclose(made.speech_hsic[i], textbook_hsic(x[i], x[i]), rtol=1e-4)
        for j in range(2):
            np.testing.assert_allclose(made.cka[i, j], textbook_cka(x[i], y[j]), rtol=1e-4)
            np.testing.assert_allclose(made.hsic[i, j], textbook_hsic(x[i], y[j]), rtol=1e-3, atol=1e-4)
    shuffles = [torch.randperm(23, generator=torch.Generator().manual_seed(seed)) for seed in range(400)]
    shuffled = np.mean([compare_layers(speech, text[:, order]).cka for order in shuffles], axis=0)
    np.testing.assert_allclose(made.chance, shuffled, rtol=0.02)


def test_identical_states_give_one_and_rotated_ones_too():
    states = noise(2, 30, 16)
    rotation = torch.linalg.qr(noise(16, 16, seed=3)).Q
    for other in (states, 7 * states @ rotation):
        means = streamed([(states, other)])
        assert np.diagonal(means.rows("cka")[0]) == pytest.approx(1.0, abs=1e-5)
        assert np.diagonal(debiased(means)[0]) == pytest.approx(1.0, abs=1e-5)
    cosines = torch.nn.functional.cosine_similarity(states, states @ rotation, dim=-1)
    assert cosines.mean() < 0.5


def test_unrelated_noise_gives_the_finite_sample_level_and_nothing_without_bias():
    """T = 24 tokens of D = 96 dimensions: CKA of white noise is D / (D + T) = 0.8, which proves nothing."""
    means = streamed([(noise(1, 24, 96, seed=2 * item), noise(1, 24, 96, seed=2 * item + 1)) for item in range(60)])
    assert means.rows("cka")[0] == pytest.approx(0.8, abs=0.02)
    assert means.rows("chance")[0] == pytest.approx(means.rows("cka")[0], abs=0.005)
    low, high = interval(debiased(means))[:, 0, 0]
    assert low < 0 < high
    assert high - low < 0.05


def planted(item: int, shift: int, num_layers: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Speech layer l holds, rotated, what text layer l + shift holds; neighbouring layers share a part."""
    walk = noise(num_layers + shift + 1, 40, 12, seed=item).cumsum(0) * 0.7
    walk = walk[1:] - walk[:-1] * 0.4
    rotation = torch.linalg.qr(noise(12, 12, seed=77)).Q
    text = walk[:num_layers]
    speech = walk[shift : shift + num_layers] @ rotation
    return speech, text


def test_a_planted_shift_of_layers_is_found():
    means = streamed([planted(item, 2) for item in range(12)])
    for rows in (means.rows("cka"), debiased(means)):
        made = describe_layers(rows)
        # What the last layers of speech hold, no layer of text does.
        assert made["best_text_layer"][:4] == [3, 4, 5, 6]
        assert min(made["best_text_layer_share"][:4]) > 0.95
        assert made["mean_shift"] == np.mean(np.array(made["best_text_layer"]) - np.arange(1, 7)) > 0
        assert min(made["halves"]["correlation"]) > 0.9


def test_halves_are_compared_with_each_other():
    """Resamples that agree in nothing, halves that agree in all but one pair."""
    rows = np.random.default_rng(0).uniform(size=(1 + NUM_RESAMPLES + 2 * NUM_HALVINGS, 3, 3))
    rows[1 + NUM_RESAMPLES :] = np.eye(3)
    rows[-1] = np.eye(3)[::-1]
    made = describe_layers(rows)["halves"]
    assert made["correlation"][:-1] == pytest.approx([1.0] * (NUM_HALVINGS - 1))
    assert made["correlation"][-1] == pytest.approx(0.0, abs=1e-12)
    assert made["same_best_layer"] == pytest.approx([1.0] * (NUM_HALVINGS - 1) + [1 / 3])


def test_an_interval_is_over_resamples_alone():
    """Not over all items, nor over halves, which have fewer of them and vary more."""
    rows = np.concatenate([[50.0], np.linspace(0, 1, NUM_RESAMPLES), np.full(2 * NUM_HALVINGS, 100.0)])
    np.testing.assert_allclose(interval(rows), [0.025, 0.975], atol=1e-9)


def test_resamples_without_an_item_say_nothing():
    """Of one item more than a third count it never; NaN is no layer and no width."""
    means = streamed([planted(0, 2)])
    assert np.isnan(means.rows("cka")[1 : 1 + NUM_RESAMPLES]).any()
    made = describe_layers(means.rows("cka"))
    for name in ("best_text_layer", "band_width", "band_contrast"):
        np.testing.assert_array_equal(made[f"{name}_ci95"], np.stack([made[name]] * 2, axis=1), err_msg=name)
    assert made["best_text_layer_share"] == [1.0] * 6
    assert made["mean_shift_ci95"] == [made["mean_shift"]] * 2
    assert np.isnan(made["halves"]["same_best_layer"]).all()


def test_unknown_entries_are_left_out():
    cka = np.array([[0.2, np.nan, 0.9], [np.nan, np.nan, np.nan], [0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(best_layers(cka), [3, np.nan, 1])
    np.testing.assert_array_equal(band_widths(cka), [1, np.nan, 1])
    other = np.nan_to_num(cka, nan=7.0)
    known = np.isfinite(cka)
    other[0, 0] = 0.5
    assert correlation(cka, other) == pytest.approx(np.corrcoef(cka[known], other[known])[0, 1])


def test_band_widths():
    cka = np.array([[1.0, 0.95, 0.2, 0.99], [0.91, 0.95, 1.0, 0.92], [0.0, -0.1, -0.2, -0.1], [0.1, 0.2, 0.3, 0.4]])
    assert band_widths(cka).tolist() == [2, 4, 0, 1]
    assert band_widths(np.stack([cka, cka[::-1]]))[1].tolist() == [1, 0, 4, 2]


def test_a_stretched_copy_is_aligned_by_its_stretch():
    text = noise(9, 32)
    repeats = torch.tensor([3, 1, 5, 2, 2, 7, 1, 4, 3])
    speech = text.repeat_interleave(repeats, 0) + 0.1 * noise(int(repeats.sum()), 32, seed=1)
    # Lengths of states are nothing to a cosine.
    places, words = warp(speech * noise(len(speech), 1, seed=2).exp(), 100 * text)
    assert places.tolist() == list(range(len(speech)))
    assert words.tolist() == torch.arange(9).repeat_interleave(repeats).tolist()
    assert [path.tolist() for path in warp(text, text)] == [list(range(9))] * 2


def test_a_path_costs_as_little_as_any():
    """Against the recursion itself, also where a sequence has more tokens than its states have dimensions."""
    for number, (num_x, num_y, width) in enumerate([(7, 5, 6), (12, 3, 6), (4, 11, 6), *[(30, 6, 64), (6, 30, 64)] * 5]):
        x, y = noise(num_x, width, seed=number), noise(num_y, width, seed=number + 50)
        # Frames that are near the text's states, and frames that are far from all of them.
        x[::2] += 8 * y[torch.arange(len(x[::2])) * num_y // len(x[::2])]
        cost = 1 - torch.nn.functional.cosine_similarity(x[:, None].double(), y[None].double(), dim=-1).numpy()
        least = np.full((num_x + 1, num_y + 1), np.inf)
        least[0, 0] = 0
        for i in range(num_x):
            for j in range(num_y):
                least[i + 1, j + 1] = cost[i, j] + min(least[i, j], least[i, j + 1], least[i + 1, j])
        places = np.stack(warp(x, y), axis=1)
        assert sum(cost[i, j] for i, j in places) == pytest.approx(least[-1, -1])
        steps = set(map(tuple, np.diff(places, axis=0)))
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert (places[0].tolist(), places[-1].tolist()) == ([0, 0], [num_x - 1, num_y - 1])


def test_intervals_are_those_of_the_bootstrap_and_shared_by_name():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    means = StreamedMeans()
    for start in range(0, 400, 7):
        part = values[start : start + 7]
        weights = np.stack([resampling(0, f"{start + number}") for number in range(len(part))])
        means.add(weights, {"value": part[:, 0]})
    rows = means.rows("value")
    assert rows[0] == pytest.approx(values.mean())
    low, high = interval(rows)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    assert np.array_equal(resampling(0, "x"), resampling(0, "x"))
    assert not np.array_equal(resampling(0, "x"), resampling(1, "x"))
    halves = resampling(0, "x")[1 + NUM_RESAMPLES :].reshape(-1, 2)
    assert (halves.sum(1) == 1).all()


def test_missing_values_are_left_out_where_they_are_missing():
    means = StreamedMeans()
    weights = np.stack([resampling(0, name) for name in "abc"])
    means.add(weights[:2], {"value": np.array([[1.0, np.nan], [3.0, 5.0]])})
    means.add(weights[2:], {"value": np.array([[5.0, np.nan]])})
    assert means.rows("value")[0].tolist() == [3.0, 5.0]
    chosen = weights[1] > 0
    assert (means.rows("value")[chosen, 1] == 5.0).all()
    assert np.isnan(means.rows("value")[~chosen, 1]).all()


def test_memory_does_not_grow_with_the_number_of_items():
    few, many = (streamed([planted(item % 3, 1) for item in range(count)]) for count in (3, 30))
    assert few.num_bytes == many.num_bytes


def test_what_two_prompts_do_not_share():
    assert content_span([1, 2, 7, 8, 3], [1, 2, 9, 9, 9, 3]) == (2, 4)
    assert content_span([1, 2, 3], [1, 2, 3]) == (3, 3)
    assert content_span([1, 1, 1], [1, 1, 1, 1]) == (3, 3)
    assert content_span([5, 6], [1, 2]) == (0, 2)


def test_tokens_at_the_same_share_of_two_lengths():
    assert [places.tolist() for places in relative_pairs(3, 3)] == [[0, 1, 2], [0, 1, 2]]
    assert [places.tolist() for places in relative_pairs(2, 4)] == [[0, 0, 1, 1], [0, 1, 2, 3]]


def test_long_paths_are_thinned_evenly():
    path = torch.arange(5000), torch.arange(5000) // 7
    x, y = thinned(path)
    assert (len(x), x[0], x[-1]) == (MOST_PAIRS, 0, 4999)
    assert x.diff().min() >= 4
    assert x.diff().max() <= 5
    assert torch.equal(y, x // 7)
    assert thinned((path[0][:9], path[1][:9]))[0].tolist() == list(range(9))
