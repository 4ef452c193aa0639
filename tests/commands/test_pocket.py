"""The bundled model and its data: what they are, that the gap is there, and that it can be closed."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from tars_fast import pocket
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions
from tars_fast.data.sources import read_rows
from tars_fast.learning.advantages import disagreeing_groups, group_indices
from tars_fast.learning.rewards.total import completion_rewards
from tars_fast.models.registry import ASSETS, PRESETS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Modality

MEGABYTE = 1e6


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def accuracy(model: SpeechModel, questions, modality: Modality, **sampling) -> tuple[float, float]:
    """(accuracy, part of the groups whose accuracies differ)."""
    prompts = model.encode_prompts(questions, modality)
    settings = {"num_completions": 1, "max_new_tokens": 40, "temperature": 0.0, "seed": 0, **sampling}
    completions = TransformersEngine(model, 128).generate(prompts, range(len(questions)), Sampling(**settings))
    correct = completion_rewards(completions, questions)["accuracy"]
    groups = group_indices([c.question for c in completions], [c.modality for c in completions])
    return correct.mean().item(), disagreeing_groups(correct, groups).float().mean().item()


def test_is_a_genuine_small_qwen2_audio_in_plain_transformers():
    """Plain transformers, from file to answer, without a line of this project."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    folder = ASSETS / "pocket"
    assert folder_size(folder) < 6 * MEGABYTE
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    question = load_questions(TRAINING_DATA)[0]
    system = {"role": "system", "content": PRESETS["pocket"].system_prompt}
    for content, audio in ((question.text, None), ([{"type": "audio"}], [decode(question.audio)])):
        messages = [system, {"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.startswith("<|im_start|>system\nThink, then answer.<|im_end|>\n<|im_start|>user\n")
        assert ("Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n" in prompt) == (audio is not None)
        sampling = {} if audio is None else {"sampling_rate": SAMPLE_RATE}
        inputs = processor(text=[prompt], audio=audio, return_tensors="pt", **sampling)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        text = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert text.startswith("<think>")
        assert text.endswith(".</answer>")


def test_takes_prompts_of_512_tokens(model):
    inputs = torch.randint(6, 300, (1, 512))
    output = model.module.generate(input_ids=inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > 512
    assert model.prompts.max_tokens >= 512 + 40


def test_prompts_and_audio_tokens_equal_the_processors_own(model):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(PRESETS["pocket"].source)
    questions = load_questions(HELD_OUT_DATA)[:5]
    for question, prompt in zip(questions, model.encode_prompts(questions, Modality.SPEECH), strict=True):
        wave = decode(question.audio)
        rendered = model.prompts.render(question, Modality.SPEECH)
        inputs = processor(text=[rendered], audio=[wave], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        assert prompt.token_ids == tuple(inputs.input_ids[0].tolist())
        (clip,) = prompt.audio_clips
        assert len(clip) == prompt.token_ids.count(model.prompts.audio_token_id) == model.prompts.num_audio_tokens(wave)
        # 25 audio tokens a second.
        assert len(clip) == pytest.approx(25 * len(wave) / SAMPLE_RATE, abs=1)


def test_bundled_speech_is_disjoint_by_operands_and_voices():
    assert folder_size(TRAINING_DATA.parent) < 15 * MEGABYTE
    parts = {}
    for path in (TRAINING_DATA, VALIDATION_DATA, HELD_OUT_DATA):
        parts[path.stem] = [row.values for row in read_rows(str(path))]
    assert len(parts["training"]) >= 800
    assert len(parts["held_out"]) >= 400
    problems = pocket.split_problems()
    assert {item["question"] for item in parts["training"]} == {problem.question for problem in problems.training}
    for field in ("question", "voice"):
        training, validation, held_out = ({item[field] for item in items} for items in parts.values())
        assert not training & validation
        assert not training & held_out
        assert not validation & held_out
    speakers = {item["voice"].partition("+")[2] for item in parts["training"]}
    assert not speakers & {item["voice"].partition("+")[2] for item in parts["held_out"]}
    assert len({item["voice"] for item in parts["training"]}) >= 20


@pytest.mark.parametrize("path", [TRAINING_DATA, VALIDATION_DATA, HELD_OUT_DATA], ids=lambda path: path.stem)
def test_every_item_is_answered_by_its_own_arithmetic(path):
    words = {word: value for value, word in enumerate(pocket.NUMBERS)}
    for question in load_questions(path):
        first, op1, second, op2, third = question.text.removeprefix("What is ").removesuffix("?").split()
        signs = {"plus": 1, "minus": -1}
        result = words[first] + signs[op1] * words[second] + signs[op2] * words[third]
        assert question.answer == pocket.NUMBERS[result]


def test_completions_taught_are_completions_rewarded():
    """The chain of thought that the warm-up teaches earns full format and accuracy."""
    from tars_fast.learning.rewards.answers import extract_answer, has_format

    for problem in pocket.split_problems().training:
        assert extract_answer(problem.completion, pocket.NUMBERS) == pocket.NUMBERS[problem.result]
        assert has_format(problem.completion, pocket.NUMBERS)


@pytest.mark.slow
def test_gap_before_training(model):
    """Text at least 97 %, speech 45 to 70 %, and at least a third of the sampled speech groups disagree."""
    questions = load_questions(HELD_OUT_DATA)
    assert accuracy(model, questions, Modality.TEXT)[0] >= 0.97
    assert 0.45 <= accuracy(model, questions, Modality.SPEECH)[0] <= 0.70
    _, disagreeing = accuracy(model, questions, Modality.SPEECH, num_completions=4, temperature=1.0)
    assert disagreeing >= 1 / 3


@pytest.mark.slow
def test_gap_is_repairable(model):
    """Supervised fine-tuning on speech alone, same checkpoint, brings speech to within 5 points of text."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(PRESETS["pocket"].source)
    speech = pocket.synthesise_warm_up(processor, num_utterances=1500, seed=1)
    stage = pocket.ThinkingStage(num_steps=150, text_per_step=0, speech_per_step=16, seed=1)
    pocket.train_thinking(model.module, processor, speech, stage)
    questions = load_questions(HELD_OUT_DATA)
    text, _ = accuracy(model, questions, Modality.TEXT)
    spoken, _ = accuracy(model, questions, Modality.SPEECH)
    assert spoken >= text - 0.05


def test_build_is_the_same_twice(tmp_path):
    """A seed gives the same model: the documented command, shortened."""
    import hashlib

    digests = []
    for name in ("first", "second"):
        folder = tmp_path / name
        config = pocket.PocketConfig(folder, hearing_steps=3, thinking_steps=2, num_utterances=40, write_data=False)
        assert pocket.make_pocket(config) == 0
        digests.append(hashlib.sha256((folder / "pocket" / "model.safetensors").read_bytes()).hexdigest())
        assert (folder / "pocket" / "tokenizer.json").read_bytes() == (ASSETS / "pocket" / "tokenizer.json").read_bytes()
    assert digests[0] == digests[1]


def test_data_are_written_as_they_are_bundled(tmp_path, monkeypatch):
    """The same columns and kind of recording, of a few problems."""
    problems = pocket.split_problems()
    few = pocket.Splits(problems.training[:2], problems.validation[:1], problems.held_out[:1])
    monkeypatch.setattr(pocket, "split_problems", lambda: few)
    monkeypatch.setattr(pocket, "NUM_TRAINING_UTTERANCES", 3)
    pocket.write_recordings(tmp_path / "data", seed=0)
    for bundled, ids in (
        (TRAINING_DATA, ["training-0000", "training-0001", "training-0002"]),
        (VALIDATION_DATA, ["validation-0000"]),
        (HELD_OUT_DATA, ["held_out-0000"]),
    ):
        path = tmp_path / "data" / bundled.name
        assert pq.ParquetFile(path).schema_arrow.equals(pq.ParquetFile(bundled).schema_arrow, check_metadata=True)
        questions = load_questions(path)
        assert [question.id for question in questions] == ids
        for question in questions:
            info = soundfile.info(io.BytesIO(question.audio.read_bytes()))
            assert (info.format, info.subtype, info.samplerate) == ("OGG", "OPUS", SAMPLE_RATE)
            assert 1 < len(decode(question.audio)) / SAMPLE_RATE < pocket.WINDOW_SECONDS
    (first, _, again), bundled = load_questions(tmp_path / "data" / TRAINING_DATA.name), load_questions(TRAINING_DATA)
    assert first.text == again.text == bundled[0].text
