"""`Preset`: a checkpoint with the settings that suit it. The table of all of them is `PRESETS` in registry.py."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tars_fast.models.architecture import Architecture
from tars_fast.models.families.base import Family

THINK_PROMPT = (
    "You are a helpful assistant. The assistant first thinks about the question and then gives the answer. The reasoning "
    "stands in <think> </think>, the answer in <answer> </answer> as: The answer is [CHOICE]. For example: "
    "<think> reasoning </think> <answer> The answer is A. </answer>"
)
PRESET_FILE = "preset.json"


@dataclass(frozen=True)
class Preset:
    """A checkpoint and the defaults of its settings, which `TrainConfig` may replace."""

    source: str
    """Hub id or local path."""
    system_prompt: str
    learning_rate: float
    """Peak learning rate of AdamW."""
    questions_per_step: int
    max_new_tokens: int
    num_steps: int
    lora_rank: int
    """0 = full fine-tuning."""
    behaviour_model: str
    """Text embedder of R_beh."""
    gradient_checkpointing: bool
    rollout_batch_size: int
    """Completions in flight: bounded by the memory of their KV cache."""
    bundled_data: str = "pocket"
    """Name of the bundled data that are taken where none are given."""
    family: Family | None = None
    """None: the one that `model_type` in config.json names."""
    architecture: Architecture | None = None
    """None: read from config.json."""

    def with_settings(self, config: object) -> Preset:
        """A copy with the settings that the user gave; `None` and `"auto"` in `config` mean that the user gave none.

        Args:
            config: a command's settings; fields that a preset does not have are ignored.
        """
        given = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value not in (None, "auto")})

    def save(self, folder: Path) -> None:
        """Write preset.json into a checkpoint's folder, from which `find_preset` makes the same preset again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # These follow from the checkpoint itself.
        del values["source"], values["family"], values["architecture"]
        (folder / PRESET_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


PAPER = Preset(
    source="",
    system_prompt=THINK_PROMPT,
    learning_rate=2e-5,
    questions_per_step=8,
    max_new_tokens=1024,
    num_steps=1000,
    lora_rank=8,
    behaviour_model="Qwen/Qwen3-Embedding-0.6B",
    gradient_checkpointing=True,
    rollout_batch_size=64,
)
"""The paper's settings, for any model of a supported architecture."""
