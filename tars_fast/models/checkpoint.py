"""Writing and reading checkpoints; a folder called `checkpoint-<steps>` is always complete.

Weights, configuration and processor are what transformers, peft and vLLM load. `optimizer/` holds the optimiser's state, by
names of parameters, in one safetensors file of each process that owns a part of it, `trainer_state.pt` all else. Any number of
processes reads what any other number wrote, and so does `HuggingFaceStorageReader` of torch.distributed.checkpoint.

A checkpoint is written in the background: `CheckpointPart` is a copy, in host memory, of what one process has to write, and
`PendingCheckpoint` writes it in a thread. Neither of them talks to other processes.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tars_fast.models.adapters import adapter_weights, has_adapter, save_adapter
from tars_fast.models.hub import checkpoint_folder, copy_processor, read_weights
from tars_fast.models.modules import PolicyModule
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.registry import list_checkpoints
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.cli import first_line
from tars_fast.support.files import (
    PARTIAL,
    CannotWriteError,
    complete_folder,
    explain_cannot_write,
    flush,
    free_bytes,
    partial_of,
    remove_folder,
)
from tars_fast.support.text import size
from tars_fast.types import UserError

_STATE = "trainer_state.pt"
_OPTIMIZER = "optimizer"
TRAINER_FILES = (_STATE, _OPTIMIZER)
"""What a checkpoint holds for a resumed run alone."""


def save_model(model: SpeechModel, folder: Path) -> None:
    """Write what transformers and vLLM load: the weights, or only the adapter if there is one, and the processor."""
    _write_model(model, _copy_weights(model), folder)


def _copy_weights(model: SpeechModel) -> dict[str, Tensor]:
    """On the host, under published names: all weights, or those of the adapter.

    Processes that have parts of them all call it; others than the first get nothing of use.
    """
    module, prompts, parallel = model.module, model.prompts, model.parallel
    if has_adapter(module):
        return adapter_weights(module, parallel)
    is_nested = _is_nested(prompts, _source_config(prompts))
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in module.state_dict().items():
        # Tied weights are written once. Views of an engine's fused weights are copied, so that each is a tensor of its own.
        if (value.data_ptr(), value.shape) not in seen:
            seen.add((value.data_ptr(), value.shape))
            # One after the other, so that a whole one is there twice for a moment only.
            whole = value.detach() if parallel is None else parallel.whole(name, value)
            published = prompts.family.published_weights(name, whole, nested=is_nested)
            weights |= {own: piece.to("cpu", copy=True) for own, piece in published}
    return weights


def _write_model(model: SpeechModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    module, prompts = model.module, model.prompts
    if has_adapter(module):
        save_adapter(module, weights, folder)
    else:
        _write_weights(module, prompts, weights, folder)
    copy_processor(prompts.source, folder)
    prompts.preset.save(folder)


def _source_config(prompts: PromptFormat) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((checkpoint_folder(prompts.source, weights=False) / "config.json").read_text("utf-8"))
    return written


def _is_nested(prompts: PromptFormat, config: Mapping[str, Any]) -> bool:
    return bool(prompts.family.nested_config) and prompts.family.nested_config in config


def _write_weights(module: PolicyModule, prompts: PromptFormat, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights under the names of published checkpoints; vLLM does not know those that transformers 5 writes."""
    from huggingface_hub import save_torch_state_dict

    family, written = prompts.family, _source_config(prompts)
    is_nested = _is_nested(prompts, written)
    unused = tuple(family.published_name(f"{part}.", nested=is_nested) for part in family.unused_parts) + family.other_parts
    save_torch_state_dict({**weights, **read_weights(prompts.source, unused)}, folder)
    module.config.architectures = [family.model_class]
    module.config.save_pretrained(folder)
    prompts.generation_config.save_pretrained(folder)
    if is_nested:
        written |= {family.nested_config: module.config.to_dict(), **family.saved_config_entries}
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def checkpoint_bytes(model: SpeechModel, extra: Mapping[str, object] | None = None) -> int:
    """Size of a checkpoint: weights, or those of the adapter, AdamW's two moments in float32, and lists of tensors in `extra`,
    see `CheckpointPart.copy`. Small files are left out."""
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


