"""The bundled speech LLMs and their data: `python -m tars_fast.pocket --task pocket --output-dir DIR`.

Each is a genuine Qwen2-Audio architecture of 1.2 M parameters that answers spoken arithmetic with a chain of thought; the tasks
are in `data/arithmetic.py`. Three stages, each deterministic by seed:

1. speech: utterances of *training* operands by *training* voices (espeak-ng);
2. hearing: audio tower and projector learn by CTC to land on the text embeddings of what was said, for `pocket` from nothing,
   for `pocket-hard` from the bundled `pocket`;
3. thinking: the language model learns the task from much text and little speech, with tower, projector and embeddings frozen.

The modality gap comes from stage 3: the encoder tells all words apart, but the language model has seen few spoken questions.
So the gap can be closed: by more speech, which is what `train` does with rewards instead of labels.

The tokenizer is an asset that was trained once and is never trained again, so that token ids stay as they are.
"""

from __future__ import annotations

import dataclasses
import io
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tars_fast.data.arithmetic import TASKS, Problem, Task
from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.data.items import BUNDLED
from tars_fast.data.parquet import write_parquet
from tars_fast.data.synthesis import Synthesiser
from tars_fast.models.families import qwen2_audio
from tars_fast.models.families.qwen2_audio import embed_audio
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.registry import ASSETS, PRESETS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.cli import require_extra, run_command
from tars_fast.support.files import atomic_folder
from tars_fast.types import Modality, Prompt, Question

WINDOW_SECONDS = 4
NUM_MELS = 64


@dataclass(frozen=True)
class Recipe:
    """How the model of a task is made; `PocketConfig` may replace each part."""

    hearing_steps: int
    hearing_batch_size: int
    thinking_steps: int
    text_per_step: int
    speech_per_step: int
    num_utterances: int
    hears_as: str | None = None
    """The bundled model whose tower, projector and embeddings stage 2 begins with; None: it begins from nothing."""
    dtype: torch.dtype = torch.float32
    """Type of the weights that are kept."""


RECIPES = {
    "pocket": Recipe(
        hearing_steps=700,
        hearing_batch_size=32,
        thinking_steps=300,
        text_per_step=32,
        speech_per_step=5,
        num_utterances=5000,
    ),
    "pocket-hard": Recipe(
        hearing_steps=250,
        hearing_batch_size=24,
        thinking_steps=500,
        text_per_step=32,
        speech_per_step=3,
        num_utterances=3000,
        hears_as="pocket",
        dtype=torch.float16,
    ),
}


def build(seed: int) -> tuple[Any, Any]:
    """Make the untrained model and its processor: (`Qwen2AudioForConditionalGeneration`, `Qwen2AudioProcessor`)."""
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "pocket" / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
    )
    extractor = WhisperFeatureExtractor(feature_size=NUM_MELS, chunk_length=WINDOW_SECONDS)
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    vocabulary = tokenizer.get_vocab()
    stop_ids = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 96,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 384,
            "num_mel_bins": NUM_MELS,
            "max_source_positions": WINDOW_SECONDS * 50,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": stop_ids[0],
            "pad_token_id": stop_ids[1],
        },
        audio_token_index=vocabulary["<|AUDIO|>"],
    )
    torch.manual_seed(seed)
    module = Qwen2AudioForConditionalGeneration(config)
    _initialise(module)
    module.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[1])
    return module, processor


@torch.no_grad()
def _initialise(module: Any) -> None:
    """Scale weights of the tower by fan-in and those of the language model up: the usual 0.02 is too little at this width."""
    tower = module.model.audio_tower
    positions, width = tower.embed_positions.weight.shape
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(positions)[:, None] * rates
    tower.embed_positions.weight.copy_(0.3 * torch.cat([angles.sin(), angles.cos()], dim=1))
    for name, parameter in tower.named_parameters():
        if parameter.dim() >= 2 and parameter.requires_grad and "embed_positions" not in name:
            gain = 1.4 if "conv" in name else 0.7
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))
    for parameter in module.model.language_model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(2.5)


@dataclass(frozen=True)
class Speech:
    """Utterances of a task's training problems by training voices."""

    task: Task

    features: Tensor
    """[N, M, F] float16 log-mel spectrogram."""
    mask: Tensor
    """[N, F]"""
    problems: list[Problem]


