"""Write a checkpoint as a model others can load: `python -m tars_fast.export --model runs/x/checkpoint-160 --output-dir DIR`.

An adapter is merged into its base in float32, and the sum is cast once: in bfloat16 the sum would lose most of an adapter that
was trained for few steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tars_fast.models.adapters import ADAPTER_WEIGHTS, merge_adapter
from tars_fast.models.checkpoint import save_model
from tars_fast.models.hub import adapter_config, base_of, checkpoint_folder, copy_processor
from tars_fast.models.modules import PolicyModule
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.publish import HubRepository, check_repository
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.reports.model_card import CardSubject, model_card
from tars_fast.support.cli import FAILED, as_paths, check_file_names, run_command
from tars_fast.support.files import atomic_folder, listing
from tars_fast.support.locks import LOCK, locked
from tars_fast.types import UserError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of dtypes; a checkpoint stored in another one is written as float32."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as a plain Hugging Face model, adapters merged, with a model card."""

    model: str
    """A checkpoint folder, full or of an adapter."""
    output_dir: Path
    """Folder to make."""
    adapter: bool = False
    """Write the bare adapter, for those who have the base."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights that are written. auto: as the base model, or a full checkpoint, is stored."""
    evaluation: Path | None = None
    """evaluation.json for the model card. None: that of the run, where the checkpoint is its last."""
    push_to_hub: str | None = None
    """Also upload it to this repository on the hub (OWNER/NAME), which is made, private, where there is none."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "evaluation")
        check_file_names(self, "model")
        check_repository(self.push_to_hub)
        if self.adapter and self.dtype != "auto":
            raise UserError(f"--dtype {self.dtype}: an adapter is written as it was trained; leave --dtype or --adapter out")
        if os.path.lexists(self.output_dir) and (not self.output_dir.is_dir() or set(os.listdir(self.output_dir)) - {LOCK}):
            raise UserError(f"--output-dir {self.output_dir}: exists already; name another folder, or remove it")


def merged_module(prompts: PromptFormat, source: str) -> PolicyModule:
    """The checkpoint's module in float32 on the CPU; an adapter is merged into its base.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    module = load_module(prompts, base_of(source), torch.device("cpu"), torch.float32)
    if adapter_config(source) is None:
        return module
    return merge_adapter(module, prompts.family, checkpoint_folder(source, weights=True))


def stored_dtype(source: str) -> torch.dtype:
    """The dtype of most of a checkpoint's stored numbers, which its configuration may not name, or name wrongly."""
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    for path in checkpoint_folder(source, weights=True).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return _DTYPES.get(max(numbers, key=numbers.__getitem__, default=""), torch.float32)


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """Raises UserError where it is not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); give a JSON file") from error
    if not isinstance(values, dict):
        raise UserError(f"{flag} {path}: not a JSON object")
    return values


def run_of(source: str) -> dict[str, Any]:
    """config.json of the run that a checkpoint belongs to; empty for a checkpoint of no run."""
    path = Path(source).resolve().parent / "config.json"
    return read_json(path, "--model") if path.is_file() else {}


def find_evaluation(config: ExportConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for the model card; empty where there are none. Those of a run belong to its last checkpoint only."""
    if config.evaluation is not None:
        path = config.evaluation
        return read_json(path / "evaluation.json" if path.is_dir() else path, "--evaluation")
    checkpoint = Path(config.model).resolve()
    path = checkpoint.parent / "evaluation.json"
    evaluation = read_json(path, "--model") if path.is_file() else {}
    num_steps = evaluation.get("stopped", {}).get("step", run.get("num_steps"))
    return evaluation if checkpoint.name == f"checkpoint-{num_steps}" else {}


def export(config: ExportConfig) -> int:
    """Write the checkpoint into `output_dir`, and publish it where that is asked for; returns the exit status.

    Raises:
        UserError: see `write_export`, or the hub does not let it be published.
    """
    repository = None if config.push_to_hub is None else HubRepository(config.push_to_hub)
    with locked(config.output_dir):
        card = write_export(config)
    print(f"written to {config.output_dir}: {listing(config.output_dir)}")
    if repository is None:
        return 0
    if (problem := repository.push(config.output_dir, card, f"export of {Path(config.model).name}")) is not None:
        print(f"warning: {problem}", flush=True)
        return FAILED
    print(f"published as {repository.name}")
    return 0


def write_export(config: ExportConfig) -> str:
    """Write the folder; returns the model card.

    Raises:
        UserError: the checkpoint or what its run wrote beside it cannot be read, or the folder not be written.
    """
    preset = find_preset(config.model)
    source = preset.source
    is_adapter = adapter_config(source) is not None
    if config.adapter and not is_adapter:
        raise UserError(f"--adapter: {config.model} is a full checkpoint; leave it out")
    if is_adapter and not (checkpoint_folder(source, weights=True) / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"--model {config.model}: holds no {ADAPTER_WEIGHTS}; name a whole checkpoint")
    run = run_of(source)
    evaluation = find_evaluation(config, run)
    prompts = load_prompt_format(preset, source)
    base = base_of(source) if is_adapter else run.get("model")
    module, dtype = None, torch.float32
    if not config.adapter:
        module = merged_module(prompts, source)
        dtype = stored_dtype(base_of(source)) if config.dtype == "auto" else getattr(torch, config.dtype)
        module = module.to(dtype)
    needs = prompts.family.adapter_folder if config.adapter else ""
    written = None if config.adapter else str(dtype).removeprefix("torch.")
    try:
        card = model_card(CardSubject(config.output_dir.name, base, written, needs), run, evaluation)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--model {config.model}: config.json or evaluation.json beside it are damaged ({error!r}); repeat the run's last "
            "command with --resume, or move the checkpoint elsewhere"
        ) from error
    num_bytes = sum(value.nbytes for value in module.state_dict().values()) if module is not None else None
    with atomic_folder(config.output_dir, num_bytes) as folder:
        write_weights(source, module, prompts, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def write_weights(source: str, module: PolicyModule | None, prompts: PromptFormat, folder: Path) -> None:
    """Write a whole model, or where `module` is None the adapter as it is, with tokenizer, processor and preset."""
    if module is None:
        for name in ("adapter_config.json", ADAPTER_WEIGHTS):
            shutil.copyfile(checkpoint_folder(source, weights=True) / name, folder / name)
        prompts.generation_config.save_pretrained(folder)
        copy_processor(prompts.source, folder)
        prompts.preset.save(folder)
        return
    save_model(SpeechModel(module, prompts), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(with_dtype(config, str(module.dtype).removeprefix("torch.")), indent=2) + "\n", encoding="utf-8")


def with_dtype(config: object, dtype: str) -> object:
    """A configuration in which every part names `dtype`; parts may name the dtype that they were loaded in before."""
    if not isinstance(config, dict):
        return config
    return {name: dtype if name == "dtype" else with_dtype(value, dtype) for name, value in config.items()}


def main() -> int:
    return run_command(export, ExportConfig, "python -m tars_fast.export")


if __name__ == "__main__":
    sys.exit(main())
