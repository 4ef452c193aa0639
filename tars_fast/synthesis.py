"""Speech synthesis with espeak-ng (extra `speech`)."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_BUFFER_MILLISECONDS = 500

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The initialised library and its sample rate in Hz; once per process, as espeak-ng keeps global state."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(
        _AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MILLISECONDS, espeakng_loader.get_data_path().encode(), 0
    )
    if rate <= 0:
        raise RuntimeError(f"espeak_Initialize returned {rate}")
    return library, rate


def synthesise(text: str, voice: str, *, words_per_minute: int = 175, pitch: int = 50) -> tuple[np.ndarray, int]:
    """Speak `text`.

    Args:
        text: what to say.
        voice: an espeak-ng voice, optionally with a variant, e.g. `en-gb+f3`.
        words_per_minute: 80 to 450.
        pitch: 0 to 100.

    Returns:
        ([samples] float32 in [-1, 1], sample rate in Hz).

    Raises:
        ValueError: unknown voice.
        RuntimeError: the library failed.
    """
    library, rate = _library()
    chunks: list[np.ndarray] = []

    @_SynthCallback
    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"voice {voice!r} is not one of espeak-ng's")
    library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
    if status != 0:
        raise RuntimeError(f"espeak_Synth returned {status} for {text!r}")
    library.espeak_Synchronize()
    return np.concatenate(chunks).astype(np.float32) / 32768 if chunks else np.zeros(0, np.float32), rate
