"""Writing and reading checkpoints; a folder called `checkpoint-<steps>` is always complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tars_fast.models.adapters import has_adapter, save_adapter
from tars_fast.models.hub import checkpoint_folder, copy_processor, read_weights
from tars_fast.models.modules import PolicyModule
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.registry import list_checkpoints
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.cli import first_line
from tars_fast.support.files import CannotWriteError, atomic_folder, free_bytes, remove_folder
from tars_fast.support.text import size
from tars_fast.types import UserError

_STATE = "trainer_state.pt"


def save_model(model: SpeechModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write what transformers and vLLM load: the weights, or only the adapter if there is one, and the processor.

    Args:
        state: the whole weights of a module that has parts of them, see `whole_weights`.
    """
    module, prompts = model.module, model.prompts
    if has_adapter(module):
        save_adapter(module, folder, state)
    else:
        _save_weights(module, prompts, folder, module.state_dict() if state is None else state)
    copy_processor(prompts.source, folder)
    prompts.preset.save(folder)


def whole_weights(model: SpeechModel) -> dict[str, Tensor] | None:
    """All weights that training changes, in the first of the processes that have parts of them, which all call this.

    None where this process has all of them.
    """
    if model.parallel is None:
        return None
    state = model.module.state_dict()
    if has_adapter(model.module):
        state = {name: value for name, value in state.items() if ".lora_" in name}
    return model.parallel.whole_state(state)


