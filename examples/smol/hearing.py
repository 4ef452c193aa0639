"""A recogniser for `prepare --recogniser examples/smol/hearing.py:whisper`: Whisper tiny.en, of an installed package."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from parts import AUDIO_TOKENIZER, AUDIO_TOWER, require

_FOLDER = AUDIO_TOWER.find().parent
_TOKENIZER = AUDIO_TOKENIZER.find()
require("ctranslate2", "4.8.5")


@cache
def _load() -> tuple[Any, Any, Any]:
    """(Whisper, its tokenizer, what makes its features)."""
    from ctranslate2.models import Whisper
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor

    whisper = Whisper(str(_FOLDER), compute_type="float32", intra_threads=1)
    return whisper, Tokenizer.from_file(str(_TOKENIZER)), WhisperFeatureExtractor()


def whisper(wave: np.ndarray, rate: int) -> str:
    """What is said in the first 30 s of [samples] float32 at 16 kHz."""
    from ctranslate2 import StorageView

    model, tokenizer, features_of = _load()
    features = features_of(wave, sampling_rate=rate, return_tensors="np").input_features
    prompt = [tokenizer.token_to_id(token) for token in ("<|startoftranscript|>", "<|notimestamps|>")]
    (result,) = model.generate(StorageView.from_array(np.ascontiguousarray(features, np.float32)), [prompt], beam_size=1)
    return tokenizer.decode(result.sequences_ids[0]).strip()