@dataclass(frozen=True)
class CheckpointPart:
    """What one process writes of a checkpoint, in host memory and of nobody else's use."""

    num_completed: int
    optimizer: dict[str, Tensor]
    """Its part of the optimiser's state, see `optimizer_state`."""
    shard: tuple[int, int]
    """(number of this part, how many there are)."""
    weights: dict[str, Tensor] | None
    """All weights, or the adapter's. None: another process writes them, and all but its part of the optimiser's state."""
    state: bytes
    """trainer_state.pt."""

    @classmethod
    def copy(
        cls,
        num_completed: int,
        model: SpeechModel | None,
        optimizer: Mapping[str, Tensor],
        shard: tuple[int, int] = (0, 1),
        extra: Mapping[str, object] | None = None,
    ) -> CheckpointPart:
        """Copy what training will change.

        Processes that have parts of the weights all call it, and of what it returns the first one's is whole.

        Args:
            model: None in a process that writes its part of the optimiser's state alone.
            extra: what else a resumed run needs, by name: tensors, numbers, strings, lists and dictionaries of them.
        """
        state = io.BytesIO()
        if model is not None:
            torch.save({"num_completed": num_completed, "num_shards": shard[1], "extra": dict(extra or {})}, state)
        parallel = None if model is None else model.parallel
        copied: dict[str, Tensor] = {}
        for name, value in optimizer.items():
            # A step's number has no parts.
            parameter = name.rpartition(".")[0]
            whole = value if parallel is None or not value.ndim else parallel.whole(parameter, value)
            copied[name] = whole.detach().to("cpu", copy=True).contiguous()
        weights = None if model is None else _copy_weights(model)
        return cls(num_completed, copied, shard, weights, state.getvalue())

    @property
    def num_bytes(self) -> int:
        tensors = [*self.optimizer.values(), *(self.weights or {}).values()]
        return len(self.state) + sum(value.nbytes for value in tensors)

    def write(self, model: SpeechModel, folder: Path) -> None:
        """Write it into a folder in which other processes write theirs; it is on disk when this returns."""
        from safetensors.torch import save_file

        (folder / _OPTIMIZER).mkdir(parents=True, exist_ok=True)
        shard = folder / _shard_name(*self.shard)
        save_file(self.optimizer, shard)
        flush([shard])
        if self.weights is not None:
            _write_model(model, self.weights, folder)
            (folder / _STATE).write_bytes(self.state)
            flush([*(path for path in folder.rglob("*") if path.parent.name != _OPTIMIZER), folder])


def _shard_name(number: int, count: int) -> str:
    return f"{_OPTIMIZER}/shard-{number + 1:05}-of-{count:05}.safetensors"


class PendingCheckpoint:
    """A checkpoint of which a thread writes this process's part; several processes write into one folder.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: Path, part: CheckpointPart, model: SpeechModel):
        self.num_completed = part.num_completed
        self.target = output_dir / f"checkpoint-{part.num_completed}"
        self._part, self._model = part, model
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._written = executor.submit(self._write)
        executor.shutdown(wait=False)

    def _write(self) -> None:
        with explain_cannot_write(self.target, self._part.num_bytes):
            self._part.write(self._model, partial_of(self.target))

    @property
    def is_written(self) -> bool:
        """Whether the thread has ended, well or not."""
        return self._written.done()

    def failure(self) -> BaseException | None:
        """Wait for the thread; returns what went wrong, a CannotWriteError where the disk is full or not to be written to."""
        return self._written.exception()

    def complete(self) -> Path:
        """Give the folder its name, once every process has written its part. Raises CannotWriteError."""
        with explain_cannot_write(self.target):
            complete_folder(self.target)
        return self.target

    def discard(self) -> None:
        """Delete what was written of it."""
        shutil.rmtree(partial_of(self.target), ignore_errors=True)


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


def set_damaged_aside(output_dir: Path, warn: Callable[[str], None]) -> bool:
    """Give checkpoints newer than the newest whole one another name; returns whether there is a whole one.

    Raises:
        CannotWriteError: they cannot be renamed.
    """
    for _, checkpoint in reversed(list_checkpoints(output_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            return True
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        with explain_cannot_write(aside):
            if aside.exists():
                remove_folder(aside)
            checkpoint.rename(aside)
        warn(f"{checkpoint} is damaged ({fault:.150}) and is left out; it is called {aside.name} now")
    return False


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
        state = _read_state(checkpoint, mmap=True)
        name = checkpoint.name.removeprefix("checkpoint-").removesuffix(PARTIAL)
        if state["num_completed"] != int(name):
            return f"{path.name}: of another step"
        for path in _shards_of(checkpoint, state):
            with safe_open(path, framework="pt"):
                pass
    except Exception as error:  # A damaged file makes the libraries raise anything.
        return f"{path.name}: {first_line(error)}"
    return None


def _read_state(checkpoint: Path, *, mmap: bool = False) -> dict[str, Any]:
    return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True, mmap=mmap)


def _shards_of(checkpoint: Path, state: Mapping[str, Any]) -> list[Path]:
    """The files with the optimiser's state; earlier versions wrote it into trainer_state.pt."""
    count = state.get("num_shards", 0)
    return [checkpoint / _shard_name(number, count) for number in range(count)]


class _SavedTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        from safetensors import safe_open

        files = [safe_open(path, framework="pt") for path in paths]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_trainer_state(folder: Path, parameters: Sequence[str]) -> tuple[int, Mapping[str, Tensor], dict[str, Any]]:
    """(completed steps, the optimiser's state by name, see `load_optimizer_state`, the `extra` of `CheckpointPart.copy`).

    Args:
        parameters: the names of those trained, in their order, by which earlier versions kept the optimiser's state.
    """
    state = _read_state(folder)
    saved: Mapping[str, Tensor] = _SavedTensors(_shards_of(folder, state))
    if "optimizer" in state:
        held = state["optimizer"]["state"]
        saved = {f"{parameters[n]}.{entry}": torch.as_tensor(value) for n in held for entry, value in held[n].items()}
    # The earliest wrote no `extra`.
    return state["num_completed"], saved, state.get("extra", {})
