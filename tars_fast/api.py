"""What the commands do, from Python: settings in, results out.

It is not the package itself that has these names, because `tars_fast.train` is the module of a command.

```python
from tars_fast.api import TrainConfig, load_policy, train

outcome = train(TrainConfig(num_steps=10))
print(outcome.evaluation["change"]["speech_accuracy"])
```

What would end a command with one line and status 2 or 1 raises `UserError` or `TrainingError` here, with the same line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tars_fast.analyse import AnalyseConfig, AnalysisOutcome, analyse
from tars_fast.config import TrainConfig
from tars_fast.data.audio import decode
from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions
from tars_fast.evaluate import EvaluateConfig, EvaluationOutcome, evaluate
from tars_fast.evaluation.answering import layer_cosines
from tars_fast.models.hub import adapter_rank
from tars_fast.models.memory import Workload, assumed_longest_prompt
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, choose_device
from tars_fast.rollout.engine import RolloutEngine, Sampling
from tars_fast.rollout.policy import choose_engine, load_model_and_engine
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.train import TrainOutcome, train
from tars_fast.types import Completion, LongAudio, Modality, Question, TrainingError, UserError

__all__ = [
    "HELD_OUT_DATA",
    "TRAINING_DATA",
    "VALIDATION_DATA",
    "AnalyseConfig",
    "AnalysisOutcome",
    "Completion",
    "EvaluateConfig",
    "EvaluationOutcome",
    "Modality",
    "Policy",
    "Question",
    "TrainConfig",
    "TrainOutcome",
    "TrainingError",
    "UserError",
    "analyse",
    "decode",
    "evaluate",
    "load_policy",
    "load_questions",
    "train",
]


@dataclass(frozen=True)
class Policy(AbstractContextManager["Policy"]):
    """A model and the engine that samples from its weights; close it, or use it in a `with` block."""

    model: SpeechModel
    engine: RolloutEngine
    max_new_tokens: int
    """Longest completion."""

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine, and give back its memory."""
        self.engine.close()

    def answer(
        self,
        questions: Sequence[Question],
        modality: Modality | Literal["speech", "text"] = Modality.SPEECH,
        *,
        num_completions: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[Completion]]:
        """`num_completions` completions of each question, from its spoken or its written prompt.

        Args:
            temperature: 0 takes the most likely token at every place.
            seed: of the samples, where the temperature is not 0.

        Raises:
            UserError: a recording cannot be used, a prompt is too long, or a number is out of range.
        """
        if num_completions < 1 or not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"num_completions {num_completions}, temperature {temperature}: at least 1, and 0 or greater")
        with torch.no_grad():
            prompts = self.model.encode_prompts(questions, Modality(modality))
        for question, prompt in zip(questions, prompts, strict=True):
            if (reason := self.engine.refusal(prompt, self.max_new_tokens)) is not None:
                raise UserError(f"item {question.id!r}: {reason}")
        sampling = Sampling(num_completions, self.max_new_tokens, temperature, seed)
        with explain_out_of_memory("evaluation"):
            completions = self.engine.generate(prompts, range(len(questions)), sampling)
        self.engine.release_memory()
        return [completions[start : start + num_completions] for start in range(0, len(completions), num_completions)]

    def layer_cosines(self, questions: Sequence[Question]) -> np.ndarray:
        """[I, L] similarity of speech and text hidden states: for each question and layer the cosine between the mean states of
        its greedy spoken and of its greedy written completion, each under its own prompt.

        Raises:
            UserError: see `answer`.
        """
        completions = {modality: [group[0] for group in self.answer(questions, modality)] for modality in Modality}
        with torch.no_grad():
            prompts = {modality: self.model.encode_prompts(questions, modality) for modality in Modality}
        return layer_cosines(self.model, prompts, completions)


def load_policy(
    model: str = "pocket",
    *,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_new_tokens: int | None = None,
    long_audio: LongAudio = "refuse",
) -> Policy:
    """Load a model to answer questions with.

    Args:
        model: a preset, a folder with a checkpoint, or a name on the hub.
        engine: see `TrainConfig`, as the next two.
        max_new_tokens: longest completion. None: the preset's.
        long_audio: what becomes of a recording longer than the model takes at once.

    Raises:
        UserError: there is no such model, it cannot be read, or the engine cannot serve it.
        TrainingError: memory ran out.
    """
    # The settings that a command would refuse.
    EvaluateConfig(model=model, engine=engine, device=device, dtype=dtype, max_new_tokens=max_new_tokens, long_audio=long_audio)
    preset = find_preset(model)
    lora_rank = adapter_rank(preset.source)
    torch_device, torch_dtype = choose_device(device, dtype, uses_lora=preset.lora_rank > 0)
    prompts = load_prompt_format(preset, preset.source, long_audio)
    architecture = prompts.family.architecture(prompts.config)
    new_tokens = max_new_tokens or preset.max_new_tokens
    workload = Workload(
        architecture=architecture,
        engine=choose_engine(engine, prompts.family, torch_device, torch_dtype, lora_rank, preset.source),
        dtype_bytes=torch_dtype.itemsize,
        lora_rank=lora_rank,
        group_size=2,
        max_new_tokens=new_tokens,
        longest_prompt=min(assumed_longest_prompt(architecture), architecture.max_tokens - new_tokens),
        rollout_batch_size=preset.rollout_batch_size,
        trains=False,
        on_gpu=torch_device.type == "cuda",
    )
    with explain_out_of_memory("loading the model"):
        speech_model, rollout_engine = load_model_and_engine(prompts, preset.source, torch_device, torch_dtype, workload)
    return Policy(speech_model, rollout_engine, new_tokens)
