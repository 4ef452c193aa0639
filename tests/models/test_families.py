"""Each architecture on a small random checkpoint of the genuine classes: prompts, audio, forward pass, LoRA, checkpoints."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from checkpoints import ADAPTER_RANK, BY_DECODER, MAKERS
from safetensors.torch import load_file, save_file
from torch import nn

from tars_fast import train
from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.adapters import load_adapter_weights
from tars_fast.models.checkpoint import save_model
from tars_fast.models.families import audio_flamingo_3, phi4_multimodal, qwen, qwen2_5_omni, qwen2_audio, qwen3_omni, voxtral
from tars_fast.models.preset import THINK_PROMPT
from tars_fast.models.prompts import PromptFormat, load_prompt_format
from tars_fast.models.registry import FAMILIES, PRESETS, architecture_of, family_of, find_preset
from tars_fast.models.speech_model import SpeechModel, load_module, make_trainable
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.policy import choose_engine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Completion, Modality, Question, Turn, UserError

CPU = torch.device("cpu")
GREEDY = Sampling(num_completions=1, max_new_tokens=12, temperature=0.0, seed=0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(params=MAKERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(checkpoints, name) -> Path:
    return checkpoints[name]


def load(folder: Path | str, long_audio: str = "refuse") -> SpeechModel:
    prompts = load_prompt_format(find_preset(str(folder)), str(folder), long_audio)
    return SpeechModel(load_module(prompts, str(folder), CPU, torch.float32), prompts)


@pytest.fixture
def speech_model(folder) -> SpeechModel:
    return load(folder)


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


@pytest.fixture
def items(tmp_path) -> list[Question]:
    """Recordings of different lengths, so that batches are padded."""
    items = []
    for number, seconds in enumerate((1.0, 2.35, 0.4)):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, wave(seconds, number), SAMPLE_RATE, subtype="FLOAT")
        text = f"What is {number} plus one?\nA. one\nB. two"
        items.append(Question(str(number), text, "A", ("A", "B"), path))
    return items


def embed(model: SpeechModel, waves: list[np.ndarray]) -> list[torch.Tensor]:
    return model.encode_clips([model.prompts.features(one) for one in waves])


def encode(model: SpeechModel, items: list[Question]) -> list:
    with torch.no_grad():
        return [prompt for modality in Modality for prompt in model.encode_prompts(items, modality)]


def greedy(model: SpeechModel, items: list[Question]) -> list[Completion]:
    return TransformersEngine(model, 8).generate(encode(model, items), [*range(len(items))] * 2, GREEDY)


def qwen2_audio_processor(prompts: PromptFormat) -> Any:
    import transformers

    return transformers.Qwen2AudioProcessor(prompts.feature_extractor, prompts.tokenizer)


def omni_processor(name: str, prompts: PromptFormat) -> Any:
    """Neither images nor video are asked of it, and its video processor needs torchvision."""
    import transformers

    processor = object.__new__(getattr(transformers, name))
    processor.tokenizer, processor.feature_extractor = prompts.tokenizer, prompts.feature_extractor
    processor.image_processor = processor.video_processor = transformers.Qwen2VLImageProcessor()
    for token in ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos"):
        setattr(processor, f"{token}_token", getattr(prompts.tokenizer, f"{token}_token"))
    processor.chat_template = json.loads((Path(prompts.source) / "chat_template.json").read_text())["chat_template"]
    return processor


def phi4_multimodal_processor(prompts: PromptFormat) -> Any:
    """No images are asked of it."""
    import transformers

    processor = object.__new__(transformers.Phi4MultimodalProcessor)
    processor.tokenizer, processor.audio_processor = prompts.tokenizer, prompts.feature_extractor
    processor.chat_template = prompts.tokenizer.chat_template
    return processor


def voxtral_processor(prompts: PromptFormat) -> Any:
    """Its own tokenizer would be mistral-common's."""
    import transformers

    processor = object.__new__(transformers.VoxtralProcessor)
    processor.tokenizer, processor.feature_extractor = prompts.tokenizer, prompts.feature_extractor
    return processor


def audio_flamingo_3_processor(prompts: PromptFormat) -> Any:
    import transformers

    return transformers.AudioFlamingo3Processor(
        prompts.feature_extractor, prompts.tokenizer, chat_template=prompts.chat_template
    )


def rendered_by_template(processor: Any, system: str, turn: object) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": turn}]
    return processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )


def rendered_by_mistral(_processor: Any, system: str, turn: object) -> str:
    """What mistral-common's tokens spell, see `test_voxtral_prompts_are_those_of_mistral_common`."""
    return f"<s>[INST]{system}\n\n{turn}[/INST]"


