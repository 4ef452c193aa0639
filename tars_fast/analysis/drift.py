"""Analysis of a model item by item: drift of completions and their states between speech and text, alignment of layers.

Each item takes part in one forward pass (`row`). What is kept of it afterwards are a few numbers for each layer (`paths` among
them), and [L, L] numbers of its prompts (`alignment`); these are added to sums over items, of all items and of every resample.

Shapes: I items, T pairs of tokens, D hidden size, L layers, K stretches of a completion, R rows of weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tars_fast.analysis.alignment import (
    FEWEST_PAIRS,
    StreamedMeans,
    band_widths,
    best_layers,
    compare_layers,
    content_span,
    correlation,
    debiased,
    describe_layers,
    interval,
    layer_numbers,
    mean_of_known,
    resampling,
    share_of_same,
    thinned,
    warp,
)
from tars_fast.analysis.paths import METRICS, PathIntervention, compare_tokens
from tars_fast.analysis.probes import Calibration
from tars_fast.analysis.row import KINDS, AnsweredItem, ItemPrompts, Row, RowStates, run_row
from tars_fast.evaluation.scorers import read_strictly
from tars_fast.models.memory import EVALUATION_TOKENS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.types import Modality, Prompt, Question, UserError

TOKENS_PER_FORWARD = EVALUATION_TOKENS // 4
"""Most tokens of a pass, which keeps the states of its prompts' content of all layers: at 7B, of two minutes of speech in
bfloat16, about 0.8 GB."""
MISMATCHED = "mismatched_"
"""Prefix of the figures of an item's speech with the words of the item before it, aligned in the same way.

