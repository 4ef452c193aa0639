"""One forward pass over several items: how they are packed into a row, and what is kept of the states while layers run.

The row of two items:

    | spoken 1   | written 1  | spoken 2   | written 2  | own 1 | forced 1 | text 1 | own 2 | forced 2 | text 2 |
    |  [audio]   |  [words]   |  [audio]   |  [words]   |                                                       |
    |<-------------------- prompts -------------------->|<-------------------- completions -------------------->|

    own      the completion of the spoken prompt, which it attends to
    forced   the completion of the written prompt, but it attends to the spoken one
    text     the completion of the written prompt, which it attends to
    [audio]  the audio tokens of the spoken prompt
    [words]  the tokens of the written prompt that the template does not give

`own` and `forced` are each compared with `text`, token by token and in the mean over tokens; [audio] with [words], layer by
layer.

Shapes: I items of the row, N = 3 I completions, S tokens of the row, C of them content ([audio] and [words]), T pairs of
compared tokens, D hidden size, L layers, K stretches of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tars_kernels import pool_sequences, pooled_similarity, token_similarity
from torch import Tensor, nn

from tars_fast.analysis.alignment import relative_pairs
from tars_fast.analysis.probes import Calibration
from tars_fast.models.modules import Decoder
from tars_fast.models.speech_model import PackedBatch, SpeechModel
from tars_fast.types import Completion, Modality, Prompt, Question

NUM_STRETCHES = 10
"""Equal shares of a completion that similarity along it is given for."""
KINDS = ("own", "forced")
"""The completions after the spoken prompt, each of which is compared with `text`."""


@dataclass(frozen=True)
class ItemPrompts:
    """The prompts of an item, with the places of their content."""

    question: Question
    speech: Prompt
    text: Prompt
    audio_places: Tensor
    """[audio tokens] in the spoken prompt."""
    word_places: Tensor
    """[words] in the written prompt."""


@dataclass(frozen=True)
class AnsweredItem:
    """An item with the model's completions of both prompts."""

    prompts: ItemPrompts
    spoken: Completion
    """Completion of the spoken prompt."""
    written: Completion
    """Completion of the written prompt."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the item takes in the row."""
        prompts = len(self.prompts.speech.token_ids) + len(self.prompts.text.token_ids)
        return prompts + len(self.spoken.token_ids) + 2 * len(self.written.token_ids)


