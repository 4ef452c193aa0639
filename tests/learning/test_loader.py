"""Which items a step sees."""

from __future__ import annotations

from collections import Counter

import pytest

from tars_fast.learning.selection import batch_of_step


@pytest.mark.parametrize(("num_questions", "batch_size"), [(7, 3), (8, 4), (3, 7), (1, 2)])
def test_steps_walk_through_shuffled_epochs(num_questions, batch_size):
    """As many steps as questions are exactly `batch_size` epochs, whether or not a batch divides an epoch."""
    walk = [i for step in range(num_questions) for i in batch_of_step(num_questions, batch_size, step, seed=1)]
    epochs = [walk[start : start + num_questions] for start in range(0, len(walk), num_questions)]
    assert len(epochs) == batch_size
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_questions))
    assert max(Counter(walk).values()) == batch_size


def test_epochs_and_seeds_are_shuffled_differently():
    # Two of 20! orders agree by chance never.
    first, second = (batch_of_step(20, 20, step, seed=1) for step in range(2))
    assert first != second
    assert list(range(20)) not in (first, second)
    assert first != batch_of_step(20, 20, 0, seed=2)


def test_a_step_needs_no_earlier_one():
    """A resumed run starts in the middle and sees what the unbroken one saw."""
    unbroken = [batch_of_step(10, 4, step, seed=3) for step in range(12)]
    resumed = [batch_of_step(10, 4, step, seed=3) for step in reversed(range(6, 12))]
    assert resumed[::-1] == unbroken[6:]
