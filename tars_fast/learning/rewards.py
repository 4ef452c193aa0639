"""Rewards of one rollout batch (METHOD step 2). N completions, P pairs, L layers, D hidden size."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tars_kernels import pooled_similarity
from torch import Tensor

from tars_fast.learning.answers import extract_answer, has_format
from tars_fast.support.cli import first_line
from tars_fast.types import Completion, Modality, Question, UserError

FORMAT_WEIGHT = 0.5


@dataclass(frozen=True)
class AnswerRewards:
    """What the text of a completion earns by itself; each [N] fp32 in {0, 1}."""

    accuracy: Tensor
    format: Tensor
    unparsed: Tensor
    """No single answer could be read; such a completion has accuracy 0."""

    @property
    def base(self) -> Tensor:
        """[N] `R_base = R_acc + 0.5 R_fmt`."""
        return self.accuracy + FORMAT_WEIGHT * self.format

    @classmethod
    def joined(cls, parts: Sequence[AnswerRewards]) -> AnswerRewards:
        """Those of several sets of completions, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def answer_rewards(completions: Sequence[Completion], questions: Sequence[Question]) -> AnswerRewards:
    """R_acc and R_fmt of each completion."""
    asked = [questions[completion.question] for completion in completions]
    answers = [extract_answer(c.text, question.choices) for c, question in zip(completions, asked, strict=True)]
    return AnswerRewards(
        accuracy=torch.tensor([float(a == question.answer) for a, question in zip(answers, asked, strict=True)]),
        format=torch.tensor([float(has_format(c.text, q.choices)) for c, q in zip(completions, asked, strict=True)]),
        unparsed=torch.tensor([float(answer is None) for answer in answers]),
    )


def choose_references(completions: Sequence[Completion], accuracy_N: Tensor, rng: random.Random) -> list[int | None]:
    """For each speech completion a *correct* text completion of the *same question*, drawn at random (METHOD step 2).

    Returns:
        N entries, indices into `completions`; None for text completions, for truncated speech completions, and where no
        finished text completion of the question is correct.
    """
    correct: dict[int, list[int]] = {}
    for index, completion in enumerate(completions):
        if completion.modality is Modality.TEXT and accuracy_N[index] == 1 and not completion.truncated:
            correct.setdefault(completion.question, []).append(index)

    def choose(completion: Completion) -> int | None:
        if completion.modality is not Modality.SPEECH or completion.truncated or completion.question not in correct:
            return None
        return rng.choice(correct[completion.question])

    return [choose(completion) for completion in completions]


def representation_rewards(pooled_LND: Tensor, references: Sequence[int | None]) -> Tensor:
    """[N] R_rep: cosine with the reference's pooled states, averaged over layers; 0 without a reference."""
    rewards = pooled_LND.new_zeros(len(references))
    speech = [index for index, reference in enumerate(references) if reference is not None]
    if speech:
        pairs = torch.tensor([(index, references[index]) for index in speech], device=pooled_LND.device)
        rewards[speech] = pooled_similarity(pooled_LND, pairs).mean(-1)
    return rewards


class TextSimilarity(Protocol):
    """What R_beh compares answers with."""

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        """[P] fp32 cosine of each pair's embeddings; every distinct text is embedded once."""
        ...


def _numbered(left: Sequence[str], right: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """(distinct texts, index of each left text, index of each right text)."""
    numbers: dict[str, int] = {}
    left_indices = [numbers.setdefault(text, len(numbers)) for text in left]
    right_indices = [numbers.setdefault(text, len(numbers)) for text in right]
    return list(numbers), left_indices, right_indices


class HashedNgrams:
    """Hashed word 1- to 3-grams: offline, and as good as a small neural model on short templated answers."""

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(
            ngram_range=(1, 3), n_features=2**12, alternate_sign=False, lowercase=False, token_pattern=r"\w+|[^\w\s]"
        )

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        texts, left_indices, right_indices = _numbered(left, right)
        vectors = self._vectorizer.transform(texts)
        cosines = np.asarray(vectors[left_indices].multiply(vectors[right_indices]).sum(axis=1)).ravel()
        return torch.from_numpy(cosines).float()


class SentenceEmbedder:
    """A sentence-transformers model, e.g. the paper's Qwen3-Embedding-0.6B."""

    def __init__(self, name: str, device: torch.device):
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(name, device=str(device))
        # It works beside the trainer, which it must not wait for.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        texts, left_indices, right_indices = _numbered(left, right)
        with torch.cuda.stream(self._stream):
            vectors = self._model.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
            return (vectors[left_indices] * vectors[right_indices]).sum(-1).float().cpu()


HASHED_NGRAMS = "hashed-ngrams"


def load_text_similarity(name: str, device: torch.device) -> TextSimilarity:
    """`hashed-ngrams`, or a sentence-transformers model by name or path.

    Raises:
        UserError: the model cannot be loaded.
    """
    if name == HASHED_NGRAMS:
        return HashedNgrams()
    try:
        return SentenceEmbedder(name, device)
    except (ImportError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"--behaviour-model {name}: cannot be loaded ({reason}); check the name, or the network") from error


def behaviour_rewards(
    completions: Sequence[Completion], references: Sequence[int | None], text_similarity: TextSimilarity
) -> Tensor:
    """[N] R_beh: similarity of a speech completion's text with its reference's; 0 without a reference."""
    rewards = torch.zeros(len(completions))
    compared = {index: reference for index, reference in enumerate(references) if reference is not None}
    if compared:
        rewards[list(compared)] = text_similarity.similarity(
            [completions[index].text for index in compared], [completions[index].text for index in compared.values()]
        )
    return rewards
