"""Recordings as the models want them: mono, 16 kHz, float32 in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tars_fast.types import UserError

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.1
"""Below this the audio towers of the supported models produce at most two tokens: nothing a question fits into."""


def load_recording(path: Path, max_seconds: float) -> np.ndarray:
    """Decode, mix down and resample one recording.

    Args:
        path: any file libsndfile reads (wav, flac, ogg, mp3, ...).
        max_seconds: the longest recording the model hears, in seconds.

    Returns:
        [samples] float32 at 16 kHz.

    Raises:
        UserError: missing, unreadable, empty, non-finite, too short or too long.
    """
    import soundfile

    if not path.is_file():
        raise UserError(f"recording {path}: no such file; 'audio' is read relative to the jsonl that names it")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:
        # TypeError: a headerless .raw file, whose rate nobody knows.
        raise UserError(
            f"recording {path}: cannot be decoded ({error}); use wav, flac, ogg or mp3, whole and undamaged"
        ) from error
    wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise UserError(f"recording {path}: holds NaN or infinite samples; write it again from its source")
    if rate != SAMPLE_RATE:
        import soxr

        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    seconds = f"{len(wave) / SAMPLE_RATE:.2f} s ({len(wave)} samples at 16 kHz)"
    if len(wave) < MIN_SECONDS * SAMPLE_RATE:
        raise UserError(f"recording {path}: {seconds}, shorter than {MIN_SECONDS} s; remove or re-record the item")
    if len(wave) > max_seconds * SAMPLE_RATE:
        raise UserError(f"recording {path}: {seconds}, the model hears at most {max_seconds:g} s; cut it shorter")
    # Resampling overshoots at edges, and float files may hold anything.
    return np.ascontiguousarray(wave.clip(-1.0, 1.0), dtype=np.float32)
