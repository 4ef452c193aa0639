"""One copy of the weights: a transformers module whose parameters are views of those an inference engine has loaded.

Engines fuse what transformers keeps apart (query, key and value; gate and up) by stacking rows, and pad the vocabulary. A
slice of rows is a contiguous view, so a trainer can own it as a parameter: an optimiser that updates it in place updates the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tars_fast.types import TrainingError

_CPU_PRODUCT = "cpu_linear"
"""Where layers of vLLM's CPU build keep the function they multiply with."""


class SharingError(TrainingError):
    """Trainer and engine no longer compute with the same memory."""


@dataclass(frozen=True)
class WeightMapping:
    """Where an engine keeps one part of the model."""

    prefix: str
    """Of transformers' module names."""
    engine_prefix: str
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Engine's fused module to the transformers modules whose rows it stacks, in order."""


EngineNames = tuple[WeightMapping, ...]


def engine_place(name: str, names: EngineNames) -> tuple[str, tuple[str, ...]]:
    """(engine's module, names before this one among the modules fused there) of a transformers module.

    Raises:
        KeyError: nothing is known of where the engine keeps it.
    """
    for part in names:
        if name.startswith(part.prefix):
            parent, dot, leaf = (part.engine_prefix + name.removeprefix(part.prefix)).rpartition(".")
            for fused, stacked in part.fused.items():
                if leaf in stacked:
                    return f"{parent}{dot}{fused}", stacked[: stacked.index(leaf)]
            return f"{parent}{dot}{leaf}", ()
    raise KeyError(f"{name}: nothing is known of where the engine keeps it")


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside an adapter's wrapper; peft and vLLM give it the same name."""
    return getattr(module, "base_layer", module)


def engine_views(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> Iterator[tuple[str, Tensor]]:
    """(transformers parameter name, view of the engine's memory) for every parameter but adapters.

    Args:
        module: transformers' model, on any device or on meta; adapters are left out, wrappers seen through.
        engine_module: the engine's, with its weights loaded.

    Raises:
        SharingError: the engine has no such parameter, or one of another shape.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        owner, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        place, stacked_before = engine_place(owner, names)
        try:
            held = getattr(base_layer(engine_module.get_submodule(place)), leaf).detach()
        except AttributeError as error:
            raise SharingError(f"{name}: the engine has no {place}.{leaf}") from error
        parent = owner.rpartition(".")[0]
        siblings = [base_layer(module.get_submodule(f"{parent}.{sibling}")) for sibling in stacked_before]
        start = sum(len(getattr(sibling, leaf)) for sibling in siblings)
        # Rows beyond the vocabulary are the engine's padding.
        view = held[start : start + len(parameter)]
        if view.shape != parameter.shape:
            raise SharingError(f"{name}: {tuple(parameter.shape)}, but {tuple(held.shape)} in the engine's {place}.{leaf}")
        yield name, view


def share_weights(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> None:
    """Replace every parameter of `module`, built on meta, by a view of the engine's memory; nothing is copied.

    What the engine ties (a head that is the embedding) becomes one parameter here too, which an optimiser sees once.

    Raises:
        SharingError: the two do not fit together.
    """
    placed: dict[int, nn.Parameter] = {}
    for name, view in list(engine_views(module, engine_module, names)):
        owner, _, leaf = name.rpartition(".")
        parameter = placed.setdefault(view.data_ptr(), nn.Parameter(view, requires_grad=False))
        setattr(module.get_submodule(owner), leaf, parameter)


def assert_shared(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> None:
    """Check that trainer and engine compute with the same memory: address, shape, stride and dtype of every parameter.

    `.to()`, `load_state_dict(assign=True)`, `resize_token_embeddings` or a reload inside the engine break it silently; so does
    the packed copy that vLLM's CPU build computes with unless it is told not to.

    Raises:
        SharingError: names the first parameter that is a copy.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, view in engine_views(module, engine_module, names):
        own = parameters[name]
        same = own.data_ptr() == view.data_ptr() and own.stride() == view.stride() and own.dtype == view.dtype
        if not same or own.device != view.device:
            raise SharingError(
                f"{name}: trainer and rollout engine no longer share this parameter ({own.dtype} on {own.device} at "
                f"{own.data_ptr():#x}, engine {view.dtype} on {view.device} at {view.data_ptr():#x}); something replaced it"
            )
    for name, layer in engine_module.named_modules():
        if getattr(layer, _CPU_PRODUCT, nn.functional.linear) is not nn.functional.linear:
            raise SharingError(f"{name}: the engine computes with a packed copy of this weight, which training does not reach")


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers of a module that was built on meta, which are real and on the CPU, where its parameters are."""
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer.to(device))
