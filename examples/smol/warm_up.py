"""Teaches an assembled model to hear spoken questions: `python examples/smol/warm_up.py`, see README.md beside it.

Three stages; the same command goes on where one was interrupted:

1. encoding: the tower, which stays as it is, encodes all recordings once;
2. hearing: the projector learns by CTC to land on the text embeddings of what is said, without the language model;
3. thinking: projector and LoRA on the language model learn to answer, reasoning first, much from text and a little from speech.

What remains is small: projector and adapter, which `assemble.py --warm-up DIR` puts into the published weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from parts import PROJECTOR
from safetensors.torch import load_file, save
from torch import Tensor

from tars_fast.data.audio import decode
from tars_fast.data.items import load_questions
from tars_fast.data.splits import data_fingerprint
from tars_fast.models.adapters import ADAPTER_WEIGHTS, adapter_weights, save_adapter
from tars_fast.models.families.base import stack_features
from tars_fast.models.families.qwen2_audio import encode_frames
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable
from tars_fast.support.cli import as_paths, check_numbers, run_command
from tars_fast.support.files import make_readable, replaced_atomically, write_atomically
from tars_fast.support.locks import locked
from tars_fast.types import Completion, Modality, Prompt, Question, UserError

_ENCODED_AT_ONCE = 16
_SHARPNESS = 12.0
"""Score of a token on whose own embedding a frame lands, before the softmax of CTC."""
_LEAST_GRADIENT = 1e-30
"""Of a score; smaller ones change no weight."""


@dataclass(frozen=True)
class WarmUpConfig:
    """Teach an assembled model to hear; the same command goes on after an interruption."""

    model: str
    """Folder that assemble.py has written."""
    questions: str
    """training.jsonl of questions.py, whose reasoning is learned from."""
    speech: str
    """The same items spoken: items.jsonl or items.parquet that `prepare` has made of them."""
    output_dir: Path
    """Projector and adapter, and what a later run goes on from."""
    hearing_steps: int = 2000
    hearing_batch_size: int = 16
    """Recordings of a step."""
    hearing_rate: float = 2e-3
    """Peak learning rate of the projector, by AdamW; neither rate has been tuned."""
    thinking_steps: int = 400
    text_per_step: int = 6
    speech_per_step: int = 2
    """The fewer, the wider the modality gap."""
    thinking_rate: float = 5e-4
    lora_rank: int = 8
    thinking_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the language model computes in; weights stay float32. bfloat16 is faster where processors have it."""
    save_every: int = 10
    """Steps between the states that a later run goes on from."""
    seed: int = 0

    def __post_init__(self) -> None:
        as_paths(self, "output_dir")
        positive = ("hearing_batch_size", "hearing_rate", "thinking_rate", "lora_rank", "save_every")
        check_numbers(
            self,
            positive=positive,
            not_negative=("hearing_steps", "thinking_steps", "text_per_step", "speech_per_step", "seed"),
        )
        if self.text_per_step + self.speech_per_step == 0:
            raise UserError("--text-per-step 0 --speech-per-step 0: nothing to learn from; give one of them")


@dataclass(frozen=True)
class Lesson:
    """An item to learn from."""

    question: Question
    completion: str
    states: Tensor
    """[A, E] float16 of its recording, by the tower."""


@dataclass(frozen=True)
class Stage:
    name: str
    num_steps: int
    rate: float
    save_every: int
    seed: int
    folder: Path


