"""The bundled models and their data: what they are, that the gap is there, and that it can be closed."""

from __future__ import annotations

import dataclasses
import io
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from tars_fast import pocket
from tars_fast.data.arithmetic import NUMBERS, TASKS, Splits, Task
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import BUNDLED, HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions, or_bundled
from tars_fast.data.sources import read_rows
from tars_fast.data.splits import check_leaks
from tars_fast.learning.advantages import disagreeing_groups, group_indices
from tars_fast.learning.rewards.answers import extract_answer, has_format
from tars_fast.learning.rewards.total import completion_rewards
from tars_fast.models.registry import ASSETS, PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Modality, UserError

MEGABYTE = 1e6
PARTS = ("training", "validation", "held_out")


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def load_pocket(name: str) -> SpeechModel:
    return load_model(PRESETS[name], PRESETS[name].source, torch.device("cpu"), torch.float32)


def bundled(name: str, part: str):
    return load_questions(or_bundled(f"{name}@{part}", "held_out"))


def answer(model: SpeechModel, questions, modality: Modality, num_completions: int, temperature: float):
    """(completions, [N] whether each is right)."""
    prompts = model.encode_prompts(questions, modality)
    max_new_tokens = model.prompts.preset.max_new_tokens
    sampling = Sampling(num_completions=num_completions, max_new_tokens=max_new_tokens, temperature=temperature, seed=0)
    completions = TransformersEngine(model, 256).generate(prompts, range(len(questions)), sampling)
    return completions, completion_rewards(completions, questions)["accuracy"]


def greedy(model: SpeechModel, questions, modality: Modality) -> float:
    return answer(model, questions, modality, 1, 0.0)[1].mean().item()


