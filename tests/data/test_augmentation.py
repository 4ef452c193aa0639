"""Augmented recordings hold the noise that was asked for, and no more of the band than a telephone has."""

from __future__ import annotations

import numpy as np
import pytest

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.augmentation import parse_augmentation
from tars_fast.data.items import VALIDATION_DATA, load_questions
from tars_fast.types import UserError


@pytest.fixture(scope="module")
def wave() -> np.ndarray:
    """A spoken question with an odd number of samples, quiet enough to be mixed with louder noise."""
    return 0.02 * decode(load_questions(VALIDATION_DATA)[0].audio)[:19_001]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def measured_snr(wave: np.ndarray, mixed: np.ndarray) -> float:
    """In dB, of a mix in which the recording is as loud as before."""
    return float(10 * np.log10(np.square(wave).sum() / np.square(mixed - wave).sum()))


def share_above(wave: np.ndarray, frequency: float) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float(power[np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE) > frequency].sum() / power.sum())


@pytest.mark.parametrize("kind", ["noise", "speech-noise"])
@pytest.mark.parametrize("snr", [20, 10, 0, -5])
def test_noise_has_the_ratio_that_was_asked_for(wave, kind, snr):
    mixed, done = parse_augmentation(f"{kind}:{snr}").apply(wave, rng())
    assert done == f"{kind}:{snr}"
    assert mixed.dtype == np.float32
    assert mixed.shape == wave.shape
    assert measured_snr(wave, mixed) == pytest.approx(snr, abs=0.5)
    again, other = (parse_augmentation(f"{kind}:{snr}").apply(wave, rng(seed))[0] for seed in (0, 1))
    assert again.tobytes() == mixed.tobytes()
    assert not np.allclose(mixed, other), "another seed, another noise"


def test_a_mix_beyond_full_scale_is_made_quieter(wave):
    loud = wave / np.abs(wave).max()
    mixed, _ = parse_augmentation("noise:0").apply(loud, rng())
    quiet, _ = parse_augmentation("noise:0").apply(0.01 * loud, rng())
    assert np.abs(mixed).max() == pytest.approx(1)
    np.testing.assert_allclose(mixed, quiet / np.abs(quiet).max(), atol=1e-4)


def test_white_noise_is_flat_and_that_of_speech_is_where_speech_is(wave):
    white, of_speech = (parse_augmentation(f"{kind}:-40").apply(wave, rng())[0] for kind in ("noise", "speech-noise"))
    assert share_above(white, 4000) == pytest.approx(0.5, abs=0.02)
    assert share_above(of_speech, 4000) == pytest.approx(share_above(wave, 4000), abs=0.02)


def test_a_ratio_is_drawn_for_each_item_within_the_range(wave):
    augmentation = parse_augmentation("noise:5..20")
    drawn = []
    for seed in range(40):
        mixed, done = augmentation.apply(wave, rng(seed))
        snr = float(done.removeprefix("noise:"))
        assert measured_snr(wave, mixed) == pytest.approx(snr, abs=0.5)
        drawn.append(snr)
    assert all(5 <= snr <= 20 for snr in drawn)
    # Of 40 uniform draws all within 12 dB of each other: one in ten thousand.
    assert max(drawn) - min(drawn) > 12


def test_a_telephone_has_300_to_3400_hz():
    def gain(frequency: float) -> float:
        tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
        heard, done = parse_augmentation("telephone").apply(tone, rng())
        assert done == "telephone"
        # Without what the filter does as the tone begins and ends.
        return float(np.sqrt(np.square(heard[2000:-2000]).mean() / np.square(tone[2000:-2000]).mean()))

    assert gain(1000) == pytest.approx(1, abs=0.02)
    assert gain(500) > 0.9
    assert gain(3000) > 0.9
    assert gain(100) < 0.02
    assert gain(5000) < 1e-4


def test_nothing_of_speech_is_left_above_4_khz(wave):
    heard, _ = parse_augmentation("telephone").apply(wave, rng())
    assert heard.shape == wave.shape
    assert heard.dtype == np.float32
    assert share_above(wave, 4000) > 1e-3
    assert share_above(heard, 4000) < 1e-6


@pytest.mark.parametrize("text", ["hiss", "noise", "noise:", "noise:ten", "noise:5..", "telephone:8", "noise:1e3", "noise:nan"])
def test_what_is_no_augmentation_is_told_which_there_are(text):
    with pytest.raises(UserError, match=rf"^--augment {text}: is none of noise:DB, speech-noise:DB and telephone, DB being"):
        parse_augmentation(text)


@pytest.mark.parametrize("text", ["noise:20..5", "noise:-41", "speech-noise:0..81"])
def test_a_ratio_out_of_range_is_refused(text):
    with pytest.raises(UserError, match=rf"^--augment {text}: give -40 to 80 dB, the lower one first$"):
        parse_augmentation(text)
