"""Inside a model, item by item: how far completions and their states drift apart, and which layers of speech and text agree.

An item is one forward pass over both prompts: its spoken one with the model's own completion and with that of the written one
behind it, its written one with its own. States are reduced while layers run; of completions sums by layer and stretch remain,
of prompts the content (audio tokens; the text that the template does not give) until the pass is over, then [L, L] numbers.

Shapes: I items of a pass, N = 3 I completions, S tokens of the row, T pairs of tokens, D hidden size, L layers, K stretches of
a completion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tars_kernels import pool_sequences, pooled_similarity, token_similarity
from torch import Tensor, nn

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
    relative_pairs,
    resampling,
    share_of_same,
    thinned,
    warp,
)
from tars_fast.analysis.probes import Calibration
from tars_fast.evaluation.scorers import read_completion
from tars_fast.models.memory import EVALUATION_TOKENS
from tars_fast.models.modules import Decoder
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.encode import encode_speech, prepare_speech
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.types import Completion, Modality, Prompt, Question, UserError

NUM_STRETCHES = 10
"""Equal shares of a completion that similarity along it is given for."""
TOKENS_PER_FORWARD = EVALUATION_TOKENS // 4
"""A pass holds its prompts' content of all layers: at 7B, two minutes of speech in bfloat16, about 0.8 GB."""
MEANS = ("own", "forced")
"""Each item's spoken and written completion, each under its own prompt; its written one under both."""
MISMATCHED = "mismatched_"
"""Before the names of figures on an item's speech and the text of the item before it, aligned in the same way. What CKA makes
of the same words in both has to lie above that: a path seeks what is alike, and neighbouring frames are alike in any speech."""
SCALARS = (
    "speech_accuracy",
    "text_accuracy",
    "same_answer",
    "same_completion",
    "first_divergence",
    "first_divergence_share",
    "speech_tokens",
    "text_tokens",
)


@dataclass(frozen=True)
class AnalysisSettings:
    """What is looked at."""

    max_new_tokens: int
    base_layer: int
    """Whose states, behind so many layers, tell which tokens belong together."""
    other_base_layers: tuple[int, ...]
    """For stability: what CKA becomes where another layer tells."""
    seed: int
    """Of resamples and halves."""


@dataclass(frozen=True)
class _Item:
    """What a forward pass needs of an item."""

    speech: Prompt
    text: Prompt
    spoken: Completion
    written: Completion
    audio_places: Tensor
    """Of audio tokens in the spoken prompt."""
    text_places: Tensor
    """Of the content in the written prompt."""

    @property
    def num_tokens(self) -> int:
        prompts = len(self.speech.token_ids) + len(self.text.token_ids)
        return prompts + len(self.spoken.token_ids) + 2 * len(self.written.token_ids)


