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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tars_fast.models.adapters import ADAPTER_WEIGHTS, merge_adapter
from tars_fast.models.checkpoint import save_model
from tars_fast.models.hub import adapter_config, base_of, checkpoint_folder, copy_processor
from tars_fast.models.modules import PolicyModule
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.registry import PRESETS, find_preset
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.support.cli import as_paths, check_file_names, run_command
from tars_fast.support.files import atomic_folder, listing
from tars_fast.support.locks import LOCK, locked
from tars_fast.types import UserError

_OF_THE_MACHINE = {"output_dir", "resume", "dry_run", "device", "audio_cache_gb", "audio_cache_dir", "audio_cache_dir_gb"}
"""Settings of a run that the model card leaves out, because they describe the machine and not the model."""

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

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "evaluation")
        check_file_names(self, "model")
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


def name_of(base: str | None) -> str | None:
    """The name by which others find a base model: on the hub, or of a preset whose weights come with this package."""
    for name, preset in PRESETS.items():
        if base in (name, preset.source):
            return name if Path(preset.source).exists() else preset.source
    return base


def model_card(
    config: ExportConfig,
    base: str | None,
    dtype: str,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    merge_first: str = "",
) -> str:
    """README.md: what the model is, where it comes from, how it was trained and what it reaches.

    Args:
        merge_first: folder of the base with an adapter that was part of it while this one was trained.
    """
    kind = "LoRA adapter" if config.adapter else f"model in {dtype}"
    head = ["library_name: peft" if config.adapter else "library_name: transformers", "tags:", "- speech", "- tars"]
    if base is not None and "/" in base and not Path(base).exists():
        head.append(f"base_model: {base.partition('@')[0]}")
    lines = ["---", *head, "---", "", f"# {config.output_dir.name}", ""]
    lines.append(
        f"A speech LLM trained with tars_fast (TARS, arXiv 2601.05543): {kind}"
        + (f", base model `{base}`." if base is not None else ".")
    )
    if merge_first:
        lines += [
            "",
            f"**Merge the base's own adapter first.** This adapter was trained on the base with `{merge_first}` merged into "
            f"it. Load the base, add the adapter in its folder `{merge_first}`, merge it (peft: `merge_and_unload`), and "
            "only then put this one on top; straight on the base it gives a model that was never trained.",
        ]
    fingerprint = run.get("data_fingerprint")
    if fingerprint:
        lines += ["", "## Data", "", "SHA-256 over ids, texts and answers of the items, in order:", ""]
        lines += [f"- {part}: `{digest}`" for part, digest in fingerprint.items()]
    rows = list(evaluation_rows(evaluation))
    if rows:
        lines += ["", "## Evaluation", "", "Greedy; % with 95 % bootstrap intervals over items.", ""]
        lines += ["| | items | speech | text | MRR |", "|---|---|---|---|---|", *rows]
    if run:
        kept = {name: value for name, value in run.items() if name not in _OF_THE_MACHINE | {"data_fingerprint"}}
        lines += ["", "## Training", "", "```json", json.dumps(kept, indent=2), "```"]
    return "\n".join(lines) + "\n"


def evaluation_rows(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """A table row for every report of a run's or an evaluation's evaluation.json."""
    for name, report in evaluation.items():
        if isinstance(report, Mapping) and report.get("speech_accuracy") is not None and name != "change":
            figures = [("speech_accuracy", 100), ("text_accuracy", 100), ("mrr", 1)]
            cells = (_cell(report, figure, scale) for figure, scale in figures)
            yield f"| {name} | {report['num_items']} | " + " | ".join(cells) + " |"


def _cell(report: Mapping[str, Any], name: str, scale: float) -> str:
    if report.get(name) is None:
        return "-"
    interval = report[f"{name}_ci95"]
    return f"{scale * report[name]:.1f}" + (f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})" if interval else "")


def export(config: ExportConfig) -> int:
    """Write the checkpoint into `output_dir`; returns exit status 0."""
    with locked(config.output_dir):
        write_export(config)
    print(f"written to {config.output_dir}: {listing(config.output_dir)}")
    return 0


def write_export(config: ExportConfig) -> None:
    """Raises UserError where the checkpoint or what its run wrote beside it cannot be read, or the folder not be written."""
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
    try:
        card = model_card(config, name_of(base), str(dtype).removeprefix("torch."), run, evaluation, needs)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--model {config.model}: config.json or evaluation.json beside it are damaged ({error!r}); repeat the run's last "
            "command with --resume, or move the checkpoint elsewhere"
        ) from error
    num_bytes = sum(value.nbytes for value in module.state_dict().values()) if module is not None else None
    with atomic_folder(config.output_dir, num_bytes) as folder:
        write_weights(source, module, prompts, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


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
