"""Similarity of the hidden states of speech and text: alignment of tokens, CKA of all pairs of layers, intervals.

Tokens are aligned by dynamic time warping on 1 - cosine of one layer's states (Sakoe & Chiba 1978), by dtaidistance.

CKA is estimated item by item, on the pairs of tokens along the item's path, so that only [L, L] numbers of an item are kept:

- `cka`: double-centred linear CKA of each item (`tars_kernels.linear_cka`), averaged. Few tokens and many dimensions lift it:
  unrelated states reach about D' / (D' + T), D' being the dimensions that they effectively fill.
- `chance`: that level, exactly: the mean of `cka` over all permutations of an item's text tokens.
- `debiased`: HSIC_1 (Song et al. 2012), summed over items before it is normalised (Nguyen et al. 2021); 0 for unrelated
  states whatever T and D. Neither estimate corrects for a path that seeks similar states: `drift.MISMATCHED` measures that.

Intervals are Poisson bootstraps (Chamandy et al. 2012): in every resample an item counts Poisson(1) times. The counts follow
from seed and id alone, so only sums are kept, and two analyses of the same items have the same resamples: they are paired.

Shapes: S speech tokens, W text tokens, T pairs of them, D hidden size, L layers, I items, R rows of weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tars_kernels import linear_cka
from torch import Tensor

NUM_RESAMPLES = 1000
"""A 95 % interval's ends are then stable to about a seventh of its width; every figure keeps a row for each resample."""
NUM_HALVINGS = 10
"""Random divisions of the items into halves, over which stability is measured."""
FEWEST_PAIRS = 4
"""HSIC_1 divides by T (T - 3)."""
MOST_PAIRS = 1024
"""Pairs of an item that CKA is taken over, evenly spread; Gram matrices of 32 layers then are 0.1 GB a side, states at D = 4096
0.5 GB. 41 s of speech have as many at 25 tokens a second."""
BAND = 0.9
"""Text layers belong to a speech layer's band where their CKA reaches this share of the best one's."""


