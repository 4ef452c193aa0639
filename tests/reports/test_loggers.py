"""What TensorBoard, wandb and trackio get of a run, and that none of them can end it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from items import first_items

from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA, load_questions
from tars_fast.reports import loggers
from tars_fast.reports.log import RunLog
from tars_fast.types import UserError

QUESTIONS = {question.id: question for question in load_questions(VALIDATION_DATA)[:2]}
METRICS = {"step": 2, "loss": 0.5, "validation/speech_accuracy": 0.7, "validation/speech_accuracy/low": 0.6}


def sample_lines() -> list[dict[str, object]]:
    spoken = {"completion": "<think>a | b\n& c</think>", "truncated": False, "reward": 1.5, "rewards": {"accuracy": 1.0}}
    first, second = QUESTIONS
    common = {"step": 2, "question": "What?", "answer": "two", "speech": spoken}
    return [common | {"id": first, "text": spoken | {"completion": "written"}}, common | {"id": second, "text": None}]


def log_a_step(folder: Path, *names: str, num_completed: int = 0) -> None:
    (folder / "config.json").write_text(json.dumps({"seed": 3}))
    with RunLog(folder, 10, num_completed, names) as log:
        log.write(METRICS)
        log.samples(sample_lines(), QUESTIONS.values())


def test_tensorboard_has_curves_with_intervals_completions_and_recordings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_step(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("validation/speech_accuracy/low")] == [(2, pytest.approx(0.6))]
    (text,) = events.Tensors("samples/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "&lt;think>a &#124; b<br>&amp; c&lt;/think> | 1.5 | written | 1.5 |" in shown
    assert [len(line.split(" | ")) for line in shown.splitlines()] == [8] * 4
    assert [events.Audio(f"recordings/{number}")[0].sample_rate for number in (1, 2)] == [16_000, 16_000]
    assert (
        b"validation/speech_accuracy/high"
        in events.SummaryMetadata("custom_scalars__config__").SerializeToString()
        + (events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    )


@pytest.fixture
def stubs(monkeypatch) -> dict[str, list[object]]:
    """Packages in the place of wandb and trackio, that remember what they are called with."""
    calls: dict[str, list[object]] = {}

    def package(name: str) -> SimpleNamespace:
        calls[name] = []

        def remember(what):
            return lambda *given, **named: calls[name].append((what, *given, named))

        def init(**named):
            remember("init")(**named)
            return SimpleNamespace(**{what: remember(what) for what in ("log", "finish", "define_metric")})

        return SimpleNamespace(
            init=init,
            Settings=lambda **named: named,
            Table=lambda columns, data: (columns, data),
            Audio=lambda waveform, caption, sample_rate: (waveform.shape, caption, sample_rate),
        )

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, package(name))
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_packages_get_metrics_tables_and_recordings(name, stubs, tmp_path):
    log_a_step(tmp_path, name)
    (_, settings), *logged = stubs[name]
    assert (settings["project"], settings["name"], settings["config"]) == ("tars_fast", tmp_path.name, {"seed": 3})
    metrics, samples = (call[1] for call in logged if call[0] == "log")
    assert metrics == METRICS
    columns, rows = samples["samples"]
    assert [dict(zip(columns, row, strict=True))["text"] for row in rows] == ["written", None]
    assert [samples[f"recordings/{number}"][1:] for number in (1, 2)] == [(key, 16_000) for key in QUESTIONS]
    assert logged[-1][0] == "finish"


def test_a_resumed_run_goes_on_in_the_same_place(stubs, tmp_path):
    (tmp_path / "wandb" / "offline-run-20260101_000000-abc123").mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to("offline-run-20260101_000000-abc123")
    for num_completed, expected in ((1, ("abc123", "allow")), (0, (None, "never"))):
        log_a_step(tmp_path, "wandb", "trackio", num_completed=num_completed)
        assert (stubs["wandb"][0][1]["id"], stubs["trackio"][0][1]["resume"]) == expected
        stubs["wandb"].clear()
        stubs["trackio"].clear()


@pytest.mark.parametrize("fails_at", ["start", "step", "samples", "close"])
def test_a_logger_that_fails_costs_one_warning(tmp_path, monkeypatch, capsys, fails_at):
    class Failing(loggers.TensorBoard):
        def __init__(self, run):
            self.attempt("start")
            super().__init__(run)

        def attempt(self, what):
            if what == fails_at:
                raise SystemExit("no\naccount") if what == "start" else ConnectionError("no network")

        def step(self, metrics):
            self.attempt("step")

        def samples(self, rows, recordings):
            self.attempt("samples")

        def close(self):
            super().close()
            self.attempt("close")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", Failing)
    (tmp_path / "config.json").write_text("{}")
    with RunLog(tmp_path, 10, 0, ("wandb", "tensorboard")) as log:
        for step in (1, 2):
            log.write(METRICS | {"step": step})
            log.samples(sample_lines(), QUESTIONS.values())
    said = capsys.readouterr().out
    assert said.count("warning: --log wandb: ") == 1
    assert "it is left out from here on" in said
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 4


def test_a_package_that_is_not_there_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(loggers, "installed", lambda name: None if name == "wandb" else "1")
    loggers.check_loggers(("tensorboard", "trackio"))
    with pytest.raises(UserError, match=r"^--log wandb: wandb is not installed; pip install 'wandb>=[\d.]+', or leave it out"):
        loggers.check_loggers(("tensorboard", "wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_logged_by_the_real_package(name, tmp_path):
    """Without a network and without an account."""
    pytest.importorskip(name, reason=f"{name} is optional: pip install 'tars-fast[log]'")
    command = [sys.executable, "-m", "tars_fast.train", "--output-dir", tmp_path / "run", "--log", name, "--sample-every", "1"]
    command += ["--data", first_items(TRAINING_DATA, 4, tmp_path / "training"), "--num-steps", "2", "--eval-samples", "0"]
    command += ["--eval-data", first_items(HELD_OUT_DATA, 2, tmp_path / "evaluation"), "--eval-every", "1", "--device", "cpu"]
    command += ["--validation-data", first_items(VALIDATION_DATA, 2, tmp_path / "validation")]
    command += ["--questions-per-step", "2", "--group-size", "4", "--objective", "tars"]
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([str(one) for one in command], env=environment, capture_output=True, text=True, check=True)
    assert "warning" not in done.stdout
    run = tmp_path / "run"
    assert not (run / "tensorboard").exists()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    if name == "wandb":
        (folder,) = (run / "wandb").glob("offline-run-*")
        (records,) = folder.glob("*.wandb")
        content = records.read_bytes()
        for expected in (b"validation/speech_accuracy/low", b"questions_per_step", b"reward/representation"):
            assert expected in content
        assert len(list(folder.rglob("*.table.json"))) == 2
        assert len(list(folder.rglob("*.wav"))) == 4
    else:
        with sqlite3.connect(tmp_path / "trackio" / "tars_fast.db") as database:
            rows = database.execute("select step, metrics from metrics order by id").fetchall()
        logged = [(step, json.loads(metrics)) for step, metrics in rows]
        assert [step for step, metrics in logged if "validation/speech_accuracy/low" in metrics] == steps
        assert [step for step, metrics in logged if "samples" in metrics] == [1, 2]
        assert len(list((tmp_path / "trackio" / "media").rglob("*.wav"))) == 4
