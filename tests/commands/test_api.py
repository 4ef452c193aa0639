"""The Python API: what the commands do, returned instead of printed, and the same errors as exceptions."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from items import first_items

from tars_fast.api import (
    HELD_OUT_DATA,
    TRAINING_DATA,
    VALIDATION_DATA,
    AnalyseConfig,
    EvaluateConfig,
    Modality,
    Policy,
    TrainConfig,
    TrainOutcome,
    UserError,
    analyse,
    evaluate,
    load_policy,
    load_questions,
    train,
)
from tars_fast.learning.rewards.accuracy import accuracy
from tars_fast.learning.rewards.inputs import reward_inputs


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("api")
    return TrainConfig(
        data=str(first_items(TRAINING_DATA, 16, folder / "training")),
        eval_data=str(first_items(VALIDATION_DATA, 8, folder / "evaluation")),
        output_dir=folder / "run",
        num_steps=2,
        questions_per_step=4,
        eval_samples=0,
        device="cpu",
        engine="transformers",
    )


@pytest.fixture(scope="module")
def outcome(settings) -> TrainOutcome:
    return train(settings)


def test_train_returns_what_the_run_wrote(outcome, settings):
    assert outcome.is_finished
    assert outcome.output_dir == settings.output_dir
    assert outcome.evaluation == json.loads((outcome.output_dir / "evaluation.json").read_text())
    assert outcome.num_failed == 0
    assert outcome.evaluation["after"]["num_items"] == 8
    assert len((outcome.output_dir / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_is_evaluated_and_analysed(outcome, settings, tmp_path):
    checkpoint = str(outcome.output_dir / "checkpoint-2")
    name = Path(settings.eval_data).name
    evaluated = evaluate(
        EvaluateConfig(model=checkpoint, data=(settings.eval_data,), samples=0, output_dir=tmp_path / "e", device="cpu")
    )
    assert evaluated.is_finished
    assert evaluated.evaluation == json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert evaluated.evaluation[name]["speech_accuracy"] == outcome.evaluation["after"]["speech_accuracy"]
    analysed = analyse(AnalyseConfig(model=checkpoint, data=settings.eval_data, output_dir=tmp_path / "a", device="cpu"))
    assert analysed.analysis == json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert analysed.num_failed == 0


def test_a_policy_answers_from_speech_and_from_text():
    questions = load_questions(HELD_OUT_DATA)[:4]
    with load_policy(device="cpu", engine="transformers") as policy:
        assert isinstance(policy, Policy)
        spoken, written = (policy.answer(questions, modality) for modality in Modality)
        assert [len(group) for group in spoken] == [1] * 4
        assert accuracy(reward_inputs([group[0] for group in written], questions)) == [1.0] * 4, "it reads well"
        assert policy.answer(questions, "speech") == spoken, "greedy"
        sampled = policy.answer(questions, num_completions=3, temperature=1.0, seed=1)
        assert [len(group) for group in sampled] == [3] * 4
        assert {completion.modality for group in sampled for completion in group} == {Modality.SPEECH}
        cosines = policy.layer_cosines(questions)
    assert cosines.shape == (4, 4)
    assert ((cosines > 0.3) & (cosines < 1.0)).all()
    assert torch.isfinite(torch.tensor(cosines)).all()


def test_errors_are_those_of_the_commands(settings, tmp_path):
    with pytest.raises(UserError, match="--model nobody/nothing: cannot be loaded"):
        load_policy("nobody/nothing")
    with pytest.raises(UserError, match="--num-steps 0: must be greater than 0"):
        TrainConfig(num_steps=0)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        train(TrainConfig(output_dir=make_run(tmp_path), data=settings.data, eval_data=settings.eval_data, device="cpu"))
    for wrong, message in (
        ({"num_steps": "3"}, "--num-steps 3: must be a number, not str"),
        ({"engine": "foo"}, "--engine foo: is none of auto, vllm, transformers"),
        ({"long_audio": "z"}, "--long-audio z: is none of refuse, chunk, truncate"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig(**wrong)
    assert TrainConfig(output_dir="runs/x").output_dir == Path("runs/x")
    assert EvaluateConfig(output_dir="runs/x").output_dir == AnalyseConfig(output_dir="runs/x").output_dir == Path("runs/x")
    for wrong in ({"engine": "x"}, {"device": "tpu"}, {"dtype": "float16"}, {"long_audio": "z"}, {"max_new_tokens": -5}):
        with pytest.raises(UserError, match=r"is none of|must be greater than 0"):
            load_policy(**wrong)
    with load_policy(device="cpu", engine="transformers") as policy:
        for wrong in ({"num_completions": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
            with pytest.raises(UserError, match="num_completions"):
                policy.answer(load_questions(HELD_OUT_DATA)[:1], **wrong)
    with load_policy(device="cpu", max_new_tokens=1000) as policy, pytest.raises(UserError, match="more than the engine's"):
        policy.answer(load_questions(HELD_OUT_DATA)[:1])


def make_run(folder: Path) -> Path:
    (folder / "checkpoint-1").mkdir()
    return folder


@pytest.mark.slow
def test_training_in_a_thread_of_a_program_that_handles_its_own_signals(settings, tmp_path):
    """Signals can be handled in a program's main thread only."""
    import dataclasses

    found = []
    config = dataclasses.replace(settings, output_dir=tmp_path / "run", num_steps=1)
    thread = threading.Thread(target=lambda: found.append(train(config)))
    thread.start()
    thread.join()
    assert found[0].is_finished
