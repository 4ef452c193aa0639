"""Similarity of speech and text by arXiv 2510.12116: of whole sequences, and token by token along the alignment path.

At each layer, S audio tokens of the spoken prompt are compared with the W words of the written one, by cosine and by Euclidean
distance:

- of the sequences: of the mean states (its section 4.1);
- of the tokens: the path gives each word the audio token most similar to it, or nearest to it. Nothing makes that path advance
  with the words; that it does is what Spearman's correlation of words with their audio tokens says (5.1). The mean over words
  of the similarity on the path is, in the mean over layers, the Alignment Path Score (5.2).

`PathIntervention` is the probe of its section 5.3: audio tokens on the path are given the direction, or the length, of the
state of their word. The paper says neither at which layer nor what becomes of an audio token that is on the path of several
words; here the layer is given, and such a token has the word most similar to it.

Shapes: S audio tokens, W words, K changed audio tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from tars_fast.analysis.alignment import correlation
from tars_fast.models.speech_model import SpeechModel
from tars_fast.types import Prompt

METRICS = (
    "sequence_cosine",
    "sequence_distance",
    "path_cosine",
    "path_distance",
    "monotonicity_cosine",
    "monotonicity_distance",
    "same_path",
)
"""Figures of an item by layer. `same_path`: share of words that have the same audio token on both paths."""

_DOUBLES = 2**23
"""Numbers in double precision that states are compared in at a time, 64 MB."""


def compare_tokens(speech: Tensor, text: Tensor) -> dict[str, np.ndarray]:
    """`METRICS` of one item, each [L]; a monotonicity is NaN where all words have the same audio token.

    Args:
        speech: [L, S, D]
        text: [L, W, D]
    """
    figures, paths = [], []
    # As many layers at a time as fit: all of them in double precision could be several times the states of the pass.
    step = max(1, _DOUBLES // (len(speech[0]) + len(text[0])) // speech.shape[-1])
    for part, other in zip(speech.split(step), text.split(step), strict=True):
        x, y = part.double(), other.double()
        products, x_norms, y_norms = x @ y.mT, x.norm(dim=-1)[:, :, None], y.norm(dim=-1)[:, None]
        similar = (products / (x_norms * y_norms).clamp(min=1e-30)).max(1)
        near = (x_norms.square() + y_norms.square() - 2 * products).min(1)
        means = x.mean(1), y.mean(1)
        distances = (means[0] - means[1]).norm(dim=-1), near.values.clamp(min=0).sqrt().mean(-1)
        figures.append(torch.stack([cosine_similarity(*means), distances[0], similar.values.mean(-1), distances[1]]))
        paths.append(torch.stack([similar.indices, near.indices]))
    columns, found = torch.cat(figures, dim=1).cpu().numpy(), torch.cat(paths, dim=1).cpu().numpy()
    values = [*columns, *monotonicity(found), (found[0] == found[1]).mean(-1)]
    return dict(zip(METRICS, values, strict=True))


def monotonicity(paths: np.ndarray) -> np.ndarray:
    """[...] Spearman's correlation of the numbers of words with their places [..., W] in the speech."""
    from scipy.stats import rankdata

    ranks = rankdata(paths, axis=-1)
    words = np.broadcast_to(np.arange(paths.shape[-1], dtype=np.float64), ranks.shape)
    return correlation(ranks[..., None, :], words[..., None, :])


def critical_tokens(speech: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The audio tokens on the path by cosine, from the least to the most similar to its word, and those words: [K] places each.

    Args:
        speech: [S, D] of one layer.
        text: [W, D]
    """
    found = (normalize(speech.double(), dim=-1) @ normalize(text.double(), dim=-1).T).max(0)
    places = found.indices.tolist()
    order = found.values.argsort(stable=True).tolist()
    # Of several words the last, which is the most similar one.
    word_of = {places[word]: word for word in order}
    kept = [word for word in order if word_of[places[word]] == word]
    return torch.tensor([places[word] for word in kept]), torch.tensor(kept)


@dataclass(frozen=True)
class Target:
    """The audio tokens of a prompt that are to be changed, and the states of their words."""

    places: Tensor
    """[K] in the prompt."""
    words: Tensor
    """[K, D]"""


@dataclass(frozen=True)
class PathIntervention:
    """Gives audio tokens on the path, at the input of one layer, the direction or the length of the state of their word."""

    kind: Literal["angle", "length"]
    """angle: the direction of the word's state, at the token's own length; length: the other way round."""
    layer: int
    """Number of layers before that input, 0 to L - 1; 0: the embeddings."""
    num_tokens: int | None
    """Only so many tokens of a prompt, those that are least similar to their word. None: all on the path."""

    @property
    def name(self) -> str:
        """As it is called in analysis.json."""
        return f"{self.kind}_{self.layer}_{'all' if self.num_tokens is None else f'lowest_{self.num_tokens}'}"

    def target(self, speech: Tensor, text: Tensor, audio_places: Tensor) -> Target:
        """What is to be changed in one spoken prompt.

        Args:
            speech: [S, D] states of its audio tokens at the input of the layer.
            text: [W, D] states of the words of the written prompt there.
            audio_places: [S] places of the audio tokens in the prompt.
        """
        places, words = (chosen[: self.num_tokens] for chosen in critical_tokens(speech, text))
        return Target(audio_places[places], text[words.to(text.device)])

    def __call__(self, states: Tensor, words: Tensor) -> Tensor:
        """Change states [K, D] by those of their words [K, D]."""
        own, other = states.double(), words.double()
        direction, length = (other, own) if self.kind == "angle" else (own, other)
        return (normalize(direction, dim=-1) * length.norm(dim=-1, keepdim=True)).to(states.dtype)

    @contextmanager
    def applied(self, model: SpeechModel, targets: Sequence[tuple[Prompt, Target]]) -> Iterator[None]:
        """Within the block all passes of these very prompts are changed: rollouts by transformers, `SpeechModel.forward`."""
        target_of = {id(prompt): target for prompt, target in targets}
        embed = model.embed_tokens
        row: dict[int, Target] = {}

        def remember(token_ids: Tensor, prompts: Sequence[Prompt], starts: Sequence[int]) -> Tensor:
            row.clear()
            for prompt, start in zip(prompts, starts, strict=True):
                if (target := target_of.get(id(prompt))) is not None:
                    row[start] = target
            return embed(token_ids, prompts, starts)

        def change(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # Passes over single new tokens follow the one over prompts; in them there is nothing to change.
            if not row:
                return None
            states = inputs[0].clone()
            places = torch.cat([start + target.places for start, target in row.items()]).to(states.device)
            flat = states.view(-1, states.shape[-1])
            flat[places] = self(flat[places], torch.cat([target.words for target in row.values()]))
            row.clear()
            return (states, *inputs[1:])

        hook = model.language_model.layers[self.layer].register_forward_pre_hook(change)
        model.embed_tokens = remember  # type: ignore[method-assign]
        try:
            yield
        finally:
            hook.remove()
            del model.embed_tokens
