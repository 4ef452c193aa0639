"""Finding and reading a checkpoint's files, in a folder or on the Hugging Face hub, of a whole model or of an adapter.

A `source` is a folder, `owner/name` or `owner/name@revision`. An adapter names its base, which is a source too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tars_fast.support.cli import first_line
from tars_fast.types import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

_WEIGHTS = ("*.safetensors",)
_REST = ("*.json", "*.jinja", "*.txt", "*.model")
_PROCESSOR_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
_PROCESSOR_FILES += ("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "processor_config.json")
_PROCESSOR_FILES += ("preprocessor_config.json", "video_preprocessor_config.json", "tekken.json")
_LORA_SETTINGS = [
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
]
_LORA_SETTINGS += ("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out")
_LORA_SETTINGS += ("bias", "use_rslora", "modules_to_save", "init_lora_weights", "loftq_config")
_LORA_SETTINGS += ("eva_config", "corda_config", "lora_ga_config", "layers_to_transform")
_LORA_SETTINGS += ("layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices")
_LORA_SETTINGS += ("use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "runtime_config")
"""Settings of peft's LoRA that are read as peft reads them; another one may compute something else (aLoRA, Arrow)."""
# consolidated.safetensors holds Mistral's weights once more, under names of its own.
_NEVER = ("vision-lora/*", "original/*", "examples/*", "figures/*", "think/*", "consolidated*")


def checkpoint_folder(source: str, *, weights: bool) -> Path:
    """The local folder of a checkpoint, downloaded first where `source` names one on the hub.

    Args:
        source: a folder, or `owner/name` or `owner/name@revision` on the hub.
        weights: whether the weights are needed; without them only configuration and tokenizer are downloaded.

    Raises:
        UserError: it is neither a folder nor can be downloaded from the hub.
    """
    return Path(source) if Path(source).is_dir() else _download(source, weights)


@cache
def _download(source: str, weights: bool) -> Path:
    """Download once a process: a second call would ask the hub again, and could see another state of the repository."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    patterns = [*_REST, *_WEIGHTS] if weights else [*_REST]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=list(_NEVER))
    except (OSError, ValueError) as error:
        raise cannot_be_loaded(source, error) from error
    return Path(folder)


def base_of(source: str) -> str:
    """The checkpoint whose weights `source` needs: itself, or the base that an adapter names.

    Raises:
        UserError: `source` cannot be found, or is an adapter whose adapter_config.json cannot be read or names no base.
    """
    config = adapter_config(source)
    if config is None:
        return source
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise UserError(f"--model {source}: an adapter that does not name its base; add base_model_name_or_path to it")
    return f"{base}@{config.revision}" if config.revision else base


def adapter_rank(source: str) -> int:
    """The largest rank of a LoRA checkpoint; 0 for a whole model. Raises UserError as `base_of` does."""
    config = adapter_config(source)
    return 0 if config is None else max([config.r, *(config.rank_pattern or {}).values()])


def adapter_config(source: str) -> LoraConfig | None:
    """The adapter_config.json of an adapter; None for a whole model.

    Raises:
        UserError: `source` cannot be found, or its file cannot be read.
    """
    folder = checkpoint_folder(source, weights=False)
    if not (folder / "adapter_config.json").is_file():
        return None
    try:
        return read_adapter_config(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--model {source}: adapter_config.json cannot be read ({first_line(error)}); copy it again") from error


def read_adapter_config(folder: Path) -> LoraConfig:
    """The adapter_config.json in `folder`. Raises UserError where it is of no LoRA that is read here, or what peft raises."""
    from peft import LoraConfig, PeftConfig, PeftType

    config = PeftConfig.from_pretrained(str(folder))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    # AdaLoRA's configuration is one of LoRA, by inheritance.
    if type(config) is LoraConfig:
        usual = LoraConfig()
        more = [name for name, value in vars(config).items() if name not in _LORA_SETTINGS and value != getattr(usual, name)]
        kind += f" with {more[0]}" if more else ""
        if not isinstance(config.r, int) or not all(isinstance(rank, int) for rank in (config.rank_pattern or {}).values()):
            raise ValueError(f"r is {config.r!r:.80}, rank_pattern {config.rank_pattern!r:.80}, which are no ranks")
    if not isinstance(config, LoraConfig) or kind != PeftType.LORA.value:
        raise UserError(f"--model {folder}: an adapter of the kind {kind}, only LORA is read; merge it by peft, if that can")
    return config


def weights_fingerprint(source: str) -> str:
    """A cheap fingerprint that changes when a checkpoint's weights change, without reading them.

    SHA-256 over the commit of a checkpoint from the hub, or names, sizes and times of change of a folder's weight files; of
    an adapter also over its base's. A copy of a folder may have another fingerprint.

    Raises:
        UserError: see `base_of`.
    """
    digest = hashlib.sha256()
    for part in dict.fromkeys((source, base_of(source))):
        if not Path(part).is_dir():
            # The hub's cache names the folder of a download after its commit.
            digest.update(f"{part} {checkpoint_folder(part, weights=False).name}\n".encode())
            continue
        paths = [*Path(part).rglob("*.safetensors"), *Path(part).glob("adapter_config.json")]
        for path in sorted(paths):
            status = path.stat()
            digest.update(f"{path.relative_to(part)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def model_type(source: str) -> str:
    """The `model_type` in config.json of a whole model.

    Raises:
        UserError: there is no config.json, or none that names it.
    """
    try:
        config = json.loads((checkpoint_folder(source, weights=False) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise ValueError("config.json names no model_type")
    except (OSError, ValueError) as error:
        raise cannot_be_loaded(source, error) from error
    return config["model_type"]


def read_weights(source: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of a checkpoint whose names begin with one of `prefixes`, on the host."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint_folder(source, weights=True).glob("*.safetensors")) if prefixes else []:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    return found


def copy_processor(source: str, folder: Path) -> None:
    """Copy the files of tokenizer, feature extractor and chat template from a checkpoint into `folder`."""
    held = checkpoint_folder(source, weights=False)
    for name in _PROCESSOR_FILES:
        path = held / name
        if path.is_file():
            shutil.copyfile(path, folder / name)


def cannot_be_loaded(source: str, error: Exception) -> UserError:
    """The UserError for a checkpoint over which a library raised `error`."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"--model {source}: asks for code of its own, which is never run; name a revision that transformers reads without"
        )
    remedy = "copy it again, whole" if Path(source).is_dir() else "check the spelling, or the network"
    return UserError(f"--model {source}: cannot be loaded ({first_line(error)}); {remedy}")