CKA of the same words has to lie above them: alignment seeks similar states, and neighbouring frames of speech are similar."""
CORRELATED = (*METRICS, *(f"{kind}_{what}" for kind in KINDS for what in ("pooled", "tokens")))
"""Figures by layer that are correlated with the accuracy gap."""
SCALARS = (
    "speech_accuracy",
    "text_accuracy",
    "accuracy_gap",
    "same_answer",
    "same_completion",
    "first_divergence",
    "first_divergence_share",
    "speech_tokens",
    "text_tokens",
)
"""Values of an item that are single numbers."""


@dataclass(frozen=True)
class AnalysisSettings:
    """How items are analysed."""

    max_new_tokens: int
    base_layer: int
    """Layer, from 1, whose states pair the tokens of speech and text."""
    other_base_layers: tuple[int, ...]
    """Layers that pair them too, to see how far CKA depends on that choice."""
    seed: int
    """Seed of resamples and halves."""


def first_divergence(spoken: Sequence[int], written: Sequence[int]) -> tuple[float, float]:
    """(number of the first token that differs or has no counterpart, its share of the longer one); NaN where all agree."""
    shortest, longest = sorted((len(spoken), len(written)))
    place = next((place for place in range(shortest) if spoken[place] != written[place]), shortest)
    return (math.nan, math.nan) if place == longest else (place, place / longest)


class Analysis:
    """Sums over items that are added batch by batch, and the figures that follow from them.

    Args:
        calibrations: are given the states of the items at their layers.
        interventions: the spoken prompts are answered once more under each.
    """

    def __init__(
        self,
        model: SpeechModel,
        engine: RolloutEngine,
        settings: AnalysisSettings,
        calibrations: Sequence[Calibration] = (),
        interventions: Sequence[PathIntervention] = (),
    ):
        self.settings = settings
        self.num_items = 0
        self.failed: dict[str, str] = {}
        phases = ("encode", "generate", "forward", "align", "path", *(["intervene"] if interventions else []))
        self.seconds = dict.fromkeys(phases, 0.0)
        self._model, self._engine = model, engine
        self._calibrations, self._interventions = calibrations, interventions
        self._text_before: Tensor | None = None
        self.means = StreamedMeans()
        self.other_means = {layer: StreamedMeans() for layer in settings.other_base_layers}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started

    @torch.inference_mode()
    def add(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Analyse some items; returns a record of each that could be used, and keeps none of them."""
        usable = self._prompts(questions)
        if not usable:
            return []
        records = [record for batch in _batches(self._answer(usable)) for record in self._add_batch(batch)]
        self.num_items += len(records)
        return records

    def _add_batch(self, items: Sequence[AnsweredItem]) -> list[dict[str, Any]]:
        """One forward pass over some items, whose states are gone when this returns."""
        weights = np.stack([resampling(self.settings.seed, item.prompts.question.id) for item in items])
        row = Row.pack(self._model, items)
        with self._timed("forward"):
            states = run_row(self._model, row, self._calibrations)
        values = states.similarities() | _chain(items)
        prompts = row.contents(states.contents)
        for number, (speech, text) in enumerate(zip(prompts[::2], prompts[1::2], strict=True)):
            self._align(speech, text, weights[number : number + 1])
        for own in self._interventions:
            with self._timed("intervene"):
                values[own.name] = self._intervene(own, items, row, states)
        self.means.add(weights, values)
        return _records(items, values)

    def _prompts(self, questions: Sequence[Question]) -> list[ItemPrompts]:
        """Encode the prompts of all items; those that cannot be used are put into `failed`."""
        limit = self.settings.max_new_tokens
        with self._timed("encode"):
            spoken = encode_speech(self._model, self._engine, prepare_speech(self._model, questions), limit)
            written = self._model.encode_prompts(questions, Modality.TEXT)
        usable = []
        for question, speech, text in zip(questions, spoken, written, strict=True):
            if isinstance(speech, UserError):
                self.failed[question.id] = str(speech)
                continue
            places = self._places(speech, text)
            if (reason := self._engine.refusal(text, limit)) is not None:
                self.failed[question.id] = reason
            elif min(map(len, places)) < FEWEST_PAIRS:
                self.failed[question.id] = f"its prompts have fewer than {FEWEST_PAIRS} tokens of their own, too few to compare"
            else:
                usable.append(ItemPrompts(question, speech, text, *places))
        return usable

    def _places(self, speech: Prompt, text: Prompt) -> tuple[Tensor, Tensor]:
        """Places of the audio tokens in the spoken prompt, and of the words in the written one."""
        is_audio = torch.tensor(speech.token_ids) == self._model.prompts.audio_token_id
        return is_audio.nonzero()[:, 0], torch.arange(*content_span(text.token_ids, speech.token_ids))

    def _answer(self, prompts: Sequence[ItemPrompts]) -> list[AnsweredItem]:
        """Complete both prompts of every item, greedily."""
        greedy = self._greedy
        numbers = range(len(prompts))
        with self._timed("generate"):
            spoken = self._engine.generate([own.speech for own in prompts], numbers, greedy)
            written = self._engine.generate([own.text for own in prompts], numbers, greedy)
            self._engine.release_memory()
        return [AnsweredItem(*parts) for parts in zip(prompts, spoken, written, strict=True)]

    @property
    def _greedy(self) -> Sampling:
        return Sampling(1, self.settings.max_new_tokens, temperature=0.0, seed=self.settings.seed)

    def _intervene(
        self, intervention: PathIntervention, items: Sequence[AnsweredItem], row: Row, states: RowStates
    ) -> np.ndarray:
        """[I] whether the answers from speech are right under the intervention."""
        own = [item.prompts for item in items]
        inputs = row.contents(states.inputs(intervention.layer))
        targets = [
            (prompts.speech, intervention.target(speech, text, prompts.audio_places))
            for prompts, speech, text in zip(own, inputs[::2], inputs[1::2], strict=True)
        ]
        with intervention.applied(self._model, targets):
            answers = self._engine.generate([prompts.speech for prompts in own], range(len(own)), self._greedy)
        self._engine.release_memory()
        right = [read_strictly(answer.text, item.question).correct for answer, item in zip(answers, own, strict=True)]
        return np.array(right, dtype=np.float64)

    def _align(self, speech: Tensor, text: Tensor, weights: np.ndarray) -> None:
        """Add the alignment of an item: speech [L, audio tokens, D], text [L, words, D], weights [1, R]."""
        base = self.settings.base_layer
        with self._timed("align"):
            aligned = _compare(speech, text, base)
            self.means.add(weights, aligned)
            for layer, means in self.other_means.items():
                means.add(weights, aligned if layer == base else _compare(speech, text, layer))
            if self._text_before is not None:
                self.means.add(weights, _of_another(_compare(speech, self._text_before, base)))
        with self._timed("path"):
            self.means.add(weights, _tokens(speech, text))
            if self._text_before is not None:
                self.means.add(weights, _of_another(_tokens(speech, self._text_before)))
        self._text_before = text.clone()

    def report(self) -> dict[str, Any]:
        """All figures, each with its 95 % interval over items."""
        means = self.means
        figures: dict[str, Any] = {"num_items": self.num_items, "num_failed": len(self.failed), "failed": self.failed}
        if not self.num_items:
            return figures
        figures["chain"] = _figures({name: means.rows(name) for name in SCALARS})
        figures["paths"] = {"own": _path_figures(means, "")}
        if self.num_items > 1:
            figures["paths"]["mismatched"] = _path_figures(means, MISMATCHED)
        if self._interventions:
            figures["interventions"] = self._intervened()
        figures["drift"] = {
            kind: _figures({name: means.rows(f"{kind}_{name}") for name in ("pooled", "tokens", "along")}) for kind in KINDS
        }
        estimates = {"cka": means.rows("cka"), "debiased": debiased(means)}
        alignment: dict[str, Any] = {
            "base_layer": self.settings.base_layer,
            "path_length": means.rows("path_length")[0].item(),
            "chance": means.rows("chance")[0].tolist(),
        }
        for name, rows in estimates.items():
            alignment[name] = _figures({"matrix": rows}) | describe_layers(rows)
        if self.num_items > 1:
            unrelated = {"cka": means.rows(f"{MISMATCHED}cka"), "debiased": debiased(means, MISMATCHED)}
            for name, rows in unrelated.items():
                alignment[name] |= _figures({"mismatched": rows, "above_mismatched": estimates[name] - rows})
        alignment["base_layers"] = {
            str(layer): {
                name: _agreement(rows, estimates[name])
                for name, rows in (("cka", other.rows("cka")), ("debiased", debiased(other)))
            }
            for layer, other in self.other_means.items()
        }
        figures["alignment"] = alignment
        items = self.num_items
        figures["cost"] = {f"{phase}_seconds_per_item": seconds / items for phase, seconds in self.seconds.items()}
        return figures

    def _intervened(self) -> dict[str, Any]:
        """Accuracy on speech without and under each intervention, and the paired difference."""
        plain = self.means.rows("speech_accuracy")
        figures = {"plain": _figures({name: self.means.rows(name) for name in ("speech_accuracy", "text_accuracy")})}
        for own in self._interventions:
            rows = self.means.rows(own.name)
            figures[own.name] = _figures({"speech_accuracy": rows}) | {"change": _figures({"speech_accuracy": rows - plain})}
        return figures

    def resamples(self) -> dict[str, np.ndarray]:
        """[R, ...] of every figure, for `change_since`."""
        rows = {name: self.means.rows(name) for name in self.means.names if "hsic" not in name}
        return rows | {"debiased": debiased(self.means)}


