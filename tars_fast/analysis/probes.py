"""Probes: interventions that test what causes the gap between speech and text (arXiv 2603.01502).

`Calibration` gives the states of speech, at one layer, the mean and the standard deviation of those of text: were the gap a
shift of the distribution, accuracy on speech would rise. `repeated` repeats every word of a text: were the gap the redundancy
of speech, accuracy on text would fall to that on speech.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tars_fast.models.speech_model import SpeechModel
from tars_fast.types import Modality, Question

_SMALLEST_DEVIATION = 1e-6
"""Where speech does not vary in a dimension, only its mean is changed."""


class Moments:
    """Mean and standard deviation of states by dimension, updated batch by batch, in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """Add states [N, D]."""
        states = states.double()
        self.mean, self._squares = self.mean.to(states.device), self._squares.to(states.device)
        count, mean = self.count + len(states), states.mean(0)
        moved = mean - self.mean
        self._squares = self._squares + (states - mean).square().sum(0) + moved.square() * (self.count * len(states) / count)
        self.mean = self.mean + moved * (len(states) / count)
        self.count = count

    @property
    def deviation(self) -> Tensor:
        return (self._squares / self.count).sqrt()


class Calibration:
    """Gives the states of audio tokens, at the input of one layer, the mean and standard deviation of those of text.

    Args:
        layer: number of layers before that input, 0 to L - 1; 0: the embeddings.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.moments = {modality: Moments() for modality in Modality}

    def __call__(self, states: Tensor) -> Tensor:
        """Calibrate states [N, D]."""
        speech, text = self.moments[Modality.SPEECH], self.moments[Modality.TEXT]
        scale = text.deviation / speech.deviation.clamp(min=_SMALLEST_DEVIATION)
        return ((states.double() - speech.mean) * scale + text.mean).to(states.dtype)

    @contextmanager
    def applied(self, model: SpeechModel) -> Iterator[None]:
        """Within the block every pass of the model is calibrated: rollouts by transformers, and `SpeechModel.forward`."""
        is_audio_token: list[Tensor] = []

        def look(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            # Every pass over prompts begins by embedding all of their tokens; passes over single new tokens have no audio.
            is_audio_token[:] = [inputs[0] == model.prompts.audio_token_id]

        def calibrate(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            states = inputs[0]
            (is_audio,) = is_audio_token
            if not is_audio.any():
                return None
            states = states.clone()
            states[is_audio] = self(states[is_audio])
            return (states, *inputs[1:])

        hooks = [
            model.module.get_input_embeddings().register_forward_hook(look),
            model.language_model.layers[self.layer].register_forward_pre_hook(calibrate),
        ]
        try:
            with torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()


def repeated(question: Question, times: int) -> Question:
    """The question with each word of its text repeated; lines stay lines, and letters in front of options are not repeated."""

    def words(line: str) -> Iterator[str]:
        for number, word in enumerate(line.split()):
            is_letter = number == 0 and word[-1] in ".:)" and word.strip("(.:)") in question.choices
            yield from [word] * (1 if is_letter else times)

    return dataclasses.replace(question, text="\n".join(" ".join(words(line)) for line in question.text.split("\n")))