def qwen_tokens(processor: Any, rendered: str, recording: np.ndarray) -> list[int]:
    return processor(text=[rendered], audio=[recording], sampling_rate=SAMPLE_RATE)["input_ids"][0]


def phi_tokens(processor: Any, rendered: str, recording: np.ndarray) -> list[int]:
    size = int(phi_audio_inputs(processor, recording)["audio_embed_sizes"][0])
    return processor.tokenizer(rendered.replace("<|audio|>", "<|audio|>" * size))["input_ids"]


def voxtral_tokens(processor: Any, rendered: str, recording: np.ndarray) -> list[int]:
    size = 375 * len(voxtral_audio_inputs(processor, recording)["input_features"])
    return processor.tokenizer(rendered.replace("[AUDIO]", "[AUDIO]" * size))["input_ids"]


def flamingo_tokens(processor: Any, rendered: str, recording: np.ndarray) -> list[int]:
    return processor(text=rendered, audio=recording)["input_ids"][0].tolist()


def qwen_audio_inputs(
    processor: Any, recording: np.ndarray, *, padding: str | bool = "max_length", truncation: bool = True
) -> dict[str, torch.Tensor]:
    settings = {"padding": padding, "truncation": truncation, "return_attention_mask": True, "return_tensors": "pt"}
    features = processor.feature_extractor([recording], sampling_rate=SAMPLE_RATE, **settings)
    return {"input_features": features.input_features, "feature_attention_mask": features.attention_mask}