@pytest.mark.parametrize("name", TASKS)
def test_is_a_genuine_small_qwen2_audio_in_plain_transformers(name):
    """Plain transformers, from file to answer, without a line of this project."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    folder = ASSETS / name
    assert folder_size(folder) < 6 * MEGABYTE
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    question = bundled(name, "training")[0]
    system = {"role": "system", "content": PRESETS[name].system_prompt}
    for content, audio in ((question.text, None), ([{"type": "audio"}], [decode(question.audio)])):
        messages = [system, {"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.startswith("<|im_start|>system\nThink, then answer.<|im_end|>\n<|im_start|>user\n")
        assert ("Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n" in prompt) == (audio is not None)
        sampling = {} if audio is None else {"sampling_rate": SAMPLE_RATE}
        inputs = processor(text=[prompt], audio=audio, return_tensors="pt", **sampling)
        output = model.generate(**inputs, max_new_tokens=PRESETS[name].max_new_tokens, do_sample=False)
        text = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert text.startswith("<think>")
        assert text.endswith(".</answer>")


def test_both_tasks_have_one_tokenizer():
    first, second = ((ASSETS / name / "tokenizer.json").read_bytes() for name in TASKS)
    assert first == second


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


@pytest.mark.parametrize("name", TASKS)
def test_bundled_speech_is_disjoint_by_operands_and_voices(name):
    task, folder = TASKS[name], BUNDLED[name]
    assert folder_size(folder) < 9 * MEGABYTE
    parts = {part: [row.values for row in read_rows(str(folder / f"{part}.parquet"))] for part in PARTS}
    assert [len(items) for items in parts.values()] == [task.num_training, task.num_validation, task.num_held_out]
    splits = task.split_problems()
    spoken = {part: [problem.question for problem in getattr(splits, part)] for part in PARTS}
    assert {item["question"] for item in parts["training"]} == set(spoken["training"][: task.num_training])
    for part in ("validation", "held_out"):
        assert [item["question"] for item in parts[part]] == spoken[part]
    for of in (lambda item: item["question"], lambda item: item["voice"].partition("+")[2]):
        training, validation, held_out = (set(map(of, items)) for items in parts.values())
        assert not training & validation
        assert not training & held_out
        assert not validation & held_out
    assert not set(spoken["training"]) & {*spoken["validation"], *spoken["held_out"]}, "nor is a held-out one taught in writing"
    assert len({item["voice"] for item in parts["training"]}) >= 20


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", TASKS)
def test_every_item_is_answered_by_its_own_arithmetic(name, part):
    words = {word: value for value, word in enumerate(NUMBERS)}
    signs = {"plus": 1, "minus": -1}
    for question in bundled(name, part):
        first, *rest = question.text.removeprefix("What is ").removesuffix("?").split()
        values = list(
            accumulate(
                zip(rest[::2], rest[1::2], strict=True),
                lambda value, operation: value + signs[operation[0]] * words[operation[1]],
                initial=words[first],
            )
        )
        assert len(values) == TASKS[name].num_operands
        # Of a longer chain the half-way value too: the result alone is often right by chance.
        said = values[-1:] if name == "pocket" else [values[2], values[4]]
        assert question.answer == " then ".join(NUMBERS[value] for value in said)
        assert set(values) <= set(range(13))
        assert question.choices == tuple(TASKS[name].choices)


@pytest.mark.parametrize("name", TASKS)
def test_completions_taught_are_completions_rewarded(name):
    """The chain of thought that the warm-up teaches earns full format and accuracy."""
    choices = tuple(TASKS[name].choices)
    for problem in TASKS[name].split_problems().training[:700]:
        assert extract_answer(problem.completion, choices) == problem.answer
        assert has_format(problem.completion, choices)


@pytest.mark.slow
def test_gap_before_training(model):
    """Text at least 97 %, speech 45 to 70 %, and at least a third of the sampled speech groups disagree."""
    questions = load_questions(HELD_OUT_DATA)
    assert greedy(model, questions, Modality.TEXT) >= 0.97
    assert 0.45 <= greedy(model, questions, Modality.SPEECH) <= 0.70
    completions, right = answer(model, questions, Modality.SPEECH, 4, 1.0)
    groups = group_indices([c.question for c in completions], [c.modality for c in completions])
    assert disagreeing_groups(right, groups).float().mean() >= 1 / 3


@pytest.mark.slow
@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_hard_gap_before_training(part):
    """Sampled text at least 98 %, speech 5 to 30 %; at least 60 % of the sampled spoken groups are all wrong, and in most of
    these the number of right steps differs: partial rewards could tell their completions apart, accuracy cannot."""
    model, questions = load_pocket("pocket-hard"), bundled("pocket-hard", part)[:200]
    problems = {problem.question: problem for problem in getattr(TASKS["pocket-hard"].split_problems(), part)}
    assert answer(model, questions, Modality.TEXT, 4, 1.0)[1].mean() >= 0.98
    assert 0.05 <= greedy(model, questions, Modality.SPEECH) <= 0.30
    completions, right = answer(model, questions, Modality.SPEECH, 4, 1.0)
    steps = torch.tensor([sum(step in c.text for step in problems[questions[c.question].text].steps) for c in completions])
    all_wrong = right.view(-1, 4).sum(1) == 0
    assert all_wrong.float().mean() >= 0.6
    in_all_wrong = steps.view(-1, 4)[all_wrong]
    assert (in_all_wrong.amax(1) > in_all_wrong.amin(1)).float().mean() >= 0.6
    assert right[steps < 4].mean() <= 0.05, "an answer is hardly ever right by chance"


@pytest.mark.slow
def test_gap_is_repairable(model):
    """Supervised fine-tuning on speech alone, same checkpoint, brings speech to within 5 points of text."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(PRESETS["pocket"].source)
    speech = pocket.synthesise_warm_up(processor, TASKS["pocket"], num_utterances=1500, seed=1)
    stage = pocket.ThinkingStage(num_steps=150, text_per_step=0, speech_per_step=16, seed=1)
    pocket.train_thinking(model.module, processor, speech, stage)
    questions = load_questions(HELD_OUT_DATA)
    assert greedy(model, questions, Modality.SPEECH) >= greedy(model, questions, Modality.TEXT) - 0.05


