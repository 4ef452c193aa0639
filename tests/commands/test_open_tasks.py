"""Items without choices from training to export: read, asked, rewarded and evaluated by the same settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from items import first_items
from judge_server import judge_server

from tars_fast import analyse, evaluate, export, train
from tars_fast.data.items import TRAINING_DATA
from tars_fast.evaluation.results import read_predictions
from tars_fast.evaluation.voicebench import refuses
from tars_fast.learning.run import may_teach_without_own
from tars_fast.models.registry import find_preset
from tars_fast.types import Question, UserError


@pytest.fixture
def server():
    with judge_server() as server:
        yield server


def open_items(folder: Path, count: int, **fields: object) -> Path:
    """Some of the bundled questions without their answer set; `fields` may be made of the answer by a function."""
    path = first_items(TRAINING_DATA, count, folder) / "items.jsonl"
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        del row["answer_set"]
        answer = row.pop("answer")
        rows.append(row | {name: value(answer) if callable(value) else value for name, value in fields.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SMALL = {"num_steps": 1, "questions_per_step": 2, "group_size": 4, "eval_samples": 0, "eval_items": 2}


def test_a_run_with_a_judge_alone(tmp_path, server, monkeypatch):
    """Nothing but its marks is there to train on; evaluations before and after have them with intervals."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    data = open_items(tmp_path / "data", 20, rubric="Is it a number?")
    config = train.TrainConfig(
        data=str(data),
        output_dir=tmp_path / "run",
        reward=("judge",),
        judge_url=server.url,
        accuracy_weight=0.0,
        objective="grpo",
        answer_format="plain",
        **SMALL,
    )
    outcome = train.train(config)
    assert outcome.is_finished
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert 0 <= after["speech_judge"] <= 1
    assert len(after["text_judge_ci95"]) == 2
    assert "speech_accuracy" not in after
    assert "judge's mark" in (tmp_path / "run" / "report.html").read_text().replace("&#39;", "'")
    assert any("Is it a number?" in asked["messages"][0]["content"] for asked in server.asked)
    # Evaluated by itself, as the checkpoint says; without the judge there is nothing to grade by.
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    assert find_preset(checkpoint).answers.name == "plain"
    settings = {"model": checkpoint, "data": (f"mine={data}",), "output_dir": tmp_path / "evaluated"}
    with pytest.raises(UserError, match=r"20 of 20 items have nothing to grade answers by .*; add 'answer' to them, or name"):
        evaluate.evaluate(evaluate.EvaluateConfig(**settings))
    evaluated = evaluate.evaluate(evaluate.EvaluateConfig(**settings, judge_url=server.url)).evaluation["mine"]
    assert (evaluated["num_items"], evaluated["num_failed"]) == (20, 0)
    assert evaluated["speech_judge_ci95"][0] <= evaluated["speech_judge"] <= evaluated["speech_judge_ci95"][1]
    with pytest.raises(UserError, match=r"20 of 20 items have no answer that a rule grades \(the first: 'training-0000'\)"):
        analyse.analyse(analyse.AnalyseConfig(model=checkpoint, data=str(data), output_dir=tmp_path / "analysed"))
    # A judge that fails on the way fails its items, which the same command tries again.
    replies = iter(["Mark: 1"])
    server.reply = lambda _: next(replies, (400, "no such model"))
    broken = settings | {"output_dir": tmp_path / "broken"}
    outcome = evaluate.evaluate(evaluate.EvaluateConfig(**broken, judge_url=server.url))
    assert outcome.num_failed == 20
    assert "the judge gave no mark" in read_predictions(tmp_path / "broken", "")[0].failed
    # One that does so from the start is found out before anything is loaded.
    monkeypatch.setattr(evaluate, "load_model_and_engine", None)
    with pytest.raises(UserError, match=r"--judge-url .*: cannot be asked .*no such model"):
        evaluate.evaluate(evaluate.EvaluateConfig(**settings | {"output_dir": tmp_path / "new"}, judge_url=server.url))
    # What is done needs no judge that runs, once it is named.
    evaluate.evaluate(evaluate.EvaluateConfig(**settings, judge_url=server.url, judge_model="a-judge"))
    with pytest.raises(UserError, match=r"other settings or contents .judge a-judge, .* -> b, "):
        evaluate.evaluate(evaluate.EvaluateConfig(**settings, judge_url=server.url, judge_model="b"))


@pytest.mark.slow
def test_a_judge_watches_a_run_that_trains_on_no_reward(tmp_path, server, monkeypatch):
    """By the default objective; a resumed run keeps to the judge that it began with."""
    monkeypatch.setattr("tars_fast.learning.rewards.judge._WAIT", 0.01)
    server.reply = lambda _: [{"type": "text", "text": "Mark: 7"}]
    data = open_items(tmp_path / "data", 30, rubric="Is it a number?")
    config = train.TrainConfig(
        data=str(data), output_dir=tmp_path / "run", judge_url=server.url, eval_every=1, keep_best="speech_judge", **SMALL
    )
    train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation/speech_judge"] for line in lines if "validation/speech_judge" in line] == [pytest.approx(0.7)] * 2
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["text_judge"] == pytest.approx(0.7)
    assert evaluation["best"]["step"] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["judge_model"] == "a-judge"
    server.models = ["another"]
    with pytest.raises(UserError, match=r"--resume: the settings differ .*judge_model a-judge -> another"):
        train.train(dataclasses.replace(config, resume=True))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"--judge-url .*: cannot be asked .*refused"):
        train.train(dataclasses.replace(config, resume=True, judge_model="a-judge"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge_model": "x"}, "--judge-model x: has no effect without --judge-url; leave it out"),
        ({"judge_template": "nofile"}, "--judge-template nofile: has no effect without --judge-url"),
        ({"judge_scale": 5.0}, "--judge-scale 5.0: has no effect without --judge-url"),
        ({"reward_timeout": 5.0}, "--reward-timeout 5.0: has no effect without --judge-url"),
        ({"judge_url": "localhost:8000"}, "--judge-url localhost:8000: is no address"),
        ({"judge_url": "http://"}, "--judge-url http://: is no address"),
        ({"judge_url": "http://x", "reward_concurrency": 0}, "--reward-concurrency 0: must be greater than 0"),
    ],
)
def test_settings_of_a_judge_that_have_no_effect(settings, said):
    with pytest.raises(UserError, match=said):
        evaluate.EvaluateConfig(**settings)