def extract_features(processor: Any, task: Task, problems: list[Problem], waves: list[np.ndarray]) -> Speech:
    """Spectrograms of recordings, [samples] at 16 kHz each, of problems."""
    features, masks = [], []
    for start in range(0, len(waves), 100):
        batch = processor.feature_extractor(
            waves[start : start + 100],
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        features.append(batch.input_features.half())
        masks.append(batch.attention_mask)
    return Speech(task, torch.cat(features), torch.cat(masks), problems)


def synthesise_warm_up(processor: Any, task: Task, num_utterances: int, seed: int) -> Speech:
    rng = random.Random(seed)
    training = task.split_problems().training
    problems = [rng.choice(training) for _ in range(num_utterances)]
    with Synthesiser() as synthesiser:
        waves = [task.speak(synthesiser, problem, task.training_speakers, rng)[0] for problem in problems]
    return extract_features(processor, task, problems, waves)


def _optimizers(module: nn.Module, matrix_rate: float, other_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest: minutes instead of hours at this size."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    is_matrix = {name: p.dim() == 2 and "embed" not in name and "lm_head" not in name for name, p in named}
    return [
        torch.optim.Muon([p for n, p in named if is_matrix[n]], lr=matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW([p for n, p in named if not is_matrix[n]], lr=other_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _update(optimizers: list[torch.optim.Optimizer], loss: Tensor, fraction: float) -> None:
    """Take an optimiser step; the rate follows the finished fraction of the stage: 3 % warm-up, then cosine to 2 %."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    scale = min(1.0, fraction / 0.03 + 0.03) * (0.02 + 0.49 * (1 + math.cos(math.pi * fraction)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()


def _mask_spectrogram(features: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment (arXiv 1904.08779), one band of mels and one of frames, which helps with held-out voices."""
    features = features.clone()
    for item in features:
        mean = item.mean()
        mel, frame = rng.integers(0, NUM_MELS - 10), rng.integers(0, 140)
        item[mel : mel + rng.integers(0, 10)] = mean
        item[:, frame : frame + rng.integers(0, 12)] = mean
    return features


def train_hearing(module: Any, processor: Any, speech: Speech, *, num_steps: int, batch_size: int, seed: int) -> None:
    """Stage 2: train tower and projector by CTC between audio tokens and the question, scored by the text embeddings."""
    rng = np.random.default_rng(seed)
    tokenizer = processor.tokenizer
    targets = [torch.tensor(tokenizer.encode(problem.question)) for problem in speech.problems]
    blank = tokenizer.pad_token_id
    module.requires_grad_(False)
    module.model.audio_tower.requires_grad_(True)
    module.model.audio_tower.embed_positions.requires_grad_(False)
    module.model.multi_modal_projector.requires_grad_(True)
    module.get_input_embeddings().requires_grad_(True)
    optimizers = _optimizers(module, matrix_rate=0.02, other_rate=2e-3)
    module.train()
    started = time.monotonic()
    for step in range(num_steps):
        rows = rng.integers(0, len(speech.problems), batch_size)
        features = _mask_spectrogram(speech.features[rows].float(), rng)
        embeddings, lengths = embed_audio(module, features, speech.mask[rows])
        logits = 4.0 * F.linear(embeddings, module.get_input_embeddings().weight)
        wanted = [targets[row] for row in rows]
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(wanted),
            lengths,
            torch.tensor([len(target) for target in wanted]),
            blank=blank,
            zero_infinity=True,
        )
        _update(optimizers, loss, step / num_steps)
        if (step + 1) % 50 == 0:
            print(f"hearing {step + 1}/{num_steps} ctc {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    module.eval()


def hear_as(module: Any, bundled: str) -> None:
    """Give a model the tower, projector and embeddings of a bundled one."""
    from transformers import Qwen2AudioForConditionalGeneration

    other = Qwen2AudioForConditionalGeneration.from_pretrained(ASSETS / bundled, trust_remote_code=False)
    module.model.audio_tower.load_state_dict(other.model.audio_tower.state_dict())
    module.model.multi_modal_projector.load_state_dict(other.model.multi_modal_projector.state_dict())
    module.get_input_embeddings().load_state_dict(other.get_input_embeddings().state_dict())


@torch.no_grad()
def encode_audio(module: Any, speech: Speech) -> list[Tensor]:
    """Audio embeddings of every utterance, [A, D] each."""
    audio_embeddings: list[Tensor] = []
    for start in range(0, len(speech.problems), 100):
        rows = slice(start, start + 100)
        states, lengths = embed_audio(module, speech.features[rows].float(), speech.mask[rows])
        audio_embeddings.extend(state[:length].clone() for state, length in zip(states, lengths.tolist(), strict=True))
    return audio_embeddings


def _supervised_loss(module: Any, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cross-entropy over the completion tokens of rows (prompt embeddings [P, D], completion ids [C])."""
    embed = module.get_input_embeddings()
    inputs = [torch.cat([prompt, embed(completion)]) for prompt, completion in rows]
    batch = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    attention_mask = torch.zeros(batch.shape[:2], dtype=torch.long)
    labels = torch.full(batch.shape[:2], -100)
    for index, (prompt, completion) in enumerate(rows):
        attention_mask[index, : len(prompt) + len(completion)] = 1
        labels[index, len(prompt) - 1 : len(prompt) + len(completion) - 1] = completion
    states = module.model.language_model(inputs_embeds=batch, attention_mask=attention_mask).last_hidden_state
    chosen = labels >= 0
    return F.cross_entropy(module.lm_head(states[chosen]), labels[chosen])


class SupervisedRows:
    """Rows (prompt embeddings, completion ids) of the task, with the prompts of `train`."""

    def __init__(self, module: Any, processor: Any):
        prompts = PromptFormat(
            qwen2_audio.FAMILY,
            module.config,
            module.generation_config,
            processor.tokenizer,
            processor.feature_extractor,
            processor.chat_template,
            PRESETS["pocket"],
            source="",
        )
        self.model = SpeechModel(module, prompts)

    def _row(self, problem: Problem, modality: Modality, *clips: Tensor) -> tuple[Tensor, Tensor]:
        question = Question(id="", text=problem.question, answer=problem.answer, choices=())
        token_ids = self.model.prompts.token_ids(question, modality, [[len(clip) for clip in clips]] if clips else ())
        prompt = self.model.embed_tokens(torch.tensor([token_ids]), [Prompt(modality, token_ids, clips)], [0])[0]
        tokenizer = self.model.prompts.tokenizer
        return prompt, torch.tensor(tokenizer.encode(problem.completion + tokenizer.eos_token))

    def text(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return self._row(problem, Modality.TEXT)

    def speech(self, problem: Problem, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self._row(problem, Modality.SPEECH, audio)


@dataclass(frozen=True)
class ThinkingStage:
    """How long stage 3 is, and what a step of it holds."""

    num_steps: int
    text_per_step: int
    speech_per_step: int
    """Sets the size of the modality gap."""
    seed: int
    matrix_rate: float = 0.02
    """Muon's peak learning rate; AdamW's is a tenth of it."""


def train_thinking(module: Any, processor: Any, speech: Speech, stage: ThinkingStage) -> None:
    """Stage 3: train the language model on chains of thought."""
    rng = random.Random(stage.seed)
    audio = encode_audio(module, speech)
    rows = SupervisedRows(module, processor)
    training = speech.task.split_problems().training
    module.requires_grad_(False)
    module.model.language_model.requires_grad_(True)
    module.lm_head.requires_grad_(True)
    module.get_input_embeddings().requires_grad_(False)
    optimizers = _optimizers(module, stage.matrix_rate, stage.matrix_rate / 10)
    module.train()
    started = time.monotonic()
    for step in range(stage.num_steps):
        batch = [rows.text(rng.choice(training)) for _ in range(stage.text_per_step)]
        for _ in range(stage.speech_per_step):
            index = rng.randrange(len(audio))
            batch.append(rows.speech(speech.problems[index], audio[index]))
        loss = _supervised_loss(module, batch)
        _update(optimizers, loss, step / stage.num_steps)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(f"thinking {step + 1}/{stage.num_steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
    module.eval()


def write_recordings(folder: Path, task: Task, seed: int) -> None:
    """Write a task's data: a file each of training, validation and held-out items, disjoint by operands and voices."""
    rng = random.Random(seed)
    splits = task.split_problems()
    parts = {
        "training": ((splits.training * 2)[: task.num_training], task.training_speakers),
        "validation": (splits.validation, task.validation_speakers),
        "held_out": (splits.held_out, task.held_out_speakers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with Synthesiser() as synthesiser:
        for name, (problems, speakers) in parts.items():
            spoken = [(problem, *task.speak(synthesiser, problem, speakers, rng)) for problem in problems]
            write_part(folder / f"{name}.parquet", task, spoken)


def write_part(path: Path, task: Task, spoken: Sequence[tuple[Problem, np.ndarray, str]]) -> None:
    """Write the file of a part, whose name its items' ids begin with.

    Args:
        spoken: each problem, [samples] float32 at 16 kHz, and whose voice that is.
    """
    import soundfile

    items = []
    recordings: dict[str, bytes] = {}
    for number, (problem, wave, voice) in enumerate(spoken):
        audio = f"{number:04}.ogg"
        buffer = io.BytesIO()
        format = {"format": "OGG", "subtype": "OPUS", "compression_level": task.compression}
        soundfile.write(buffer, wave, SAMPLE_RATE, **format)
        recordings[audio] = buffer.getvalue()
        item = {
            "id": f"{path.stem}-{number:04}",
            "question": problem.question,
            "answer": problem.answer,
            "answer_set": task.choices,
            "audio": audio,
            "voice": voice,
        }
        items.append(item)
    write_parquet(path, items, recordings.__getitem__)


@dataclass(frozen=True)
class PocketConfig:
    """Make a bundled speech LLM and its data."""

    output_dir: Path
    """Receives the model and the data, in folders of the names they are bundled by."""
    task: Literal["pocket", "pocket-hard"] = "pocket"
    """pocket: three operands, made from nothing. pocket-hard: five operands, which hears as the bundled pocket does."""
    seed: int = 0
    """The same seed gives the same model and data on the same machine."""
    hearing_steps: int | None = None
    """Optimiser steps of stage 2 (audio tower and projector, by CTC). None: the task's, as for the next four."""
    thinking_steps: int | None = None
    """Optimiser steps of stage 3 (language model)."""
    text_per_step: int | None = None
    """Written items in a step of stage 3."""
    speech_per_step: int | None = None
    """Spoken items in a step of stage 3: the fewer, the wider the modality gap."""
    num_utterances: int | None = None
    """Utterances synthesised for stages 2 and 3; they are not kept."""
    write_data: bool = True
    """Write the data too; encoding the recordings takes a minute."""

    def recipe(self) -> Recipe:
        """The task's, with the settings that were given."""
        given = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Recipe)}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(RECIPES[self.task], **changes)


def make_pocket(config: PocketConfig) -> int:
    require_extra("speech")
    started = time.monotonic()
    # Two threads are no faster at this width, and one makes the result independent of how many cores there are.
    torch.set_num_threads(1)
    task, recipe = TASKS[config.task], config.recipe()
    module, processor = build(config.seed)
    if config.write_data:
        write_recordings(config.output_dir / BUNDLED[config.task].name, task, config.seed)
    speech = synthesise_warm_up(processor, task, recipe.num_utterances, config.seed)
    print(f"speech synthesised, {time.monotonic() - started:.0f} s", flush=True)
    if recipe.hears_as is not None:
        hear_as(module, recipe.hears_as)
    batch_size = recipe.hearing_batch_size
    train_hearing(module, processor, speech, num_steps=recipe.hearing_steps, batch_size=batch_size, seed=config.seed)
    stage = ThinkingStage(recipe.thinking_steps, recipe.text_per_step, recipe.speech_per_step, config.seed)
    train_thinking(module, processor, speech, stage)
    with atomic_folder(config.output_dir / config.task) as folder:
        module.to(recipe.dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        PRESETS[config.task].save(folder)
    print(f"written to {config.output_dir}, {time.monotonic() - started:.0f} s")
    return 0


def main() -> int:
    return run_command(make_pocket, PocketConfig, "python -m tars_fast.pocket")


if __name__ == "__main__":
    sys.exit(main())
