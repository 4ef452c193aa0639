"""R_beh: whether a spoken completion says what its written reference says. Shapes: N completions, P pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from tars_fast.learning.rewards.inputs import Needs, RewardInput
from tars_fast.support.cli import first_line
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import TrainingError, UserError


class TextSimilarity(Protocol):
    """Compares what two completions say."""

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        """[P] fp32 cosine of each pair's embeddings; every distinct text is embedded once."""
        ...

    def embed(self, texts: Sequence[str]) -> Any:
        """[texts, E] array, dense or sparse, of unit length by row."""
        ...


def _numbered(left: Sequence[str], right: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """(distinct texts, index of each left text, index of each right text)."""
    numbers: dict[str, int] = {}
    left_indices = [numbers.setdefault(text, len(numbers)) for text in left]
    right_indices = [numbers.setdefault(text, len(numbers)) for text in right]
    return list(numbers), left_indices, right_indices


class HashedNgrams:
    """Compares hashed word 1- to 3-grams: offline, for short answers after a template."""

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(
            ngram_range=(1, 3), n_features=2**12, alternate_sign=False, lowercase=False, token_pattern=r"\w+|[^\w\s]"
        )

    def embed(self, texts: Sequence[str]) -> Any:
        return self._vectorizer.transform(texts)

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        texts, left_indices, right_indices = _numbered(left, right)
        vectors = self.embed(texts)
        cosines = np.asarray(vectors[left_indices].multiply(vectors[right_indices]).sum(axis=1)).ravel()
        return torch.from_numpy(cosines).float()


class SentenceEmbedder:
    """A sentence-transformers model, e.g. the paper's Qwen3-Embedding-0.6B."""

    def __init__(self, name: str, device: torch.device):
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(name, device=str(device), trust_remote_code=False)
        # The embedder works beside the trainer and must not wait for it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def embed(self, texts: Sequence[str]) -> Any:
        return self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        texts, left_indices, right_indices = _numbered(left, right)
        with torch.cuda.stream(self._stream):
            vectors = self._model.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
            return (vectors[left_indices] * vectors[right_indices]).sum(-1).float().cpu()


HASHED_NGRAMS = "hashed-ngrams"


def _check_modules(name: str, flag: str) -> None:
    """Raises UserError where a folder asks for classes of its own, which some releases of sentence-transformers run unasked."""
    path = Path(name) / "modules.json"
    for module in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ():
        if not module["type"].startswith("sentence_transformers."):
            raise UserError(
                f"{flag} {name}: asks for code of its own ({module['type']!s:.80}), which is never run; name another"
            )


def load_text_similarity(name: str, device: torch.device, flag: str = "--behaviour-model") -> TextSimilarity:
    """`hashed-ngrams`, or a sentence-transformers model by name or path; `flag` is what named it.

    Raises:
        UserError: the model cannot be loaded.
    """
    if name == HASHED_NGRAMS:
        return HashedNgrams()
    try:
        _check_modules(name, flag)
        return SentenceEmbedder(name, device)
    except (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{flag} {name}: cannot be loaded ({reason}); check the name, or the network") from error


@dataclass(eq=False)
class Behaviour:
    """Similarity of a spoken completion's text with its reference's."""

    text_similarity: TextSimilarity
    needs: ClassVar[Needs] = Needs(reference=True, background=True)

    def __call__(self, completions: list[RewardInput]) -> list[float]:
        """
        Raises:
            TrainingError: the embedder fails, or gives what is not finite.
        """
        written = [one.reference.text for one in completions if one.reference is not None]
        try:
            return [*finite_similarities(self.text_similarity, [one.text for one in completions], written).tolist()]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{error!r:.200}"
            raise TrainingError(
                f"the text embedder of --behaviour-model failed ({reason}); the last checkpoint, if there is one, is good"
            ) from error


def finite_similarities(text_similarity: TextSimilarity, left: Sequence[str], right: Sequence[str]) -> Tensor:
    """[P] `text_similarity.similarity`. Raises ValueError for what is not one finite number a pair, or whatever it raises."""
    similarities = text_similarity.similarity(left, right)
    if similarities.shape != (len(left),):
        raise ValueError(f"shape {tuple(similarities.shape)} for {len(left)} pairs of texts")
    if not similarities.isfinite().all():
        place = int(similarities.isfinite().int().argmin())
        raise ValueError(f"{similarities[place]} for {left[place]!r:.100} and {right[place]!r:.100}")
    return similarities