def phi_audio_inputs(processor: Any, recording: np.ndarray) -> dict[str, torch.Tensor]:
    features = processor.audio_processor([recording], sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return {"audio_input_features": features.audio_input_features, "audio_embed_sizes": features.audio_embed_sizes}


def voxtral_audio_inputs(processor: Any, recording: np.ndarray) -> dict[str, torch.Tensor]:
    """Settings as the processor's own `apply_chat_template` passes them."""
    settings = {"sampling_rate": SAMPLE_RATE, "padding": True, "truncation": False, "pad_to_multiple_of": 480_000}
    return {"input_features": processor._retrieve_input_features([recording], 3000, return_tensors="pt", **settings)}


def flamingo_audio_inputs(processor: Any, recording: np.ndarray) -> dict[str, torch.Tensor]:
    made = processor(text="<sound>", audio=recording)
    return {name: made[name] for name in ("input_features", "input_features_mask")}


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers and the model's card say of a family, which the tests compare with."""

    processor: Callable[[PromptFormat], Any]
    """The class that transformers has for it."""
    tokens: Callable[[Any, str, np.ndarray], list[int]]
    """(its processor, a rendered spoken prompt, the recording) -> token ids."""
    speech_turn: object
    """The user's turn of a spoken prompt, as the model's card has it."""
    audio_tokens: Mapping[float, int]
    """Seconds of a recording -> tokens."""
    audio_inputs: Callable[[Any, np.ndarray], dict[str, torch.Tensor]]
    """(its processor, a recording) -> arguments of the model's own forward pass."""
    rendered: Callable[[Any, str, object], str] = rendered_by_template
    """(its processor, system prompt, user's turn) -> the prompt as text."""
    linear_layers: frozenset[str] = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    """Last names of the decoder's linear layers."""
    merges_adapter: bool = False
    """Its base is what an adapter of the checkpoint has been merged into."""


QWEN_TURN = [{"type": "audio", "audio_url": "speech.wav"}]
EXPECTED = {
    "qwen2-audio": Expected(
        processor=qwen2_audio_processor,
        tokens=qwen_tokens,
        speech_turn=QWEN_TURN,
        audio_tokens={0.1: 2, 1.0: 25, 7.3: 182, 30.0: 750},
        audio_inputs=qwen_audio_inputs,
    ),
    "qwen2.5-omni": Expected(
        processor=partial(omni_processor, "Qwen2_5OmniProcessor"),
        tokens=qwen_tokens,
        speech_turn=QWEN_TURN,
        audio_tokens={0.1: 2, 1.0: 25, 7.3: 182, 30.0: 750, 61.5: 1537},
        audio_inputs=qwen_audio_inputs,
    ),
    "qwen3-omni": Expected(
        processor=partial(omni_processor, "Qwen3OmniMoeProcessor"),
        tokens=qwen_tokens,
        speech_turn=QWEN_TURN,
        # 13 a second, as many as the last part of a second has left.
        audio_tokens={0.1: 2, 1.0: 13, 2.0: 26, 7.3: 95, 30.0: 390, 61.5: 800},
        audio_inputs=partial(qwen_audio_inputs, padding=True, truncation=False),
        # Of experts transformers makes no linear layers.
        linear_layers=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    ),
    "phi-4-multimodal": Expected(
        processor=phi4_multimodal_processor,
        tokens=phi_tokens,
        speech_turn="<|audio|>",
        audio_tokens={0.1: 1, 1.0: 13, 7.3: 91, 30.0: 375, 73.0: 913},
        audio_inputs=phi_audio_inputs,
        linear_layers=frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        merges_adapter=True,
    ),
    "voxtral": Expected(
        processor=voxtral_processor,
        tokens=voxtral_tokens,
        speech_turn="[BEGIN_AUDIO][AUDIO]",
        # A window of 30 s is encoded whole.
        audio_tokens={0.1: 375, 7.3: 375, 30.0: 375, 61.5: 1125},
        audio_inputs=voxtral_audio_inputs,
        rendered=rendered_by_mistral,
    ),
    "audio-flamingo-3": Expected(
        processor=audio_flamingo_3_processor,
        tokens=flamingo_tokens,
        speech_turn=[{"type": "audio", "path": "speech.wav"}],
        audio_tokens={0.1: 2, 1.0: 25, 7.3: 182, 30.0: 750, 61.5: 1537},
        audio_inputs=flamingo_audio_inputs,
    ),
}
"""By name in `MAKERS`."""


@pytest.fixture
def expected(name) -> Expected:
    return EXPECTED[name]


def test_every_test_checkpoint_has_its_expectations():
    assert EXPECTED.keys() == MAKERS.keys(), "add the new family to EXPECTED, in this file"


@pytest.mark.parametrize("modality", Modality)
def test_prompts_equal_those_of_the_processors_own_template(expected, speech_model, items, modality):
    processor = expected.processor(speech_model.prompts)
    for question, prompt in zip(items, speech_model.encode_prompts(items, modality), strict=True):
        turn = question.text if modality is Modality.TEXT else expected.speech_turn
        rendered = expected.rendered(processor, THINK_PROMPT, turn)
        assert THINK_PROMPT in rendered
        if modality is Modality.TEXT:
            assert prompt.token_ids == tuple(processor.tokenizer(rendered)["input_ids"])
            continue
        recording, _ = soundfile.read(question.audio, dtype="float32")
        assert prompt.token_ids == tuple(expected.tokens(processor, rendered, recording))


@pytest.mark.slow
def test_voxtral_prompts_are_those_of_mistral_common(checkpoints, items, tmp_path):
    """Its processor with mistral-common's tokenizer, which comes with vLLM; the system prompt opens the user's turn."""
    pytest.importorskip("mistral_common", reason="needs mistral-common, which vLLM brings")
    from transformers import AutoTokenizer, VoxtralProcessor

    folder = checkpoints["voxtral"]
    model = load(folder, "chunk")
    processor = VoxtralProcessor(model.prompts.feature_extractor, AutoTokenizer.from_pretrained(folder))
    assert type(processor.tokenizer).__name__ == "MistralCommonBackend"
    soundfile.write(tmp_path / "long.wav", wave(61.5), SAMPLE_RATE, subtype="FLOAT")
    text = "Wie viele Äpfel sind 12 und 30?\n  A. 42\n  B. the other"
    items.append(Question("long", text, "A", ("A", "B"), tmp_path / "long.wav"))

    def theirs(*parts: dict[str, str]) -> Any:
        opening = {"type": "text", "text": f"{THINK_PROMPT}\n\n"}
        return processor.apply_chat_template([{"role": "user", "content": [opening, *parts]}])

    for question in items:
        audio = {"type": "audio", "base64": base64.b64encode(question.audio.read_bytes()).decode()}
        spoken, prepared = theirs(audio), model.prepare(question, Modality.SPEECH)
        assert prepared.token_ids == tuple(spoken["input_ids"][0].tolist())
        windows = prepared.audio[0].features[0].values.split(3000, 1)
        assert torch.equal(torch.stack(windows), spoken["input_features"])
        written = processor.apply_chat_template([{"role": "user", "content": f"{THINK_PROMPT}\n\n{question.text}"}])
        assert model.prompts.token_ids(question, Modality.TEXT) == tuple(written["input_ids"][0].tolist())
    two_clips = model.prompts.token_ids(items[0], Modality.SPEECH, [[1125, 1125]])
    assert two_clips == tuple(theirs(audio, audio)["input_ids"][0].tolist())


def test_turns_before_the_question_reach_both_prompts(speech_model, items):
    """Two recordings in one turn, what the model said, and the question, each at its place; the system prompt as ever."""
    first, second = (question.audio for question in items[:2])
    turns = (Turn("user", "Two numbers come.", (first, second)), Turn("assistant", "I hear them."), Turn("user", "Now add."))
    question = dataclasses.replace(items[0], turns=turns)
    spoken, written = (speech_model.encode_prompts([question], modality)[0] for modality in Modality)
    alone = [speech_model.encode_prompts([own], Modality.SPEECH)[0].audio_clips[0] for own in items[:2]]
    assert all(torch.equal(clip, own) for clip, own in zip(spoken.audio_clips, [*alone, alone[0]], strict=True))
    assert not written.audio_clips
    tokenizer = speech_model.prompts.tokenizer
    (said, heard) = (tokenizer.decode(prompt.token_ids) for prompt in (written, spoken))
    marks = [THINK_PROMPT, "Two numbers come.", "I hear them.", "Now add.", question.text]
    places = [said.index(mark) for mark in marks]
    assert places == sorted(places)
    audio = speech_model.prompts.audio_token
    before, between, behind = heard.partition("I hear them.")[0], *heard.partition("I hear them.")[2].partition("Now add.")[::2]
    assert [part.count(audio) for part in (before, between, behind)] == [len(alone[0]) + len(alone[1]), 0, len(alone[0])]
    assert "Two numbers" not in heard
    assert question.text not in heard
    # Told to transcribe, it gets the question's recording alone.
    (transcribing,) = speech_model.encode_prompts([question], Modality.SPEECH, "Write it down.")
    assert transcribing == dataclasses.replace(
        speech_model.encode_prompts(items[:1], Modality.SPEECH, "Write it down.")[0], audio_clips=transcribing.audio_clips
    )
    assert len(transcribing.audio_clips) == 1
    # A question about a recording stands behind it.
    asked = speech_model.encode_prompts([dataclasses.replace(items[0], about_audio=True)], Modality.SPEECH)[0]
    assert items[0].text in tokenizer.decode(asked.token_ids).rpartition(audio)[2]


def test_audio_tokens_are_counted_as_the_tower_makes_them(expected, speech_model):
    lengths = expected.audio_tokens
    waves = [wave(seconds) for seconds in lengths]
    with torch.no_grad():
        embedded = embed(speech_model, waves)
    assert [speech_model.prompts.num_audio_tokens(one) for one in waves] == list(lengths.values())
    assert [len(clip) for clip in embedded] == list(lengths.values())


@pytest.mark.parametrize("length", ["short", "longest"])
def test_audio_embeddings_are_those_of_the_models_own_forward_pass(expected, speech_model, length):
    """The whole model, fed by its own processor, ends in the logits that our embeddings lead to, also beyond a window."""
    recording = wave(2.35 if length == "short" else max(expected.audio_tokens))
    prompts, module = speech_model.prompts, speech_model.module
    with torch.no_grad():
        (clip,) = embed(speech_model, [recording])
    ids = torch.tensor([[5, *[prompts.audio_token_id] * len(clip), 7, 9]])
    given = expected.audio_inputs(expected.processor(prompts), recording)
    embeddings = module.get_input_embeddings()(ids)
    embeddings[0, 1 : 1 + len(clip)] = clip
    with torch.no_grad():
        theirs = module(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
        ours = module(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)).logits
        without_audio = module(inputs_embeds=embeddings.index_fill(1, torch.arange(1, 1 + len(clip)), 0.0)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours[0, -1] - without_audio[0, -1]).abs().max() > 0.1, "a model that ignores the audio would pass"


def test_a_batch_is_encoded_as_each_recording_alone(speech_model):
    waves = [wave(seconds, seed) for seed, seconds in enumerate((0.4, 3.0, 1.7))]
    with torch.no_grad():
        together = embed(speech_model, waves)
        for one, clip in zip(waves, together, strict=True):
            torch.testing.assert_close(embed(speech_model, [one])[0], clip, rtol=1e-4, atol=1e-5)


def test_qwen2_audio_encodes_what_a_recording_fills_of_its_window():
    model = load(PRESETS["pocket"].source)
    extractor = model.prompts.feature_extractor
    # Every place in which a recording can end within four frames, and the window filled.
    samples = [*range(16000, 16641, 160), extractor.n_samples]
    waves = [wave(number / SAMPLE_RATE, number) for number in samples]
    clips = [model.prompts.features(one) for one in waves]
    assert [clip.values.shape[1] for clip in clips] == [101, 103, 103, 105, 105, 400]
    windows = [qwen.whisper_features(extractor, one, extractor.n_samples) for one in waves]
    tower = model.module.model.audio_tower
    with torch.no_grad():
        for clip, window in zip(clips, windows, strict=True):
            (ours,) = model.encode_clips([clip])
            is_speech = torch.arange(200) < tower._get_feat_extract_output_lengths(window.mask.sum())[0]
            states = tower(window.values[None], attention_mask=is_speech[None, None, None].expand(1, 1, 200, 200))
            theirs = model.module.model.multi_modal_projector(states.last_hidden_state)[0, : clip.num_tokens]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_long_recordings_become_clips_of_one_prompt(name, folder, tmp_path):
    model = load(folder, "chunk")
    model.prompts = dataclasses.replace(model.prompts, family=dataclasses.replace(model.family, max_audio_seconds=1.0))
    path = tmp_path / "long.wav"
    soundfile.write(path, wave(2.5), SAMPLE_RATE, subtype="FLOAT")
    question = Question("long", "What?", "A", ("A", "B"), path)
    (prompt,) = model.encode_prompts([question], Modality.SPEECH)
    assert len(prompt.audio_clips) == 3
    assert prompt.token_ids.count(model.prompts.audio_token_id) == sum(len(clip) for clip in prompt.audio_clips)
    (size,) = model.prompts.check_questions([question], 8)
    assert (size.num_tokens, size.seconds) == (len(prompt.token_ids), 2.5)
    assert "1 of 1 recordings are longer than the 1 s" in model.prompts.long_audio_notice([size])
    assert "encoded as several clips" in model.prompts.long_audio_notice([size])
    refusing = dataclasses.replace(model.prompts, long_audio="refuse")
    with pytest.raises(UserError, match=r"item 'long': recording .*2\.50 s.*the model encodes at most 1 s at once"):
        refusing.check_questions([question], 8)
    with pytest.raises(UserError, match=r"\(2 of 2 recordings are longer\)"):
        refusing.check_questions([question, dataclasses.replace(question, id="again")], 8)
    cut = dataclasses.replace(model.prompts, long_audio="truncate")
    assert cut.check_questions([question], 8)[0].num_tokens < size.num_tokens
    assert "only the beginning" in cut.long_audio_notice([size])


def test_counting_sizes_leaves_a_model_of_the_same_configuration_as_it_is(speech_model):
    """vLLM's side of it is built of `prompts.config`, and attention across sequences of a row is an answer without an error."""
    prompts = speech_model.prompts
    module = prompts.family.on_meta(prompts.config)
    model = SpeechModel(module, prompts)
    before = model.language_model.config._attn_implementation
    assert before == speech_model.language_model.config._attn_implementation
    prompts.family.architecture(prompts.config)
    prompts.family.architecture(module.config)
    assert model.language_model.config._attn_implementation == before


def test_rollout_and_trainer_agree(speech_model, items):
    """Greedy tokens with a cache, their log-probabilities in one packed forward pass."""
    completions = greedy(speech_model, items)
    assert len({completion.token_ids for completion in completions}) > 3, "different prompts are answered differently"
    layout = speech_model.pack(encode(speech_model, items), completions)
    with torch.no_grad():
        logits = speech_model.head(speech_model.forward(layout)) + speech_model.suppressed_bias
    logprobs = logits.log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]
    rollout = torch.tensor([value for completion in completions for value in completion.rollout_logprobs])
    torch.testing.assert_close(logprobs, rollout, rtol=0, atol=1e-4)


