"""The bundled speech LLM and its data, made from nothing: `python -m tars_fast.pocket --output-dir DIR`.

A genuine Qwen2-Audio architecture of 1.2 M parameters that answers spoken two-step arithmetic with a chain of thought. Three
stages, each deterministic by seed:

1. speech: utterances of the *training* operands by the *training* voices (espeak-ng, 14 per question on average);
2. hearing: audio tower and projector learn by CTC to land on the text embeddings of what was said;
3. thinking: the language model learns the task from much text and little speech, with tower, projector and embeddings frozen.

The modality gap comes from stage 3: the encoder tells all words apart, but the language model has seen few spoken questions.
So the gap can be closed: by more speech, which is what `train` does with rewards instead of labels.

The tokenizer is an asset that was trained once and is never trained again, so that token ids stay as they are.
"""

from __future__ import annotations

import io
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.data.parquet import write_parquet
from tars_fast.data.synthesis import ACCENTS, SPEAKERS, Synthesiser
from tars_fast.models.families import qwen2_audio
from tars_fast.models.families.qwen2_audio import embed_audio
from tars_fast.models.prompts import PromptFormat
from tars_fast.models.registry import ASSETS, PRESETS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.cli import require_extra, run_command
from tars_fast.support.files import atomic_folder
from tars_fast.types import Modality, Prompt, Question

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
OPERATORS = {1: "plus", -1: "minus"}
TRAINING_SPEAKERS = SPEAKERS
VALIDATION_SPEAKERS = ("steph", "anika")
HELD_OUT_SPEAKERS = ("f5", "linda", "edward", "max")
NUM_TRAINING_UTTERANCES = 840
NUM_VALIDATION = 100
NUM_HELD_OUT = 400
WINDOW_SECONDS = 4
NUM_MELS = 64


@dataclass(frozen=True)
class Problem:
    """`first op1 second op2 third`, whose intermediate and final values are within 0..12."""

    first: int
    op1: int
    second: int
    op2: int
    third: int

    @property
    def middle(self) -> int:
        return self.first + self.op1 * self.second

    @property
    def result(self) -> int:
        return self.middle + self.op2 * self.third

    @property
    def question(self) -> str:
        a, b, c = NUMBERS[self.first], NUMBERS[self.second], NUMBERS[self.third]
        return f"What is {a} {OPERATORS[self.op1]} {b} {OPERATORS[self.op2]} {c}?"

    @property
    def completion(self) -> str:
        a, b, c = NUMBERS[self.first], NUMBERS[self.second], NUMBERS[self.third]
        m, r = NUMBERS[self.middle], NUMBERS[self.result]
        return (
            f"<think>{a} {OPERATORS[self.op1]} {b} is {m}, {m} {OPERATORS[self.op2]} {c} is {r}.</think>"
            f"<answer>The answer is {r}.</answer>"
        )


@dataclass(frozen=True)
class Splits:
    training: list[Problem]
    validation: list[Problem]
    held_out: list[Problem]


def split_problems() -> Splits:
    """Split all 1,163 problems, each of which is in one part; the split never depends on a seed."""
    digits = range(1, 10)
    limits = range(len(NUMBERS))
    problems = [
        problem
        for first in digits
        for op1 in OPERATORS
        for second in digits
        for op2 in OPERATORS
        for third in digits
        if (problem := Problem(first, op1, second, op2, third)).middle in limits and problem.result in limits
    ]
    random.Random(0).shuffle(problems)
    tail = NUM_HELD_OUT + NUM_VALIDATION
    return Splits(problems[tail:], problems[NUM_HELD_OUT:tail], problems[:NUM_HELD_OUT])


