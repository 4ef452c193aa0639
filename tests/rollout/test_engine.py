"""What stops a run whose engine and trainer disagree, and that an item which goes bad later costs no other."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from items import first_items
from steps import rollout_of

from tars_fast import train as train_command
from tars_fast.config import TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning import loader
from tars_fast.learning.batch import encode_batch, prepare_batch
from tars_fast.learning.update import Learner
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.train import command
from tars_fast.types import Modality, TrainingError


class OtherPolicy(TransformersEngine):
    """An engine whose log-probabilities are a tenth of a nat off, as stale weights make them."""

    def sample(self, prompts, sampling, on_sampled):
        def stale(number, sampled):
            on_sampled(number, [dataclasses.replace(one, logprobs=[value - 0.1 for value in one.logprobs]) for one in sampled])

        super().sample(prompts, sampling, stale)


@pytest.mark.parametrize("limit", [None, 0.05, 0.2])
def test_an_engine_with_another_policy_stops_the_run_before_an_update(model, questions, config, limit):
    config = dataclasses.replace(config, max_logprob_diff=limit)
    engine = OtherPolicy(model, config.rollout_batch_size)
    sampled = rollout_of(model, questions[:2], config, engine=engine)
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=1.0), config)
    before = model.head.weight.detach().clone()

    def update() -> dict[str, float]:
        return train_command.update_policy(learner, learner.begin_rollout(sampled))

    if limit == 0.2:
        assert update()["logprob_diff_mean"] == pytest.approx(0.1, abs=1e-4)
        return
    with pytest.raises(TrainingError, match=r"differ by 0\.1 nats a token.*Likely causes: .*--engine transformers"):
        update()
    assert torch.equal(model.head.weight, before)


@pytest.fixture
def own_data(tmp_path):
    """Twelve items in a folder of their own, whose recordings a test may spoil."""
    return first_items(TRAINING_DATA, 12, tmp_path / "data")


@pytest.mark.parametrize("how", ["deleted", "cut short", "not audio"])
def test_an_item_that_goes_bad_later_does_not_cost_the_batch(model, own_data, how):
    questions = load_questions(own_data)[:4]
    spoiled = questions[1].audio
    if how == "deleted":
        spoiled.unlink()
    else:
        spoiled.write_bytes(b"" if how == "cut short" else b"not audio" * 100)
    encoded = encode_batch(model, TransformersEngine(model, 8), prepare_batch(model, questions), 40)
    assert encoded.usable == [0, 2, 3]
    assert [prompt.modality for prompt in encoded.prompts] == [Modality.SPEECH, Modality.TEXT] * 3
    (warning,) = encoded.warnings
    assert warning.startswith(f"item {questions[1].id!r} is left out of this step: ")


def test_a_recording_that_grew_too_long_costs_that_item_only(model, own_data, monkeypatch):
    questions = load_questions(own_data)[:3]
    engine = TransformersEngine(model, 8)
    (longer,) = model.encode_prompts(questions[2:], Modality.SPEECH)

    def refusal(prompt, _max_new_tokens):
        same = prompt.audio_clips[0].shape == longer.audio_clips[0].shape
        return "too long" if same and torch.equal(prompt.audio_clips[0], longer.audio_clips[0]) else None

    monkeypatch.setattr(engine, "refusal", refusal)
    encoded = encode_batch(model, engine, prepare_batch(model, questions), 40)
    assert encoded.usable == [0, 1]
    assert len(encoded.prompts) == 4
    assert encoded.warnings == [f"item {questions[2].id!r} is left out of this step: too long"]
    assert "1000 new ones are more than the engine's 1024" in TransformersEngine(model, 8).refusal(longer, 1000)


def test_a_tower_that_makes_nan_of_a_recording_costs_that_item_only(model, own_data, config, monkeypatch):
    questions = load_questions(own_data)[:3]
    encode = model.encode_clips

    def ruin(when) -> None:
        monkeypatch.setattr(
            model, "encode_clips", lambda clips: [state * torch.nan if when(clips) else state for state in encode(clips)]
        )

    ruin(lambda clips: len(clips) > 1)
    engine = TransformersEngine(model, 8)
    assert encode_batch(model, engine, prepare_batch(model, questions), 40).usable == [0, 1, 2], (
        "in a batch of one each is fine again"
    )
    ruin(lambda clips: True)
    model.set_audio_cache(0, None, 0)
    with pytest.raises(TrainingError, match=r"no recording of this step could be used.*NaN or infinity"):
        rollout_of(model, questions, config, engine=engine)


def test_a_run_goes_on_without_the_bad_item(own_data, tmp_path, monkeypatch, capsys):
    """One recording is deleted once training has begun; the run ends well and says what it left out."""
    config = TrainConfig(
        data=own_data, output_dir=tmp_path / "run", num_steps=3, questions_per_step=12, eval_samples=0, device="cpu",
        eval_data=own_data.parent / "eval", audio_cache_gb=0.0,
    )  # fmt: skip
    lines = (own_data / "items.jsonl").read_text().splitlines()
    (tmp_path / "eval").mkdir()
    (own_data / "items.jsonl").write_text("\n".join(lines[:11]) + "\n")
    held_out = json.loads(lines[11])
    (tmp_path / "eval" / held_out["audio"]).parent.mkdir()
    shutil.move(own_data / held_out["audio"], tmp_path / "eval" / held_out["audio"])
    (tmp_path / "eval" / "items.jsonl").write_text(lines[11] + "\n")
    original = train_command.run_steps
    victim = load_questions(own_data)[4]

    def spoil_first(*arguments):
        victim.audio.unlink()
        return original(*arguments)

    monkeypatch.setattr(train_command, "run_steps", spoil_first)
    assert command(dataclasses.replace(config, questions_per_step=11)) == 0
    assert f"item {victim.id!r} is left out of this step" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_whose_recordings_are_gone_keeps_its_last_step(tmp_path, own_data, monkeypatch):
    """All recordings vanish after the second step: that step is saved, and the run continues once they are back."""
    evaluation = tmp_path / "evaluation"
    shutil.copytree(own_data, evaluation)
    lines = (own_data / "items.jsonl").read_text().splitlines()
    (own_data / "items.jsonl").write_text("\n".join(lines[:8]) + "\n")
    (evaluation / "items.jsonl").write_text("\n".join(lines[8:]) + "\n")
    config = TrainConfig(
        data=own_data, eval_data=evaluation, output_dir=tmp_path / "run", num_steps=4, questions_per_step=2,
        eval_samples=0, device="cpu", audio_cache_gb=0.0,
    )  # fmt: skip
    original = loader.prepare_batch
    calls = []

    def vanishing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            (own_data / "recordings").rename(own_data / "elsewhere")
        return original(*arguments)

    monkeypatch.setattr(loader, "prepare_batch", vanishing)
    with pytest.raises(TrainingError, match=r"no recording of this step could be used.*--resume"):
        command(config)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    (own_data / "elsewhere").rename(own_data / "recordings")
    assert command(dataclasses.replace(config, resume=True)) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
