"""Speech synthesis with espeak-ng (extra `speech`), reproducible by seed.

The library carries its noise generator and filter memory from one utterance into the next and offers no way to reset them. So
it lives in a small process of its own, which forks for every utterance: each starts from the same fresh state.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any, BinaryIO, Self

import numpy as np

ACCENTS = ("en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
SPEAKERS = ("f2", "f3", "f4", "m1", "m3", "m4", "m7", "klatt", "Annie", "Michael")
VOICES = tuple(f"{accent}+{speaker}" for accent in ACCENTS for speaker in SPEAKERS)
"""The voices of `prepare` where none are given."""

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_BUFFER_MILLISECONDS = 500
_HEADER = struct.Struct("<ii")
"""Sample rate in Hz (0: an error message follows) and number of bytes that follow."""

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesiser:
    """A running espeak-ng; use as a context manager, call for each utterance.

    Raises:
        ImportError: `espeakng-loader` is not installed.
    """

    def __enter__(self) -> Self:
        import espeakng_loader  # noqa: F401  Where it is missing, the caller must get the error, not the other process.

        self._start()
        return self

    def _start(self) -> None:
        command = [sys.executable, "-m", "tars_fast.data.synthesis"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def __exit__(self, *_exception: object) -> None:
        # A process that has died has not read what was written last.
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def __call__(
        self, text: str, voice: str, *, words_per_minute: int = 175, pitch: int = 50, seed: int = 0
    ) -> tuple[np.ndarray, int]:
        """Speak `text`.

        Args:
            text: what to say.
            voice: an espeak-ng voice, optionally with a variant, e.g. `en-us+f3`.
            words_per_minute: 80 to 450.
            pitch: 0 to 100.
            seed: of the noise that espeak-ng adds to a voice.

        Returns:
            ([samples] float32 in [-1, 1], sample rate in Hz).

        Raises:
            ValueError: espeak-ng refuses, e.g. an unknown voice, or crashes; the next call finds it running again.
        """
        request = json.dumps([text, voice, words_per_minute, pitch, seed]) + "\n"
        with suppress(BrokenPipeError):
            self._requests.write(request.encode())
            self._requests.flush()
        header = self._answers.read(_HEADER.size)
        rate, size = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0)
        payload = self._answers.read(size)
        if len(header) + len(payload) < _HEADER.size + size:
            self.__exit__()
            self._start()
            raise ValueError(f"espeak-ng died of {text!r:.80}, spoken by {voice}")
        if rate == 0:
            raise ValueError(payload.decode())
        return np.frombuffer(payload, np.int16).astype(np.float32) / 32768, rate


def _start_library() -> tuple[ctypes.CDLL, int]:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MILLISECONDS, data_path, 0)
    if rate <= 0:
        raise RuntimeError(f"espeak_Initialize returned {rate}")
    return library, rate


def _speak(library: ctypes.CDLL, text: str, voice: str, words_per_minute: int, pitch: int, seed: int) -> bytes:
    """int16 samples."""
    chunks: list[bytes] = []

    @_SynthCallback
    def collect(samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"voice {voice!r} is not one of espeak-ng's")
    library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
    if status != 0:
        raise ValueError(f"espeak_Synth returned {status} for {text!r}")
    library.espeak_Synchronize()
    return b"".join(chunks)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests, a JSON line each, in a fork of the fresh library; end where a fork crashes.

    The caller then finds the end of `replies` before a whole answer, even where the fork had written a part of it.
    """
    library, rate = _start_library()
    for line in requests:
        child = os.fork()
        if child == 0:
            try:
                payload = _speak(library, *json.loads(line))
                header = _HEADER.pack(rate, len(payload))
            except ValueError as error:
                payload = str(error).encode()
                header = _HEADER.pack(0, len(payload))
            replies.write(header + payload)
            replies.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            return


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