@contextmanager
def reading(language_model: Decoder, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Have `read` see the states [S, D] of a row as each layer makes them.

    0 is what the first layer is given, 1 to L - 1 what so many layers make of it, L the output of the final norm.
    """
    layers = language_model.layers

    def after(number: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: read(number, (output[0] if isinstance(output, tuple) else output).flatten(0, 1))

    hooks = [layers[0].register_forward_pre_hook(lambda _module, inputs: read(0, inputs[0].flatten(0, 1)))]
    hooks += [layer.register_forward_hook(after(number)) for number, layer in enumerate(layers[:-1], 1)]
    hooks.append(language_model.norm.register_forward_hook(after(len(layers))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_divergence(spoken: Sequence[int], written: Sequence[int]) -> tuple[float, float]:
    """Number of the first token that differs or has no partner, also as a share of the longer one; NaN where there is none."""
    shortest, longest = sorted((len(spoken), len(written)))
    place = next((place for place in range(shortest) if spoken[place] != written[place]), shortest)
    return (math.nan, math.nan) if place == longest else (place, place / longest)


class Analysis:
    """Sums over items; what they come to is asked for at the end.

    Args:
        calibrations: filled on the way with what they need to know of the items' states.
    """

    def __init__(
        self,
        model: SpeechModel,
        engine: RolloutEngine,
        settings: AnalysisSettings,
        calibrations: Sequence[Calibration] = (),
    ):
        self.settings = settings
        self.num_items = 0
        self.failed: dict[str, str] = {}
        self.seconds = dict.fromkeys(("encode", "generate", "forward", "align"), 0.0)
        self._model, self._engine = model, engine
        self._calibrations = calibrations
        self._text_before: Tensor | None = None
        self.means = StreamedMeans()
        self.other_means = {layer: StreamedMeans() for layer in settings.other_base_layers}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - started

    @torch.inference_mode()
    def add(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Look at some items; what is known of each comes back and is not kept."""
        model, limit = self._model, self.settings.max_new_tokens
        with self._timed("encode"):
            spoken = encode_speech(model, self._engine, prepare_speech(model, questions), limit)
            text = model.encode_prompts(questions, Modality.TEXT)
        usable = []
        for question, speech_prompt, text_prompt in zip(questions, spoken, text, strict=True):
            if isinstance(speech_prompt, UserError):
                self.failed[question.id] = str(speech_prompt)
                continue
            places = self._places(speech_prompt, text_prompt)
            if (reason := self._engine.refusal(text_prompt, limit)) is not None:
                self.failed[question.id] = reason
            elif min(map(len, places)) < FEWEST_PAIRS:
                self.failed[question.id] = f"its prompts have fewer than {FEWEST_PAIRS} tokens of their own, too few to compare"
            else:
                usable.append((question, speech_prompt, text_prompt, places))
        if not usable:
            return []
        with self._timed("generate"):
            greedy = Sampling(num_completions=1, max_new_tokens=limit, temperature=0.0, seed=self.settings.seed)
            numbers = range(len(usable))
            spoken_prompts, written_prompts = [one[1] for one in usable], [one[2] for one in usable]
            answers = [self._engine.generate(prompts, numbers, greedy) for prompts in (spoken_prompts, written_prompts)]
            self._engine.release_memory()
        items = [
            _Item(speech, text, heard, read, *places)
            for (_, speech, text, places), heard, read in zip(usable, *answers, strict=True)
        ]
        records: list[dict[str, Any]] = []
        for chosen in _batches(items):
            start = len(records)
            part = [one[0] for one in usable[start : start + len(chosen)]]
            weights = np.stack([resampling(self.settings.seed, question.id) for question in part])
            values = self._look(chosen, weights) | _chain(part, chosen, self.settings.seed)
            self.means.add(weights, values)
            records += _records(part, chosen, values)
        self.num_items += len(records)
        return records

    def _places(self, speech: Prompt, text: Prompt) -> tuple[Tensor, Tensor]:
        held = torch.tensor(speech.token_ids) == self._model.prompts.audio_token_id
        return held.nonzero()[:, 0], torch.arange(*content_span(text.token_ids, speech.token_ids))

    def _look(self, items: Sequence[_Item], weights: np.ndarray) -> dict[str, np.ndarray]:
        """One forward pass: values by name, [I, ...]; those of the prompts go to their sums at once."""
        model = self._model
        layout = model.pack(
            [prompt for item in items for prompt in (item.speech, item.speech, item.text)],
            [completion for item in items for completion in (item.spoken, item.written, item.written)],
        )
        bounds = layout.cu_seqlens.tolist()
        starts = [layout.groups.num_prompt_tokens + bound for bound in bounds]
        pairs: list[tuple[int, int]] = []
        places: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for number in range(len(items)):
            last = 3 * number + 2
            for kind, first in enumerate((last - 2, last - 1)):
                x, y = relative_pairs(bounds[first + 1] - bounds[first], bounds[last + 1] - bounds[last])
                pairs.append((first, last))
                stretch = torch.arange(len(x)) * NUM_STRETCHES // len(x)
                cell = (2 * number + kind) * NUM_STRETCHES + stretch
                for part, found in zip(places, (starts[first] + x, starts[last] + y, cell), strict=True):
                    part.append(found)
        device = model.device
        x_places, y_places, cells = (torch.cat(part).to(device) for part in places)
        paired = torch.tensor(pairs, device=device)
        num_cells = 2 * len(items) * NUM_STRETCHES
        # Where each prompt's content stands in the row: spoken and written prompts take turns.
        offsets = accumulate(layout.groups.prompt_lengths[:-1], initial=0)
        parts = [part for item in items for part in (item.audio_places, item.text_places)]
        lengths = [len(part) for part in parts]
        contents = torch.cat([offset + part for offset, part in zip(offsets, parts, strict=True)]).to(device)
        by_prompt = dict(zip(Modality, (slice(0, None, 2), slice(1, None, 2)), strict=True))
        pooled: list[Tensor] = []
        tokens: list[Tensor] = []
        content: list[Tensor] = []

        def read(layer: int, states: Tensor) -> None:
            held = states[contents]
            for calibration in self._calibrations:
                if calibration.layer == layer:
                    for modality, own in by_prompt.items():
                        calibration.moments[modality].add(torch.cat(held.split(lengths)[own]))
            if layer == 0:
                return
            content.append(held)
            vectors = pool_sequences(states, layout.cu_seqlens, positions=layout.positions)
            pooled.append(pooled_similarity(vectors[None], paired)[:, 0])
            cosines = token_similarity([states[x_places]], [states[y_places]])[0]
            tokens.append(cosines.new_zeros(num_cells).index_add_(0, cells, cosines))

        with self._timed("forward"), reading(model.language_model, read):
            model.forward(layout)
        shape = (len(pooled), len(items), 2, NUM_STRETCHES)
        sums = torch.stack(tokens).view(shape).double().cpu().numpy()
        counts = torch.bincount(cells, minlength=num_cells).view(shape[1:]).cpu().numpy()
        vectors = torch.stack(pooled).view(shape[:3]).double().cpu().numpy()
        values = {}
        for kind, name in enumerate(MEANS):
            own, count = sums[:, :, kind].swapaxes(0, 1), counts[:, kind]
            values[f"{name}_pooled"] = vectors[:, :, kind].T
            values[f"{name}_tokens"] = own.sum(-1) / count.sum(-1)[:, None]
            values[f"{name}_along"] = np.where(count[:, None] > 0, own / np.maximum(count, 1)[:, None], np.nan)
        with self._timed("align"):
            prompts = torch.stack(content).split(lengths, dim=1)
            for number, (speech, text) in enumerate(zip(prompts[::2], prompts[1::2], strict=True)):
                self._align(speech, text, weights[number : number + 1])
        return values

    def _align(self, speech: Tensor, text: Tensor, weights: np.ndarray) -> None:
        """Args: speech [L, audio tokens, D], text [L, content tokens, D] of an item; weights [1, R]."""
        base = self.settings.base_layer
        made = _compare(speech, text, base)
        self.means.add(weights, made)
        for layer, means in self.other_means.items():
            means.add(weights, made if layer == base else _compare(speech, text, layer))
        if self._text_before is not None:
            unrelated = _compare(speech, self._text_before, base)
            self.means.add(weights, {f"{MISMATCHED}{name}": value for name, value in unrelated.items()})
        self._text_before = text.clone()

    def report(self) -> dict[str, Any]:
        """All figures, each with its 95 % interval over items beside it."""
        means = self.means
        made: dict[str, Any] = {"num_items": self.num_items, "num_failed": len(self.failed), "failed": self.failed}
        if not self.num_items:
            return made
        made["chain"] = _figures({name: means.rows(name) for name in SCALARS})
        made["drift"] = {
            kind: _figures({name: means.rows(f"{kind}_{name}") for name in ("pooled", "tokens", "along")}) for kind in MEANS
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
        made["alignment"] = alignment
        items = self.num_items
        made["cost"] = {f"{part}_seconds_per_item": seconds / items for part, seconds in self.seconds.items()}
        return made

    def resamples(self) -> dict[str, np.ndarray]:
        """Rows of every figure, for `change_since`."""
        rows = {name: self.means.rows(name) for name in self.means.names if "hsic" not in name}
        return rows | {"debiased": debiased(self.means)}


def change_since(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Differences to another analysis of the same items with the same seed: its resamples are the same, so they are paired."""
    shared = [name for name in after if name in before and after[name].shape == before[name].shape]
    return _figures({name: after[name] - before[name] for name in shared})


def _figures(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, values in rows.items():
        ends = np.moveaxis(interval(values), 0, -1)
        made |= {name: values[0].tolist(), f"{name}_ci95": ends.tolist()}
    return made


def _agreement(rows: np.ndarray, main: np.ndarray) -> dict[str, Any]:
    """Of CKA under another base layer with that under the chosen one, both [R, L, L]."""
    best = best_layers(rows)
    made = _figures(
        {
            "correlation": correlation(rows, main),
            "same_best_layer": share_of_same(best, best_layers(main)),
            "mean_band_width": mean_of_known(band_widths(rows)),
        }
    )
    return made | {"best_text_layer": layer_numbers(best[0])}


def _compare(speech: Tensor, text: Tensor, layer: int) -> dict[str, np.ndarray]:
    """Figures [1, ...] of one item, its tokens paired by what a layer makes of them."""
    path = warp(speech[layer - 1], text[layer - 1])
    x, y = (places.to(speech.device) for places in thinned(path))
    made = vars(compare_layers(speech[:, x], text[:, y])) | {"path_length": float(len(path[0]))}
    return {name: np.asarray(value)[None] for name, value in made.items()}


def _batches(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """In order, as many at a time as a forward pass takes."""
    batch: list[_Item] = []
    for item in items:
        if batch and sum(one.num_tokens for one in batch) + item.num_tokens > TOKENS_PER_FORWARD:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _chain(questions: Sequence[Question], items: Sequence[_Item], seed: int) -> dict[str, np.ndarray]:
    """The `SCALARS` of each item."""
    rows = []
    for question, item in zip(questions, items, strict=True):
        speech, text = (
            read_completion(one.text, question.choices, question.answer, f"{seed} {one.modality} {question.id}")["strict"]
            for one in (item.spoken, item.written)
        )
        place, share = first_divergence(item.spoken.token_ids, item.written.token_ids)
        rows.append(
            (
                speech.correct,
                text.correct,
                speech.extracted is not None and speech.extracted == text.extracted,
                math.isnan(place),
                place,
                share,
                len(item.spoken.token_ids),
                len(item.written.token_ids),
            )
        )
    return dict(zip(SCALARS, np.array(rows, dtype=np.float64).T, strict=True))


def _records(questions: Sequence[Question], items: Sequence[_Item], values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Lines of items.jsonl."""
    kept = (*SCALARS, *(f"{kind}_{what}" for kind in MEANS for what in ("pooled", "tokens")))
    return [
        {"id": question.id, "speech": item.spoken.text, "text": item.written.text}
        | {"speech_truncated": item.spoken.truncated, "text_truncated": item.written.truncated}
        | {name: values[name][number].tolist() for name in kept}
        for number, (question, item) in enumerate(zip(questions, items, strict=True))
    ]