@pytest.mark.parametrize("name", ["pocket", pytest.param("pocket-hard", marks=pytest.mark.slow)])
def test_build_is_the_same_twice(name, tmp_path):
    """A seed gives the same model: the documented command, shortened."""
    digests = []
    for number in ("first", "second"):
        folder = tmp_path / number
        short = {"hearing_steps": 3, "thinking_steps": 2, "num_utterances": 40}
        assert pocket.make_pocket(pocket.PocketConfig(folder, name, **short, write_data=False)) == 0
        digests.append(sha256((folder / name / "model.safetensors").read_bytes()).hexdigest())
        for file in ("tokenizer.json", "preset.json"):
            assert (folder / name / file).read_bytes() == (ASSETS / name / file).read_bytes()
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", TASKS)
def test_data_are_written_as_they_are_bundled(name, tmp_path, monkeypatch):
    """The same columns and kind of recording, of a few problems."""
    splits = TASKS[name].split_problems()
    few = Splits(splits.training[:2], splits.validation[:1], splits.held_out[:1])
    monkeypatch.setattr(Task, "split_problems", lambda _: few)
    pocket.write_recordings(tmp_path, dataclasses.replace(TASKS[name], num_training=3), seed=0)
    ids = {"training": [0, 1, 2], "validation": [0], "held_out": [0]}
    for part in PARTS:
        written, kept = (folder / f"{part}.parquet" for folder in (tmp_path, BUNDLED[name]))
        assert pq.ParquetFile(written).schema_arrow.equals(pq.ParquetFile(kept).schema_arrow, check_metadata=True)
        questions = load_questions(written)
        assert [question.id for question in questions] == [f"{part}-{number:04}" for number in ids[part]]
        for question in questions:
            info = soundfile.info(io.BytesIO(question.audio.read_bytes()))
            assert (info.format, info.subtype, info.samplerate) == ("OGG", "OPUS", SAMPLE_RATE)
            assert 1 < len(decode(question.audio)) / SAMPLE_RATE < pocket.WINDOW_SECONDS
    first, _, again = load_questions(tmp_path / "training.parquet")
    assert first.text == again.text == bundled(name, "training")[0].text


def test_held_out_questions_are_bundled_in_another_voice():
    """The same questions in the same order, whose recordings are new and little longer."""
    path = Path(or_bundled("pocket@held_out_neural", "held_out"))
    assert path.stat().st_size < 4 * MEGABYTE
    heard, other = load_questions(HELD_OUT_DATA), load_questions(path)
    # What bench/results has was measured on this file.
    assert sha256(path.read_bytes()).hexdigest() == "f97496a38256f3d0769dc5d30559a65bb180d9fc0f395d9db42c6255995c32bd"
    assert [(one.text, one.answer, one.choices) for one in other] == [(one.text, one.answer, one.choices) for one in heard]
    assert [one.id for one in other] == [f"held_out_neural-{number:04}" for number in range(400)]
    assert {row.values["voice"] for row in read_rows(str(path))} == {"joe"}
    assert pq.ParquetFile(path).schema_arrow.equals(pq.ParquetFile(HELD_OUT_DATA).schema_arrow, check_metadata=True)
    check_leaks([*load_questions(TRAINING_DATA), *load_questions(VALIDATION_DATA)], other)
    lengths = [[len(decode(one.audio)) / SAMPLE_RATE for one in questions] for questions in (heard, other)]
    assert fmean(lengths[1]) < 1.2 * fmean(lengths[0])
    assert max(lengths[1]) < pocket.WINDOW_SECONDS
    assert all(np.abs(decode(one.audio)).max() > 0.1 for one in other)


def test_parts_of_bundled_data_are_named():
    assert load_questions(or_bundled("pocket-hard", "training"))[0].id == "training-0000"
    assert Path(or_bundled(None, "held_out", "pocket-hard")) == BUNDLED["pocket-hard"] / "held_out.parquet"
    assert Path(or_bundled("pocket@validation", "training")) == BUNDLED["pocket"] / "validation.parquet"
    assert or_bundled("owner/name@validation", "training") == "owner/name@validation"
    assert or_bundled(Path("own/items.jsonl"), "training") == "own/items.jsonl"
    with pytest.raises(
        UserError, match="data pocket@test: has no split 'test'; it has training, validation, held_out, held_out_neural"
    ):
        or_bundled("pocket@test", "training")
    with pytest.raises(UserError, match=r"no split 'held_out_neural'; it has training, validation, held_out$"):
        or_bundled("pocket-hard@held_out_neural", "training")
