"""The command end to end on the embedded model: what it writes, that it repeats, resumes, stops and warns."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from items import first_items

from tars_fast import evaluate
from tars_fast.config import BestMetric, RunConfig, TrainConfig
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import BUNDLED, HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions
from tars_fast.data.splits import data_fingerprint, split_by_id
from tars_fast.evaluation.figures import FIGURES
from tars_fast.evaluation.results import read_predictions
from tars_fast.export import ExportConfig, find_evaluation, run_of
from tars_fast.learning.metrics import check_progress
from tars_fast.learning.rewards.answers import extract_answer
from tars_fast.learning.run import evaluation_source, load_data, load_validation
from tars_fast.models.publish import HubRepository
from tars_fast.models.registry import PRESETS, find_preset, list_checkpoints
from tars_fast.reports.log import RunLog
from tars_fast.reports.tables import print_summary
from tars_fast.support.cli import FAILED, INTERRUPTED, parse_command_line
from tars_fast.support.console import PlainConsole
from tars_fast.train import command, run_steps, update_policy
from tars_fast.types import TrainingError, UserError


@pytest.fixture(scope="session")
def small_eval(tmp_path_factory) -> Path:
    """Eight items to evaluate on; beside the folder `training`, with sixteen to train on."""
    folder = tmp_path_factory.mktemp("small")
    first_items(TRAINING_DATA, 16, folder / "training")
    return first_items(VALIDATION_DATA, 8, folder / "evaluation")


def small_config(output_dir: Path, small_eval: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        objective="tars",
        output_dir=output_dir,
        data=small_eval.with_name("training"),
        eval_data=small_eval,
        num_steps=4,
        questions_per_step=2,
        tokens_per_micro_batch=1,
        save_every=2,
        eval_samples=1,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Everything but the clock."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")} for line in lines]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_eval) -> Path:
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    assert command(small_config(output_dir, small_eval)) == 0
    return output_dir


@pytest.mark.slow
def test_kernels_and_reference_train_alike(tmp_path, small_eval):
    """The same run twice, each in a process of its own: fused kernels under Triton's interpreter, and plain PyTorch."""
    metrics = []
    for kernels in ("auto", "reference"):
        output_dir = tmp_path / kernels
        command = [sys.executable, "-m", "tars_fast.train", "--output-dir", output_dir, "--kernels", kernels]
        command += ["--data", small_eval.with_name("training")]
        command += ["--eval-data", small_eval, "--eval-samples", "0", "--num-steps", "2", "--questions-per-step", "2"]
        command += ["--group-size", "4", "--updates-per-rollout", "2"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        subprocess.run([str(part) for part in command], check=True, capture_output=True, env=environment)
        metrics.append(read_metrics(output_dir))
    for ours, theirs in zip(*metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert metrics[0] != metrics[1], "the kernels did not run"


def test_writes_what_the_readme_promises(finished, small_eval):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for part in ("before", "after"):
        report = evaluation[part]
        for key in ("speech_accuracy", "text_accuracy", "mrr", "mrr_same_model", "behaviour_similarity", "unparsed"):
            low, high = report[f"{key}_ci95"]
            assert low <= report[key] <= high, key
        assert 0 <= report["speech_accuracy"] <= 1
        assert len(report["layer_cosine"]) == 4 == len(report["layer_cosine_ci95"])
        assert all(0 < cosine <= 1 for cosine in report["layer_cosine"])
    before, after = evaluation["before"], evaluation["after"]
    # The fixed reference is the text accuracy before training, also for the MRR after it.
    assert after["mrr"] == pytest.approx(100 * after["speech_accuracy"] / before["text_accuracy"])
    assert after["mrr_same_model"] == pytest.approx(100 * after["speech_accuracy"] / after["text_accuracy"])
    change = evaluation["change"]["speech_accuracy"]
    assert change == pytest.approx(after["speech_accuracy"] - before["speech_accuracy"])

    metrics = read_metrics(finished)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(line["logprob_diff_max"] < 1e-4 for line in metrics)
    assert json.loads((finished / "config.json").read_text())["learning_rate"] == PRESETS["pocket"].learning_rate
    assert list((finished / "tensorboard").glob("events.*"))
    for part in ("before", "after"):
        results = read_predictions(finished / f"predictions_{part}.jsonl", "")
        assert len(results) == 8
        assert all("<think>" in result.evaluated.text.completion for result in results)
        correct = [result.evaluated.speech.readings["strict"].correct for result in results]
        assert evaluation[part]["speech_accuracy"] == sum(correct) / 8
    assert (finished / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")
    fingerprint = json.loads((finished / "config.json").read_text())["data_fingerprint"]
    assert fingerprint["training"] == data_fingerprint(load_questions(small_eval.with_name("training")))
    assert [step for step, _ in list_checkpoints(finished)] == [2, 4]


def test_pocket_names_the_embedded_data():
    (training, held_out, _), named = (load_data(TrainConfig(data=data)) for data in (None, "pocket"))
    assert named == (training, held_out, [])
    assert load_data(TrainConfig(eval_data="pocket"))[1] == held_out
    assert [question.id for question in training] == [question.id for question in load_questions(TRAINING_DATA)]


def test_a_bundled_model_takes_the_data_of_its_task(tmp_path):
    def texts(**settings):
        return [{question.text for question in part} for part in load_data(TrainConfig(**settings))[:2]]

    hard = texts(model="pocket-hard")
    assert [len(part) for part in hard] == [800, 400]
    assert hard == texts(data="pocket-hard") == texts(data="pocket-hard@training")
    training, validation = texts(model="pocket-hard", eval_data="pocket-hard@validation")
    assert training == hard[0]
    assert len(validation) == 200
    assert not validation & (hard[0] | hard[1])
    PRESETS["pocket-hard"].save(tmp_path)
    assert evaluation_source(TrainConfig(model=str(tmp_path))) == str(BUNDLED["pocket-hard"] / "held_out.parquet")
    assert evaluation_source(TrainConfig(data="pocket-hard@training")) == str(BUNDLED["pocket-hard"] / "held_out.parquet")
    with pytest.raises(UserError, match="is in both training and evaluation data"):
        load_data(TrainConfig(data="pocket-hard", eval_data="pocket-hard@training"))


def test_checkpoint_loads_in_plain_transformers_and_has_learned(finished, model):
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    folder = finished / "checkpoint-4"
    trained = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == model.prompts.tokenizer.get_vocab()
    changed, unchanged = trained.state_dict(), model.module.state_dict()
    moved = {name for name, value in changed.items() if not torch.equal(value, unchanged[name])}
    assert moved
    assert all("language_model" in name or "lm_head" in name for name in moved), "audio tower and projector are frozen"


def test_a_run_repeated_from_its_settings_has_the_same_metrics_and_another_seed_others(finished, small_eval, tmp_path):
    settings = shutil.copy(finished / "config.json", tmp_path / "settings.json")
    given = ["--config", str(settings), "--output-dir", str(tmp_path / "again")]
    assert command(parse_command_line(TrainConfig, given, "python -m tars_fast.train")[0]) == 0
    assert read_metrics(tmp_path / "again") == read_metrics(finished)
    again, first = ((folder / "evaluation.json").read_text() for folder in (tmp_path / "again", finished))
    assert again == first
    assert command(small_config(tmp_path / "other", small_eval, seed=1, num_steps=1)) == 0
    assert read_metrics(tmp_path / "other")[0] != read_metrics(finished)[0]


REMEMBERS = {"objective": "tars+opd", "teacher": "ema", "text_anchor": "kl", "watch_every": 1, "representation_centre": True}
"""An objective that needs all that a checkpoint can hold beside weights and optimiser, and the model before training."""


@pytest.mark.parametrize(
    ("lora_rank", "dtype", "objective"),
    [
        (0, "float32", {}),
        *(pytest.param(*one, {}, marks=pytest.mark.slow) for one in ((0, "bfloat16"), (4, "float32"), (4, "bfloat16"))),
        *(pytest.param(rank, "float32", REMEMBERS, marks=pytest.mark.slow, id=f"objective-{rank}") for rank in (0, 4)),
    ],
)
def test_resumed_run_equals_unbroken_one(lora_rank, dtype, objective, finished, small_eval, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    config = small_config(unbroken, small_eval, lora_rank=lora_rank, dtype=dtype, **objective)
    if (lora_rank, dtype, objective) == (0, "float32", {}):
        # The bundled model's own settings.
        unbroken = finished
    else:
        assert command(config) == 0
    stopped = dataclasses.replace(config, output_dir=broken)
    assert run_interrupted(stopped, during_step=3) == INTERRUPTED
    assert [step for step, _ in list_checkpoints(broken)] == [2, 3]
    assert not (broken / "evaluation.json").exists()
    # A line beyond the checkpoint, as a killed run leaves one, must not survive the resumption.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "stale": true}\n')
    assert command(dataclasses.replace(stopped, resume=True)) == 0
    assert read_metrics(broken) == read_metrics(unbroken)
    first, second = ((folder / "evaluation.json").read_text() for folder in (broken, unbroken))
    assert first == second
    events = EventAccumulator(str(broken / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


VALIDATED = {"eval_every": 2, "keep_best": "behaviour_similarity", "sample_every": 2}


@pytest.fixture(scope="session")
def validated(tmp_path_factory, small_eval) -> Path:
    """As `finished`, with evaluations on the way."""
    output_dir = tmp_path_factory.mktemp("validated") / "run"
    items = first_items(HELD_OUT_DATA, 4, output_dir.parent / "validation")
    assert command(small_config(output_dir, small_eval, validation_data=str(items), **VALIDATED)) == 0
    return output_dir


def test_evaluations_on_the_way_change_nothing_in_training(finished, validated):
    watched = read_metrics(validated)
    assert [line["step"] for line in watched if "validation/speech_accuracy" in line] == [0, 2, 4]
    for line in watched:
        if "validation/speech_accuracy" in line:
            low, high = (line[f"validation/speech_accuracy/{end}"] for end in ("low", "high"))
            assert low <= line["validation/speech_accuracy"] <= high
    without = [{name: value for name, value in line.items() if not name.startswith("validation/")} for line in watched]
    assert without[1:] == read_metrics(finished)
    after = [json.loads((folder / "evaluation.json").read_text()) for folder in (validated, finished)]
    best = after[0].pop("best")
    assert after[0] == after[1]
    similarities = {line["step"]: line.get("validation/behaviour_similarity", 0.0) for line in watched}
    assert best == {"step": max(similarities, key=similarities.get), "metric": "behaviour_similarity"} | {
        "value": max(similarities.values())
    }
    report = (validated / "report.html").read_text()
    assert "Validation" in report
    assert "What the policy writes" in report


def test_samples_are_completions_of_their_step_with_their_rewards(validated, small_eval):
    samples = [json.loads(line) for line in (validated / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [2, 2, 4, 4]
    questions = {question.id: question for question in load_questions(small_eval.with_name("training"))}
    for line in samples:
        question, spoken, written = questions[line["id"]], line["speech"], line["text"]
        assert (line["question"], line["answer"]) == (question.text, question.answer)
        assert written["reward"] == written["rewards"]["accuracy"] + 0.5 * written["rewards"]["format"]
        assert "representation" not in written["rewards"]
        for part in (spoken, written):
            right = question.answer == extract_answer(part["completion"], question.choices)
            assert part["rewards"]["accuracy"] == float(right)
        rewards = spoken["rewards"]
        total = rewards["accuracy"] + 0.5 * rewards["format"] + rewards.get("representation", 0) + rewards.get("behaviour", 0)
        assert spoken["reward"] == pytest.approx(total)
    assert any("representation" in line["speech"]["rewards"] for line in samples)


@pytest.mark.slow
def test_a_run_with_evaluations_on_the_way_resumes_bit_for_bit(validated, small_eval, tmp_path):
    items = str(validated.parent / "validation")
    config = small_config(tmp_path / "run", small_eval, validation_data=items, **VALIDATED)
    assert run_interrupted(config, during_step=3) == INTERRUPTED
    assert "pocket, 2 of 4 steps" in (tmp_path / "run" / "report.html").read_text()
    assert command(dataclasses.replace(config, resume=True)) == 0
    assert read_metrics(tmp_path / "run") == read_metrics(validated)
    for name in ("evaluation.json", "samples.jsonl"):
        again, first = ((folder / name).read_text() for folder in (tmp_path / "run", validated))
        assert again == first


def test_a_run_stops_early_where_nothing_gets_better_and_keeps_the_best(small_eval, tmp_path, monkeypatch, capsys):
    """Best after its first step, by figures that are made up; resumed it does not go on."""

    def point_of(_results):
        value = next(values)
        return {} if value is None else {"validation/text_accuracy": value}

    # Where there is no figure, nothing got better or worse.
    values = iter([None, 0.2, 0.7, None, 0.6, 0.7, 0.9])
    monkeypatch.setattr("tars_fast.evaluation.training_run.curve_point", point_of)
    items = first_items(HELD_OUT_DATA, 2, tmp_path / "validation")
    config = small_config(tmp_path / "run", small_eval, num_steps=8, eval_every=1, validation_data=str(items), eval_samples=0)
    config = dataclasses.replace(config, keep_best="text_accuracy", early_stop=2, save_every=1, keep_checkpoints=1)
    assert command(config) == 0
    run = tmp_path / "run"
    assert [step for step, _ in list_checkpoints(run)] == [2, 5]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["best"] == {"step": 2, "metric": "text_accuracy", "value": 0.7}
    assert evaluation["stopped"] == {"step": 5}
    said = capsys.readouterr().out
    assert "stopped early, after 5 steps" in said
    assert said.count("--keep-best text_accuracy: the validation items give no such figure after 3 steps") == 1
    assert command(dataclasses.replace(config, resume=True)) == 0
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4, 5]
    # The model card has the figures of the last checkpoint, whichever step that is.
    evaluations = [
        find_evaluation(ExportConfig(str(run / f"checkpoint-{n}"), tmp_path / "out"), run_of(run / "x")) for n in (2, 5)
    ]
    assert evaluations == [{}, evaluation]


def test_validation_reads_answers_as_the_run_does(small_eval, tmp_path):
    never = tmp_path / "never.yaml"
    never.write_text("instruction: Answer.\nanswer: 'NEVER (?P<answer>\\w+)'\n")
    items = first_items(HELD_OUT_DATA, 2, tmp_path / "validation")
    config = small_config(tmp_path / "run", small_eval, num_steps=1, eval_every=1, validation_data=str(items), eval_samples=0)
    assert command(dataclasses.replace(config, answer_format=str(never))) == 0
    assert [line["validation/text_unparsed"] for line in read_metrics(tmp_path / "run")] == [1, 1]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["text_unparsed"] == 1


def test_validation_items_are_neither_trained_on_nor_held_out(small_eval, tmp_path):
    assert set(get_args(BestMetric)) <= FIGURES.keys()
    config = TrainConfig(eval_every=1)
    training, held_out, _ = load_data(config)
    again, validation = load_validation(config, training, held_out)
    assert again == training
    assert validation == load_questions(VALIDATION_DATA)
    # Of one's own data another tenth, with --eval-data or without.
    rows = [{"id": f"item-{n}", "question": f"What is {n}?", "answer": "a", "options": ["a", "b"]} for n in range(200)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for eval_data in (None, str(small_eval)):
        questions = load_questions(tmp_path / "own.jsonl", spoken=False)
        if eval_data is None:
            questions, held_out = split_by_id(questions, 0.1)
        own = dataclasses.replace(config, data=str(tmp_path / "own.jsonl"), eval_data=eval_data)
        training, validation = load_validation(own, questions, held_out)
        assert 10 <= len(validation) <= 30
        assert {question.id for question in training} == {q.id for q in questions} - {q.id for q in validation}
    with pytest.raises(
        UserError, match=r"^--validation-data .*: 100 of its 100 items are among those held out for the end; name"
    ):
        load_validation(config, [], load_questions(VALIDATION_DATA))
    with pytest.raises(UserError, match="give --validation-data"):
        load_validation(own, questions[:1], [])
    unanswered = [dataclasses.replace(question, answer="") for question in questions]
    with pytest.raises(UserError, match="none of its items has an answer to evaluate by; give --validation-data"):
        load_validation(own, unanswered, [])
    # With a judge, items with a rubric alone are evaluated, as those held out are.
    judged = dataclasses.replace(own, objective="tars", reward=("judge",), judge_url="http://localhost:8000/v1")
    for_a_judge = [dataclasses.replace(question, choices=(), rubric="Is it kind?") for question in unanswered]
    assert load_validation(judged, for_a_judge, [])[1]


def run_interrupted(config: TrainConfig, during_step: int) -> int:
    """Train, and get a Ctrl-C as a step ends."""
    original = RunLog.step

    def step(self, metrics):
        original(self, metrics)
        if metrics["step"] == during_step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", step)
        return command(config)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoints_are_published_with_a_card(small_eval, tmp_path, hub, monkeypatch, capsys, lora_rank):
    """The first upload is lost, which costs a warning; the last one has the figures."""
    pushed = HubRepository.push

    def push(repository, folder, *others):
        hub.refuses = "/commit/" if folder.name == "checkpoint-1" else ""
        return pushed(repository, folder, *others)

    monkeypatch.setattr(HubRepository, "push", push)
    config = small_config(tmp_path / "run", small_eval, num_steps=2, save_every=1, push_to_hub="me/speech", lora_rank=lora_rank)
    assert command(config) == 0
    assert "warning: --push-to-hub me/speech: checkpoint-1 could not be uploaded" in capsys.readouterr().out
    assert [(name, message) for name, message, _ in hub.commits] == [("me/speech", "after 2 steps")] * 2
    cards = [files.pop("README.md").decode() for *_, files in hub.commits]
    assert ["## Evaluation" in card for card in cards] == [False, True]
    assert all("# speech\n" in card and '"learning_rate": 0.0008' in card for card in cards)
    assert all(f"library_name: {'peft' if lora_rank else 'transformers'}" in card for card in cards)
    held = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint-2").iterdir() if path.is_file()}
    del held["trainer_state.pt"]
    assert [files for *_, files in hub.commits] == [held] * 2


def test_settings_that_cannot_go_together(small_eval, tmp_path):
    forgetful = {"lora_rank": 0, "freeze_audio": False, "audio_cache_dir": tmp_path}
    for changes, flag in ((forgetful, "--audio-cache-dir"), ({"lora_rank": 4, "freeze_audio": False}, "--no-freeze-audio")):
        with pytest.raises(UserError, match=flag):
            command(small_config(tmp_path / "run", small_eval, **changes))


def test_help_explains_every_setting_with_its_default(capsys, monkeypatch):
    from tars_fast.train import main

    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    # A setting that may be given several times says so instead.
    assert shown.count("default: ") + shown.count("(repeatable)") >= len(dataclasses.fields(TrainConfig))
    assert "in tokens" in shown


def test_broken_checkpoints_are_the_users_to_put_right(finished, small_eval, tmp_path):
    for spoil, name in ((b"junk", "model.safetensors"), (b'{"no": 1}', "preset.json")):
        folder = tmp_path / name
        shutil.copytree(finished / "checkpoint-4", folder)
        (folder / name).write_bytes(spoil)
        with pytest.raises(UserError, match="--model"):
            command(small_config(tmp_path / "run", small_eval, model=str(folder)))


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_outlives_the_checkpoint_it_began_from(small_eval, tmp_path, monkeypatch, lora_rank):
    """Twice interrupted, and saved until the checkpoints of both resumptions are gone."""
    config = small_config(tmp_path / "run", small_eval, num_steps=7, save_every=1, lora_rank=lora_rank)

    def interrupt_after(step):
        def check(history, _warn):
            if history[-1]["step"] == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr("tars_fast.train.check_progress", check)

    interrupt_after(1)
    assert command(config) == INTERRUPTED
    interrupt_after(2)
    assert command(dataclasses.replace(config, resume=True)) == INTERRUPTED
    interrupt_after(None)
    assert command(dataclasses.replace(config, resume=True)) == 0
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [6, 7]
    assert [metrics["step"] for metrics in read_metrics(tmp_path / "run")] == [*range(1, 8)]
    evaluated = evaluate.EvaluateConfig(
        model=str(tmp_path / "run" / "checkpoint-7"), data=(str(small_eval),), samples=0, output_dir=tmp_path / "again"
    )
    assert evaluate.command(evaluated) == 0


def test_help_and_wrong_settings_load_nothing_heavy():
    """Whoever asks for --help does not wait for torch."""
    command = [sys.executable, "-X", "importtime", "-m", "tars_fast.train"]
    for flags, status in ((["--help"], 0), (["--num-steps", "0"], 2)):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == status
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert not loaded & {"torch", "transformers", "numpy", "datasets", "peft"}
        assert "tars_fast" in loaded


def test_resume_refuses_other_settings(finished, small_eval):
    config = small_config(finished, small_eval, resume=True, learning_rate=1.0)
    with pytest.raises(UserError, match=r"learning_rate 0\.0008 -> 1\.0"):
        command(config)
    # A run from before there was a setting did what its default does.
    written = (finished / "config.json").read_text()
    older = {name: value for name, value in json.loads(written).items() if name != "loss_type"}
    (finished / "config.json").write_text(json.dumps(older))
    try:
        with pytest.raises(UserError, match=r"\(loss_type dapo -> grpo\)"):
            command(small_config(finished, small_eval, resume=True, loss_type="grpo"))
    finally:
        (finished / "config.json").write_text(written)


def test_lora_checkpoint_loads_in_plain_transformers(small_eval, tmp_path):
    from transformers import Qwen2AudioForConditionalGeneration

    assert command(small_config(tmp_path / "run", small_eval, lora_rank=4, num_steps=2, learning_rate=1e-3)) == 0
    try:
        loaded = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-2")
    except ImportError as error:
        # That peft loads them is tested in test_families.py.
        pytest.skip(f"transformers' own loader does not take the peft that is installed: {error}")
    adapters = {name: value for name, value in loaded.state_dict().items() if "lora_B" in name}
    # 4 layers of 7 linear maps; B starts at zero, so a non-zero one was trained and loaded.
    assert len(adapters) == 28
    assert all(value.abs().max() > 0 for value in adapters.values())


def test_ctrl_c_finishes_the_step_saves_and_exits_130(small_eval, tmp_path):
    """The real signal to the real process."""
    command = [sys.executable, "-m", "tars_fast.train", "--output-dir", str(tmp_path / "run"), "--eval-data", str(small_eval)]
    command += ["--questions-per-step", "2", "--num-steps", "500", "--eval-samples", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in errors
    steps = metrics.read_text().count("\n")
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [steps]


def test_interrupted_checkpoint_leaves_the_last_good_one(finished, model, tmp_path, monkeypatch):
    """Atomic: what fails half-way through writing never carries a checkpoint's name."""
    from steps import save_checkpoint

    from tars_fast.models.checkpoint import remove_outdated

    optimizer = torch.optim.AdamW(model.trainable_parameters())
    save_checkpoint(tmp_path, 1, model, optimizer)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, model, optimizer)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    monkeypatch.undo()
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, model, optimizer)
    remove_outdated(tmp_path, num_kept=2, best_step=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 4]
    remove_outdated(tmp_path, num_kept=1, best_step=4)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 4], "the best is not among those that are counted"
    remove_outdated(tmp_path, num_kept=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4]


def test_every_completion_cut_off_warns_then_stops(small_eval, tmp_path, capsys):
    config = small_config(tmp_path / "run", small_eval, max_new_tokens=5, num_steps=20)
    with pytest.raises(TrainingError, match="--max-new-tokens"):
        command(config)
    said = capsys.readouterr().out
    assert said.count("every completion was cut off; raise --max-new-tokens") == 3
    assert "--temperature" not in said
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 3
    assert all(line["grad_norm"] == 0 and line["reward/representation"] == 0 for line in metrics)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]


def test_no_disagreement_is_said(tmp_path, capsys):
    metrics = {"step": 7, "truncated/speech": 0.0, "truncated/text": 0.0, "disagreeing/any": 0.0}
    check_progress([metrics], RunLog(tmp_path, 10, 0).warn)
    assert "no group disagrees" in " ".join(capsys.readouterr().out.split())
    cut_off = {**metrics, "truncated/speech": 0.9}
    check_progress([cut_off], RunLog(tmp_path, 10, 0).warn)
    assert "90 % of the speech completions were cut off, raise --max-new-tokens" in " ".join(capsys.readouterr().out.split())
    agreeing = {**metrics, "disagreeing/any": 0.25}
    check_progress([metrics, agreeing], RunLog(tmp_path, 10, 0).warn)
    assert capsys.readouterr().out == ""
    # Steps in which everything was cut off had a warning of their own, and do not put off this one.
    empty = {**metrics, "truncated/speech": 1.0, "truncated/text": 1.0}
    check_progress([empty, empty, metrics], RunLog(tmp_path, 10, 0).warn)
    assert "raise --temperature" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="for 3 steps; raise --max-new-tokens"):
        check_progress([empty] * 4, RunLog(tmp_path, 10, 0).warn)
    with pytest.raises(TrainingError, match="for 3 steps; before that some ended: lower --learning-rate"):
        check_progress([agreeing] + [empty] * 3, RunLog(tmp_path, 10, 0).warn)


def test_non_finite_weights_never_become_a_checkpoint(small_eval, tmp_path, monkeypatch):
    """An update that ruins the weights after two good steps: the good checkpoint stays the last one."""
    calls = []

    def ruinous(learner, *arguments):
        result = update_policy(learner, *arguments)
        calls.append(result)
        if len(calls) == 3:
            learner.model.head.weight.data[0, 0] = torch.nan
        return result

    monkeypatch.setattr("tars_fast.train.update_policy", ruinous)
    with pytest.raises(TrainingError, match="not finite"):
        command(small_config(tmp_path / "run", small_eval, num_steps=12, save_every=1))
    checkpoints = list_checkpoints(tmp_path / "run")
    assert [step for step, _ in checkpoints] == [1, 2]
    from safetensors.torch import load_file

    weights = load_file(checkpoints[-1][1] / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_logits_that_overflow_stop_the_rollout(small_eval, tmp_path):
    """A learning rate after which weights are finite but their products are not: found before sampling from nonsense."""
    with pytest.raises(TrainingError, match="not finite"):
        command(small_config(tmp_path / "run", small_eval, num_steps=12, save_every=1, learning_rate=1e30))


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 10**30}, {"temperature": float("inf")}, {"lora_alpha": float("nan")}])
def test_numbers_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        TrainConfig(**wrong)


def test_settings_of_a_run_leave_nothing_open(tmp_path):
    """Whatever the presets know is filled in, what the user gave stays, and config.json has the settings in the same order."""
    assert [field.name for field in dataclasses.fields(RunConfig)] == [field.name for field in dataclasses.fields(TrainConfig)]
    given = TrainConfig(num_steps=3, lora_rank=4, seed=7)
    run = given.resolve(PRESETS["qwen2-audio-7b"], output_dir=tmp_path, tokens_per_micro_batch=100)
    assert (run.num_steps, run.lora_rank, run.seed, run.tokens_per_micro_batch) == (3, 4, 7, 100)
    assert (run.learning_rate, run.behaviour_model) == (2e-5, "Qwen/Qwen3-Embedding-0.6B")
    open_fields = {name for name, kind in get_type_hints(RunConfig).items() if type(None) in get_args(kind)}
    assert open_fields == {
        "data", "eval_data", "kv_cache_gb", "lora_targets", "max_logprob_diff", "audio_cache_dir", "eval_items",
        "validation_data", "keep_best", "push_to_hub", "judge_url", "judge_model", "judge_template", "overlong_tokens",
        "reward_pattern", "system_prompt", "prompt_template", "answer_format",
    }  # fmt: skip
    assert {name for name, value in vars(run).items() if value is None} <= open_fields
    with pytest.raises(TypeError, match="output_dir"):
        RunConfig()


def test_output_folder_that_cannot_be_made(small_eval, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        command(small_config(tmp_path / "file" / "run", small_eval))


def test_own_data_is_read_through_the_same_path(small_eval, tmp_path):
    """A user's jsonl with lettered options, wav recordings and no evaluation data: a tenth is held out by id hash."""
    import soundfile

    lines = []
    for index, item in enumerate(load_questions(TRAINING_DATA)[:24]):
        soundfile.write(tmp_path / f"{index}.wav", decode(item.audio), SAMPLE_RATE)
        options = [item.answer, *(word for word in item.choices if word != item.answer)][:4]
        record = {
            "id": f"own-{index}",
            "question": item.text,
            "options": options,
            "answer": "A",
            "audio": f"{index}.wav",
        }
        lines.append(json.dumps(record))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    config = small_config(tmp_path / "run", small_eval, data=tmp_path, eval_data=None, num_steps=1, max_new_tokens=30)
    assert command(config) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 1 <= evaluation["before"]["num_items"] <= 8
    # The embedded model was never taught letters: every answer must show as unparsed, none as a guess.
    assert evaluation["before"]["unparsed"] == 2 * evaluation["before"]["num_items"]
    assert evaluation["before"]["mrr"] is None


def test_items_with_an_answer_are_evaluated_on(small_eval, tmp_path):
    """The others are trained on, unless they ask what an evaluation item asks."""
    lines = [json.loads(line) for line in (small_eval.with_name("training") / "items.jsonl").read_text().splitlines()]
    audio = small_eval.with_name("training").resolve()
    labelled = [line | {"id": f"item-{number}", "audio": str(audio / line["audio"])} for number, line in enumerate(lines)]
    plain = [
        {"id": f"plain-{number}", "audio": line["audio"], "sentence": line["question"]} for number, line in enumerate(labelled)
    ]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled + plain))
    config = small_config(tmp_path / "run", small_eval, data=tmp_path / "both.jsonl", eval_data=None, objective="opd")
    training, held_out, notes = load_data(config)
    assert held_out == split_by_id(load_questions(tmp_path / "both.jsonl", answered=False)[: len(labelled)], 0.1)[1]
    assert len(training) == 2 * (len(labelled) - len(held_out))
    assert notes == [f"{len(training) // 2} of {len(training)} training items have no answer, and no rewards"]


def test_summary_without_an_interval(finished, tmp_path, capsys):
    """Few items: some resamples have no correct text answer, so the recovery rate has a figure but no interval."""
    evaluation = json.loads((finished / "evaluation.json").read_text())
    evaluation["before"]["mrr_ci95"] = None
    evaluation["before"]["mrr"] = 12.3
    print_summary(RunLog(tmp_path, 4, 0), evaluation, tmp_path)
    assert "12.3 " in capsys.readouterr().out


def test_evaluate_command_reads_a_checkpoint(finished, small_eval, tmp_path, monkeypatch):
    # A checkpoint remembers the settings of its run, so that evaluating it needs none.
    assert json.loads((finished / "checkpoint-4" / "preset.json").read_text())["questions_per_step"] == 2
    command = ["evaluate", "--model", str(finished / "checkpoint-4"), "--data", str(small_eval)]
    command += ["--output-dir", str(tmp_path), "--reference", "0.5", "--device", "cpu"]
    command += ["--compare", str(finished / "predictions_after.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    assert evaluate.main() == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())[small_eval.name]
    after = json.loads((finished / "evaluation.json").read_text())["after"]
    assert report["speech_accuracy"] == after["speech_accuracy"]
    assert report["layer_cosine"] == pytest.approx(after["layer_cosine"], abs=1e-6)
    assert report["mrr"] == pytest.approx(200 * report["speech_accuracy"])
    assert report["change"]["speech_accuracy_mcnemar_p"] == 1


def test_an_item_that_fails_in_an_evaluation_is_told_and_costs_nothing_else(small_eval, tmp_path, monkeypatch, capsys):
    """A recording that is gone by the second evaluation: figures of the others, paired over those that both have."""
    folder = tmp_path / "data"
    shutil.copytree(small_eval, folder)

    def then_lost(*arguments):
        finished = run_steps(*arguments)
        (folder / json.loads((folder / "items.jsonl").read_text().splitlines()[0])["audio"]).unlink()
        return finished

    monkeypatch.setattr("tars_fast.train.run_steps", then_lost)
    config = small_config(tmp_path / "run", small_eval, eval_data=folder, num_steps=1)
    assert command(config) == FAILED
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [evaluation[part]["num_items"] for part in ("before", "after", "change")] == [8, 7, 7]
    (reason,) = evaluation["after"]["failed"].values()
    assert "No such file" in reason
    assert "No such file" in " ".join(capsys.readouterr().out.split())


def test_the_live_tables_put_every_figure_under_its_own_name(finished, tmp_path):
    """Speech and text side by side; what belongs to the step as a whole stands below, with a name of its own."""
    from rich.console import Group

    metrics = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    console = PlainConsole(width=100)
    with console.capture() as capture:
        console.print(Group(*RunLog(tmp_path, 10, 0)._tables(metrics)))
    rows = [line.split() for line in capture.get().splitlines() if line.strip()]
    assert rows[0] == ["speech", "text"]
    assert [f"{metrics[f'accuracy/{modality}']:.4g}" for modality in ("speech", "text")] == rows[1][1:]
    shown = {" ".join(row[:-1]): row[-1] for row in rows}
    for title, name in (("R_rep", "reward/representation"), ("R_beh", "reward/behaviour"), ("gradient norm", "grad_norm")):
        assert shown[title] == f"{metrics[name]:.4g}"
    assert shown["rollout (s)"] == f"{metrics['seconds/rollout']:.2f}"


def test_a_runs_folder_is_answered_with_its_newest_checkpoint(finished, tmp_path):
    """By number, and never one that an interruption left half written."""
    for name in ("checkpoint-4", "checkpoint-10", "checkpoint-12.partial"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"the folder of a run; .*checkpoint-10$"):
        find_preset(str(tmp_path))
    assert find_preset(str(finished / "checkpoint-4")).source == str(finished / "checkpoint-4")
