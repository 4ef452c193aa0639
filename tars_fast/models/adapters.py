"""LoRA adapters through peft's own functions, so that they do not depend on transformers' code for adapters.

On disk an adapter is peft's: adapter_config.json beside adapter_model.safetensors, whose names begin with `base_model.model.`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tars_fast.models.families.base import Family
from tars_fast.models.hub import adapter_config, checkpoint_folder, read_adapter_config
from tars_fast.models.modules import PolicyModule
from tars_fast.models.tensor_parallel import TensorParallel
from tars_fast.support.cli import first_line
from tars_fast.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def has_adapter(module: nn.Module) -> bool:
    """Whether any layer of `module` carries LoRA weights."""
    return any(".lora_" in name for name, _ in module.named_parameters())


def add_adapter(module: nn.Module, config: LoraConfig) -> None:
    """Add LoRA weights to the layers that `config` names, in place; new ones change nothing, because B is 0.

    They are float32, whatever the layers are: bfloat16 would round away a step at a learning rate of 2e-5.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """Inside the block the adapter adds zeros, and `module` computes what its base does; nothing else may run it meanwhile."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(module, 0.0):
        yield


_PLAIN = re.compile(r"(?P<layer>.+)\.lora_[AB]\.weight")


def beyond_plain_lora(family: Family, source: str) -> str | None:
    """What an adapter has beside two matrices for linear layers of the decoder or the audio tower; None where it has nothing.

    Raises:
        UserError: the adapter cannot be read.
    """
    config = adapter_config(source)
    if config is None:
        return None
    with _errors_as_user_errors(source):
        names = sorted(_read_adapter(family, checkpoint_folder(source, weights=True))[1])
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        return f"other weights of its base ({config.init_lora_weights})"
    places = tuple(f"{part}." for part in (f"{family.language_model}.layers", *family.audio_parts))
    for name in names:
        if _PLAIN.fullmatch(name) is None or not name.startswith(places):
            return name
    return None


def load_adapter(module: nn.Module, family: Family, source: str) -> None:
    """Add the adapter `source` to its base, frozen like the base; does nothing where `source` is a whole model.

    Args:
        module: the base, changed in place.

    Raises:
        UserError: the adapter cannot be read, or does not fit the module.
    """
    if adapter_config(source) is None:
        return
    folder = checkpoint_folder(source, weights=True)
    with _errors_as_user_errors(source):
        config, weights = _read_adapter(family, folder)
        add_adapter(module, config)
        _set_weights(module, weights)
    # peft makes its layers in training mode, with dropout.
    module.requires_grad_(False).eval()


def load_adapter_weights(module: nn.Module, family: Family, folder: Path, parallel: TensorParallel | None = None) -> None:
    """Load a checkpoint's weights into the adapter that `module` has. Raises UserError where they do not fit.

    Args:
        parallel: see `SpeechModel`.
    """
    with _errors_as_user_errors(str(folder)):
        weights = _read_adapter(family, folder)[1]
        if parallel is not None:
            weights = {name: parallel.part(name, value) for name, value in weights.items()}
        _set_weights(module, weights)


def merge_adapter(module: nn.Module, family: Family, folder: Path) -> PolicyModule:
    """Add the product of an adapter's matrices to the weights of `module`, in the weights' dtype.

    Args:
        module: the base, whose weights change in place.
        folder: holds the adapter.

    Returns:
        `module` without any adapter.

    Raises:
        UserError: the adapter cannot be read, does not fit the module, or changes nothing.
    """
    from peft import get_peft_model

    with _errors_as_user_errors(str(folder)):
        config, weights = _read_adapter(family, folder)
        if isinstance(config.target_modules, str):
            # The pattern was written for the decoder alone, whose names here begin with those of the modules around it.
            config.target_modules = rf"(.*\.)?({config.target_modules})"
        # Of a base by another name peft would warn, and the module may come from anywhere.
        config.base_model_name_or_path = None
        adapted = get_peft_model(module, config)
        _set_weights(adapted, {_PREFIX + name: value for name, value in weights.items()})
        if not any(value.any() for name, value in weights.items() if ".lora_B." in name):
            raise ValueError("it changes nothing: its weights have other names, or were never trained")
        merged: Any = adapted.merge_and_unload()
    return merged


def adapter_weights(module: nn.Module, parallel: TensorParallel | None = None) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the host, under the names that peft and transformers read.

    Args:
        parallel: see `SpeechModel`; all its processes call this, and the first gets whole weights.
    """
    from peft import get_peft_model_state_dict

    # With "auto" peft compares vocabularies with the base on the hub, over the network.
    weights = get_peft_model_state_dict(module, save_embedding_layers=False)
    whole = {name: value if parallel is None else parallel.whole(name, value) for name, value in weights.items()}
    return {_PREFIX + name: value.detach().to("cpu", copy=True).contiguous() for name, value in whole.items()}


def save_adapter(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter of `module` into `folder`, in the files that peft and transformers read.

    Args:
        weights: see `adapter_weights`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    configs: Any = module.peft_config
    config = copy.copy(configs["default"])
    # Full names, not peft's shortened ones: those are unique in this module only, which lacks the whole model's vision tower.
    config.target_modules = sorted(name for name, layer in module.named_modules() if hasattr(layer, "lora_A"))
    config.save_pretrained(folder)
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _errors_as_user_errors(source: str) -> Iterator[None]:
    """Turn what peft, torch and safetensors raise over a broken adapter, or one of another model, into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        re.error,
        SafetensorError,
    ) as error:
        raise UserError(
            f"--model {source}: the adapter cannot be loaded ({first_line(error)}); give one of this base"
        ) from error


def _read_adapter(family: Family, folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, weights by name), with module names as in the transformers that is installed, without peft's prefix."""
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"--model {folder}: holds no {ADAPTER_WEIGHTS}; save it by peft's save_pretrained, no pickle is read")
    if not isinstance(config.target_modules, str | None):
        config.target_modules = [family.installed_name(name) for name in config.target_modules]
    config.rank_pattern = {family.installed_name(name): rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {family.installed_name(name): alpha for name, alpha in (config.alpha_pattern or {}).items()}
    named = {
        family.installed_name(name.removeprefix(_PREFIX)): value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    # Neither speech nor text passes through these.
    return config, {name: value for name, value in named.items() if not name.startswith(family.unused_parts)}


def _set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError where the names of `weights` and those of the module's adapter differ."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # Also biases, and whole modules that the adapter replaces.
    missing = get_peft_model_state_dict(module, save_embedding_layers=False).keys() - weights.keys()
    result: Any = None if missing else set_peft_model_state_dict(module, weights)
    for names, what in ((missing, "finds nothing for"), (result and result.unexpected_keys, "has no place for")):
        if names:
            raise ValueError(f"the model {what} {len(names)} of its weights, first {min(names)}")
