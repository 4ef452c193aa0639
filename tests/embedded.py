"""The embedded model, as tests and the processes that they start take it."""

from __future__ import annotations

import torch

from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable


def new_model(**changes) -> SpeechModel:
    """The embedded model as the loop prepares it, fully trainable unless `changes` say otherwise."""
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    settings = {"lora_rank": 0, "lora_alpha": 32.0, "freeze_audio": True, "gradient_checkpointing": False}
    make_trainable(model, **(settings | changes))
    return model
