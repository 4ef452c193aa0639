"""espeak-ng in a process of its own: the same seed, the same samples, whatever was spoken before."""

from __future__ import annotations

import numpy as np
import pytest

from tars_fast.synthesis import Synthesiser


def test_reproducible_by_seed_and_independent_of_history():
    with Synthesiser() as synthesiser:
        first, rate = synthesiser("What is two plus two?", "en-us+f2", seed=3)
        synthesiser("Something else entirely.", "en-gb-scotland+m3", seed=9)
        second, _ = synthesiser("What is two plus two?", "en-us+f2", seed=3)
    with Synthesiser() as synthesiser:
        third, _ = synthesiser("What is two plus two?", "en-us+f2", seed=3)
    assert rate == 22050
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)
    assert 0.1 < np.abs(first).max() <= 1.0


def test_faster_speech_is_shorter_and_unknown_voices_are_refused():
    with Synthesiser() as synthesiser:
        slow, _ = synthesiser("What is two plus two?", "en-us", words_per_minute=120)
        with pytest.raises(ValueError, match="no-such-voice"):
            synthesiser("hello", "no-such-voice")
        fast, _ = synthesiser("What is two plus two?", "en-us", words_per_minute=240)
    # Silence at the ends does not shrink, so a little less than twice.
    assert 1.5 < len(slow) / len(fast) < 2.2
