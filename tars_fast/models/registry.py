"""The tables of all presets and families, and the lookups of a checkpoint in them."""

from __future__ import annotations

import dataclasses
import os
import re
from functools import cache
from pathlib import Path

from tars_fast.models.architecture import Architecture
from tars_fast.models.families import audio_flamingo_3, phi4_multimodal, qwen2_5_omni, qwen2_audio, qwen3_omni, voxtral
from tars_fast.models.families.base import Family
from tars_fast.models.hub import base_of, checkpoint_folder, model_type
from tars_fast.models.preset import PAPER, PRESET_FILE, Preset
from tars_fast.support.text import visible
from tars_fast.types import UserError

ASSETS = Path(__file__).parents[1] / "assets"
FAMILIES = (
    qwen2_audio.FAMILY,
    qwen2_5_omni.FAMILY,
    qwen3_omni.FAMILY,
    phi4_multimodal.FAMILY,
    voxtral.FAMILY,
    audio_flamingo_3.FAMILY,
)
_POCKET = Preset(
    source=str(ASSETS / "pocket"),
    system_prompt="Think, then answer.",
    learning_rate=8e-4,
    questions_per_step=32,
    max_new_tokens=40,
    num_steps=160,
    lora_rank=0,
    behaviour_model="hashed-ngrams",
    gradient_checkpointing=False,
    rollout_batch_size=256,
)
PRESETS: dict[str, Preset] = {
    "pocket": _POCKET,
    "pocket-hard": dataclasses.replace(
        _POCKET,
        source=str(ASSETS / "pocket-hard"),
        learning_rate=4e-4,
        max_new_tokens=48,
        num_steps=120,
        bundled_data="pocket-hard",
    ),
    **qwen2_audio.PRESETS,
    **qwen2_5_omni.PRESETS,
    **qwen3_omni.PRESETS,
    **phi4_multimodal.PRESETS,
    **voxtral.PRESETS,
    **audio_flamingo_3.PRESETS,
}


def find_family(source: str, model_type: str) -> Family:
    """The family that the `model_type` of a checkpoint's config.json belongs to.

    Args:
        source: for the message.

    Raises:
        UserError: no family has this `model_type`.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(family.model_types[0] for family in FAMILIES)
    hint = "; its revision refs/pr/70 holds weights that transformers reads" if model_type == "phi4mm" else ""
    raise UserError(f"--model {source}: a {model_type} checkpoint; supported are {supported}{hint}")


def family_of(preset: Preset) -> Family:
    """The family of a preset, or of its checkpoint; an adapter has its base's.

    Raises:
        UserError: config.json cannot be read, or no family has its `model_type`.
    """
    if preset.family is not None:
        return preset.family
    base = base_of(preset.source)
    return find_family(base, model_type(base))


def architecture_of(preset: Preset) -> Architecture:
    """The architecture from the table of presets, or else from the checkpoint's config.json; an adapter has its base's.

    Raises:
        UserError: see `family_of`.
    """
    base = preset.source if preset.architecture is not None else base_of(preset.source)
    for known in PRESETS.values():
        if known.source == base and known.architecture is not None:
            return known.architecture
    from transformers import AutoConfig

    family = family_of(preset)
    config = AutoConfig.from_pretrained(checkpoint_folder(base, weights=False), trust_remote_code=False)
    return family.architecture(family.config_of(config))


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(completed steps, folder) of every complete checkpoint of a run, oldest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def find_preset(model: str) -> Preset:
    """The preset for `--model`: by its name, by its checkpoint, by the preset.json in a checkpoint, or else `PAPER`.

    Args:
        model: name of a preset, folder of a checkpoint, or name on the hub.

    Raises:
        UserError: `model` is none of these, or its preset.json is of another version.
    """
    if model in PRESETS:
        return PRESETS[model]
    for preset in PRESETS.values():
        if preset.source == model:
            return preset
    # Neither begins with a dot on the hub: that is a path.
    if not Path(model).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@\S+)?", model) is None:
        raise UserError(
            f"--model {model}: neither a preset ({', '.join(PRESETS)}), nor a folder, nor a name on the hub (owner/name)"
        )
    folder = checkpoint_folder(model, weights=False) if not Path(model).exists() else Path(model)
    if (folder / PRESET_FILE).is_file():
        try:
            return Preset.read(folder, model)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--model {model}: its {PRESET_FILE} is not one of this version ({error}); remove the file"
            ) from error
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        newest = checkpoints[-1][1]
        raise UserError(f"--model {model}: the folder of a run; name one of its checkpoints, for example {newest}")
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        _say_assumed(model)
        return dataclasses.replace(PAPER, source=model)
    raise UserError(f"--model {model}: neither a preset ({', '.join(PRESETS)}) nor a folder that holds a checkpoint")


@cache
def _say_assumed(model: str) -> None:
    """Once a process: a run's checkpoint that has lost the file is asked in other words than it was trained on."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"note: --model {visible(model)} holds no {PRESET_FILE}; the paper's settings are taken, with the system prompt "
            f"{PAPER.system_prompt[:60]!r}...",
            flush=True,
        )
