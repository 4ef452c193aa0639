"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tars_fast.models.adapters import has_adapter, save_adapter
from tars_fast.models.hub import checkpoint_folder, copy_processor, read_weights
from tars_fast.models.modules import PolicyModule
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.registry import list_checkpoints
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.files import PARTIAL, make_readable
from tars_fast.types import UserError

_STATE = "trainer_state.pt"
NUM_KEPT = 2


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes `target`'s name only once the block has ended well and all is on disk."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    make_readable(*partial.glob("*.safetensors"))
    for path in [*partial.rglob("*"), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def save_model(model: SpeechModel, folder: Path) -> None:
    """Write what plain transformers and vLLM load: the weights, or the adapter alone where there is one, with its processor."""
    module, prompts = model.module, model.prompts
    if has_adapter(module):
        save_adapter(module, folder)
    else:
        _save_weights(module, prompts, folder)
    copy_processor(prompts.source, folder)
    prompts.preset.save(folder)


def _save_weights(module: PolicyModule, prompts: PromptFormat, folder: Path) -> None:
    """Under the names of published checkpoints; those that transformers would write are not known to vLLM."""
    from huggingface_hub import save_torch_state_dict

    family = prompts.family
    written = json.loads((checkpoint_folder(prompts.source, weights=False) / "config.json").read_text("utf-8"))
    is_nested = bool(family.nested_config) and family.nested_config in written
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in module.state_dict().items():
        # What is tied stands there once; slices of an engine's fused weights each become a tensor of their own, on the host.
        if (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            weights[family.published_name(name, nested=is_nested)] = value.detach().to("cpu", copy=True)
    unused = tuple(family.published_name(f"{part}.", nested=is_nested) for part in family.unused)
    weights |= read_weights(prompts.source, unused)
    save_torch_state_dict(weights, folder)
    module.config.architectures = [family.model_class]
    module.config.save_pretrained(folder)
    prompts.generation_config.save_pretrained(folder)
    if is_nested:
        written |= {family.nested_config: module.config.to_dict(), **family.without_the_rest}
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(output_dir: Path, num_completed: int, model: SpeechModel, optimizer: torch.optim.Optimizer) -> Path:
    """Write `checkpoint-<steps>/`, see `save_model`, and drop all but the newest two."""
    target = output_dir / f"checkpoint-{num_completed}"
    with atomic_folder(target) as folder:
        save_model(model, folder)
        torch.save({"num_completed": num_completed, "optimizer": optimizer.state_dict()}, folder / _STATE)
    for _, outdated in list_checkpoints(output_dir)[:-NUM_KEPT]:
        shutil.rmtree(outdated)
    return target


def latest_checkpoint(output_dir: Path) -> Path:
    """Raises UserError where there is none to resume from."""
    found = list_checkpoints(output_dir)
    if not found:
        raise UserError(f"--resume: no checkpoint in {output_dir}; start without --resume")
    return found[-1][1]


def load_trainer_state(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Restore the optimiser; returns the number of completed steps."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["num_completed"]