def test_every_stop_token_ends_a_completion(speech_model):
    """Those of the checkpoint and those of the chat format, whichever of the two names them."""
    tokenizer = speech_model.prompts.tokenizer
    expected = set(tokenizer.convert_tokens_to_ids(list(speech_model.family.stop_tokens)))
    assert len(expected) == len(speech_model.family.stop_tokens)
    assert set(speech_model.prompts.stop_token_ids) == expected
    without_stop_tokens = dataclasses.replace(speech_model.prompts, generation_config=type("None", (), {"eos_token_id": None}))
    assert set(without_stop_tokens.stop_token_ids) == expected


def train_lora(model: SpeechModel, lora_targets: Collection[str] | None = None) -> None:
    """Adapters that do something."""
    settings = {"lora_alpha": 8.0, "freeze_audio": True, "gradient_checkpointing": False}
    make_trainable(model, lora_rank=4, lora_targets=lora_targets, **settings)
    torch.manual_seed(1)
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, 0, 0.05)


@pytest.mark.parametrize("given", ["attention", "names"])
def test_lora_reaches_the_layers_that_are_named_and_is_planned_for_them(expected, speech_model, given):
    """The plan counts as peft makes them."""
    named = {name for name in expected.linear_layers if name.startswith(("q", "k", "v", "o_"))}
    if given == "names":
        named = {"o_proj", max(expected.linear_layers)}
        given = ",".join(named)
    architecture = speech_model.family.architecture(speech_model.prompts.config)
    targets = architecture.find_lora_targets(given)
    train_lora(speech_model, targets)
    adapted = [path for path, layer in speech_model.module.named_modules() if hasattr(layer, "lora_A")]
    assert {path.rpartition(".")[2] for path in adapted} == named
    assert len(adapted) == 3 * len(targets), "three layers"
    num_trained = sum(parameter.numel() for parameter in speech_model.trainable_parameters())
    assert num_trained == architecture.num_lora_parameters(4, targets)