def content_span(own: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """(start, end) of the tokens between the beginning and the end that a prompt shares with another: without the template."""
    shortest = min(len(own), len(other))
    start = next((place for place in range(shortest) if own[place] != other[place]), shortest)
    # A token counts once, also where beginning and end would overlap.
    ends = range(shortest - start)
    shared = next((place for place in ends if own[-1 - place] != other[-1 - place]), len(ends))
    return start, len(own) - shared


def relative_pairs(num_x: int, num_y: int) -> tuple[Tensor, Tensor]:
    """Pair the tokens of two sequences that lie at the same share of their length."""
    count = max(num_x, num_y)
    places = torch.arange(count)
    return places * num_x // count, places * num_y // count


def warp(speech: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Align two sequences: the path of least cost in which each step advances in one or in both, at 1 - cosine a pair.

    Args:
        speech: [S, D]
        text: [W, D]

    Returns:
        [T] places in each; every token is in at least one pair.
    """
    from dtaidistance import dtw_ndim

    x, y = (torch.nn.functional.normalize(states.double(), dim=-1) for states in (speech, text))
    # dtaidistance takes points, not a matrix of costs. Squared distances of unit vectors are 2 (1 - cosine). Only distances to
    # states of the text matter, which need the W axes that these span, and one axis for the rest, instead of D.
    axes = torch.linalg.qr(y.T).Q
    inside = x @ axes
    rest = (1 - inside.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    x, y = torch.cat([inside, rest], dim=1), torch.cat([y @ axes, torch.zeros(len(y), 1, dtype=y.dtype)], dim=1)
    path = torch.tensor(dtw_ndim.warping_path(x.cpu().numpy(), y.cpu().numpy(), use_c=True))
    return path[:, 0], path[:, 1]


def thinned(path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keep at most `MOST_PAIRS` of the pairs, evenly spread, the first and the last among them."""
    count = len(path[0])
    if count <= MOST_PAIRS:
        return path
    chosen = torch.linspace(0, count - 1, MOST_PAIRS, dtype=torch.float64).round().long()
    return path[0][chosen], path[1][chosen]


@dataclass(frozen=True)
class ItemAlignment:
    """What is kept of an item's aligned states."""

    cka: np.ndarray
    """[L, L] speech layers x text layers."""
    chance: np.ndarray
    """[L, L]"""
    hsic: np.ndarray
    """[L, L] HSIC_1, not normalised."""
    speech_hsic: np.ndarray
    """[L] HSIC_1 of each layer of speech with itself."""
    text_hsic: np.ndarray
    """[L]"""


def compare_layers(speech: Tensor, text: Tensor) -> ItemAlignment:
    """Compare all pairs of layers of one item.

    Args:
        speech: [L, T, D] states of the pairs of tokens, at least `FEWEST_PAIRS` of them.
        text: [L, T, D]
    """
    count = speech.shape[1]
    grams, sizes, spectra = [], [], []
    for states in (speech, text):
        centred = states.float() - states.float().mean(1, keepdim=True)
        gram = centred @ centred.mT
        diagonal = gram.diagonal(dim1=1, dim2=2)
        sizes.append(diagonal.sum(-1))
        spectra.append(gram.square().sum((1, 2)).sqrt())
        diagonal.zero_()
        grams.append(gram)
    x, y = grams
    (x_trace, y_trace), (x_norm, y_norm) = sizes, spectra
    # The mean of tr(K P M P') over permutations P is tr(K) tr(M) / (T - 1) where both are centred.
    chance = (x_trace / x_norm.clamp(min=1e-30))[:, None] * (y_trace / y_norm.clamp(min=1e-30)) / (count - 1)

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return _hsic(x.flatten(1) @ y.flatten(1).T, x.sum(-1), y.sum(-1))

    def alone(x: Tensor) -> Tensor:
        rows = x.sum(-1)
        return torch.stack([_hsic(g.square().sum(), r, r) for g, r in zip(x, rows, strict=True)])

    values = (linear_cka(speech, text), chance, pairs(x, y), alone(x), alone(y))
    return ItemAlignment(*(value.double().cpu().numpy() for value in values))


def _hsic(products: Tensor, x_rows: Tensor, y_rows: Tensor) -> Tensor:
    """HSIC_1 from Gram matrices without diagonal: the sums of their products, and of their rows [..., T]."""
    count = x_rows.shape[-1]
    totals = x_rows.sum(-1)[..., None] * y_rows.sum(-1) if x_rows.ndim == 2 else x_rows.sum() * y_rows.sum()
    across = x_rows @ y_rows.T if x_rows.ndim == 2 else x_rows @ y_rows
    terms = products + totals / ((count - 1) * (count - 2)) - 2 * across / (count - 2)
    return terms / (count * (count - 3))


def resampling(seed: int, key: str) -> np.ndarray:
    """[R] weights of an item: 1 among all items, Poisson(1) in each resample, then 1 in one of each pair of halves, else 0."""
    generator = np.random.default_rng(list(hashlib.sha256(f"{seed} {key}".encode()).digest()))
    halves = generator.integers(0, 2, NUM_HALVINGS)
    resamples = generator.poisson(1.0, NUM_RESAMPLES)
    return np.concatenate([[1], resamples, np.stack([halves, 1 - halves], axis=1).ravel()]).astype(np.float64)


class StreamedMeans:
    """Means over all items and over every resample, of values that are summed and not kept."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, weights: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add items: weights [I, R], and values [I, ...] by name, NaN where an item has none."""
        for name, given in values.items():
            flat = np.asarray(given, dtype=np.float64).reshape(len(weights), -1)
            known = np.isfinite(flat)
            shape = (weights.shape[1], *np.shape(given)[1:])
            # One count for all entries where none is missing, as in the [L, L] of CKA.
            counts = weights.sum(0)[:, None] if known.all() else weights.T @ known
            sums = weights.T @ np.where(known, flat, 0.0)
            if name not in self._sums:
                self._sums[name] = np.zeros(shape)
                self._counts[name] = np.zeros((shape[0], 1))
            self._sums[name] += sums.reshape(shape)
            self._counts[name] = self._counts[name] + counts

    @property
    def names(self) -> list[str]:
        return list(self._sums)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self._sums.values(), *self._counts.values()))

    def rows(self, name: str) -> np.ndarray:
        """[R, ...] means; NaN where no item has a value."""
        sums, counts = self._sums[name], self._counts[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (sums.reshape(len(sums), -1) / np.where(counts > 0, counts, np.nan)).reshape(sums.shape)


def interval(rows: np.ndarray) -> np.ndarray:
    """[2, ...] ends of the 95 % percentile interval over the resamples among rows of weights."""
    resamples = rows[1 : 1 + NUM_RESAMPLES]
    known = np.isfinite(resamples).any(0)
    return np.nanpercentile(np.where(known, resamples, 0.0), [2.5, 97.5], axis=0) + np.where(known, 0.0, np.nan)


def debiased(means: StreamedMeans, prefix: str = "") -> np.ndarray:
    """[R, L, L] debiased CKA from the means `hsic`, `speech_hsic`, `text_hsic`, whose names begin with `prefix`."""
    products, speech, text = (means.rows(f"{prefix}{name}") for name in ("hsic", "speech_hsic", "text_hsic"))
    scale = speech[:, :, None] * text[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, products / np.sqrt(np.where(scale > 0, scale, 1.0)), np.nan)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """[...] mean over the last axis of what is not NaN; NaN where all is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(-1) / known.sum(-1)


def best_layers(cka: np.ndarray) -> np.ndarray:
    """[..., L] text layer, from 1, of highest CKA with each speech layer; NaN in a resample without items."""
    known = np.isfinite(cka)
    return np.where(known.any(-1), np.where(known, cka, -np.inf).argmax(-1) + 1, np.nan)


def share_of_same(best: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[...] share of speech layers whose `best_layers` are the same."""
    return mean_of_known(np.where(np.isfinite(best + others), best == others, np.nan))


def band_widths(cka: np.ndarray) -> np.ndarray:
    """[..., L] number of neighbouring text layers, the best one among them, that reach `BAND` of its CKA.

    0 where no CKA is above 0, NaN in a resample without items.

    Args:
        cka: [..., L, L] speech layers x text layers.
    """
    filled = np.nan_to_num(cka)
    best = filled.argmax(-1)[..., None]
    peak = np.take_along_axis(filled, best, -1)
    inside = filled >= BAND * peak
    width = np.ones(best.shape, dtype=int)
    for step in (-1, 1):
        reaches = np.ones(best.shape, dtype=bool)
        for distance in range(1, cka.shape[-1]):
            place = best + step * distance
            exists = (place >= 0) & (place < cka.shape[-1])
            reaches &= exists & np.take_along_axis(inside, np.where(exists, place, 0), -1)
            width += reaches
    return np.where(np.isfinite(cka).any(-1), np.where(peak > 0, width, 0)[..., 0], np.nan)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[...] Pearson's correlation over the entries of [..., L, L] that are NaN in neither."""
    x, y = (values.reshape(*values.shape[:-2], -1) for values in (x, y))
    known = np.isfinite(x + y)
    x, y = (np.where(known, values, np.nan) for values in (x, y))
    x, y = (np.nan_to_num(values - mean_of_known(values)[..., None]) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))