def read_completions(path: str) -> dict[str, str]:
    """Completion of each question, by the question's text.

    Raises:
        UserError: a line has none.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {row["question"]: row["completion"] for row in rows}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--questions {path}: not a file of questions.py ({error!r:.100}); write it by that") from error


def fingerprint(questions: Sequence[Question], completions: Mapping[str, str]) -> str:
    """SHA-256 of what is learned from: the items, their completions and the samples of their recordings."""
    digest = hashlib.sha256(data_fingerprint(questions).encode())
    for question in questions:
        assert question.audio is not None, "spoken items are read"
        digest.update(completions[question.text].encode())
        digest.update(decode(question.audio).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode(model: SpeechModel, questions: Sequence[Question], folder: Path) -> Iterator[Tensor]:
    """[A, E] float16 states of each recording, from `folder` where they are there already."""
    for start in range(0, len(questions), _ENCODED_AT_ONCE):
        batch = questions[start : start + _ENCODED_AT_ONCE]
        path = folder / f"states-{start:04}.safetensors"
        if not path.is_file():
            clips = [model.prompts.features(model.prompts.load_clips(question.audio)[0][0]) for question in batch]
            features, mask = stack_features(model.module, clips)
            states, lengths = encode_frames(model.module, features, mask)
            held = {
                question.id: own[:length].half().contiguous()
                for question, own, length in zip(batch, states, lengths.tolist(), strict=True)
            }
            write_atomically(path, save(held))
            make_readable(path)
        held = load_file(path)
        yield from (held[question.id] for question in batch)


def projector_of(model: SpeechModel) -> Any:
    return model.module.get_submodule("model.multi_modal_projector")


def train(model: SpeechModel, stage: Stage, loss_of: Callable[[random.Random], Tensor]) -> None:
    """Train what needs gradients, from the state that an interrupted run has left.

    Args:
        loss_of: the loss of a step, whose items the generator chooses.
    """
    from transformers import get_cosine_schedule_with_warmup

    trained = {name: own for name, own in model.module.named_parameters() if own.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, stage.num_steps // 20), stage.num_steps)
    path = stage.folder / f"{stage.name}.pt"
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        with torch.no_grad():
            for name, own in trained.items():
                own.copy_(state["weights"][name])
    started = time.monotonic()
    for step in range(first, stage.num_steps):
        loss = loss_of(random.Random(f"{stage.seed} {stage.name} {step}"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % stage.save_every == 0 or done == stage.num_steps:
            weights = {name: own.detach() for name, own in trained.items()}
            state = {"step": done, "weights": weights, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            with replaced_atomically(path) as file:
                torch.save(state, file)
            seconds = (time.monotonic() - started) / (done - first)
            print(f"{stage.name} {done}/{stage.num_steps} loss {loss.item():.4f}, {seconds:.2f} s a step", flush=True)


def hearing_loss(model: SpeechModel, lessons: Sequence[Lesson], batch_size: int) -> Callable[[random.Random], Tensor]:
    """CTC between audio embeddings and the tokens of what is said; scores are products with these tokens' embeddings."""
    tokenizer: Any = model.prompts.tokenizer
    targets = [tokenizer.encode(lesson.question.transcript or lesson.question.text) for lesson in lessons]
    said = {token for target in targets for token in target}
    # Where nothing new is heard the projector lands on the embedding of a space, which a pretrained model passes over; on that
    # of padding where the tokenizer writes spaces between words.
    blank = next(token for token in (*tokenizer.encode(" "), tokenizer.pad_token_id) if token not in said)
    used = [blank, *sorted(said)]
    place = {token: number for number, token in enumerate(used)}
    embeddings = model.module.get_input_embeddings().weight[used].detach()
    scale = _SHARPNESS / embeddings.square().sum(-1).mean()
    projector = projector_of(model)

    def loss_of(rng: random.Random) -> Tensor:
        rows = rng.choices(range(len(lessons)), k=batch_size)
        states = [lessons[row].states.float() for row in rows]
        heard = projector(torch.nn.utils.rnn.pad_sequence(states, batch_first=True))
        scores = scale * F.linear(heard, embeddings)
        # Where hearing is sure they are denormal numbers, with which a step takes three times as long.
        scores.register_hook(lambda gradient: gradient.masked_fill_(gradient.abs() < _LEAST_GRADIENT, 0))
        return F.ctc_loss(
            scores.log_softmax(-1).transpose(0, 1),
            torch.tensor([place[token] for row in rows for token in targets[row]]),
            torch.tensor([len(own) for own in states]),
            torch.tensor([len(targets[row]) for row in rows]),
            blank=0,
            zero_infinity=True,
        )

    return loss_of