@dataclass(frozen=True)
class Row:
    """A packed row and the places in it of everything that is compared."""

    num_items: int
    packed: PackedBatch
    content_places: Tensor
    """[C] places of the content of each prompt, spoken and written in turn."""
    content_lengths: list[int]
    """[2 I] numbers of content tokens of each prompt."""
    completion_pairs: Tensor
    """[2 I, 2] indices of the completions that are compared: own and text, forced and text, of each item."""
    token_pairs: tuple[Tensor, Tensor]
    """Two tensors [T]: the places of the tokens that are compared."""
    cells: Tensor
    """[T] index, below 2 I K, of the (item, kind, stretch) that each pair of tokens belongs to."""

    @classmethod
    def pack(cls, model: SpeechModel, items: Sequence[AnsweredItem]) -> Row:
        packed = model.pack(
            [prompt for item in items for prompt in (item.prompts.speech, item.prompts.speech, item.prompts.text)],
            [completion for item in items for completion in (item.spoken, item.written, item.written)],
        )
        bounds = packed.cu_seqlens.tolist()
        starts = [packed.groups.num_prompt_tokens + bound for bound in bounds]
        completion_pairs = []
        x_places, y_places, cells = [], [], []
        for item in range(len(items)):
            text = 3 * item + 2
            for kind in range(len(KINDS)):
                after_speech = 3 * item + kind
                completion_pairs.append((after_speech, text))
                x, y = relative_pairs(*(bounds[number + 1] - bounds[number] for number in (after_speech, text)))
                x_places.append(starts[after_speech] + x)
                y_places.append(starts[text] + y)
                cells.append((2 * item + kind) * NUM_STRETCHES + torch.arange(len(x)) * NUM_STRETCHES // len(x))
        prompt_starts = accumulate(packed.groups.prompt_lengths[:-1], initial=0)
        contents = [places for item in items for places in (item.prompts.audio_places, item.prompts.word_places)]
        return cls(
            num_items=len(items),
            packed=packed,
            content_places=torch.cat([start + places for start, places in zip(prompt_starts, contents, strict=True)]).to(
                model.device
            ),
            content_lengths=[len(places) for places in contents],
            completion_pairs=torch.tensor(completion_pairs, device=model.device),
            token_pairs=(torch.cat(x_places).to(model.device), torch.cat(y_places).to(model.device)),
            cells=torch.cat(cells).to(model.device),
        )

    def contents(self, states: Tensor) -> list[Tensor]:
        """Split [..., C, D] into the contents of the prompts, spoken and written in turn."""
        return list(states.split(self.content_lengths, dim=-2))


@dataclass(frozen=True)
class RowStates:
    """The values that are kept of the states of a row."""

    pooled_cosines: np.ndarray
    """[I, kinds, L] cosine of states that are averaged over tokens."""
    cosine_sums: np.ndarray
    """[I, kinds, L, K] sums, over the tokens of a stretch, of the cosine of their states."""
    counts: np.ndarray
    """[I, kinds, K] numbers of those tokens."""
    contents: Tensor
    """[L, C, D] states of the prompts' content."""
    embeddings: Tensor
    """[C, D] the same at the input of the first layer."""

    def inputs(self, layer: int) -> Tensor:
        """[C, D] states of the prompts' content on their way into a layer, 0 to L - 1."""
        return self.contents[layer - 1] if layer else self.embeddings

    def similarities(self) -> dict[str, np.ndarray]:
        """Cosines of completions, of each kind: `_pooled` and `_tokens` [I, L], `_along` [I, L, K]."""
        values = {}
        for kind, name in enumerate(KINDS):
            sums, counts = self.cosine_sums[:, kind], self.counts[:, kind]
            values[f"{name}_pooled"] = self.pooled_cosines[:, kind]
            values[f"{name}_tokens"] = sums.sum(-1) / counts.sum(-1)[:, None]
            values[f"{name}_along"] = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.nan)
        return values


def run_row(model: SpeechModel, row: Row, calibrations: Sequence[Calibration]) -> RowStates:
    """One forward pass. `calibrations` are given the states of the prompts' content at their layers."""
    num_cells = row.num_items * len(KINDS) * NUM_STRETCHES
    pooled: list[Tensor] = []
    sums: list[Tensor] = []
    contents: list[Tensor] = []

    def read(layer: int, states: Tensor) -> None:
        content = states[row.content_places]
        for calibration in calibrations:
            if calibration.layer == layer:
                parts = row.contents(content)
                for modality, own in zip(Modality, (parts[::2], parts[1::2]), strict=True):
                    calibration.moments[modality].add(torch.cat(own))
        contents.append(content)
        if layer == 0:
            return
        vectors = pool_sequences(states, row.packed.cu_seqlens, positions=row.packed.positions)
        pooled.append(pooled_similarity(vectors[None], row.completion_pairs)[:, 0])
        cosines = token_similarity([states[row.token_pairs[0]]], [states[row.token_pairs[1]]])[0]
        sums.append(cosines.new_zeros(num_cells).index_add_(0, row.cells, cosines))

    with reading_states(model.language_model, read):
        model.forward(row.packed)
    shape = (row.num_items, len(KINDS), NUM_STRETCHES)
    return RowStates(
        pooled_cosines=np.moveaxis(torch.stack(pooled).view(-1, *shape[:2]).double().cpu().numpy(), 0, -1),
        cosine_sums=np.moveaxis(torch.stack(sums).view(-1, *shape).double().cpu().numpy(), 0, -2),
        counts=torch.bincount(row.cells, minlength=num_cells).view(shape).cpu().numpy(),
        contents=torch.stack(contents[1:]),
        embeddings=contents[0],
    )


@contextmanager
def reading_states(language_model: Decoder, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `read` with a number and the states [S, D] of the row while the language model runs.

    The number is 0 for the input of the first layer, 1 to L - 1 for the output of that layer, counted from 1, and L for the
    output of the final norm.
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
