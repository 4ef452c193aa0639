"""Recordings: the decoded wave is the sound in the file, and a recording that no model can take is refused by name."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tars_fast.data.audio import SAMPLE_RATE, decode, load_clips
from tars_fast.types import UserError

MAX_SECONDS = 4.0
"""The longest clip of the bundled model."""


def tone(hertz: float, seconds: float, rate: int = SAMPLE_RATE, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path: Path, wave: np.ndarray, rate: int = SAMPLE_RATE, subtype: str | None = "FLOAT") -> Path:
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_one(path)
    message = str(caught.value)
    assert message.startswith(f"recording {path}: ")
    assert "\n" not in message
    return message


def load_one(path):
    (wave,), seconds = load_clips(path, MAX_SECONDS, "refuse")
    assert seconds == len(wave) / SAMPLE_RATE
    return wave


def test_16_khz_mono_comes_back_unchanged(tmp_path):
    wave = np.random.default_rng(0).uniform(-1, 1, 3000).astype(np.float32)
    loaded = load_one(write(tmp_path / "a.wav", wave))
    assert loaded.dtype == np.float32
    assert loaded.flags.c_contiguous
    assert np.array_equal(loaded, wave)


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 0.5), tone(1000, 0.5, amplitude=0.25)
    stereo = np.stack([left, right], axis=1).astype(np.float32)
    loaded = load_one(write(tmp_path / "a.wav", stereo))
    np.testing.assert_allclose(loaded, (left + right) / 2, atol=1e-7)
    opposite = load_one(write(tmp_path / "b.wav", np.stack([left, -left], axis=1)))
    assert not opposite.any()


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_frequency_length_and_loudness(tmp_path, rate):
    """One second, so that bin k of the spectrum is k Hz; 1,234 Hz is below the 4 kHz that 8 kHz recordings hold."""
    loaded = load_one(write(tmp_path / "a.wav", tone(1234, 1.0, rate), rate))
    assert len(loaded) == SAMPLE_RATE
    assert loaded.dtype == np.float32
    assert np.abs(np.fft.rfft(loaded)).argmax() == 1234
    # The ends ring; in between it is the tone itself, in phase.
    np.testing.assert_allclose(loaded[500:-500], tone(1234, 1.0)[500:-500], atol=1e-3)


def test_resampling_does_not_fold_high_frequencies_down(tmp_path):
    """12 kHz cannot be said at 16 kHz; taking every third sample of 48 kHz would turn it into 4 kHz."""
    loaded = load_one(write(tmp_path / "a.wav", tone(12_000, 1.0, 48_000), 48_000))
    assert np.abs(loaded[500:-500]).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        # One rounding step of 16 bits; the last two are lossy: off by 0.015 and 0.013 on this tone.
        ("a.wav", "PCM_16", 2**-15),
        ("a.flac", "PCM_16", 2**-15),
        ("a.ogg", "VORBIS", 0.02),
        ("a.mp3", "MPEG_LAYER_III", 0.02),
    ],
)
def test_formats(tmp_path, name, subtype, tolerance):
    wave = tone(440, 1.0)
    loaded = load_one(write(tmp_path / name, wave, subtype=subtype))
    assert len(loaded) == len(wave)
    # Encoders ring at the ends.
    np.testing.assert_allclose(loaded[2000:-2000], wave[2000:-2000], atol=tolerance)


def test_integers_are_scaled_to_one(tmp_path):
    samples = np.tile(np.array([-32768, 32767, 16384, -1, 0], dtype=np.int16), 400)
    loaded = load_one(write(tmp_path / "a.wav", samples, subtype="PCM_16"))
    assert np.array_equal(loaded, samples.astype(np.float32) / 32768)


def test_refuses_what_is_not_there(tmp_path):
    assert "no such file; 'audio' is read relative to the jsonl that names it" in refusal(tmp_path / "absent.wav")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"These are the words, not the sound of them.\n" * 200])
def test_refuses_what_is_not_audio(tmp_path, content):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    message = refusal(path)
    assert "cannot be decoded" in message
    assert message.endswith("use wav, flac, ogg or mp3, whole and undamaged")


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
@pytest.mark.parametrize(("seconds", "said"), [(0.0, "0.00 s (0 samples at 16 kHz)"), (0.05, "0.05 s (800 samples at 16 kHz)")])
def test_refuses_empty_and_short_ones(tmp_path, rate, seconds, said):
    message = refusal(write(tmp_path / "a.wav", tone(440, seconds, rate), rate))
    assert f"{said}, shorter than 0.1 s; remove or re-record the item" in message


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_refuses_long_ones(tmp_path, rate):
    message = refusal(write(tmp_path / "a.wav", tone(440, 4.25, rate), rate))
    assert "4.25 s (68000 samples at 16 kHz), the model encodes at most 4 s at once; cut it shorter" in message


def test_limits_themselves_are_accepted(tmp_path):
    assert len(load_one(write(tmp_path / "a.wav", tone(440, 0.1)))) == 1600
    assert len(load_one(write(tmp_path / "b.wav", tone(440, 4.0)))) == 64_000
    assert len(load_one(write(tmp_path / "c.wav", tone(440, 4.0, 44_100), 44_100))) == 64_000
    refusal(write(tmp_path / "d.wav", tone(440, 0.1)[:-1]))
    refusal(write(tmp_path / "e.wav", np.append(tone(440, 4.0), 0.0)))


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_samples_that_are_no_numbers(tmp_path, rate, value):
    """One sample in one of two channels is enough."""
    wave = np.stack([tone(440, 1.0, rate)] * 2, axis=1)
    wave[5000, 1] = value
    message = refusal(write(tmp_path / "a.wav", wave, rate))
    assert "holds NaN or infinite samples; write it again from its source" in message


def test_stays_within_one(tmp_path):
    """Float files may hold anything, and resampling a full-scale square wave overshoots by a fifth."""
    import soundfile

    square = np.sign(tone(440, 0.5, 44_100))
    for name, wave, rate in (("float", np.full(4000, 3.0), SAMPLE_RATE), ("square", square, 44_100)):
        soundfile.write(tmp_path / f"{name}.wav", wave, rate, subtype="FLOAT")
        assert np.abs(load_one(tmp_path / f"{name}.wav")).max() == 1.0


def test_headerless_recording_is_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"\0" * 32_000)
    assert "cannot be decoded" in refusal(tmp_path / "a.raw")


@pytest.mark.parametrize("seconds", [4.0001, 7.9, 8.0, 8.0001, 11.3])
def test_long_recordings_become_clips_that_lose_nothing(tmp_path, seconds):
    path = write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE)))
    clips, total = load_clips(path, MAX_SECONDS, "chunk")
    assert total == pytest.approx(seconds, abs=1e-4)
    assert len(clips) == np.ceil(seconds / MAX_SECONDS)
    lengths = [len(clip) for clip in clips]
    assert max(lengths) <= MAX_SECONDS * SAMPLE_RATE
    assert max(lengths) - min(lengths) <= 1
    whole = np.concatenate(clips)
    np.testing.assert_array_equal(whole, load_clips(path, 100.0, "refuse")[0][0])
    (beginning,), total = load_clips(path, MAX_SECONDS, "truncate")
    assert total == pytest.approx(seconds, abs=1e-4)
    np.testing.assert_array_equal(beginning, whole[: int(MAX_SECONDS * SAMPLE_RATE)])


def test_an_interrupt_is_never_taken_for_sound(tmp_path):
    """Ctrl-C at any moment ends the decoding, or comes too late; it never leaves another wave."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(440, 60.0), SAMPLE_RATE, format="OGG", subtype="OPUS")
    expected = decode(path)
    started = time.perf_counter()
    decode(path)
    seconds = time.perf_counter() - started

    def interrupt(_signal, _frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds * (number + 0.5) / 20)
                wave = decode(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                np.testing.assert_array_equal(wave, expected)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 5
