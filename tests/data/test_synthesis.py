"""espeak-ng in a process of its own: the same seed, the same samples, whatever was spoken before."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tars_fast.data.synthesis import Synthesiser


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


def children(server: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def kill_utterance(server: int) -> None:
    """Kill what speaks next, as the kernel does where memory runs out."""
    while not (found := children(server)):
        time.sleep(0.005)
    os.kill(found[0], signal.SIGKILL)


@pytest.mark.parametrize("whole", [False, True])
def test_an_utterance_that_dies_is_an_error_and_the_next_is_spoken(whole):
    """The fork that speaks, or all of espeak-ng between two utterances."""
    with Synthesiser() as synthesiser:
        expected, _ = synthesiser("hello", "en-us", seed=1)
        server = synthesiser._process
        if whole:
            server.kill()
            server.wait()
        else:
            while children(server.pid):
                time.sleep(0.005)
            threading.Thread(target=kill_utterance, args=[server.pid]).start()
        with pytest.raises(ValueError, match="espeak-ng died of 'a very long text"):
            synthesiser("a very long text " * 5000, "en-us")
        assert server.returncode is not None
        assert np.array_equal(synthesiser("hello", "en-us", seed=1)[0], expected)
