"""Statistics of the evaluation and centring of the rewards: pure arithmetic, checked against values known otherwise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from tars_fast.evaluation.metrics import (
    CrossedBootstrap,
    bootstrap_interval,
    holm,
    mcnemar,
    mean,
    mean_difference,
    mean_over_data,
    modality_recovery_rate,
    paired_t_test,
    total,
)
from tars_fast.learning.advantages import centred_advantages, disagreeing_groups, group_indices, group_means
from tars_fast.types import Modality

SPEECH, TEXT = Modality.SPEECH, Modality.TEXT


@pytest.mark.parametrize("kind", ["normal", "correct or not"])
def test_interval_of_a_mean_agrees_with_normal_theory(kind):
    """With 400 items the mean is as good as normal: its 95 % interval is mean +- 1.96 standard errors.

    The end of a percentile interval from 2,000 resamples scatters by 0.06 standard errors; 0.2 is over three times that.
    """
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, 400) if kind == "normal" else (rng.random(400) < 0.7).astype(float)
    figure, (low, high) = bootstrap_interval(mean, values)
    standard_error = values.std() / 20  # sqrt(400)
    assert figure == pytest.approx(values.mean(), abs=1e-12)
    assert low == pytest.approx(figure - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(figure + 1.96 * standard_error, abs=0.2 * standard_error)


def test_interval_of_a_total_is_that_of_the_mean_times_the_number_of_items():
    values = np.random.default_rng(2).integers(0, 3, 50).astype(float)
    figure, interval = bootstrap_interval(mean, values)
    total_figure, total_interval = bootstrap_interval(total, values)
    assert total_figure == values.sum()
    assert [total_figure, *total_interval] == pytest.approx([50 * figure, *(50 * end for end in interval)])


def test_interval_depends_on_the_seed_only():
    values = np.random.default_rng(3).normal(size=30)
    assert bootstrap_interval(mean, values, seed=5) == bootstrap_interval(mean, values, seed=5)
    assert bootstrap_interval(mean, values, seed=5)[1] != bootstrap_interval(mean, values, seed=6)[1]


def test_columns_are_resampled_together():
    """Items differ widely, what happened to them does not: only pairing by item sees that."""
    before = np.random.default_rng(4).normal(size=100)
    assert bootstrap_interval(mean_difference, before, before) == (0.0, [0.0, 0.0])
    figure, (low, high) = bootstrap_interval(mean_difference, before + 0.25, before)
    assert [figure, low, high] == pytest.approx([0.25, 0.25, 0.25], abs=1e-12)


def test_paired_difference_excludes_zero_where_each_figure_s_own_interval_does_not():
    """20 of 200 items turn right and none wrong: 10 points, where each accuracy is known to 7 points only."""
    before = np.repeat([1.0, 0.0], [100, 100])
    after = np.repeat([1.0, 0.0], [120, 80])
    _, (_, before_high) = bootstrap_interval(mean, before)
    _, (after_low, _) = bootstrap_interval(mean, after)
    assert after_low < before_high
    figure, (low, high) = bootstrap_interval(mean_difference, after, before)
    assert figure == pytest.approx(0.1)
    # Binomial: the standard error of 20 in 200 is 0.0212.
    assert low == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.005)
    assert high == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.005)


def test_modality_recovery_rate():
    speech = np.array([1.0, 0.0, 1.0, 0.0])
    text = np.array([1.0, 1.0, 1.0, 0.0])
    assert modality_recovery_rate(speech, text) == pytest.approx(100 * 2 / 3)
    assert modality_recovery_rate(text, speech) == pytest.approx(150.0)
    assert modality_recovery_rate(np.zeros(4), text) == 0.0
    # The paper's Qwen2.5-Omni row: 71.30 against its fixed reference of 77.70 is 91.76.
    assert modality_recovery_rate(np.array([0.7130]), np.array([0.7770])) == pytest.approx(91.76, abs=0.01)


def test_modality_recovery_rate_without_text_accuracy_is_nan_in_that_row_only(recwarn):
    rates = modality_recovery_rate(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[1, 1], [0, 0], [0, 0]]))
    assert rates[0] == 50.0
    assert np.isnan(rates[1:]).all()
    assert not recwarn.list


def test_modality_recovery_rate_is_paired():
    correct = (np.random.default_rng(5).random(60) < 0.6).astype(float)
    figure, interval = bootstrap_interval(modality_recovery_rate, correct, correct)
    assert [figure, *interval] == pytest.approx([100.0, 100.0, 100.0], abs=1e-9)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (1, 5), (10, 10), (40, 12), (2000, 1500)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    """In integers, which neither round nor overflow."""
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail / 2**changed), rel=1e-9)


def test_mean_over_data_counts_each_data_set_once():
    """Three data sets of very different sizes, against normal theory for their mean."""
    rng = np.random.default_rng(6)
    data_sets = [[(rng.random(size) < share).astype(float)] for size, share in ((200, 0.9), (800, 0.5), (50, 0.2))]
    figure, (low, high) = mean_over_data(mean, data_sets)
    assert figure == pytest.approx(np.mean([column.mean() for (column,) in data_sets]))
    error = np.sqrt(sum(column.var() / len(column) for (column,) in data_sets)) / 3
    assert low == pytest.approx(figure - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(figure + 1.96 * error, abs=0.2 * error)
    # A ratio of means, not a mean of ratios.
    pairs = [([1.0, 0.0], [1.0, 1.0]), ([1.0], [1.0])]
    assert mean_over_data(modality_recovery_rate, pairs)[0] == pytest.approx(75.0)
    assert mean_over_data(modality_recovery_rate, [([1.0, 0.0], [1.0, 0.0]), ([1.0], [0.5])])[0] == pytest.approx(150.0)


def test_groups_are_numbered_by_question_and_modality_in_order_of_appearance():
    questions = [3, 0, 3, 3, 0, 0]
    modalities = [TEXT, SPEECH, SPEECH, TEXT, SPEECH, TEXT]
    assert group_indices(questions, modalities).tolist() == [0, 1, 2, 0, 1, 3]
    with pytest.raises(ValueError, match="shorter"):
        group_indices(questions, modalities[:-1])


def test_advantages_are_centred_within_their_group_and_not_divided_by_the_deviation():
    # Two groups, interleaved in no regular pattern; means 1 and 0.25.
    groups = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    rewards = torch.tensor([0.0, 0.25, 0.0, 1.0, 0.75, 2.0, 0.0])
    assert group_means(rewards, groups).tolist() == [1.0, 0.25]
    advantages = centred_advantages(rewards, groups)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [-1.0, 0.0, -0.25, 0.0, 0.5, 1.0, -0.25]


@pytest.mark.parametrize("size", [3, 4, 7, 8])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1.5, 2.3456789])
def test_agreeing_rewards_have_nothing_to_teach(reward, size):
    """Exact zeros: seven times 0.1 summed in float32 is not 0.7, and the rounding error is no advantage."""
    rewards = torch.full((2 * size,), reward)
    groups = torch.arange(2 * size) % 2
    assert torch.equal(centred_advantages(rewards, groups), torch.zeros(2 * size))
    assert not disagreeing_groups(rewards, groups).any()


def test_disagreement_is_found_group_by_group():
    groups = torch.tensor([0, 1, 2, 2, 1, 0, 3])
    # Group 1 differs by one float32 rounding step, group 3 has one member only.
    rewards = torch.tensor([0.5, 0.1, -1.0, 1.0, 0.1, 0.5, 7.0])
    rewards[4] = torch.nextafter(rewards[1], torch.tensor(1.0))
    assert disagreeing_groups(rewards, groups).tolist() == [False, True, True, False]


def test_order_of_completions_changes_nothing():
    """Nothing may depend on where in the batch a completion stands, its parity least of all."""
    rng = random.Random(6)
    questions = [question for question in range(5) for _ in range(8)]
    modalities = [SPEECH, SPEECH, SPEECH, SPEECH, TEXT, TEXT, TEXT, TEXT] * 5
    rewards = torch.tensor([rng.random() for _ in questions])
    groups = group_indices(questions, modalities)
    advantages = centred_advantages(rewards, groups)
    for question in range(5):
        for start in (8 * question, 8 * question + 4):
            own = rewards[start : start + 4]
            torch.testing.assert_close(advantages[start : start + 4], own - own.mean())
    for _ in range(3):
        order = rng.sample(range(40), 40)
        shuffled = group_indices([questions[i] for i in order], [modalities[i] for i in order])
        torch.testing.assert_close(centred_advantages(rewards[order], shuffled), advantages[order])


def test_resamples_of_seeds_spread_as_the_mean_of_seeds_does():
    """Where items do not matter the spread is s / sqrt(S) with the unbiased s, also for few seeds."""
    for values in ([0.1, 0.5, 0.2, 0.9, 0.4], [0.3, 0.8]):
        rows = CrossedBootstrap(len(values), 50, num_resamples=20_000).means(np.repeat(np.array(values)[:, None], 50, axis=1))
        assert rows[0] == pytest.approx(np.mean(values))
        assert rows[1:].std() == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=0.03)


def test_resamples_of_items_spread_as_the_mean_of_items_does():
    values = np.random.default_rng(3).normal(size=200)
    one, five = (CrossedBootstrap(seeds, 200, num_resamples=20_000).means(np.tile(values, (seeds, 1))) for seeds in (1, 5))
    assert one == pytest.approx(five), "the same items are drawn however many seeds there are"
    assert one[1:].std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_crossed_intervals_hold_the_truth_as_often_as_they_say():
    """5 seeds and 60 items, each with an effect of its own and noise: items alone would hold the truth far more rarely."""
    rng = np.random.default_rng(4)
    held, held_by_items = 0, 0
    for _ in range(300):
        values = rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.3, (5, 60))
        low, high = np.percentile(CrossedBootstrap(5, 60, num_resamples=400).means(values)[1:], [2.5, 97.5])
        held += low <= 0 <= high
        low, high = np.percentile(
            CrossedBootstrap(1, 60, num_resamples=400).means(values.mean(0, keepdims=True))[1:], [2.5, 97.5]
        )
        held_by_items += low <= 0 <= high
    assert 0.85 < held / 300 < 0.99
    assert held_by_items < held - 15


def test_paired_t_test_is_that_of_the_textbook():
    """Student's data on sleep: t = -4.0621 with 9 degrees of freedom."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired_t_test([a - b for a, b in zip(first, second, strict=True)]) == pytest.approx(0.002833, abs=1e-6)
    assert paired_t_test([0.1]) is None
    assert paired_t_test([0.1, 0.1]) is None
    assert paired_t_test([0.75 - 0.55, 0.7 - 0.5, 0.8 - 0.6]) is None, "rounding alone tells them apart"
    assert paired_t_test([0.1, 0.2, float("nan")]) is None


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
