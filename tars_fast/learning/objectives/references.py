"""The model before training, and the average of its weights: other weights that the one module computes with for a moment.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tars_fast.config import RunConfig
from tars_fast.models.adapters import adapter_off
from tars_fast.models.speech_model import SpeechModel, load_module

ReferenceName = Literal["frozen", "moving", "ema"]


@contextmanager
def exchanged(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the parameters hold `values`, rounded to their dtype; nothing else may read them meanwhile."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


class References:
    """The weights that a policy in training is compared with.

    With LoRA the model before training is this one with its adapter off. Full fine-tuning keeps a copy of what it trains, and
    an average is always a copy; both only where the objective needs them, and without the audio tower: a teacher reads written
    prompts, and a tower in training encodes the recordings of the next batch meanwhile.

    Args:
        model: made trainable, with the weights that training begins with, or that a resumed run goes on with.
        is_resumed: the model before training is loaded once more.

    Raises:
        UserError: it cannot be loaded any more.
    """

    def __init__(self, model: SpeechModel, config: RunConfig, *, is_resumed: bool = False):
        self._model = model
        self._decay = config.teacher_decay
        self._parameters = list(model.trainable_for_text().values())
        self._start: list[Tensor] | None = None
        # In float32: in bfloat16 it would stand still.
        self._average: list[Tensor] | None = None
        if config.needs_start and config.lora_rank == 0:
            self._start = self._reload() if is_resumed else [parameter.detach().clone() for parameter in self._parameters]
        if config.keeps_average:
            self._average = [parameter.detach().float().clone() for parameter in self._parameters]

    def _reload(self) -> list[Tensor]:
        source = self._model.prompts.source
        device, dtype = self._model.device, self._model.module.dtype
        started = dict(load_module(self._model.prompts, source, torch.device("cpu"), dtype).named_parameters())
        parallel = self._model.parallel
        values = {name: started[name].detach() for name in self._model.trainable_for_text()}
        return [(value if parallel is None else parallel.part(name, value)).to(device) for name, value in values.items()]

    @contextmanager
    def using(self, name: ReferenceName) -> Iterator[None]:
        """Inside the block the module computes with these weights; nothing else may run it, and no gradient is taken."""
        values = self._values(name)
        other_weights: AbstractContextManager[None] = nullcontext()
        if values is not None:
            other_weights = exchanged(self._parameters, values)
        elif name == "frozen":
            other_weights = adapter_off(self._model.module)
        with torch.no_grad(), other_weights:
            yield

    def head(self, name: ReferenceName) -> Tensor | None:
        """[V, D] its own head; None where it is the policy's."""
        values, weight = self._values(name), self._model.head.weight
        for parameter, value in zip(self._parameters, values or (), strict=False):
            if parameter is weight:
                return value.to(weight.dtype)
        return None

    def _values(self, name: ReferenceName) -> list[Tensor] | None:
        return {"frozen": self._start, "moving": None, "ema": self._average}[name]

    def state(self) -> dict[str, object]:
        """What a checkpoint holds of them: the average, where there is one."""
        return {} if self._average is None else {"average": self._average}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises LookupError, ValueError or RuntimeError where it is of another run."""
        for value, held in zip(self._average or (), state["average"] if self._average else (), strict=True):
            value.copy_(held)

    @torch.no_grad()
    def follow(self) -> None:
        """Take the weights into their average, after a step of the optimiser."""
        for value, parameter in zip(self._average or (), self._parameters, strict=False):
            value.lerp_(parameter.float(), 1.0 - self._decay)