def test_layers_for_lora_that_are_not_there_are_refused_by_name(expected, speech_model):
    architecture = speech_model.family.architecture(speech_model.prompts.config)
    assert {*architecture.linear_layers} == expected.linear_layers
    with pytest.raises(UserError, match=r"--lora-targets o_proj,up: the model has no linear layer 'up'; it has .*, o_proj"):
        architecture.find_lora_targets("o_proj,up")
    for given in ("all-linear", "q_proj,down_proj") if architecture.num_experts else ():
        with pytest.raises(UserError, match=f"--lora-targets {given}: the experts .* take no adapter; give attention, or"):
            architecture.find_lora_targets(given)


def test_lora_reaches_exactly_the_linear_layers_of_the_language_model(expected, speech_model):
    train_lora(speech_model)
    adapted = {path for path, layer in speech_model.module.named_modules() if hasattr(layer, "lora_A")}
    inside = speech_model.language_model
    linear = {
        f"{speech_model.family.language_model}.{path}"
        for path, layer in inside.named_modules()
        if path.startswith("layers.") and hasattr(layer, "base_layer")
    }
    last_names = {path.rpartition(".")[2] for path in adapted}
    assert last_names == expected.linear_layers
    assert adapted == linear
    assert len(adapted) == 3 * len(last_names), "three layers"
    architecture = speech_model.family.architecture(speech_model.prompts.config)
    for given in (None, "attention" if architecture.num_experts else "all-linear"):
        planned = architecture.num_lora_parameters(4, architecture.find_lora_targets(given))
        assert sum(p.numel() for p in speech_model.trainable_parameters()) == planned