def _save_weights(module: PolicyModule, prompts: PromptFormat, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the weights under the names of published checkpoints; vLLM does not know those that transformers 5 writes."""
    from huggingface_hub import save_torch_state_dict

    family = prompts.family
    written = json.loads((checkpoint_folder(prompts.source, weights=False) / "config.json").read_text("utf-8"))
    is_nested = bool(family.nested_config) and family.nested_config in written
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in state.items():
        # Tied weights are written once. Views of an engine's fused weights are copied, so that each is a tensor of its own.
        if (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            published = family.published_weights(name, value.detach(), nested=is_nested)
            weights |= {own: piece.to("cpu", copy=True) for own, piece in published}
    unused = tuple(family.published_name(f"{part}.", nested=is_nested) for part in family.unused_parts) + family.other_parts
    weights |= read_weights(prompts.source, unused)
    save_torch_state_dict(weights, folder)
    module.config.architectures = [family.model_class]
    module.config.save_pretrained(folder)
    prompts.generation_config.save_pretrained(folder)
    if is_nested:
        written |= {family.nested_config: module.config.to_dict(), **family.saved_config_entries}
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def checkpoint_bytes(model: SpeechModel, extra: Mapping[str, object] | None = None) -> int:
    """Size of a checkpoint: weights, or those of the adapter, AdamW's two moments in float32, and lists of tensors in `extra`,
    see `save_checkpoint`. Small files are left out."""
    lists = [values for values in (extra or {}).values() if isinstance(values, list)]
    trainable = 8 * sum(parameter.numel() for parameter in model.trainable_parameters())
    trainable += sum(value.nbytes for values in lists for value in values if isinstance(value, Tensor))
    tensors = {value.data_ptr(): value.nbytes for name, value in model.module.state_dict().items() if ".lora_" in name}
    if not has_adapter(model.module):
        tensors = {value.data_ptr(): value.nbytes for value in model.module.state_dict().values()}
    # Of parts, which are written as a whole, at most.
    return (trainable + sum(tensors.values())) * (1 if model.parallel is None else model.parallel.size)


def check_room(
    output_dir: Path, model: SpeechModel, num_saves: int, num_kept: int, extra: Mapping[str, object] | None = None
) -> None:
    """Raises CannotWriteError where a disk has no room for the checkpoints of a run that saves so many more of them.

    Args:
        extra: what each of them will hold beside weights and optimiser.
    """
    # The next one is written before the oldest is deleted.
    num_there = min(num_kept, len(list_checkpoints(output_dir)))
    num_missing = min(num_saves, num_kept + 1 - num_there)
    needed, free = num_missing * checkpoint_bytes(model, extra), free_bytes(output_dir)
    if needed > free:
        raise CannotWriteError(
            f"{output_dir}: {num_missing} checkpoints more need {size(needed)}, {size(free)} are free; make room, or name "
            "another folder"
        )


def save_checkpoint(
    output_dir: Path,
    num_completed: int,
    model: SpeechModel,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, object] | None = None,
) -> Path:
    """Write `checkpoint-<steps>/`, see `save_model`, with the optimiser's state.

    Processes that have parts of the weights all call it, and the first writes.

    Args:
        extra: what else a resumed run needs, by name: tensors, numbers, strings, lists and dictionaries of them.

    Raises:
        CannotWriteError: the disk is full, or the folder cannot be written to.
    """
    target = output_dir / f"checkpoint-{num_completed}"
    weights, moments, parallel = whole_weights(model), optimizer.state_dict(), model.parallel
    if parallel is not None:
        moments = parallel.whole_optimizer_state(moments, model.trained_names())
        if parallel.rank:
            return target
    with atomic_folder(target, checkpoint_bytes(model, extra)) as folder:
        save_model(model, folder, weights)
        # By a file of Python's, whose error says that the disk is full; torch's own does not.
        with (folder / _STATE).open("wb") as file:
            state = {"num_completed": num_completed, "optimizer": moments, "extra": dict(extra or {})}
            torch.save(state, file)
    return target


def remove_outdated(output_dir: Path, num_kept: int, best_step: int | None = None) -> None:
    """Delete all checkpoints but the newest `num_kept` and that of the best step. Raises CannotWriteError."""
    others = [folder for step, folder in list_checkpoints(output_dir) if step != best_step]
    for outdated in others[:-num_kept]:
        remove_folder(outdated)


def latest_checkpoint(output_dir: Path) -> Path:
    """The folder of the newest checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = list_checkpoints(output_dir)
    if not found:
        raise UserError(f"--resume: no checkpoint in {output_dir}; start without --resume")
    newest = found[-1][1]
    fault = fault_of(newest)
    if fault is None:
        return newest
    raise is_damaged(newest, fault)


def is_damaged(checkpoint: Path, fault: str) -> UserError:
    """The UserError for a checkpoint that a run cannot go on from; it names the one to take instead."""
    others = [path for _, path in list_checkpoints(checkpoint.parent) if path != checkpoint and fault_of(path) is None]
    remedy = f"{others[-1]} is whole: remove the first and resume" if others else "none is whole: start anew in another folder"
    return UserError(f"--resume: {checkpoint} is damaged ({fault:.150}); {remedy}")


def fault_of(checkpoint: Path) -> str | None:
    """What is missing or damaged in a run's checkpoint; of weights the headers are read, which tell their length."""
    from safetensors import safe_open

    path = checkpoint
    try:
        weights = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        if not weights:
            return "neither model.safetensors nor adapter_model.safetensors is there"
        shards = checkpoint / "model.safetensors.index.json"
        if shards.is_file():
            path = shards
            weights = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        settings = [checkpoint / ("adapter_config.json" if "adapter_model.safetensors" in weights else "config.json")]
        # Not every checkpoint has it, and transformers reads it beside the weights.
        settings += checkpoint.glob("generation_config.json")
        for path in settings:
            if not isinstance(json.loads(path.read_text("utf-8")), dict):
                return f"{path.name}: holds no settings"
        for path in (checkpoint / name for name in weights):
            with safe_open(path, framework="pt"):
                pass
        path = checkpoint / _STATE
        if _read_state(checkpoint, mmap=True)["num_completed"] != int(checkpoint.name.removeprefix("checkpoint-")):
            return f"{path.name}: of another step"
    except Exception as error:  # A damaged file makes the libraries raise anything.
        return f"{path.name}: {first_line(error)}"
    return None


def _read_state(checkpoint: Path, *, mmap: bool = False) -> dict[str, Any]:
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True, mmap=mmap)


def load_trainer_state(
    folder: Path, optimizer: torch.optim.Optimizer, model: SpeechModel | None = None
) -> tuple[int, dict[str, Any]]:
    """Load the optimiser's state; returns the number of completed steps and the `extra` of `save_checkpoint`.

    Args:
        model: one that may have parts of the weights only, so that its optimiser has parts of the state.

    Raises:
        UserError: it is not of these weights.
    """
    state = _read_state(folder)
    try:
        moments = state["optimizer"]
        if model is not None and model.parallel is not None:
            moments = model.parallel.part_of_optimizer_state(moments, model.trained_names())
        optimizer.load_state_dict(moments)
        for parameter, held in optimizer.state.items():
            if held["exp_avg"].shape != parameter.shape:
                raise ValueError(f"of {tuple(held['exp_avg'].shape)}, not {tuple(parameter.shape)} weights")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise is_damaged(folder, f"{_STATE}: {first_line(error)}") from error
    # Earlier versions wrote none.
    return state["num_completed"], state.get("extra", {})
