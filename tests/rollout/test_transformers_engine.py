"""The decode loop against plain transformers: the same tokens, exact draws, and nothing left of completions that have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from checkpoints import BY_DECODER, MAKERS

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable
from tars_fast.rollout import transformers_engine
from tars_fast.rollout.engine import SampledCompletion, Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Modality, Prompt, Question, TrainingError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def prepared(folder: Path, lora_rank: int, dtype: torch.dtype) -> SpeechModel:
    preset = find_preset(str(folder))
    model = load_model(preset, preset.source, torch.device("cpu"), dtype)
    settings = {"lora_alpha": 32.0, "freeze_audio": True, "gradient_checkpointing": True}
    make_trainable(model, lora_rank=lora_rank, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def prompts_of(model: SpeechModel, folder: Path) -> list[Prompt]:
    """Spoken and written ones of different lengths."""
    questions = []
    for number, seconds in enumerate((1.0, 2.35, 0.4)):
        path = folder / f"{number}.wav"
        wave = 0.1 * np.random.default_rng(number).standard_normal(round(seconds * SAMPLE_RATE))
        soundfile.write(path, wave, SAMPLE_RATE, subtype="FLOAT")
        questions.append(Question(str(number), f"What is {number} plus one?" + " Say it." * number, "A", ("A", "B"), path))
    return [prompt for modality in Modality for prompt in model.encode_prompts(questions, modality)]


def sample(engine: TransformersEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[SampledCompletion]]:
    sampled: dict[int, list[SampledCompletion]] = {}
    engine.wake_up()
    engine.sample(prompts, sampling, sampled.__setitem__)
    return [sampled[number] for number in range(len(prompts))]


@torch.no_grad()
def logprobs_alone(model: SpeechModel, prompt: Prompt, token_ids: Sequence[int]) -> torch.Tensor:
    """[tokens, V] by transformers' own class: one row, no cache, no padding, its own mask and positions."""
    ids = torch.tensor([[*prompt.token_ids, *token_ids]])
    states = model.language_model(inputs_embeds=model.embed_tokens(ids, [prompt], [0]), use_cache=False).last_hidden_state
    logits = model.head(states[0, len(prompt.token_ids) - 1 : -1]).float() + model.suppressed_bias
    return logits.log_softmax(-1)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", BY_DECODER)