def change_since(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Differences to another analysis of the same items with the same seed: its resamples are the same, so they are paired."""
    shared = [name for name in after if name in before and after[name].shape == before[name].shape]
    return _figures({name: after[name] - before[name] for name in shared})


def over_models(models: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Accuracies and figures of several models, and over the models the correlation of each figure with the accuracy gap.

    Pearson's, whose square is the R^2 of a straight line; null where a figure or the gap is the same for all. Intervals are
    over items, with the same resamples for every model; over other models they say nothing.

    Args:
        models: the `resamples` of each, of the same items with the same seed.
    """
    accuracies = ("speech_accuracy", "text_accuracy", "accuracy_gap")
    figures: dict[str, Any] = {"models": {}, "correlation": {}}
    for name, rows in models.items():
        means = {metric: mean_of_known(rows[metric]) for metric in CORRELATED}
        figures["models"][name] = _figures({own: rows[own] for own in accuracies} | means)
    gap = np.stack([rows["accuracy_gap"] for rows in models.values()], axis=-1)
    for metric in CORRELATED:
        layers = np.stack([rows[metric] for rows in models.values()], axis=-1)
        by_layer = _with_gap(layers, gap[:, None])
        figures["correlation"][metric] = _figures({"mean": _with_gap(layers.mean(1), gap), "layers": by_layer})
    return figures


def _with_gap(values: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """[...] correlation of values with the gap, both [..., M], over models."""
    values, gap = np.broadcast_arrays(values, gap)
    # Rounding would make a correlation of what does not vary.
    varies = (np.ptp(values, axis=-1) > 0) & (np.ptp(gap, axis=-1) > 0)
    return np.where(varies, correlation(values[..., None, :], gap[..., None, :]), np.nan)


def _figures(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, values in rows.items():
        ends = np.moveaxis(interval(values), 0, -1)
        figures |= {name: values[0].tolist(), f"{name}_ci95": ends.tolist()}
    return figures


def _path_figures(means: StreamedMeans, prefix: str) -> dict[str, Any]:
    """`METRICS` by layer and in the mean over layers, from means whose names begin with `prefix`."""
    rows = {name: means.rows(f"{prefix}{name}") for name in METRICS}
    return {"layers": _figures(rows), "mean": _figures({name: mean_of_known(values) for name, values in rows.items()})}


def _agreement(rows: np.ndarray, main: np.ndarray) -> dict[str, Any]:
    """Agreement of CKA under another base layer with that under the chosen one, both [R, L, L]."""
    best = best_layers(rows)
    figures = _figures(
        {
            "correlation": correlation(rows, main),
            "same_best_layer": share_of_same(best, best_layers(main)),
            "mean_band_width": mean_of_known(band_widths(rows)),
        }
    )
    return figures | {"best_text_layer": layer_numbers(best[0])}


def _compare(speech: Tensor, text: Tensor, layer: int) -> dict[str, np.ndarray]:
    """Figures [1, ...] of one item whose tokens are paired by the states of a layer."""
    path = warp(speech[layer - 1], text[layer - 1])
    x, y = (places.to(speech.device) for places in thinned(path))
    figures = vars(compare_layers(speech[:, x], text[:, y])) | {"path_length": float(len(path[0]))}
    return {name: np.asarray(value)[None] for name, value in figures.items()}


def _tokens(speech: Tensor, text: Tensor) -> dict[str, np.ndarray]:
    """`METRICS` [1, L] of one item."""
    return {name: value[None] for name, value in compare_tokens(speech, text).items()}


def _of_another(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{MISMATCHED}{name}": value for name, value in values.items()}


def _batches(items: Sequence[AnsweredItem]) -> Iterator[list[AnsweredItem]]:
    """Split the items, in order, into batches as large as a forward pass takes."""
    batch: list[AnsweredItem] = []
    for item in items:
        if batch and sum(other.num_tokens for other in batch) + item.num_tokens > TOKENS_PER_FORWARD:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _chain(items: Sequence[AnsweredItem]) -> dict[str, np.ndarray]:
    """[I] of each of `SCALARS`."""
    rows = []
    for item in items:
        question = item.prompts.question
        speech, text = (read_strictly(own.text, question) for own in (item.spoken, item.written))
        place, share = first_divergence(item.spoken.token_ids, item.written.token_ids)
        rows.append(
            (
                speech.correct,
                text.correct,
                text.correct - speech.correct,
                speech.extracted is not None and speech.extracted == text.extracted,
                math.isnan(place),
                place,
                share,
                len(item.spoken.token_ids),
                len(item.written.token_ids),
            )
        )
    return dict(zip(SCALARS, np.array(rows, dtype=np.float64).T, strict=True))


def _records(items: Sequence[AnsweredItem], values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The lines of items.jsonl."""
    names = (*SCALARS, *(f"{kind}_{what}" for kind in KINDS for what in ("pooled", "tokens")))
    return [
        {"id": item.prompts.question.id, "speech": item.spoken.text, "text": item.written.text}
        | {"speech_truncated": item.spoken.truncated, "text_truncated": item.written.truncated}
        | {name: values[name][number].tolist() for name in names}
        for number, item in enumerate(items)
    ]
