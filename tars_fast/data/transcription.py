"""The word error rate of a transcription."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


@cache
def _normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalised(text: str) -> str:
    """Whisper's English normalisation: without case, punctuation and contractions, numbers written in one way."""
    return _normaliser()(text)


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Words substituted, deleted and inserted, over the words of `reference`, both normalised; may exceed 1."""
    import jiwer

    reference, hypothesis = normalised(reference), normalised(hypothesis)
    if not reference:
        return float(bool(hypothesis))
    return jiwer.wer(reference, hypothesis)
