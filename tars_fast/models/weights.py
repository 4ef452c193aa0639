"""One copy of the weights: a transformers module whose parameters are views of those an inference engine has loaded.

An engine stacks the rows of weights that transformers keeps apart (query, key and value; gate and up), and pads the
vocabulary; of a mixture of experts both stack all experts in one tensor. A slice of rows is a contiguous view, so it can be a
parameter of the trainer's module: an optimiser that updates it in place updates the engine's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tars_fast.types import TrainingError

_CPU_PRODUCT = "cpu_linear"
"""Attribute of a layer in vLLM's CPU build: the function that multiplies with its weight."""


class SharingError(TrainingError):
    """Trainer and engine do not, or no longer, compute with the same memory."""


@dataclass(frozen=True)
class WeightMapping:
    """What the engine calls the modules whose names begin alike in transformers."""

    prefix: str
    """Beginning of the modules' names in transformers."""
    engine_prefix: str
    """What the engine has in its place."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Engine's fused module (`qkv_proj`) to the transformers modules whose rows it stacks, in order (`q_proj`, ...)."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Transformers' name of a parameter inside its module to the engine's, seen from the engine's module, where they differ."""


EngineNames = tuple[WeightMapping, ...]
"""For all modules of a model that have weights; the first mapping whose prefix fits counts."""


def engine_place(name: str, names: EngineNames) -> tuple[str, tuple[str, ...]]:
    """(the engine's module, the modules whose rows it stacks before this one's) of a transformers module.

    Raises:
        KeyError: no prefix in `names` fits.
    """
    for mapping in names:
        if name.startswith(mapping.prefix):
            parent, dot, leaf = (mapping.engine_prefix + name.removeprefix(mapping.prefix)).rpartition(".")
            for fused, stacked in mapping.fused.items():
                if leaf in stacked:
                    return f"{parent}{dot}{fused}", stacked[: stacked.index(leaf)]
            return f"{parent}{dot}{leaf}", ()
    raise KeyError(f"{name}: nothing is known of where the engine keeps it")


def engine_parameter(name: str, names: EngineNames) -> tuple[str, tuple[str, ...]]:
    """As `engine_place`, of a transformers parameter."""
    owner, _, leaf = name.rpartition(".")
    place, stacked_before = engine_place(owner, names)
    renamed = next((mapping.parameters for mapping in names if name.startswith(mapping.prefix)), {})
    return f"{place}.{renamed.get(leaf, leaf)}", stacked_before


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside a LoRA wrapper, of peft or of vLLM, or the layer itself."""
    return getattr(module, "base_layer", module)


def engine_views(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> Iterator[tuple[str, Tensor]]:
    """(transformers parameter name, view of the engine's memory) for every parameter but adapters.

    Args:
        module: transformers' model, on any device or on meta, with or without LoRA wrappers.
        engine_module: the engine's model, with its weights loaded.

    Raises:
        SharingError: the engine has no such parameter, or one of another shape.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        published = name.replace(".base_layer.", ".")
        owner, _, leaf = published.rpartition(".")
        parameter_there, stacked_before = engine_parameter(published, names)
        place, _, theirs = parameter_there.rpartition(".")
        try:
            held = getattr(base_layer(engine_module.get_submodule(place)), theirs).detach()
        except AttributeError as error:
            raise SharingError(f"{name}: the engine has no {place}.{theirs}") from error
        parent = owner.rpartition(".")[0]
        siblings = [base_layer(module.get_submodule(f"{parent}.{sibling}")) for sibling in stacked_before]
        start = sum(len(getattr(sibling, leaf)) for sibling in siblings)
        # Leaves out the engine's padding of the vocabulary.
        view = held[start : start + len(parameter)]
        if view.shape != parameter.shape:
            raise SharingError(f"{name}: {tuple(parameter.shape)}, but {tuple(held.shape)} in the engine's {place}.{theirs}")
        yield name, view


def share_weights(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> None:
    """Replace every parameter of `module`, built on the meta device, by a view of the engine's memory; nothing is copied.

    Weights that the engine ties, like a head that is the embedding, become one parameter, so that an optimiser updates it once.

    Raises:
        SharingError: names or shapes of the two modules do not fit.
    """
    placed: dict[int, nn.Parameter] = {}
    for name, view in list(engine_views(module, engine_module, names)):
        owner, _, leaf = name.rpartition(".")
        parameter = placed.setdefault(view.data_ptr(), nn.Parameter(view, requires_grad=False))
        setattr(module.get_submodule(owner), leaf, parameter)


def assert_shared(module: nn.Module, engine_module: nn.Module, names: EngineNames) -> None:
    """Check that trainer and engine compute with the same memory: address, shape, stride and dtype of every parameter.

    It finds what would otherwise end the sharing unnoticed: `.to()`, `load_state_dict(assign=True)`, `resize_token_embeddings`,
    a reload inside the engine, and the packed copies of weights that vLLM's CPU build makes by default.

    Raises:
        SharingError: with the name of the first parameter that is a copy.
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
    """Move the buffers of a module to `device`, in place; one built by `Family.on_meta` has them on the CPU."""
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer.to(device))
