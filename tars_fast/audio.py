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
    except soundfile.LibsndfileError as error:
        raise UserError(f"recording {path}: cannot be decoded ({error}); use wav, flac, ogg or mp3") from error
    wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise UserError(f"recording {path}: holds NaN or infinite samples; write it again from its source")
    if rate != SAMPLE_RATE:
        import soxr

        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    seconds = len(wave) / SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise UserError(f"recording {path}: {seconds:.2f} s, shorter than {MIN_SECONDS} s; remove or re-record the item")
    if seconds > max_seconds:
        raise UserError(f"recording {path}: {seconds:.2f} s, the model hears at most {max_seconds:g} s; cut it shorter")
    return np.ascontiguousarray(wave, dtype=np.float32)
