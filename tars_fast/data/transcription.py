"""How far a transcription is from what was said."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


@cache
def _normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalised(text: str) -> str:
    """Without case, punctuation, contractions and ways to write a number: Whisper's English normalisation."""
    return _normaliser()(text)


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Words substituted, left out and put in, over the words of `reference`, both normalised; may exceed 1."""
    import jiwer

    said, heard = normalised(reference), normalised(hypothesis)
    if not said:
        return float(bool(heard))
    return jiwer.wer(said, heard)
