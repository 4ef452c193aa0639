"""Recordings: the decoded wave is the sound in the file, and a recording that no model can take is refused by name."""

from __future__ import annotations

import io
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tars_fast.data.audio import SAMPLE_RATE, decode, load_clips, read_wave
from tars_fast.data.quality import inspect_recording
from tars_fast.data.sources import stamp
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
    assert "no such file; a path is read relative to the file that names it" in refusal(tmp_path / "absent.wav")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("x" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_refuses_names_that_no_file_can_have(tmp_path, name, said):
    assert f"cannot be read ({said})" in refusal(tmp_path / name)
    assert stamp(tmp_path / name) == "missing"


def test_refuses_pipes_and_devices(tmp_path):
    """Which would be waited for, or read without end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "cannot be read (a pipe or device, not a file)" in refusal(path)


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


@pytest.mark.parametrize("scale", [128, 32_768, 2**31])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_on_the_scale_of_integers_are_refused(tmp_path, scale, subtype):
    """Whatever the channels are together; floats of a loud mix are taken, and clipped."""
    left = tone(440, 0.5) * scale
    message = refusal(write(tmp_path / "a.wav", np.stack([left, -left], axis=1), subtype=subtype))
    assert message.endswith(
        f"samples go to {scale / 2:.0f} where 1 is full scale; divide them by 32768 if they are integers of 16 bits"
    )
    assert load_one(write(tmp_path / "b.wav", tone(440, 0.5, amplitude=8.0), subtype=subtype)).max() == 1


@pytest.fixture
def speech() -> np.ndarray:
    """Three seconds that no codec makes small."""
    return 0.7 * tone(220, 3.0) + 0.05 * np.random.default_rng(0).normal(size=3 * SAMPLE_RATE)


WHOLE = [
    *(("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610")),
    *(("WAVEX", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16")),
    *(("NIST", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
]


@pytest.mark.parametrize(("format", "subtype"), WHOLE)
@pytest.mark.parametrize("share", [0.97, 0.67, 0.33])
def test_what_was_cut_off_is_refused(tmp_path, speech, format, subtype, share):
    path = tmp_path / "a"
    soundfile.write(path, speech, SAMPLE_RATE, format=format, subtype=subtype)
    assert len(decode(path)) == pytest.approx(len(speech), abs=1000)  # codecs fill their last block
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(path)
    assert "is not whole (" in message or "cannot be decoded (" in message


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_that_ends_with_a_page_that_is_not_the_last(tmp_path, speech, subtype):
    path = tmp_path / "a.ogg"
    soundfile.write(path, speech, SAMPLE_RATE, subtype=subtype)
    content = path.read_bytes()
    last = content.rindex(b"OggS")
    for end in (last + 1, last + 20, last + 30, len(content) - 1):
        path.write_bytes(content[:end])
        assert "is not whole (it" in refusal(path)
    for behind in (b"junk" * 20, content):
        path.write_bytes(content + behind)
        assert len(decode(path)) == len(speech)
    path.write_bytes(content[:last])
    assert "is not whole (its last page does not end its stream); copy or write it again from its source" in refusal(path)


def wav(sound: bytes, size: int | None = None, riff: int | None = None, before: bytes = b"") -> bytes:
    """A wav file of 16 bits, mono, whose header says that it holds `size` bytes of sound."""
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16) + before
    size = len(sound) if size is None else size
    riff = len(head) + 8 + len(sound) if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + head + b"data" + struct.pack("<I", size) + sound


SOUND = (tone(220, 1.0) * 32767).astype("<i2").tobytes()


@pytest.mark.parametrize(
    "content",
    [
        wav(SOUND, 2**32 - 1, 2**32 - 1),  # ffmpeg into a pipe
        wav(SOUND, 0x7FFFF000, 0x7FFFF024),  # sox
        wav(SOUND, 2**31, 2**31 + 36),  # arecord
        wav(SOUND, riff=36),
        wav(SOUND + b"x"),
        wav(SOUND + b"x", len(SOUND)),
        wav(SOUND, len(SOUND) + 1),
        wav(SOUND, before=b"LIST" + struct.pack("<I", 8) + b"INFOabcd"),
        wav(SOUND + b"LIST" + struct.pack("<I", 40_000) + b"x" * 40_000, len(SOUND)),
    ],
    ids=[
        "ffmpeg",
        "sox",
        "arecord",
        "riff",
        "odd byte",
        "odd byte outside",
        "odd byte missing",
        "chunk before",
        "chunk behind",
    ],
)
def test_wav_headers_that_promise_no_length_or_the_right_one(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_array_equal(load_one(tmp_path / "a.wav"), np.frombuffer(SOUND, "<i2") / np.float32(32768))


LONG_COMMENT = b"INFO" + 30 * (b"ICMT" + struct.pack("<I", 100) + 100 * b"x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (wav(SOUND[:-2], len(SOUND)), "its header says 32000 bytes of sound, of which 31998 are there"),
        (wav(SOUND[:-3], len(SOUND)), "its header says 32000 bytes of sound, of which 31997 are there"),
        # libsndfile's notes are full before they come to the sound.
        (
            wav(SOUND[:9000], len(SOUND), before=b"LIST" + struct.pack("<I", len(LONG_COMMENT)) + LONG_COMMENT),
            "its header says 32000 bytes of sound, of which 9000 are there",
        ),
        (wav(SOUND, 0), "its header says 0 bytes of sound and leaves 32000 out"),
        (wav(SOUND, 8000), "its header says 8000 bytes of sound and leaves 24000 out"),
    ],
    ids=["a sample", "a sample and a half", "a long comment", "size 0", "a quarter"],
)
def test_wav_headers_that_say_otherwise(tmp_path, content, said):
    (tmp_path / "a.wav").write_bytes(content)
    assert refusal(tmp_path / "a.wav").endswith(f"is not whole ({said}); copy or write it again from its source")


@pytest.mark.parametrize(
    ("format", "endian", "place"), [("AU", "FILE", 8), ("AU", "LITTLE", 8), ("RF64", "FILE", 28), ("WAV", "BIG", 40)]
)
def test_a_size_of_0_that_a_program_never_came_to_write(tmp_path, format, endian, place):
    """It was said to be 0.000 s long, and silent besides."""
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(SOUND, "<i2"), SAMPLE_RATE, format=format, endian=endian, subtype="PCM_16")
    content = bytearray(file.getvalue())
    content[place : place + 4] = bytes(4)
    (tmp_path / "a").write_bytes(content)
    problems, seconds = inspect_recording(tmp_path / "a", 30.0)
    assert seconds is None
    assert list(problems) == ["unreadable"]
    assert f"is not whole (its header says that there is no sound, in a file of {len(content)} bytes)" in problems["unreadable"]
    # One that is as empty as it says.
    soundfile.write(tmp_path / "b.wav", np.zeros(0), SAMPLE_RATE)
    assert list(inspect_recording(tmp_path / "b.wav", 30.0)[0]) == ["too short"]


def mp3(wave: np.ndarray, rate: int = SAMPLE_RATE, **settings: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="MP3", **settings)
    return file.getvalue()


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_mp3_with_and_without_a_header(tmp_path, speech, rate):
    path = tmp_path / "a.mp3"
    name = bytes(10) + b"TIT2 a name"
    for content in (
        mp3(speech, rate),
        b"ID3\4\0\0\0\0\0" + bytes([len(name)]) + name + mp3(speech, rate) + b"TAG" + bytes(125),
    ):
        path.write_bytes(content)
        assert len(read_wave(path)[0]) == len(speech)
    varying = mp3(speech, rate)
    first = len(varying) - len(varying[varying.index(varying[:2], 4) :])
    # Of what has no header, libsndfile decodes a fifth; of a second file behind the first, nothing.
    for content in (varying[first:], varying + varying):
        path.write_bytes(content)
        assert "is not whole (it" in refusal(path)
    constant = mp3(speech, rate, bitrate_mode="CONSTANT", compression_level=0.9)
    path.write_bytes(constant[constant.index(constant[:2], 4) :] if b"Info" in constant[:60] else constant)
    assert len(read_wave(path)[0]) == pytest.approx(len(speech), abs=2500)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not whole (it ends within a frame)" in refusal(path)


def test_a_header_of_a_rate_that_is_none(tmp_path):
    """Brought to 16 kHz, its second would fill the memory."""
    content = bytearray(wav(SOUND))
    content[24:28] = struct.pack("<I", 1)
    (tmp_path / "a.wav").write_bytes(content)
    assert refusal(tmp_path / "a.wav").endswith("1 Hz hold no speech; write it again from its source")


@pytest.mark.parametrize(("format", "subtype"), WHOLE)
def test_damaged_recordings_are_decoded_or_refused(tmp_path, format, subtype):
    """Whatever stands in the header; never another exception."""
    path = tmp_path / "a"
    soundfile.write(path, tone(220, 0.5), SAMPLE_RATE, format=format, subtype=subtype)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(30):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(0, rng.choice([60, 120, len(content)]), 3)] = rng.choice([0, 127, 128, 255, rng.integers(256)], 3)
        path.write_bytes(content.tobytes()[: rng.choice([len(content), rng.integers(len(content))])])
        try:
            assert decode(path).dtype == np.float32
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 3
    assert all(refusal.startswith(f"recording {path}: ") for refusal in refusals)


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
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        decode(path)
        taken.append(time.perf_counter() - started)
    # What other processes take from it makes it longer, and none of the alarms too late.
    seconds = min(taken)

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
