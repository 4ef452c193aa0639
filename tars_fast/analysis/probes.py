"""What happens to answers when inputs change in ways that a cause of the gap would explain (arXiv 2603.01502).

`Calibration` gives the states of speech the mean and the standard deviation of text's at one layer: were the gap a shift of
distribution, accuracy would rise. `repeated` says every word of a text several times: were the gap the redundancy of speech,
accuracy would fall to that of speech.

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
"""Of a dimension in which speech does not vary; its mean is then all that moves."""


class Moments:
    """Mean and standard deviation by dimension of states that are not kept, in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """Args: states [N, D]."""
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
    """Mean and standard deviation of text for the states of audio tokens, on their way into one layer.

    Args:
        layer: 0 to L - 1; states are those behind so many layers, 0 being the embeddings.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.moments = {modality: Moments() for modality in Modality}

    def __call__(self, states: Tensor) -> Tensor:
        """[N, D] calibrated."""
        speech, text = self.moments[Modality.SPEECH], self.moments[Modality.TEXT]
        scale = text.deviation / speech.deviation.clamp(min=_SMALLEST_DEVIATION)
        return ((states.double() - speech.mean) * scale + text.mean).to(states.dtype)

    @contextmanager
    def applied(self, model: SpeechModel) -> Iterator[None]:
        """For the length of the block, to whatever the model's modules run: transformers' rollouts and the trainer's pass."""
        heard: list[Tensor] = []

        def look(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            # Every pass over prompts begins by embedding all of their tokens; passes over single new ones hold no audio.
            heard[:] = [inputs[0] == model.prompts.audio_token_id]

        def calibrate(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            states = inputs[0]
            is_audio = heard[0]
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
    """The question with each word of its text said so often; lines stay lines, and letters in front of options stay once."""

    def said(line: str) -> Iterator[str]:
        for number, word in enumerate(line.split()):
            is_letter = number == 0 and word[-1] in ".:)" and word.strip("(.:)") in question.choices
            yield from [word] * (1 if is_letter else times)

    return dataclasses.replace(question, text="\n".join(" ".join(said(line)) for line in question.text.split("\n")))
