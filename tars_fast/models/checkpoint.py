"""Writing and reading checkpoints; a folder called `checkpoint-<steps>` is always complete."""

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
from tars_fast.support.files import PARTIAL, make_readable, remove_folder
from tars_fast.types import UserError

_STATE = "trainer_state.pt"
NUM_KEPT = 2
"""Checkpoints of a run that stay; older ones are deleted."""


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `target` when the block has ended without error and all is on disk."""
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
        remove_folder(target)
    partial.rename(target)


def save_model(model: SpeechModel, folder: Path) -> None:
    """Write what transformers and vLLM load: the weights, or only the adapter if there is one, and the processor."""
    module, prompts = model.module, model.prompts
    if has_adapter(module):
        save_adapter(module, folder)
    else:
        _save_weights(module, prompts, folder)
    copy_processor(prompts.source, folder)
    prompts.preset.save(folder)


def _save_weights(module: PolicyModule, prompts: PromptFormat, folder: Path) -> None:
    """Write the weights under the names of published checkpoints; vLLM does not know those that transformers 5 writes."""
    from huggingface_hub import save_torch_state_dict

    family = prompts.family
    written = json.loads((checkpoint_folder(prompts.source, weights=False) / "config.json").read_text("utf-8"))
    is_nested = bool(family.nested_config) and family.nested_config in written
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in module.state_dict().items():
        # Tied weights are written once. Views of an engine's fused weights are copied, so that each is a tensor of its own.
        if (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            weights[family.published_name(name, nested=is_nested)] = value.detach().to("cpu", copy=True)
    unused = tuple(family.published_name(f"{part}.", nested=is_nested) for part in family.unused_parts)
    weights |= read_weights(prompts.source, unused)
    save_torch_state_dict(weights, folder)
    module.config.architectures = [family.model_class]
    module.config.save_pretrained(folder)
    prompts.generation_config.save_pretrained(folder)
    if is_nested:
        written |= {family.nested_config: module.config.to_dict(), **family.saved_config_entries}
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(output_dir: Path, num_completed: int, model: SpeechModel, optimizer: torch.optim.Optimizer) -> Path:
    """Write `checkpoint-<steps>/`, see `save_model`, with the optimiser's state, and delete all but the newest two."""
    target = output_dir / f"checkpoint-{num_completed}"
    with atomic_folder(target) as folder:
        save_model(model, folder)
        torch.save({"num_completed": num_completed, "optimizer": optimizer.state_dict()}, folder / _STATE)
    for _, outdated in list_checkpoints(output_dir)[:-NUM_KEPT]:
        remove_folder(outdated)
    return target


def latest_checkpoint(output_dir: Path) -> Path:
    """The folder of the newest checkpoint. Raises UserError where there is none."""
    found = list_checkpoints(output_dir)
    if not found:
        raise UserError(f"--resume: no checkpoint in {output_dir}; start without --resume")
    return found[-1][1]


def load_trainer_state(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Load the optimiser's state; returns the number of completed steps."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return state["num_completed"]
