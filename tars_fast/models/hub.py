"""Where a checkpoint's files are: a folder, or a repository on the Hugging Face hub, an adapter or a model of its own."""

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
_PROCESSOR_FILES += ("preprocessor_config.json", "video_preprocessor_config.json")
_NEVER = ("vision-lora/*", "original/*", "examples/*", "figures/*")


def checkpoint_folder(source: str, *, weights: bool) -> Path:
    """The local folder of a checkpoint, downloaded first where `source` names one on the hub.

    Args:
        source: a folder, or `owner/name` or `owner/name@revision` on the hub.
        weights: with them, not only configuration and tokenizer.

    Raises:
        UserError: neither a folder nor to be had from the hub.
    """
    return Path(source) if Path(source).is_dir() else _download(source, weights)


@cache
def _download(source: str, weights: bool) -> Path:
    """Once a process: each asks the hub what is new, and a run must not see two states of a repository."""
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
        UserError: it cannot be found, or is an adapter whose description cannot be read.
    """
    config = adapter_config(source)
    if config is None:
        return source
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"--model {source}: an adapter that does not name its base; add base_model_name_or_path to it")
    return f"{base}@{config.revision}" if config.revision else base


def adapter_rank(source: str) -> int:
    """Largest of a LoRA checkpoint; 0 for any other. Raises UserError as `base_of` does."""
    config = adapter_config(source)
    return 0 if config is None else max([config.r, *(config.rank_pattern or {}).values()])


def adapter_config(source: str) -> LoraConfig | None:
    """peft's description of an adapter, None for a checkpoint with weights of its own.

    Raises:
        UserError: it cannot be found or read.
    """
    folder = checkpoint_folder(source, weights=False)
    if not (folder / "adapter_config.json").is_file():
        return None
    try:
        return read_adapter_config(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise cannot_be_loaded(source, error) from error


def read_adapter_config(folder: Path) -> LoraConfig:
    """Of an adapter that peft wrote. Raises ValueError for one that is not LoRA, or what peft raises."""
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"its adapter is {config.peft_type}, not LORA")
    return config


def weights_fingerprint(source: str) -> str:
    """SHA-256 over what tells a checkpoint's weights from others without reading them.

    That is, of the checkpoint and of the base of an adapter: the commit of one from the hub; names, sizes and times of the last
    change of a folder's weight files, which a copy need not keep.

    Raises:
        UserError: see `base_of`.
    """
    digest = hashlib.sha256()
    for part in dict.fromkeys((source, base_of(source))):
        if not Path(part).is_dir():
            # The folder of a download is called like its commit.
            digest.update(f"{part} {checkpoint_folder(part, weights=False).name}\n".encode())
            continue
        paths = [*Path(part).rglob("*.safetensors"), *Path(part).glob("adapter_config.json")]
        for path in sorted(paths):
            status = path.stat()
            digest.update(f"{path.relative_to(part)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def model_type(source: str) -> str:
    """What config.json of a checkpoint with weights of its own calls its architecture.

    Raises:
        UserError: there is none that could be read.
    """
    try:
        config = json.loads((checkpoint_folder(source, weights=False) / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cannot_be_loaded(source, error) from error


def read_weights(source: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of a checkpoint whose names begin with one of `prefixes`, on the host."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(checkpoint_folder(source, weights=True).glob("*.safetensors")) if prefixes else []:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
    return found


def copy_processor(source: str, folder: Path) -> None:
    """Copy all that turns text and sound into a checkpoint's inputs, as it is."""
    held = checkpoint_folder(source, weights=False)
    for name in _PROCESSOR_FILES:
        path = held / name
        if path.is_file():
            shutil.copyfile(path, folder / name)


def cannot_be_loaded(source: str, error: Exception) -> UserError:
    return UserError(f"--model {source}: cannot be loaded ({first_line(error)}); check the path, or the network")
