"""Arms of training: what they are, that runs begin, resume, fail and stop as said, and what is made of their figures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from items import first_items
from pages import check_nothing_foreign, check_plays, on_a_phone

from tars_fast.ablate import (
    AblateConfig,
    Run,
    Runner,
    ablate,
    choose_arms,
    choose_baseline,
    command,
    list_gpus,
    open_output,
    parse_settings,
    parse_training,
    plan_runs,
)
from tars_fast.config import TrainConfig
from tars_fast.data.items import TRAINING_DATA, VALIDATION_DATA
from tars_fast.evaluation.ablation import START, Arms, FinishedRun, check_runs
from tars_fast.evaluation.figures import report as report_of
from tars_fast.evaluation.figures import text_reference
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult
from tars_fast.evaluation.scorers import Reading
from tars_fast.models.architecture import find_layers
from tars_fast.reports.ablation_page import describe, difference_table, figure_table, headline_table, seed_table
from tars_fast.support.cli import FAILED, INTERRUPTED
from tars_fast.support.console import PlainConsole
from tars_fast.train import train
from tars_fast.types import Question, UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """16 items to train on and four to evaluate on."""
    folder = tmp_path_factory.mktemp("small")
    first_items(TRAINING_DATA, 16, folder / "training")
    first_items(VALIDATION_DATA, 4, folder / "evaluation")
    return folder


def config_of(output_dir: Path, small: Path, **changes) -> AblateConfig:
    settings = ("questions_per_step=2", "eval_samples=1", "device=cpu")
    data = {"data": str(small / "training"), "eval_data": str(small / "evaluation")}
    config = AblateConfig(arms="grpo,tars", seeds=2, num_steps=2, setting=settings, output_dir=output_dir, jobs=2, **data)
    return dataclasses.replace(config, **changes)


def answered(correct: bool) -> Answered:
    return Answered("it is two", False, {"strict": Reading("two", False, correct)}, float(correct))


def finished_run(
    arm: str, seed: int, speech: list[bool | None], before: list[bool], cosine: float = 0.5, **changes
) -> FinishedRun:
    """Text is right throughout; None: the item could not be evaluated."""

    def result(number: int, correct: bool | None) -> ItemResult:
        question = Question(str(number), "?", "two", ("one", "two"))
        evaluated = correct is not None and Evaluated(answered(correct), answered(True), 0.5, (cosine, cosine / 2), None)
        return ItemResult.of("mine", question, evaluated or None, None if evaluated else "broken")

    metrics = [
        dict.fromkeys(
            ("accuracy/text", "reward/representation", "reward/behaviour", "format/speech", "entropy/speech", "seconds/step"),
            1.0,
        )
        | {"step": step, "accuracy/speech": step / 10 + seed}
        for step in range(1, 13)
    ]
    parts = [[result(number, correct) for number, correct in enumerate(part)] for part in (before, speech)]
    return FinishedRun(arm, seed, *parts, metrics, {"num_steps": 12, "data_fingerprint": "x"} | changes)


HALF = [True, False] * 10


def test_the_papers_arms():
    """docs/method.md, Rewards: R = R_base + alpha R_rep + beta R_beh; Fig. 3: R_rep alone, over parts of the layers."""
    arms = choose_arms(AblateConfig(arms="grpo,rep,beh,tars,rep-shallow,rep-last"))
    settings = {name: dataclasses.replace(TrainConfig(), **_typed(own)) for name, own in arms.items()}
    weights = {name: (own.representation_weight, own.behaviour_weight) for name, own in settings.items()}
    assert not settings["grpo"].parts.uses_alignment
    assert all(settings[name].parts.uses_alignment for name in arms if name != "grpo")
    assert weights["rep"] == (1, 0) == weights["rep-shallow"] == weights["rep-last"]
    assert weights["beh"] == (0, 1)
    assert weights["tars"] == (1, 1)
    assert [settings[name].representation_layers for name in ("rep", "rep-shallow", "rep-last")] == ["all", "shallow", "last"]


def _typed(settings: dict[str, str]) -> dict[str, object]:
    return {name: float(value) if name.endswith("weight") else value for name, value in settings.items()}


def test_parts_of_the_layers_are_the_papers():
    """Fig. 3, 32 layers: 1-10, 11-20, 21-30, and the last two."""
    parts = [find_layers(name, 32) for name in ("shallow", "middle", "deep", "last")]
    assert [(part[0] + 1, part[-1] + 1) for part in parts] == [(1, 10), (11, 20), (21, 30), (31, 32)]
    for num_layers in (4, 5, 6, 28, 36):
        parts = [find_layers(name, num_layers) for name in ("shallow", "middle", "deep", "last")]
        assert [layer for part in parts for layer in part] == list(range(num_layers)), "each layer in one part"
        assert all(parts)
    assert find_layers("all", 32) is None
    assert list(find_layers("3", 32)) == [2]
    assert list(find_layers("3-5", 32)) == [2, 3, 4]


@pytest.mark.parametrize("given", ["0", "33", "5-3", "30-33"])
def test_layers_out_of_range(given):
    with pytest.raises(UserError, match=rf"--representation-layers {given}: the model has layers 1 to 32"):
        find_layers(given, 32)


def test_arms_of_ones_own():
    config = AblateConfig(arms="half, grpo", define=("half:objective=tars,representation_weight=0.5,freeze-audio=false",))
    assert choose_arms(config) == {
        "half": {"objective": "tars", "representation_weight": "0.5", "freeze_audio": "false"},
        "grpo": {"objective": "grpo"},
    }
    half, _ = plan_runs(dataclasses.replace(config, seeds=1, num_steps=3), choose_arms(config), {})
    given = ("--model=pocket", "--num-steps=3", "--objective=tars", "--representation-weight=0.5")
    assert half.command[3:7] == given
    assert "--no-freeze-audio" in half.command
    assert half.command[-4:] == ("--seed", "0", "--output-dir", "runs/ablation/half/seed-0")
    runs = plan_runs(dataclasses.replace(config, seeds=2), choose_arms(config), {})
    assert [run.name for run in runs] == ["half, seed 0", "grpo, seed 0", "half, seed 1", "grpo, seed 1"], "seed by seed"
    shared = parse_settings("--setting", ("representation_weight=3", "temperature=0.7"), set())
    half = parse_training("half", plan_runs(config, {"half": choose_arms(config)["half"]}, shared)[0].command[3:])
    assert (half.representation_weight, half.temperature) == (0.5, 0.7), "the arm's own settings come first"
    with pytest.raises(UserError, match=r"--arms grpo: --representation-weight 3.0: has no effect without tars"):
        plan_runs(config, choose_arms(config), shared)
    assert choose_baseline(config, choose_arms(config)) == "grpo"
    assert choose_baseline(AblateConfig(), ["a", "b"]) == "a"


def test_values_reach_the_runs_as_they_were_given():
    config = AblateConfig(arms="tars", data="my folder/items.jsonl")
    given = ("disjoint_from=mmsu obqa", "behaviour_model=/my models/a=b", "gradient_checkpointing=true")
    given += ("system_prompt=--help",)
    (run,) = plan_runs(config, choose_arms(config), parse_settings("--setting", given, set()))[:1]
    parsed = parse_training("--setting", run.command[3:])
    assert parsed.data == "my folder/items.jsonl"
    assert parsed.disjoint_from == ("mmsu", "obqa")
    assert parsed.behaviour_model == "/my models/a=b"
    assert parsed.gradient_checkpointing is True
    assert parsed.system_prompt == "--help"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "grpo,none"}, r"'none' is none of grpo, rep, beh, tars, .*--define"),
        ({"arms": "grpo,grpo"}, "twice"),
        ({"arms": "x", "define": ("x:nothing=1",)}, r"--define x: nothing=1: give SETTING=VALUE"),
        ({"arms": "x", "define": ("x:learning_rate",)}, "give SETTING=VALUE"),
        (
            {"arms": "x", "define": ("x:learning_rate=fast",)},
            "learning_rate=fast: no value that python -m tars_fast.train",
        ),
        (
            {"arms": "x", "define": ("x:learning_rate=-1",)},
            "--arms x: --learning-rate -1.0: must be greater than 0",
        ),
        ({"arms": "x", "define": ("x:data=other",)}, "data=other: must be the same in all arms; use --data"),
        (
            {"arms": "x", "define": ("x:questions_per_step=4",)},
            "in all arms; use --setting questions_per_step=4",
        ),
        ({"arms": "x", "define": ("x:representation_layers=outer",)}, "--representation-layers outer: all, shallow"),
        (
            {"arms": "x", "define": ("x:objective=tars,representation_layers=9",)},
            "--representation-layers 9: the model has layers 1 to 4",
        ),
        ({"define": ("tars:learning_rate=1",)}, "an arm called tars already"),
        ({"arms": "x", "define": ("x:long_audio=truncate",)}, "must be the same in all arms; use --setting long_audio="),
        ({"define": ("../x:learning_rate=1",)}, "NAME of small letters"),
        ({"define": ("drift.png:learning_rate=1",)}, "NAME of small letters"),
        ({"arms": "start,grpo", "define": ("start:learning_rate=1",)}, "start is what all arms start from"),
        ({"setting": ("seed=1",)}, "--setting seed=1: must be the same in all arms; use --seeds"),
        ({"setting": ("early_stop=2",)}, "--setting early_stop=2: must be the same in all arms; leave it out"),
        ({"setting": ("learning_rate=1", "learning-rate=2")}, "there twice"),
        ({"baseline": "rep"}, "--baseline rep: none of --arms grpo,tars"),
        ({"seeds": 0}, "--seeds 0: must be greater than 0"),
        ({"model": "nothing"}, "--model nothing"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(changes, message, small, tmp_path):
    with pytest.raises(UserError, match=message):
        command(config_of(tmp_path / "out", small, **changes))
    assert not (tmp_path / "out").exists()


def test_answers_that_one_arm_needs_are_missed_before_any_trains(small, tmp_path):
    item = json.dumps({"audio": "x.wav", "text": "Good morning."})
    (tmp_path / "plain.jsonl").write_text(item + "\n")
    config = config_of(tmp_path / "out", small, data=str(tmp_path / "plain.jsonl"), arms="opd,grpo", baseline="opd")
    with pytest.raises(UserError, match=r"line 1: 'question', 'answer' missing .*; --objective opd needs no answers"):
        command(config)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def ablation(tmp_path_factory, small) -> Path:
    """Two arms that train, and one that cannot; `failed` beside it holds what was written and said of that one.

    Runs are processes. Most of these train in this one, by the settings of their command, and are there when theirs begins.
    """
    output_dir = tmp_path_factory.mktemp("ablation") / "out"
    config = config_of(output_dir, small, num_steps=1)
    for run in plan_runs(config, choose_arms(config), parse_settings("--setting", config.setting, set())):
        if run.name != "tars, seed 0":
            assert train(parse_training("--arms", run.command[3:])).num_failed == 0
    broken = {"arms": "grpo,tars,broken", "define": ("broken:max_logprob_diff=1e-30",), "seeds": 1}
    with redirect_stdout(io.StringIO()) as said:
        assert command(dataclasses.replace(config, **broken)) == FAILED
    failed = output_dir.with_name("failed")
    failed.mkdir()
    for path in output_dir.glob("*.*"):
        shutil.copy(path, failed)
    (failed / "said.txt").write_text(said.getvalue())
    outcome = ablate(config)
    assert (outcome.output_dir, outcome.is_finished, outcome.num_failed) == (output_dir, True, 0)
    assert outcome.ablation == json.loads((output_dir / "ablation.json").read_text())
    return output_dir


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_arms_train_on_the_same_from_the_same(ablation):
    """Before the first update all arms are one model: same prompts and seeds show as the same completions."""
    drawn = ("accuracy/speech", "accuracy/text", "length/speech", "length/text", "entropy/speech", "format/speech")
    for seed in (0, 1):
        steps = [read(ablation / arm / f"seed-{seed}")[0] for arm in ("grpo", "tars")]
        assert [steps[0][name] for name in drawn] == [steps[1][name] for name in drawn]
        assert steps[0]["reward/speech"] != steps[1]["reward/speech"], "the arms reward the same"
    seeds = [read(ablation / "grpo" / f"seed-{seed}")[0] for seed in (0, 1)]
    assert [seeds[0][name] for name in drawn] != [seeds[1][name] for name in drawn]


def test_what_it_writes(ablation):
    made = json.loads((ablation / "ablation.json").read_text())
    assert made["baseline"] == "grpo"
    assert made["num_items"] == 4
    assert made["failed"] == {}
    for arm in ("grpo", "tars"):
        figures = made["arms"][arm]
        assert figures["seeds"] == [0, 1]
        own = [json.loads((ablation / arm / f"seed-{seed}" / "evaluation.json").read_text())["after"] for seed in (0, 1)]
        for name in ("speech_accuracy", "text_accuracy", "mrr", "mrr_same_model", "behaviour_similarity"):
            assert figures[f"{name}_by_seed"] == pytest.approx([one[name] for one in own], nan_ok=True), name
        assert figures["layer_cosine"] == pytest.approx(np.mean([one["layer_cosine"] for one in own], axis=0))
    assert set(made["minus_grpo"]) == {"tars"}
    assert made["provenance"]["versions"]["torch"]
    assert (ablation / "ablation.md").read_text().startswith("| arm ")
    table = (ablation / "ablation.tex").read_text()
    assert table.startswith("\\begin{tabular}")
    assert "greedy \\%" in table
    for name in ("learning_curves.png", "drift.png"):
        assert (ablation / name).read_bytes().startswith(b"\x89PNG")
    assert (ablation / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_what_is_finished_is_not_done_again(ablation, small, capsys):
    times = {path: path.stat().st_mtime_ns for path in ablation.glob("*/seed-*/metrics.jsonl")}
    assert command(config_of(ablation, small, num_steps=1)) == 0
    assert "4 of 4 runs are finished; 1 at a time" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in ablation.glob("*/seed-*/metrics.jsonl")} == times


def test_a_failed_run_is_listed_and_costs_no_other(ablation):
    failed = ablation.with_name("failed")
    made = json.loads((failed / "ablation.json").read_text())
    assert list(made["failed"]) == ["broken, seed 0"]
    assert "trainer and rollout engine differ" in made["failed"]["broken, seed 0"]
    assert set(made["arms"]) == {"grpo", "tars"}
    for name in ("ablation.md", "ablation.tex", "report.html"):
        assert "Failed: broken, seed 0: stopped: trainer and rollout engine differ" in (failed / name).read_text()
    assert "broken, seed 0" in (failed / "said.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_steps": 3}, "num_steps"),
        ({"setting": ("questions_per_step=3",)}, "setting"),
        ({"arms": "tars,mine", "define": ("mine:objective=tars,clip_low=0.1",)}, "arm mine"),
    ],
)
def test_runs_that_do_not_match_are_refused(ablation, small, changes, difference):
    settings = json.loads((ablation / "ablation_settings.json").read_text())
    settings["arms"]["mine"] = {"objective": "tars", "clip_low": "0.3"}
    (ablation / "ablation_settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"holds runs with other settings \(.*{difference}.*\); give the same ones"):
        command(config_of(ablation, small, **({"num_steps": 1} | changes)))


@pytest.mark.parametrize(
    ("name", "difference"), [("predictions_after.jsonl", "has 3 lines, not 4"), ("metrics.jsonl", "has 0 lines, not 1")]
)
def test_a_run_that_was_cut_off_is_refused_before_others_train(ablation, small, tmp_path, name, difference):
    shutil.copytree(ablation, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "tars" / "seed-1" / name
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=rf"tars/seed-1: not a whole run \({name} {difference}\); remove the folder"):
        command(config_of(tmp_path, small, num_steps=1, seeds=3))
    assert not (tmp_path / "grpo" / "seed-2").exists()


def test_arms_of_earlier_commands_stay_what_they_were(tmp_path):
    config = AblateConfig(output_dir=tmp_path)
    open_output(config, {"mine": {"clip_low": "0.1"}}, {})
    open_output(config, {"grpo": {}}, {})
    open_output(config, {"mine": {"clip_low": "0.1"}}, {})
    with pytest.raises(UserError, match=r"other settings \(arm mine\)"):
        open_output(config, {"mine": {"clip_low": "0.3"}}, {})


def test_a_folder_that_cannot_be_written_to(small, tmp_path):
    (tmp_path / "ablation_settings.json").mkdir()
    with pytest.raises(UserError, match=r"--output-dir .*: its ablation_settings.json is not an ablation's, or damaged; name"):
        command(config_of(tmp_path, small))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(small, tmp_path):
    command = [sys.executable, "-m", "tars_fast.ablate", "--arms", "tars", "--seeds", "1"]
    command += ["--data", str(small / "training"), "--eval-data", str(small / "evaluation")]
    command += ["--num-steps", "8", "--setting", "questions_per_step=2", "--setting", "eval_samples=0"]
    command += ["--output-dir", str(tmp_path)]
    run = tmp_path / "tars" / "seed-0"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(read(run)) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED
    assert errors.splitlines() == [
        "stopping after the steps that are running; a second Ctrl-C stops at once",
        "stopped; the same command continues",
    ]
    done = len(read(run))
    assert done < 8
    assert list(run.glob("checkpoint-*"))
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tars, seed 0: finished" in finished.stdout
    assert [step["step"] for step in read(run)] == list(range(1, 9))
    assert "--resume" not in finished.stdout
    assert "step 1/8" not in (run / "log.txt").read_text().partition("stopped; continue")[2], "it began again"


def fake_run(folder: Path, name: str, code: str) -> Run:
    """A process that is no training, run as one; it finds its folder in `folder`."""
    own = folder / name
    code = f"import os, signal, sys, time, pathlib; folder = pathlib.Path({str(own)!r}); {code}"
    return Run(name, 0, own, (sys.executable, "-c", code))


FINISH = (
    "e = os.environ; (folder / 'evaluation.json').write_text(e.get('CUDA_VISIBLE_DEVICES', '') + ' ' + e['OMP_NUM_THREADS'])"
)


def test_runs_side_by_side_have_gpus_and_cores_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    # Each waits until the other one is there: one after the other the first would give up.
    others = "len(list(folder.parent.glob('*/here'))) == 2"
    meet = f"any({others} or time.sleep(0.02) for _ in range(3000)) or sys.exit(1)"
    runs = [fake_run(tmp_path, name, f"(folder / 'here').touch(); {meet}; {FINISH}") for name in ("a", "b")]
    assert Runner(2, ["4", "7"], PlainConsole(quiet=True)).run(runs) == {}
    assert sorted((run.folder / "evaluation.json").read_text() for run in runs) == ["4 3", "7 3"]


def test_no_more_runs_at_a_time_than_the_setting_says(tmp_path):
    busy = "other = list(folder.parent.glob('*/busy')); (folder / 'busy').touch(); time.sleep(0.1); (folder / 'busy').unlink()"
    runs = [fake_run(tmp_path, str(number), f"{busy}; sys.exit(3) if other else None; {FINISH}") for number in range(4)]
    assert Runner(1, [], PlainConsole(quiet=True)).run(runs) == {}


def test_why_a_run_failed(tmp_path):
    runs = [
        fake_run(tmp_path, "says", "print('error: no such thing', file=sys.stderr); print(); sys.exit(2)"),
        fake_run(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        fake_run(tmp_path, "silent", "sys.exit(7)"),
        fake_run(tmp_path, "unfinished", "pass"),
        fake_run(tmp_path, "items", f"{FINISH}; sys.exit(1)"),
        fake_run(tmp_path, "brackets", "print('error: [/x] [red]'); sys.exit(2)"),
        fake_run(tmp_path, "nowhere", "pass"),
    ]
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "log.txt").write_text("what an earlier attempt said\n")
    (tmp_path / "nowhere").write_text("a file where its folder should be")
    said = io.StringIO()
    reasons = Runner(2, [], PlainConsole(file=said)).run(runs)
    assert reasons["says, seed 0"].startswith("error: no such thing; see ")
    assert reasons["killed, seed 0"].startswith("ended by signal 9 (SIGKILL)")
    assert reasons["silent, seed 0"].startswith("exit status 7")
    assert "unfinished, seed 0" in reasons
    assert "File exists" in reasons["nowhere, seed 0"]
    assert "brackets, seed 0: failed, error: [/x] [red]; see" in said.getvalue()
    assert "items, seed 0" not in reasons, "figures are there, of the items that could be evaluated"


COUNT_INTERRUPTS = (
    "received = []; signal.signal(signal.SIGINT, lambda *_: received.append(1)); (folder / 'ready').touch();"
    "[time.sleep(0.02) for _ in range(500) if not received]; time.sleep(0.5);"
    "(folder / 'received').write_text(str(len(received)))"
)


@pytest.mark.parametrize(
    ("sent", "received"), [([signal.SIGINT] * 2, "2"), ([signal.SIGTERM] * 2, "1"), ([signal.SIGHUP, signal.SIGTERM], "1")]
)
def test_signals_reach_the_runs_and_no_other_begins(tmp_path, sent, received):
    """Only Ctrl-C twice stops at once; a cluster that repeats itself still has the step saved."""
    runs = [fake_run(tmp_path, name, COUNT_INTERRUPTS) for name in ("a", "b")]
    runner = Runner(1, [], PlainConsole(quiet=True))

    def send() -> None:
        while not (runs[0].folder / "ready").exists():
            time.sleep(0.02)
        for number in sent:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    assert runner.run(runs) == {}
    sender.join()
    assert runner.stopped
    assert (runs[0].folder / "received").read_text() == received
    assert not runs[1].folder.exists()


def test_with_nohup_it_goes_on(tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runner = Runner(1, [], PlainConsole(quiet=True))
        assert runner.run([fake_run(tmp_path, "a", f"os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.2); {FINISH}")]) == {}
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert not runner.stopped


def test_a_run_that_is_just_starting_is_stopped_too(tmp_path, monkeypatch):
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        # Where coverage is measured it starts in the process first, and swallows a Ctrl-C there.
        monkeypatch.delenv(name, raising=False)
    runner = Runner(1, [], PlainConsole(quiet=True))
    start = subprocess.Popen

    def start_late(*arguments, **named) -> subprocess.Popen:
        process = start(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)
        while not runner.stopped:
            time.sleep(0.02)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_late)
    started = time.monotonic()
    assert runner.run([fake_run(tmp_path, "a", "time.sleep(300)")]) == {}
    assert time.monotonic() - started < 200


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert list_gpus() == ["5", "GPU-abc"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list_gpus() == []


def test_figures_of_planted_arms():
    """20 items; the baseline has 10 right after training in each seed, the arm 14, 15 and 16; the start 5."""
    before = [True] * 5 + [False] * 15
    runs = [finished_run("grpo", seed, HALF, before) for seed in range(3)]
    runs += [finished_run("mine", seed, [True] * (14 + seed) + [False] * (6 - seed), before, 0.8) for seed in range(3)]
    made = Arms(runs, "grpo").report()
    assert made[START]["speech_accuracy"] == pytest.approx(0.25)
    assert made["arms"]["grpo"]["speech_accuracy_by_seed"] == pytest.approx([0.5] * 3)
    assert made["arms"]["mine"]["speech_accuracy_by_seed"] == pytest.approx([0.7, 0.75, 0.8])
    assert made["arms"]["mine"]["speech_accuracy"] == pytest.approx(0.75)
    assert made["arms"]["mine"]["mrr"] == pytest.approx(75)
    assert made["arms"]["mine"]["layer_cosine"] == pytest.approx([0.8, 0.4])
    change = made["minus_grpo"]["mine"]
    assert change["speech_accuracy"] == pytest.approx(0.25)
    assert change["speech_accuracy_by_seed"] == pytest.approx([0.2, 0.25, 0.3])
    # t = 0.25 / (0.05 / sqrt 3) = 8.66 with 2 degrees of freedom.
    assert change["speech_accuracy_p"] == pytest.approx(0.01307, abs=1e-5)
    assert change["layer_cosine_mean"] == pytest.approx(0.225)
    low, high = change["speech_accuracy_ci95"]
    assert low < 0.2
    assert high > 0.3
    assert change["text_accuracy_ci95"] == [0, 0]
    assert change["text_accuracy_p"] is None


def test_differences_are_paired_by_item():
    """Two arms that agree on all items but two: the interval of the difference is far narrower than that of either."""
    mine = [True, True, True, True, *HALF[4:]]
    made = Arms([finished_run("grpo", 0, HALF, HALF), finished_run("mine", 0, mine, HALF)], "grpo").report()
    widths = [np.ptp(part["speech_accuracy_ci95"]) for part in (made["arms"]["mine"], made["minus_grpo"]["mine"])]
    assert widths[1] < 0.65 * widths[0]
    assert made["minus_grpo"]["mine"]["speech_accuracy_p"] is None, "one seed tells nothing of seeds"


def test_p_values_are_corrected_for_the_number_of_arms():
    runs = [finished_run("grpo", seed, HALF, HALF) for seed in range(3)]
    for name, more in (("a", 4), ("b", 2)):
        runs += [
            finished_run(name, seed, [True] * (10 + more + seed) + [False] * (10 - more - seed), HALF) for seed in range(3)
        ]
    changes = Arms(runs, "grpo").report()["minus_grpo"]
    assert changes["a"]["speech_accuracy_p_holm"] == pytest.approx(2 * changes["a"]["speech_accuracy_p"])
    assert changes["b"]["speech_accuracy_p_holm"] == pytest.approx(changes["b"]["speech_accuracy_p"])


def test_tables_show_differences_with_their_sign_and_corrected_p_values():
    runs = [finished_run("grpo", seed, HALF, HALF) for seed in range(3)]
    for name, more in (("a", 4), ("b", -4)):
        runs += [
            finished_run(name, seed, [True] * (10 + more + seed) + [False] * (10 - more - seed), HALF) for seed in range(3)
        ]
    made = Arms(runs, "grpo").report()
    for table, names in ((difference_table(made), "p, speech"), (headline_table(made), "p")):
        rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
        for arm, difference in (("a", "+25.0 ["), ("b", "-15.0 [")):
            change = made["minus_grpo"][arm]
            assert change["speech_accuracy_p_holm"] > change["speech_accuracy_p"] or arm == "b"
            assert rows[arm][names] == f"{change['speech_accuracy_p_holm']:.2g}"
            assert any(cell.startswith(difference) for cell in rows[arm].values())


def test_what_cannot_be_divided_has_no_figure_and_no_p_value():
    """MRR of a model that has no written answer right."""

    def without_text(run: FinishedRun) -> FinishedRun:
        after = [
            dataclasses.replace(one, evaluated=dataclasses.replace(one.evaluated, text=answered(False))) for one in run.after
        ]
        return dataclasses.replace(run, after=after)

    runs = [finished_run("grpo", seed, HALF, HALF) for seed in range(3)]
    runs += [without_text(finished_run("mine", seed, HALF, HALF)) for seed in (0, 1)] + [finished_run("mine", 2, HALF, HALF)]
    made = Arms(runs, "grpo").report()
    json.dumps(made, allow_nan=False)
    assert made["arms"]["mine"]["mrr_same_model_by_seed"] == [None, None, pytest.approx(50)]
    assert made["arms"]["mine"]["mrr_same_model_ci95"] is None
    change = made["minus_grpo"]["mine"]
    assert change["mrr_same_model_by_seed"] == [None, None, 0]
    assert change["mrr_same_model_p"] is None
    assert change["mrr"] == 0, "its reference is the start's"


def test_items_that_some_run_could_not_evaluate_are_left_out_of_all():
    runs = [finished_run("grpo", 0, HALF, HALF), finished_run("mine", 0, [None, *HALF[1:]], HALF)]
    made = Arms(runs, "grpo").report()
    assert (made["num_items"], made["num_items_left_out"]) == (19, 1)
    assert made["arms"]["grpo"]["speech_accuracy"] == pytest.approx(9 / 19)
    before_only = [runs[0], finished_run("mine", 0, HALF, [None, *HALF[1:]])]
    assert Arms(before_only, "grpo").report()["num_items_left_out"] == 1
    assert "(1 left out" in describe(made | {"failed": {}})[0]
    with pytest.raises(UserError, match="no item was evaluated by all of them"):
        Arms([runs[0], finished_run("mine", 0, [None] * 20, HALF)], "grpo")


def test_missing_runs_leave_what_can_be_compared():
    mine = [finished_run("mine", seed, HALF, HALF) for seed in (0, 1)]
    made = Arms([finished_run("grpo", 1, [True] * 20, HALF), *mine[::-1]], "grpo").report()
    assert made["minus_grpo"]["mine"]["speech_accuracy"] == pytest.approx(-0.5)
    assert made[START]["seeds"] == [0, 1]
    assert made["minus_grpo"]["mine"]["seeds"] == [1]
    assert made["arms"]["mine"]["seeds"] == [0, 1]
    without_baseline = Arms(mine, "grpo").report()
    assert without_baseline["minus_grpo"] == {}
    table = figure_table(without_baseline)
    assert [row[0] for row in table.rows] == [START, "mine"]
    assert all(len(row) == len(table.header) for row in table.rows)
    assert not difference_table(without_baseline).rows


def test_runs_without_sampled_completions_have_tables():
    """As with --setting eval_samples=0."""

    def greedy(result: ItemResult) -> ItemResult:
        speech, text = (
            dataclasses.replace(answer, sampled_accuracy=None) for answer in (result.evaluated.speech, result.evaluated.text)
        )
        return dataclasses.replace(result, evaluated=dataclasses.replace(result.evaluated, speech=speech, text=text))

    runs = [finished_run(arm, 0, HALF, HALF) for arm in ("grpo", "tars")]
    assert "sampled" in seed_table(Arms(runs, "grpo").report()).header[-1]
    runs = [dataclasses.replace(run, before=list(map(greedy, run.before)), after=list(map(greedy, run.after))) for run in runs]
    report = Arms(runs, "grpo").report()
    for table in (seed_table(report), figure_table(report), difference_table(report)):
        assert not any("sampled" in title for title in table.header)
        assert all(len(row) == len(table.header) for row in table.rows)


@pytest.mark.parametrize(
    ("changes", "difference"), [({"num_steps": 11}, "num_steps 12 and 11"), ({"data_fingerprint": "y"}, "other items")]
)
def test_runs_of_something_else_are_refused(changes, difference):
    with pytest.raises(UserError, match=rf"runs do not match: grpo, seed 0 and mine, seed 1 have {difference}"):
        check_runs([finished_run("grpo", 0, HALF, HALF), finished_run("mine", 1, HALF, HALF, **changes)])


def test_a_run_with_a_file_missing(tmp_path):
    with pytest.raises(UserError, match=r"not a whole run .* remove the folder to have it run again"):
        FinishedRun.read("grpo", 0, tmp_path)


def test_learning_curves_are_means_over_steps_and_seeds():
    arms = Arms([finished_run("grpo", seed, HALF, HALF) for seed in (0, 1)], "grpo")
    curve = arms.curves()["accuracy in training, speech"]["grpo"]
    # 12 steps, 10 of them averaged: steps 1-10, 2-11, 3-12; seed 1 lies 1 above seed 0.
    assert list(curve.x) == [10, 11, 12]
    assert curve.y == pytest.approx([1.05, 1.15, 1.25])
    # t(0.975, 1) = 12.706; standard error of {0, 1} about their mean is 0.5.
    assert np.subtract(curve.high, curve.y) == pytest.approx([12.7062 * 0.5] * 3, rel=1e-4)


def test_curves_of_what_is_not_measured_are_left_out():
    """R_beh of an arm that gives it no weight is 0 throughout."""
    runs = [finished_run(arm, 0, HALF, HALF) for arm in ("grpo", "tars")]
    runs[0] = dataclasses.replace(runs[0], metrics=[step | {"reward/behaviour": 0.0} for step in runs[0].metrics])
    assert set(Arms(runs, "grpo").curves()["R_beh"]) == {"tars"}
    assert set(Arms(runs, "grpo").curves()["R_rep"]) == {"grpo", "tars"}
    assert "R_beh" not in Arms(runs[:1], "grpo").curves()


def test_seconds_of_a_step_are_the_median_of_all_steps():
    run = finished_run("grpo", 0, HALF, HALF)
    slow = dataclasses.replace(run, metrics=[*run.metrics[:-1], run.metrics[-1] | {"seconds/step": 60.0}])
    assert Arms([slow], "grpo").report()["arms"]["grpo"]["median_seconds_per_step"] == 1


def test_figures_agree_with_those_of_an_evaluation():
    """One seed is what `evaluate` reports, mrr against the start's text included."""
    run = finished_run("grpo", 0, HALF, [True] * 20)
    ours, theirs = Arms([run], "grpo").figures("grpo"), report_of(run.after, text_reference(run.before))
    for name in ("speech_accuracy", "mrr", "mrr_same_model", "behaviour_similarity", "speech_accuracy_sampled"):
        assert ours[name] == pytest.approx(theirs[name])
        assert ours[f"{name}_ci95"] == pytest.approx(theirs[f"{name}_ci95"], abs=6 if name.startswith("mrr") else 0.06)


def test_the_page_shows_all_arms_and_their_items(ablation):
    page = check_nothing_foreign((ablation / "report.html").read_text())
    assert len(page.all("audio")) == 4
    for words in ("start", "grpo", "tars", "R_rep", "paired t-test over seeds", "4 of 4 items"):
        assert words in page.words
    alternatives = [image["alt"] for image in page.all("img")]
    assert any("Cosine of completion states" in one for one in alternatives)
    assert any("accuracy in training, speech" in one for one in alternatives)


@pytest.mark.browser
def test_the_page_in_a_browser(ablation, browser):
    with on_a_phone(browser, ablation / "report.html") as page:
        assert page.inner_text("#count") == "4 of 4 items shown"
        check_plays(page.locator("#items > details").first)
        page.fill("#words", "no item says this")
        assert page.inner_text("#count") == "0 of 4 items shown"