def speak(synthesiser: Synthesiser, problem: Problem, speakers: Sequence[str], rng: random.Random) -> tuple[np.ndarray, str]:
    """Synthesise a question without noise: ([samples] float32 at 16 kHz, voice)."""
    import soxr

    voice = f"{rng.choice(ACCENTS)}+{rng.choice(speakers)}"
    wave, rate = synthesiser(
        problem.question,
        voice,
        words_per_minute=rng.randint(210, 290),
        pitch=rng.randint(30, 70),
        seed=rng.randrange(2**31),
    )
    wave = soxr.resample(wave, rate, SAMPLE_RATE)
    audible = np.flatnonzero(np.abs(wave) > 0.01)
    margin = SAMPLE_RATE // 20
    wave = wave[max(0, audible[0] - margin) : audible[-1] + margin]
    silence = np.zeros(rng.randint(0, SAMPLE_RATE // 10), np.float32)
    return np.concatenate([silence, wave]), voice


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
    """Utterances of training problems by training voices."""

    features: Tensor
    """[N, M, F] float16 log-mel spectrogram."""
    mask: Tensor
    """[N, F]"""
    problems: list[Problem]


def synthesise_warm_up(processor: Any, num_utterances: int, seed: int) -> Speech:
    rng = random.Random(seed)
    problems = [rng.choice(split_problems().training) for _ in range(num_utterances)]
    with Synthesiser() as synthesiser:
        waves = [speak(synthesiser, problem, TRAINING_SPEAKERS, rng)[0] for problem in problems]
    features, masks = [], []
    for start in range(0, num_utterances, 100):
        batch = processor.feature_extractor(
            waves[start : start + 100],
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        features.append(batch.input_features.half())
        masks.append(batch.attention_mask)
    return Speech(torch.cat(features), torch.cat(masks), problems)


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
        question = Question(id="", text=problem.question, answer=NUMBERS[problem.result], choices=tuple(NUMBERS))
        token_ids = self.model.prompts.token_ids(question, modality, [len(clip) for clip in clips])
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


def train_thinking(module: Any, processor: Any, speech: Speech, stage: ThinkingStage) -> None:
    """Stage 3: train the language model on chains of thought."""
    rng = random.Random(stage.seed)
    audio = encode_audio(module, speech)
    rows = SupervisedRows(module, processor)
    training = split_problems().training
    module.requires_grad_(False)
    module.model.language_model.requires_grad_(True)
    module.lm_head.requires_grad_(True)
    module.get_input_embeddings().requires_grad_(False)
    optimizers = _optimizers(module, matrix_rate=0.02, other_rate=2e-3)
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


def write_recordings(folder: Path, seed: int) -> None:
    """Write the bundled data: a file each of training, validation and held-out items, disjoint by operands and voices."""
    import soundfile

    rng = random.Random(seed)
    splits = split_problems()
    spoken_twice = splits.training[: NUM_TRAINING_UTTERANCES - len(splits.training)]
    parts = {
        "training": (splits.training + spoken_twice, TRAINING_SPEAKERS),
        "validation": (splits.validation, VALIDATION_SPEAKERS),
        "held_out": (splits.held_out, HELD_OUT_SPEAKERS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with Synthesiser() as synthesiser:
        for name, (problems, speakers) in parts.items():
            items = []
            recordings: dict[str, bytes] = {}
            for number, problem in enumerate(problems):
                wave, voice = speak(synthesiser, problem, speakers, rng)
                audio = f"{number:04}.ogg"
                buffer = io.BytesIO()
                soundfile.write(buffer, wave, SAMPLE_RATE, format="OGG", subtype="OPUS")
                recordings[audio] = buffer.getvalue()
                item = {
                    "id": f"{name}-{number:04}",
                    "question": problem.question,
                    "answer": NUMBERS[problem.result],
                    "answer_set": NUMBERS,
                    "audio": audio,
                    "voice": voice,
                }
                items.append(item)
            write_parquet(folder / f"{name}.parquet", items, recordings.__getitem__)


@dataclass(frozen=True)
class PocketConfig:
    """Make the bundled speech LLM and its data from nothing."""

    output_dir: Path
    """Receives pocket/ (the model) and spoken-arithmetic/ (the data)."""
    seed: int = 0
    """The same seed gives the same model and data on the same machine."""
    hearing_steps: int = 700
    """Optimiser steps of stage 2 (audio tower and projector, by CTC)."""
    thinking_steps: int = 300
    """Optimiser steps of stage 3 (language model)."""
    text_per_step: int = 32
    """Written items in a step of stage 3."""
    speech_per_step: int = 5
    """Spoken items in a step of stage 3: the fewer, the wider the modality gap."""
    num_utterances: int = 5000
    """Utterances synthesised for stages 2 and 3; they are not kept."""
    write_data: bool = True
    """Write spoken-arithmetic/ too; encoding its recordings takes a minute."""


def make_pocket(config: PocketConfig) -> int:
    require_extra("speech")
    started = time.monotonic()
    # Two threads are no faster at this width, and one makes the result independent of how many cores there are.
    torch.set_num_threads(1)
    module, processor = build(config.seed)
    if config.write_data:
        write_recordings(config.output_dir / "spoken-arithmetic", config.seed)
    speech = synthesise_warm_up(processor, config.num_utterances, config.seed)
    print(f"speech synthesised, {time.monotonic() - started:.0f} s", flush=True)
    train_hearing(module, processor, speech, num_steps=config.hearing_steps, batch_size=32, seed=config.seed)
    stage = ThinkingStage(config.thinking_steps, config.text_per_step, config.speech_per_step, config.seed)
    train_thinking(module, processor, speech, stage)
    with atomic_folder(config.output_dir / "pocket") as folder:
        module.save_pretrained(folder)
        processor.save_pretrained(folder)
        PRESETS["pocket"].save(folder)
    print(f"written to {config.output_dir}, {time.monotonic() - started:.0f} s")
    return 0


def main() -> int:
    return run_command(make_pocket, PocketConfig, "python -m tars_fast.pocket")


if __name__ == "__main__":
    sys.exit(main())