def test_full_fine_tuning_leaves_audio_alone_unless_asked(speech_model):
    settings = {"lora_rank": 0, "lora_alpha": 1.0, "gradient_checkpointing": False}
    make_trainable(speech_model, freeze_audio=True, **settings)
    audio = {id(p) for part in speech_model.audio_parts for p in part.parameters()}
    trained = {id(p) for p in speech_model.trainable_parameters()}
    assert trained
    assert not trained & audio
    make_trainable(speech_model, freeze_audio=False, **settings)
    constants = {id(p) for c in speech_model.family.frozen_parts for p in speech_model.module.get_submodule(c).parameters()}
    assert {id(p) for p in speech_model.trainable_parameters()} & audio == audio - constants


@pytest.mark.parametrize("name", BY_DECODER)
def test_gradient_checkpointing_changes_nothing(folder, items):
    gradients = []
    for checkpointing in (False, True):
        model = load(folder)
        make_trainable(model, lora_rank=0, lora_alpha=1.0, freeze_audio=True, gradient_checkpointing=checkpointing)
        prompts = encode(model, items)
        completions = [Completion(0, prompt.modality, (5, 6, 7, 8), (), "", False) for prompt in prompts]
        model.forward(model.pack(prompts, completions)).pow(2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_phi_listens_through_its_speech_adapter(checkpoints, tmp_path):
    """Merged once, in float32: the same logits as peft's own adapter on its own base, its pattern spelt out."""
    from peft import PeftModel
    from transformers import Phi4MultimodalForCausalLM

    folder = checkpoints["phi-4-multimodal"]
    base = Phi4MultimodalForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        without_audio = base(ids).logits
        adapter = shutil.copytree(folder / "speech-lora", tmp_path / "adapter")
        described = json.loads((adapter / "adapter_config.json").read_text())
        described["target_modules"] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        described["exclude_modules"] = r".*(audio_embed|image_embed).*"
        (adapter / "adapter_config.json").write_text(json.dumps(described))
        theirs = PeftModel.from_pretrained(base, adapter)
        assert theirs.peft_config["default"].r == ADAPTER_RANK
        theirs = theirs(ids).logits
        ours = load(folder).module(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - without_audio).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpoints_come_back_and_load_in_plain_transformers(name, folder, items, tmp_path, kind):
    import transformers

    model = load(folder)
    if kind == "lora":
        train_lora(model)
    else:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.language_model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    expected = greedy(model, items)
    save_model(model, tmp_path)
    assert greedy(load(tmp_path), items) == expected
    assert expected != greedy(load(folder), items), "training had no effect"
    if kind == "lora":
        assert not list(tmp_path.glob("model*.safetensors"))
        described = json.loads((tmp_path / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(folder)
        return
    plain, found = getattr(transformers, model.family.model_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    for path, value in plain.named_parameters():
        if not path.startswith(model.family.unused_parts):
            assert torch.equal(value, model.module.get_parameter(path)), path
    whole = getattr(transformers, model.family.model_class).from_pretrained(folder)
    for path, value in plain.named_parameters():
        if path.startswith(model.family.unused_parts):
            assert torch.equal(value, whole.get_parameter(path)), f"{path} is not what the base had"


def test_adapter_names_base_and_revision(checkpoints, tmp_path):
    model = load(checkpoints["qwen2-audio"])
    model.prompts = dataclasses.replace(model.prompts, source="owner/name@refs/pr/70")
    train_lora(model)
    described = model.module.peft_config["default"]
    assert (described.base_model_name_or_path, described.revision) == ("owner/name", "refs/pr/70")


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["qwen2-audio"], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layers.1.mlp.up_proj" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are not in it, model\.language_model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_other_architectures_are_refused(tmp_path):
    for model_type, message in (
        ("llama", "supported are qwen2_audio, qwen2_5_omni, qwen3_omni_moe, phi4_multimodal, voxtral, audioflamingo3"),
        ("phi4mm", "refs/pr/70"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_vllm_refuses_phi_with_the_reason():
    with pytest.raises(UserError, match="--engine vllm: vLLM knows only the remote-code variant of Phi-4-multimodal"):
        choose_engine("vllm", phi4_multimodal.FAMILY, CPU, torch.float32, 0)
    assert choose_engine("auto", phi4_multimodal.FAMILY, torch.device("cuda"), torch.bfloat16, 8) == "transformers"
    assert all(family.engine_names for family in FAMILIES if family is not phi4_multimodal.FAMILY)


def test_presets_have_the_published_shapes():
    """Counted on the genuine classes with the published configurations, without memory."""
    from transformers import (
        AudioFlamingo3Config,
        Phi4MultimodalConfig,
        Qwen2_5OmniThinkerConfig,
        Qwen3OmniMoeThinkerConfig,
        VoxtralConfig,
    )

    omni = {
        "qwen2.5-omni-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        "qwen2.5-omni-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    }
    for name, text in omni.items():
        config = Qwen2_5OmniThinkerConfig(text_config=text, audio_config={"output_dim": text["hidden_size"]})
        assert qwen2_5_omni.FAMILY.architecture(config) == architecture_of(PRESETS[name])
    text = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    text |= {"vocab_size": 152064, "intermediate_size": 768, "moe_intermediate_size": 768, "num_experts": 128}
    text |= {"num_experts_per_tok": 8, "max_position_embeddings": 65536}
    mixture = Qwen3OmniMoeThinkerConfig(text_config=text, audio_config={"output_dim": 2048})
    architecture = qwen3_omni.FAMILY.architecture(mixture)
    assert architecture == architecture_of(PRESETS["qwen3-omni-30b"]) == architecture_of(PRESETS["qwen3-omni-30b-thinking"])
    module = qwen3_omni.FAMILY.on_meta(mixture)
    assert architecture.num_text_parameters() == sum(
        parameter.numel() for name, parameter in module.named_parameters() if "audio_tower" not in name
    )
    phi = Phi4MultimodalConfig(
        num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, tie_word_embeddings=True
    )  # fmt: skip
    assert phi4_multimodal.FAMILY.architecture(phi) == architecture_of(PRESETS["phi-4-multimodal"])
    small = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
    for name, text in (("voxtral-mini-3b", {}), ("voxtral-small-24b", small)):
        config = VoxtralConfig(text_config=text, audio_config={}, audio_token_id=24)
        assert voxtral.FAMILY.architecture(config) == architecture_of(PRESETS[name])
    text = omni["qwen2.5-omni-7b"] | {"vocab_size": 151672}
    flamingo = AudioFlamingo3Config(text_config=text, audio_config={})
    assert audio_flamingo_3.FAMILY.architecture(flamingo) == architecture_of(PRESETS["audio-flamingo-3"])
    assert family_of(PRESETS["qwen2-audio-7b"]) is qwen2_audio.FAMILY


@pytest.mark.parametrize("name", BY_DECODER)
def test_training_runs_on_every_family(folder, tmp_path, monkeypatch, capsys):
    """The command itself, two steps of LoRA from a checkpoint folder."""
    items = tmp_path / "items"
    items.mkdir()
    lines = []
    for number in range(6):
        soundfile.write(items / f"{number}.wav", wave(0.5, number), SAMPLE_RATE, subtype="FLOAT")
        lines.append({"id": f"q{number}", "question": f"Which is {number}?", "options": ["one", "two"], "answer": "A"})
        lines[-1]["audio"] = f"{number}.wav"
    (items / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = [line | {"id": f"e{line['id']}", "question": f"Who is {line['id']}?"} for line in lines]
    (items / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
    run = tmp_path / "run"
    command = ["train", "--model", str(folder), "--data", str(items / "items.jsonl")]
    command += ["--eval-data", str(items / "held_out.jsonl"), "--output-dir", str(run), "--questions-per-step", "2"]
    command += ["--max-new-tokens", "8", "--behaviour-model", "hashed-ngrams", "--eval-samples", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--num-steps", "2"])
    assert train.main() == 0
    assert "masked attention" in capsys.readouterr().out
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert max(step["logprob_diff_max"] for step in steps) < 1e-3
    assert (run / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_adapters_are_those_of_peft(expected, folder, items, tmp_path):
    """Saved ones are read by peft on plain transformers, and ours are read as peft reads them."""
    import transformers
    from peft import PeftModel

    model = load(folder)
    train_lora(model)
    save_model(model, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = load(folder).module if expected.merges_adapter else None
    if plain is None:
        plain = getattr(transformers, model.family.model_class).from_pretrained(folder).eval()
    with torch.no_grad():
        before = plain(ids).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            theirs = PeftModel.from_pretrained(plain, tmp_path).eval()(ids).logits
        ours = load(tmp_path).module(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 0.01, "the adapter does something"


@pytest.mark.parametrize("name", BY_DECODER)
def test_adapters_of_other_releases_of_transformers_load(name, folder, items, tmp_path):
    """Releases differ in where the decoder stands; an adapter names the layers as the release did that trained it."""
    model = load(folder)
    train_lora(model)
    save_model(model, tmp_path / "here")
    expected = greedy(model, items)
    decoder = model.family.language_model
    weights = load_file(tmp_path / "here" / "adapter_model.safetensors")
    for number, other in enumerate(model.family.decoder_aliases):
        there = shutil.copytree(tmp_path / "here", tmp_path / str(number))
        renamed = {
            key.replace(f"base_model.model.{decoder}.", f"base_model.model.{other}."): value for key, value in weights.items()
        }
        save_file(renamed, there / "adapter_model.safetensors", metadata={"format": "pt"})
        described = json.loads((there / "adapter_config.json").read_text())
        described["target_modules"] = [
            f"{other}.layers.{layer}.{part}" for layer in range(3) for part in sorted(linear_layers(model))
        ]
        (there / "adapter_config.json").write_text(json.dumps(described))
        assert greedy(load(there), items) == expected
        resumed = load(folder)
        settings = {"lora_rank": 4, "lora_alpha": 8.0, "freeze_audio": True, "gradient_checkpointing": False}
        make_trainable(resumed, **settings)
        load_adapter_weights(resumed.module, resumed.family, there)
        assert greedy(resumed, items) == expected
    assert expected != greedy(load(folder), items)


def linear_layers(model: SpeechModel) -> set[str]:
    """What is adapted inside a decoder layer."""
    first = model.language_model.layers[0]
    return {path for path, layer in first.named_modules() if hasattr(layer, "lora_A")}


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    model = load(folder)
    train_lora(model)
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (first, *_), prefix = (
        sorted(weights),
        re.escape(f"--model {tmp_path}: the adapter cannot be loaded ("),
    )
    save_file({key: value for key, value in weights.items() if key != first}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=prefix + "the model finds nothing for 1 of its weights, first "):
        load(tmp_path)
    save_file(
        weights | {"base_model.model.elsewhere.lora_A.weight": weights[first].clone()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=prefix + "the model has no place for 1 of its weights, first elsewhere"):
        load(tmp_path)
    save_file(weights | {first: weights[first][:, :-1].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=prefix + "Error.* in loading state_dict"):
        load(tmp_path)


def test_dropout_of_an_adapter_is_not_active(folder, items, tmp_path):
    """Other people's adapters have it; rollout, reward and loss would be three policies."""
    model = load(folder)
    train_lora(model)
    save_model(model, tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | {"lora_dropout": 0.5}))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load(tmp_path).module(ids).logits, model.module(ids).logits)


def test_scales_of_single_layers_follow_their_names(tmp_path, checkpoints, items):
    """alpha_pattern and rank_pattern name layers as another release of transformers has them."""
    model = load(checkpoints["qwen2-audio"])
    train_lora(model)
    save_model(model, tmp_path / "here")
    described = json.loads((tmp_path / "here" / "adapter_config.json").read_text())
    logits = []
    for decoder in ("model.language_model", "language_model.model"):
        folder = shutil.copytree(tmp_path / "here", tmp_path / decoder)
        pattern = {f"{decoder}.layers.0.self_attn.q_proj": 80}
        (folder / "adapter_config.json").write_text(json.dumps(described | {"alpha_pattern": pattern}))
        with torch.no_grad():
            logits.append(load(folder).module(torch.tensor([[5, 6, 7, 8]])).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], model.module(torch.tensor([[5, 6, 7, 8]])).logits)
