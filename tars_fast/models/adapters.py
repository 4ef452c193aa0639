"""LoRA adapters through peft's own functions, so that no release of transformers decides whether they work.

On disk an adapter is peft's: adapter_config.json beside adapter_model.safetensors, whose names begin with `base_model.model.`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tars_fast.models.families.base import Family
from tars_fast.models.hub import adapter_config, checkpoint_folder, read_adapter_config
from tars_fast.models.modules import PolicyModule
from tars_fast.support.cli import first_line
from tars_fast.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def has_adapter(module: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in module.named_parameters())


def add_adapter(module: nn.Module, config: LoraConfig) -> None:
    """Wrap the layers that `config` names; until it is trained or loaded the adapter changes nothing.

    Its weights are float32 whatever the layers are: bfloat16 cannot hold a step of learning rate 2e-5, and adapters are small.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def load_adapter(module: nn.Module, family: Family, source: str) -> None:
    """Put the adapter `source` on top of its base, frozen like it; nothing where `source` has weights of its own.

    Raises:
        UserError: it cannot be read, or does not fit the module.
    """
    if adapter_config(source) is None:
        return
    folder = checkpoint_folder(source, weights=True)
    with _one_line(source):
        config, weights = _read_adapter(family, folder)
        add_adapter(module, config)
        _set_weights(module, weights)
    # Its layers are made in training mode, where their dropout is active.
    module.requires_grad_(False).eval()


def load_adapter_weights(module: nn.Module, family: Family, folder: Path) -> None:
    """Give the adapter that `module` has the weights of a checkpoint. Raises UserError where they do not fit."""
    with _one_line(str(folder)):
        _set_weights(module, _read_adapter(family, folder)[1])


def merge_adapter(module: nn.Module, family: Family, folder: Path) -> PolicyModule:
    """Add the adapter in `folder` to the weights of `module`, in the dtype they have.

    Raises:
        UserError: it cannot be read, does not fit the module, or changes nothing.
    """
    from peft import get_peft_model

    with _one_line(str(folder)):
        config, weights = _read_adapter(family, folder)
        if isinstance(config.target_modules, str):
            # Written for the decoder alone, which here stands inside another module.
            config.target_modules = rf"(.*\.)?({config.target_modules})"
        adapted = get_peft_model(module, config)
        _set_weights(adapted, {_PREFIX + name: value for name, value in weights.items()})
        if not any(value.any() for name, value in weights.items() if ".lora_B." in name):
            raise ValueError("it changes nothing: its weights have other names, or were never trained")
        merged: Any = adapted.merge_and_unload()
    return merged


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write the adapter of `module` as peft and transformers load it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    configs: Any = module.peft_config
    config = copy.copy(configs["default"])
    # In full: peft shortens names as far as this model has no others like them, and the vision tower is not loaded here.
    config.target_modules = sorted(name for name, layer in module.named_modules() if hasattr(layer, "lora_A"))
    config.save_pretrained(folder)
    # "auto" would ask the hub whether the base has the same vocabulary.
    weights = get_peft_model_state_dict(module, save_embedding_layers=False)
    weights = {_PREFIX + name: value.detach().to("cpu").contiguous() for name, value in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever peft, torch and safetensors raise over an adapter that is broken or of another model, as UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, re.error, SafetensorError) as error:
        raise UserError(
            f"--model {source}: the adapter cannot be loaded ({first_line(error)}); give one of this base"
        ) from error


def _read_adapter(family: Family, folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, weights by name without prefix), for the module tree of the transformers that is installed."""
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    if not isinstance(config.target_modules, str | None):
        config.target_modules = [family.decoder_name(name) for name in config.target_modules]
    config.rank_pattern = {family.decoder_name(name): rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {family.decoder_name(name): alpha for name, alpha in (config.alpha_pattern or {}).items()}
    weights = load_file(folder / ADAPTER_WEIGHTS)
    return config, {family.decoder_name(name.removeprefix(_PREFIX)): value for name, value in weights.items()}


def _set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(module, weights)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    for names, what in ((result.unexpected_keys, "has no place for"), (missing, "finds nothing for")):
        if names:
            raise ValueError(f"the model {what} {len(names)} of its weights, first {min(names)}")