def test_equals_plain_transformers(checkpoints, tmp_path, monkeypatch, name, lora_rank):
    """Greedy and sampled, while rows leave and room runs out: each completion as if it were computed alone."""
    monkeypatch.setattr(transformers_engine, "_ROOM", 3)
    monkeypatch.setattr(transformers_engine, "_FEWEST_RUNNING", 1.0)
    model = prepared(checkpoints[name], lora_rank, torch.float32)
    prompts = prompts_of(model, tmp_path)
    frequent = [*model.prompts.stop_token_ids, *range(40, 80)]
    monkeypatch.setattr(type(model.prompts), "stop_token_ids", frequent)
    for temperature, copies in ((0.0, 1), (1.0, 3)):
        sampled = sample(TransformersEngine(model, 12), prompts, Sampling(copies, 20, temperature, 0))
        lengths = [len(one.token_ids) for group in sampled for one in group]
        assert len(set(lengths)) > 1, "completions end at different tokens"
        for prompt, group in zip(prompts, sampled, strict=True):
            for one in group:
                expected = logprobs_alone(model, prompt, one.token_ids)
                tokens = torch.tensor(one.token_ids)
                own = expected.gather(-1, tokens[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(one.logprobs), own, atol=1e-4, rtol=0)
                if not temperature:
                    assert torch.equal(expected.argmax(-1), tokens)
                assert one.truncated == (one.token_ids[-1] not in frequent)
                assert len(one.token_ids) == 20 or not one.truncated
                assert not set(one.token_ids[:-1]) & set(frequent), "nothing behind the end"


@pytest.mark.parametrize("name", BY_DECODER)
def test_bfloat16(checkpoints, tmp_path, name):
    model = prepared(checkpoints[name], 4, torch.bfloat16)
    prompts = prompts_of(model, tmp_path)
    for prompt, group in zip(prompts, sample(TransformersEngine(model, 12), prompts, Sampling(2, 12, 1.0, 0)), strict=True):
        for one in group:
            own = logprobs_alone(model, prompt, one.token_ids).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
            # Where two experts are about as likely rounding sends a token through another.
            assert (torch.tensor(one.logprobs) - own).abs().mean() < (0.1 if model.routing is None else 0.5)


def test_draws_follow_the_distribution(model, questions):
    """First tokens of 40,000 completions against their probabilities at another temperature (chi-squared)."""
    prompts = model.encode_prompts(questions[:1], Modality.TEXT)
    with torch.no_grad():
        model.head.weight.mul_(0.15)
        logits = logprobs_alone(model, prompts[0], [0])[0]
    sampling = Sampling(num_completions=200, max_new_tokens=1, temperature=0.7, seed=3)
    sampled = sample(TransformersEngine(model, 40_000), prompts * 200, sampling)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for group in sampled for one in group]), minlength=len(logits))
    expected = 40_000 * (logits / 0.7).softmax(-1).double()
    possible = torch.arange(len(logits)) != model.prompts.audio_token_id
    assert counts[~possible].sum() == 0
    assert expected[possible].min() > 5, "each token often enough for the statistic"
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    freedom = possible.sum() - 1
    # The statistic has mean `freedom` and variance `2 * freedom`.
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_seed_alone_decides(model, questions):
    """The same tokens and log-probabilities bit for bit, whatever torch's own generator holds, which stays as it is."""
    prompts = model.encode_prompts(questions[:4], Modality.TEXT)
    sampling = Sampling(num_completions=2, max_new_tokens=12, temperature=1.5, seed=5)
    torch.manual_seed(1)
    first = sample(TransformersEngine(model, 8), prompts, sampling)
    held = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert sample(TransformersEngine(model, 8), prompts, sampling) == first
    assert sample(TransformersEngine(model, 8), prompts, dataclasses.replace(sampling, seed=6)) != first
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), held)


def test_completions_are_handed_over_as_soon_as_a_prompt_has_all_of_its_own(model, questions, monkeypatch):
    """And its row is given up: the passes after it are over the others only."""
    monkeypatch.setattr(transformers_engine, "_FEWEST_RUNNING", 1.0)
    prompts = model.encode_prompts(questions[:4], Modality.TEXT)
    handed_over, rows = [], []
    decode = model.run_decoder
    monkeypatch.setattr(
        model, "run_decoder", lambda inputs, *rest, **named: rows.append(inputs.shape[:2]) or decode(inputs, *rest, **named)
    )
    engine = TransformersEngine(model, 8)
    engine.sample(prompts, Sampling(2, 40, 2.0, 0), lambda number, sampled: handed_over.append((number, len(rows), sampled)))
    assert sorted(number for number, _, _ in handed_over) == [0, 1, 2, 3]
    for _, passes, sampled in handed_over:
        assert passes == max(len(one.token_ids) for one in sampled)
    assert rows[0] == (1, sum(len(prompt.token_ids) for prompt in prompts)), "prompts without padding"
    assert rows[1] == (4, 2)
    assert rows[-1][0] < 4
    assert len(rows) == max(passes for _, passes, _ in handed_over)


@pytest.mark.parametrize("flaw", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_stop_the_run(model, questions, flaw):
    prompts = model.encode_prompts(questions[:2], Modality.TEXT)
    with torch.no_grad():
        model.head.weight[7] = flaw
    with pytest.raises(TrainingError, match="logits are not finite"):
        TransformersEngine(model, 8).generate(prompts, [0, 1], Sampling(2, 4, 1.0, 0))