def thinking_loss(model: SpeechModel, lessons: Sequence[Lesson], config: WarmUpConfig) -> Callable[[random.Random], Tensor]:
    """Mean cross-entropy of completions, whose prompts are written or spoken, in the trainer's own forward pass."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.thinking_dtype == "bfloat16")
    tokenizer: Any = model.prompts.tokenizer
    projector = projector_of(model)

    def pair(lesson: Lesson, modality: Modality) -> tuple[Prompt, Completion]:
        clips = (projector(lesson.states.float()),) if modality is Modality.SPEECH else ()
        token_ids = model.prompts.token_ids(lesson.question, modality, [[len(clip) for clip in clips]] if clips else ())
        completion = tuple(tokenizer.encode(lesson.completion + tokenizer.eos_token))
        return Prompt(modality, token_ids, clips), Completion(0, modality, completion, (), lesson.completion, False)

    def loss_of(rng: random.Random) -> Tensor:
        pairs = [pair(rng.choice(lessons), Modality.TEXT) for _ in range(config.text_per_step)]
        pairs += [pair(rng.choice(lessons), Modality.SPEECH) for _ in range(config.speech_per_step)]
        batch = model.pack([prompt for prompt, _ in pairs], [completion for _, completion in pairs])
        with autocast:
            logits = model.head(model.forward(batch))
        return F.cross_entropy(logits.float(), batch.targets)

    return loss_of


def begin(config: WarmUpConfig, settings: Mapping[str, object]) -> None:
    """Raises UserError where the folder was begun with other settings."""
    path = config.output_dir / "settings.json"
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if begun.get("lessons") != settings["lessons"]:
            raise UserError(
                f"--output-dir {config.output_dir}: was begun with other recordings or completions; name another folder"
            )
        changed = [f"--{name.replace('_', '-')} {begun.get(name)}" for name in settings if begun.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"--output-dir {config.output_dir}: was begun with {', '.join(changed)}; give the same, or another folder"
            )
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def warm_up(config: WarmUpConfig) -> int:
    settings = {
        name: str(value) for name, value in dataclasses.asdict(config).items() if name not in ("output_dir", "save_every")
    }
    completions = read_completions(config.questions)
    questions = load_questions(config.speech)
    if without := [question.id for question in questions if question.text not in completions]:
        raise UserError(
            f"--questions {config.questions}: nothing of item {without[0]!r} of --speech; give what that was made of"
        )
    # What is learned may change where its files keep their names; states on disk are those of these recordings.
    settings["lessons"] = fingerprint(questions, completions)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir):
        begin(config, settings)
        preset = find_preset(config.model)
        model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
        encoded = encode(model, questions, config.output_dir)
        lessons = [
            Lesson(question, completions[question.text], states) for question, states in zip(questions, encoded, strict=True)
        ]
        print(f"{len(lessons)} recordings encoded", flush=True)
        projector_of(model).requires_grad_(True)
        stage = Stage(
            "hearing", config.hearing_steps, config.hearing_rate, 10 * config.save_every, config.seed, config.output_dir
        )
        train(model, stage, hearing_loss(model, lessons, config.hearing_batch_size))
        torch.manual_seed(config.seed)
        make_trainable(
            model, lora_rank=config.lora_rank, lora_alpha=4 * config.lora_rank, freeze_audio=True, gradient_checkpointing=False
        )
        # Adding an adapter froze it.
        projector = projector_of(model).requires_grad_(True)
        stage = Stage(
            "thinking", config.thinking_steps, config.thinking_rate, config.save_every, config.seed, config.output_dir
        )
        train(model, stage, thinking_loss(model, lessons, config))
        model.module.half()
        save_adapter(model.module, adapter_weights(model.module), config.output_dir)
        make_readable(config.output_dir / ADAPTER_WEIGHTS)
        write_atomically(config.output_dir / PROJECTOR, save(projector.state_dict()))
    print(f"projector and adapter written to {config.output_dir}")
    return 0


def main() -> int:
    return run_command(warm_up, WarmUpConfig, "python examples/smol/warm_up.py")


if __name__ == "__main__":
    sys.exit(main())