def layer_numbers(best: np.ndarray) -> list[int]:
    """Turn layers into integers for JSON, with 0 in the place of NaN."""
    return np.nan_to_num(best).astype(int).tolist()


def describe_layers(rows: np.ndarray) -> dict[str, object]:
    """Best layers, bands and their stability, from rows [R, L, L] of CKA; layers are counted from 1."""
    best, widths = best_layers(rows), band_widths(rows)
    contrast = np.where(np.isfinite(rows), rows, -np.inf).max(-1) - mean_of_known(rows)
    shift = best - np.arange(1, rows.shape[-1] + 1)
    halves = rows[1 + NUM_RESAMPLES :].reshape(NUM_HALVINGS, 2, *rows.shape[1:])
    alike = correlation(halves[:, 0], halves[:, 1])
    same_best = share_of_same(best_layers(halves[:, 0]), best_layers(halves[:, 1]))
    resampled = best[1 : 1 + NUM_RESAMPLES]
    same_as_found = np.where(np.isfinite(resampled), resampled == best[0], np.nan)
    described: dict[str, object] = {}
    figures = {
        "best_text_layer": best,
        "band_width": widths,
        "band_contrast": contrast,
        "mean_band_width": mean_of_known(widths),
        "mean_shift": mean_of_known(shift),
    }
    for name, values in figures.items():
        described |= {name: values[0].tolist(), f"{name}_ci95": interval(values).T.tolist()}
    described["best_text_layer"] = layer_numbers(best[0])
    described["best_text_layer_share"] = mean_of_known(same_as_found.T).tolist()
    described["halves"] = {
        "correlation": alike.tolist(),
        "same_best_layer": same_best.tolist(),
        "mean_band_width": mean_of_known(widths)[1 + NUM_RESAMPLES :].tolist(),
    }
    return described
