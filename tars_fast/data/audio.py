"""Recordings decoded as the models take them: mono, 16 kHz, float32 in [-1, 1]."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tars_fast.data.containers import IncompleteError, check_header, check_notes
from tars_fast.types import LongAudio, Recording, UserError

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.1
"""Of anything shorter the audio towers of the supported models make at most two tokens, too few for a question."""
_LARGEST_SAMPLE = 16.0
"""Floats go beyond 1 where a mix is loud, but not by 24 dB; 16-bit integers written as floats go to 32768."""
_LOWEST_RATE = 2000
"""In Hz. A damaged header may say 1, from which resampling would make 16,000 times as many samples."""
_FRAMES_AT_ONCE = 2**18
_LONGEST_EMPTY = 4096
"""Bytes of a file that may hold no sound; of a larger one a program that crashed has never written the size of its sound."""


def on_integer_scale(wave: np.ndarray) -> str | None:
    """What is wrong with samples that are floats on the scale of integers; None with all others."""
    peak = float(np.abs(wave).max(initial=0.0))
    return f"samples go to {peak:.0f} where 1 is full scale" if peak > _LARGEST_SAMPLE else None


def read_wave(recording: Recording) -> tuple[np.ndarray, int]:
    """Decode and mix down one recording.

    Args:
        recording: in any format that libsndfile reads (wav, flac, ogg, mp3, ...).

    Returns:
        ([samples] float32, sample rate in Hz), both as recorded.

    Raises:
        UserError: the recording is missing, cannot be decoded, is not as long as its header says, or holds samples that are
            not finite or on the scale of integers.
    """
    import soundfile

    try:
        # libsndfile reads a file by itself; an object it reads by calls into Python, which swallow a Ctrl-C and lose bytes.
        with _open(recording) if isinstance(recording, Path) else tempfile.TemporaryFile() as file:
            if not isinstance(recording, Path):
                file.write(recording.read_bytes())
                file.seek(0)
            wave, rate = _decode_whole(file.fileno())
    except FileNotFoundError as error:
        raise UserError(f"recording {recording}: no such file; a path is read relative to the file that names it") from error
    except OSError as error:
        raise UserError(f"recording {recording}: cannot be read ({error.strerror}); correct or remove the item") from error
    except IncompleteError as error:
        raise UserError(f"recording {recording}: is not whole ({error}); copy or write it again from its source") from error
    except ValueError as error:
        raise UserError(f"recording {recording}: cannot be read ({error}); correct or remove the item") from error
    except soundfile.SoundFileError as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(
            f"recording {recording}: cannot be decoded ({reason}); use wav, flac, ogg or mp3, whole and undamaged"
        ) from error
    if not np.isfinite(wave).all():
        raise UserError(f"recording {recording}: holds NaN or infinite samples; write it again from its source")
    if wrong := on_integer_scale(wave):
        raise UserError(f"recording {recording}: {wrong}; divide them by 32768 if they are integers of 16 bits")
    if rate < _LOWEST_RATE:
        raise UserError(f"recording {recording}: {rate} Hz hold no speech; write it again from its source")
    return wave.mean(axis=1), rate


def _open(path: Path) -> BinaryIO:
    if path.is_fifo() or path.is_char_device():
        # Which would be waited for, or never end.
        raise OSError(errno.EINVAL, "a pipe or device, not a file")
    return path.open("rb")


def _decode_whole(file: int) -> tuple[np.ndarray, int]:
    """[frames, channels] float32 and sample rate of a file, given by its descriptor, that holds all it promises.

    Raises IncompleteError, or soundfile.SoundFileError where it cannot be decoded.
    """
    import soundfile

    # Before libsndfile, which prints warnings of its own about some of them.
    least = check_header(file)
    with soundfile.SoundFile(file, closefd=False) as sound:
        blocks = [np.empty((0, sound.channels), np.float32)]
        # In parts: memory follows from what is there, whatever the header claims, and formats that cannot seek are read too.
        while sum(map(len, blocks)) < sound.frames:
            blocks.append(sound.read(_FRAMES_AT_ONCE, dtype="float32", always_2d=True))
            if not len(blocks[-1]):
                break
        check_notes(sound.extra_info)
    wave = np.concatenate(blocks)
    if not len(wave) and (size := os.fstat(file).st_size) > _LONGEST_EMPTY:
        raise IncompleteError(f"its header says that there is no sound, in a file of {size} bytes")
    if len(wave) < least:
        raise IncompleteError(f"it has {least} samples or more, of which {len(wave)} can be decoded")
    return wave, sound.samplerate


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
