"""`Preset`: a checkpoint with the settings that suit it. The table of all of them is `PRESETS` in registry.py."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tars_fast.models.architecture import Architecture
from tars_fast.models.families.base import Family
from tars_fast.models.prompt_settings import read_answer_format, read_prompt_template
from tars_fast.types import THINK, AnswerFormat

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

THINK_PROMPT = (
    "You are a helpful assistant. The assistant first thinks about the question and then gives the answer. The reasoning "
    "stands in <think> </think>, the answer in <answer> </answer> as: The answer is [CHOICE]. For example: "
    "<think> reasoning </think> <answer> The answer is A. </answer>"
)
PLAIN_PROMPT = "You are a helpful assistant."
"""System prompt of an instruction that is not a question, such as transcribing."""
PRESET_FILE = "preset.json"


@dataclass(frozen=True)
class Preset:
    """A checkpoint and the defaults of its settings, which `TrainConfig` may replace."""

    source: str
    """Hub id or local path."""
    system_prompt: str
    """`{answer_format}` in it stands for what `answers` says; empty: prompts have none."""
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
    question_template: str = ""
    """jinja text of the user's turn, see `prompt_settings.TEMPLATE_VARIABLES`; empty: the question as it is."""
    answers: AnswerFormat = THINK
    """How completions write their answer."""
    family: Family | None = None
    """None: the one that `model_type` in config.json names."""
    architecture: Architecture | None = None
    """None: read from config.json."""

    def with_settings(self, config: object) -> Preset:
        """A copy with the settings that the user gave; `None` and `"auto"` in `config` mean that the user gave none.

        Args:
            config: a command's settings; fields that a preset does not have are ignored.

        Raises:
            UserError: the file of a prompt template or answer format cannot be used.
        """
        given = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(self)}
        preset = dataclasses.replace(self, **{name: value for name, value in given.items() if value not in (None, "auto")})
        template, format = (getattr(config, name, None) for name in ("prompt_template", "answer_format"))
        if template is not None:
            preset = dataclasses.replace(preset, question_template=read_prompt_template(template))
        if format is not None and (answers := read_answer_format(format)) != self.answers:
            # The system prompt that is there asks for the other format.
            own = THINK_PROMPT if answers == THINK else f"{PLAIN_PROMPT} {{answer_format}}"
            system_prompt = preset.system_prompt if given["system_prompt"] is not None else own
            preset = dataclasses.replace(preset, answers=answers, system_prompt=system_prompt)
        return preset

    def settings_of(self, config: DataclassInstance) -> dict[str, Any]:
        """The values here of the settings that `config`, whose settings this preset has, shares with it."""
        names = {field.name for field in dataclasses.fields(self)} & {field.name for field in dataclasses.fields(config)}
        # The system prompt is the preset's where none is given, and stays with it.
        return {name: getattr(self, name) for name in names - {"system_prompt"}}

    def save(self, folder: Path) -> None:
        """Write preset.json into a checkpoint's folder, from which `find_preset` makes the same preset again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # These follow from the checkpoint itself.
        del values["source"], values["family"], values["architecture"]
        values["answers"] = dataclasses.asdict(self.answers)
        (folder / PRESET_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, source: str) -> Preset:
        """What `save` wrote. Raises ValueError or TypeError where it is not of this version."""
        values = json.loads((folder / PRESET_FILE).read_text(encoding="utf-8"))
        if "answers" in values:
            values["answers"] = AnswerFormat(**values["answers"])
        return cls(source=source, **values)


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
