"""Recordings decoded as the models take them: mono, 16 kHz, float32 in [-1, 1]."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tars_fast.types import LongAudio, Recording, UserError

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.1
"""Of anything shorter the audio towers of the supported models make at most two tokens, too few for a question."""


def read_wave(recording: Recording) -> tuple[np.ndarray, int]:
    """Decode and mix down one recording.

    Args:
        recording: in any format that libsndfile reads (wav, flac, ogg, mp3, ...).

    Returns:
        ([samples] float32, sample rate in Hz), both as recorded.

    Raises:
        UserError: the recording is missing, cannot be decoded, or holds samples that are not finite.
    """
    import soundfile

    try:
        # libsndfile reads a file by itself; an object it reads by calls into Python, which swallow a Ctrl-C and lose bytes.
        with recording.open("rb") if isinstance(recording, Path) else tempfile.TemporaryFile() as file:
            if not isinstance(recording, Path):
                file.write(recording.read_bytes())
                file.seek(0)
            wave, rate = soundfile.read(file.fileno(), dtype="float32", always_2d=True, closefd=False)
    except FileNotFoundError as error:
        raise UserError(f"recording {recording}: no such file; 'audio' is read relative to the jsonl that names it") from error
    except OSError as error:
        raise UserError(f"recording {recording}: cannot be read ({error.strerror})") from error
    except soundfile.LibsndfileError as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(
            f"recording {recording}: cannot be decoded ({reason}); use wav, flac, ogg or mp3, whole and undamaged"
        ) from error
    wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise UserError(f"recording {recording}: holds NaN or infinite samples; write it again from its source")
    return wave, rate


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Bring a wave to 16 kHz and into [-1, 1]: [samples] float32."""
    if rate != SAMPLE_RATE:
        import soxr

        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    # Resampling overshoots at edges, and float files may hold anything.
    return np.ascontiguousarray(wave.clip(-1.0, 1.0), dtype=np.float32)


def decode(recording: Recording) -> np.ndarray:
    """Decode, mix down and resample one recording of any length.

    Returns:
        [samples] float32 at 16 kHz.

    Raises:
        UserError: see `read_wave`, or the recording is too short.
    """
    wave = resample(*read_wave(recording))
    if len(wave) < MIN_SECONDS * SAMPLE_RATE:
        raise UserError(f"recording {recording}: {_length(wave)}, shorter than {MIN_SECONDS} s; remove or re-record the item")
    return wave


class LongRecordingError(UserError):
    """A recording is longer than the model takes at once."""


def load_clips(recording: Recording, max_seconds: float, long_audio: LongAudio) -> tuple[list[np.ndarray], float]:
    """Decode a recording into clips of at most `max_seconds`, one for any recording that is no longer.

    Args:
        recording: see `decode`.
        max_seconds: the longest clip that the model takes, in seconds.
        long_audio: what becomes of a longer recording: an error, clips of equal length one after the other, or its beginning.

    Returns:
        ([samples] float32 at 16 kHz each, seconds of the whole recording).

    Raises:
        UserError: see `decode`.
        LongRecordingError: with `refuse`, a recording that is too long.
    """
    wave = decode(recording)
    longest = round(max_seconds * SAMPLE_RATE)
    seconds = len(wave) / SAMPLE_RATE
    if len(wave) <= longest:
        return [wave], seconds
    if long_audio == "refuse":
        raise LongRecordingError(
            f"recording {recording}: {_length(wave)}, the model encodes at most {max_seconds:g} s at once; cut it shorter, or "
            "see --long-audio"
        )
    if long_audio == "truncate":
        return [wave[:longest]], seconds
    # Equal lengths, so that no clip is a fraction of a second.
    return np.array_split(wave, -(-len(wave) // longest)), seconds


def _length(wave: np.ndarray) -> str:
    return f"{len(wave) / SAMPLE_RATE:.2f} s ({len(wave)} samples at 16 kHz)"