@pytest.mark.slow
def test_refusals_are_evaluated_by_voicebenchs_phrases(tmp_path):
    """A set called advbench, in the published columns, from the command to its interval; pocket refuses nothing."""
    data = open_items(tmp_path / "advbench", 12)
    rows = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["question"], "audio": row["audio"]} for row in rows]
    (data / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = evaluate.evaluate(evaluate.EvaluateConfig(data=(str(data),), output_dir=tmp_path / "e"))
    figures = outcome.evaluation["advbench"]
    assert figures["num_items"] == 12
    results = read_predictions(tmp_path / "e", "")
    for modality in ("speech", "text"):
        completions = [getattr(result.evaluated, modality).completion for result in results]
        assert figures[f"{modality}_refusal"] == sum(map(refuses, completions)) / 12
        low, high = figures[f"{modality}_refusal_ci95"]
        assert 0 <= low <= figures[f"{modality}_refusal"] <= high <= 1
    assert "text_accuracy" not in figures


@pytest.mark.slow
def test_prompt_settings_go_with_a_checkpoint(tmp_path):
    """Those of a run are those of evaluation, analysis and export, though the files are gone."""
    data = open_items(tmp_path / "data", 20, answer_text=lambda answer: [answer, answer.upper()])
    template, own = tmp_path / "turn.jinja", tmp_path / "is.yaml"
    template.write_text("Listen: {{ question }}")
    own.write_text("instruction: Think, then answer.\nanswer: 'answer is (?P<answer>\\w+)'\nwhole: '<think>.*</answer>'\n")
    config = train.TrainConfig(
        data=str(data),
        output_dir=tmp_path / "run",
        prompt_template=template,
        answer_format=str(own),
        sample_every=1,
        **SMALL,
    )
    train.train(config)
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        assert json.loads(line)["answer"] in NUMBERS
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert after["text_exact"] == after["text_accuracy"]
    template.unlink()
    own.unlink()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    preset = find_preset(checkpoint)
    assert (preset.question_template, preset.answers.answer) == ("Listen: {{ question }}", r"answer is (?P<answer>\w+)")
    evaluate.evaluate(evaluate.EvaluateConfig(model=checkpoint, data=(f"d={data}",), output_dir=tmp_path / "e"))
    written = json.loads((tmp_path / "e" / "config.json").read_text())["evaluation"]
    assert (written["prompt_template"], written["answer_format"]["name"]) == ("Listen: {{ question }}", str(own))
    shared = {result.id for result in read_predictions(tmp_path / "run" / "predictions_after.jsonl", "")}
    own_results, theirs = (
        {result.id: result.evaluated.speech.completion for result in read_predictions(path, "") if result.id in shared}
        for path in (tmp_path / "e", tmp_path / "run" / "predictions_after.jsonl")
    )
    assert own_results == theirs
    analyse.analyse(analyse.AnalyseConfig(model=checkpoint, data=str(data), items=4, output_dir=tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "analysis.json").read_text())["settings"]["prompt_template"] == "Listen: {{ question }}"
    export.export(export.ExportConfig(model=checkpoint, output_dir=tmp_path / "exported"))
    assert find_preset(str(tmp_path / "exported")).answers == preset.answers
    # Other ones are another evaluation.
    other = evaluate.EvaluateConfig(model=checkpoint, data=(f"d={data}",), output_dir=tmp_path / "e", answer_format="plain")
    with pytest.raises(UserError, match="holds an evaluation with other settings or contents"):
        evaluate.evaluate(other)


def test_rewards_that_apply_to_nothing_are_warned_of(tmp_path, capsys):
    data = open_items(tmp_path / "data", 4, rubric="Is it a number?")
    settings = {"data": str(data), "eval_data": "pocket", "objective": "tars", "reward": ("exact", "numeric")}
    config = train.TrainConfig(**settings, accuracy_weight=0.0, format_weight=0.0, output_dir=tmp_path / "run", **SMALL)
    train.train(config)
    assert "warning: --reward exact numeric: applies to no completion of the training item" in capsys.readouterr().out
    # Where some items have an answer, the rewards for it apply to those.
    answered = Question("q", "?", "one", ("one", "two"))
    assert not may_teach_without_own(config, [dataclasses.replace(answered, answer="")])
    assert not may_teach_without_own(config, [answered])
    assert may_teach_without_own(dataclasses.replace(config, format_weight=0.5), [answered])
    assert may_teach_without_own(dataclasses.replace(config, objective="tars+opd"), [answered])


def test_numbers_are_evaluated_as_numbers(tmp_path):
    data = open_items(tmp_path / "data", 12, answer_number=NUMBERS.index)
    outcome = evaluate.evaluate(evaluate.EvaluateConfig(data=(f"d={data}",), output_dir=tmp_path / "e"))
    figures = outcome.evaluation["d"]
    assert figures["text_numeric"] == figures["text_accuracy"] > 0.5
    assert figures["speech_numeric_ci95"][0] <= figures["speech_numeric"]
    assert "text_exact" not in figures
