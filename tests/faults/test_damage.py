"""Every file that a command leaves, damaged in every way: one line names it and says what to do, or it is made again."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from runs import read_metrics, settings_of

from tars_fast import train
from tars_fast.analyse import AnalyseConfig, analyse, read_compared
from tars_fast.config import TrainConfig
from tars_fast.data.items import VALIDATION_DATA
from tars_fast.evaluate import EvaluateConfig, evaluate
from tars_fast.evaluation.ablation import FinishedRun
from tars_fast.export import ExportConfig, export
from tars_fast.models.checkpoint import fault_of
from tars_fast.prepare import Outcome, Recipe, open_folder, recording_name
from tars_fast.support.command_line import parse_arguments
from tars_fast.types import UserError


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def other_json(path: Path) -> None:
    path.write_text('{"a": [1, 2]}\n')


def list_in_json(path: Path) -> None:
    path.write_text("[1]\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


SHARD = "optimizer/shard-00001-of-00001.safetensors"
DAMAGES = (cut, empty, remove, other_json, list_in_json, binary)


def config_of(data: Path, output_dir: Path, *flags: str) -> TrainConfig:
    given = [*settings_of(data, 2), "--save-every", "1", "--output-dir", str(output_dir), *flags]
    return parse_arguments("", TrainConfig, given, "train")


def finished(data: Path, folder: Path, rank: int) -> Path:
    assert train.train(config_of(data, folder, "--lora-rank", str(rank))).is_finished
    return folder


@pytest.fixture(scope="session")
def full(data, tmp_path_factory) -> Path:
    """A finished run of full fine-tuning."""
    return finished(data, tmp_path_factory.mktemp("runs") / "full", 0)


@pytest.fixture(scope="session")
def lora(data, tmp_path_factory) -> Path:
    """A finished run of LoRA."""
    return finished(data, tmp_path_factory.mktemp("runs") / "lora", 2)


def refusal_of(command: Callable[[], object]) -> str:
    """The line with which a command refuses to work; empty where it does not."""
    try:
        command()
    except UserError as error:
        return str(error)
    return ""


def resume(whole: Path, data: Path, run: Path) -> str:
    """Resume a damaged copy of a run; returns the line that refuses it, or else what was said.

    Raises:
        AssertionError: it went on, and not with the figures of the undamaged one.
    """
    rank = "2" if run.name == "lora" else "0"
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        refusal = refusal_of(lambda: train.train(config_of(data, run, "--lora-rank", rank, "--resume")))
    if refusal:
        return refusal
    assert (run / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    warned = " ".join(line for line in said.getvalue().splitlines() if "warning" in line and str(run) in line)
    assert read_metrics(run) == read_metrics(whole) or "metrics.jsonl lacks" in warned
    for name in ("report.html", "accuracy.png", "predictions_after.jsonl", "config.json"):
        assert (run / name).stat().st_size > 100
    return warned


def copy(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / run.name)
    return folder / run.name


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (
            "checkpoint-2/trainer_state.pt",
            cut,
            r"checkpoint-2 is damaged \(trainer_state.pt: .*\); .*checkpoint-1 is whole: remove",
        ),
        pytest.param(
            "checkpoint-2/trainer_state.pt",
            remove,
            r"checkpoint-2 is damaged \(trainer_state.pt: .*checkpoint-1 is whole",
            marks=pytest.mark.slow,
        ),
        (
            f"checkpoint-2/{SHARD}",
            cut,
            r"checkpoint-2 is damaged \(shard-00001-of-00001.safetensors: .*checkpoint-1 is whole",
        ),
        pytest.param(
            f"checkpoint-2/{SHARD}",
            remove,
            r"checkpoint-2 is damaged \(shard-00001-of-00001.safetensors: .*checkpoint-1 is whole",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "checkpoint-2/model.safetensors",
            cut,
            r"checkpoint-2 is damaged \(model.safetensors: .*checkpoint-1 is whole",
            marks=pytest.mark.slow,
        ),
        ("checkpoint-2/config.json", other_json, r"checkpoint-2 is damaged \(config.json: .*checkpoint-1 is whole"),
        ("config.json", empty, r"config.json is damaged \(.*\); remove it, and resume with the settings of the run"),
        pytest.param("config.json", remove, r"warning: .*config.json is missing; it is made again", marks=pytest.mark.slow),
        (
            "predictions_before.jsonl",
            cut,
            r"predictions_before.jsonl is damaged or missing \(lacks \d of 4 items\); make it again by",
        ),
        pytest.param(
            "predictions_before.jsonl",
            remove,
            r"predictions_before.jsonl is damaged or missing \(.*\); make it again by python",
            marks=pytest.mark.slow,
        ),
        ("metrics.jsonl", binary, r"warning: .*metrics.jsonl lacks 2 of 2 steps"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_or_made_whole(full, data, tmp_path, name, damage, said):
    run = copy(full, tmp_path)
    damage(run / name)
    assert re.search(said, resume(full, data, run))


UNREAD = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "preset.json"}
"""Files of a checkpoint that resuming does not read, nor checkpoint-1 where checkpoint-2 is whole."""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_file_of_a_run_in_every_way(request, data, tmp_path, kind, damage):
    whole = request.getfixturevalue(kind)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and "tensorboard" not in path.parts]
    assert len(files) > 10
    for name in files:
        if name.parts[0] == "checkpoint-1" or name.name in UNREAD:
            continue
        run = copy(whole, tmp_path)
        damage(run / name)
        said = resume(whole, data, run)
        # A damaged checkpoint is named as a whole: its remedy is to remove it.
        assert not said or name.name in said or f"{name.parts[0]} is damaged" in said, (name, said)
        shutil.rmtree(run)


@pytest.mark.parametrize(("values", "said"), [({}, "tokens_per_micro_batch"), ({"tokens_per_micro_batch": "abc"}, "'abc'")])
def test_settings_of_a_wrong_type(full, data, tmp_path, values, said):
    run = copy(full, tmp_path)
    (run / "config.json").write_text(json.dumps(values))
    assert said in resume(full, data, run)


@pytest.mark.slow
def test_a_run_goes_on_from_the_whole_checkpoint(full, data, tmp_path):
    """What the line says, done; and where none is whole it says so."""
    run = copy(full, tmp_path)
    cut(run / "checkpoint-2" / "trainer_state.pt")
    assert "checkpoint-1 is whole: remove the first and resume" in resume(full, data, run)
    empty(run / "checkpoint-1" / "model.safetensors")
    assert "none is whole: start anew in another folder" in resume(full, data, run)
    shutil.copy(full / "checkpoint-1" / "model.safetensors", run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    assert resume(full, data, run) == ""


def test_resume_if_exists_leaves_a_damaged_checkpoint_out(full, data, tmp_path):
    run = copy(full, tmp_path)
    cut(run / "checkpoint-2" / SHARD)
    said = io.StringIO()
    with redirect_stdout(said):
        assert train.train(config_of(data, run, "--lora-rank", "0", "--resume-if-exists")).is_finished
    assert "warning: " in said.getvalue()
    assert f"{run}/checkpoint-2 is damaged (shard-00001-of-00001.safetensors: " in said.getvalue()
    assert "is left out; it is called checkpoint-2.damaged now" in said.getvalue()
    assert (run / "evaluation.json").read_text() == (full / "evaluation.json").read_text()
    assert read_metrics(run) == read_metrics(full)
    assert fault_of(run / "checkpoint-2") is None


def test_resume_if_exists_begins_where_nothing_is_and_minutes_pass(data, tmp_path):
    """A checkpoint after every step, by the clock alone."""
    config = config_of(data, tmp_path / "run", "--resume-if-exists", "--save-minutes", "0.00001")
    config = dataclasses.replace(config, save_every=100, num_steps=3)
    assert train.train(config).is_finished
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_a_state_of_another_step_or_model_is_none(full, lora, data, tmp_path):
    run = copy(full, tmp_path)
    shutil.copy(run / "checkpoint-1" / "trainer_state.pt", run / "checkpoint-2")
    assert fault_of(run / "checkpoint-2") == "trainer_state.pt: of another step"
    shutil.copy(full / "checkpoint-2" / "trainer_state.pt", run / "checkpoint-2")
    shutil.copy(lora / "checkpoint-2" / SHARD, run / "checkpoint-2" / SHARD)
    assert "checkpoint-2 is damaged (state of the optimiser: of other weights" in resume(full, data, run)
    shutil.copy(full / "checkpoint-2" / SHARD, run / "checkpoint-2" / SHARD)
    shutil.copy(lora / "checkpoint-2" / "adapter_model.safetensors", run / "checkpoint-2" / "model.safetensors")
    assert "checkpoint-2 is damaged (" in resume(full, data, run)


@pytest.mark.slow
def test_before_made_again_by_the_command_that_the_line_shows(full, data, tmp_path):
    run = copy(full, tmp_path)
    remove(run / "predictions_before.jsonl")
    line = resume(full, data, run)
    flags = line.partition("python -m tars_fast.evaluate ")[2].partition(", and copy")[0].replace("DIR", str(tmp_path / "made"))
    evaluate(parse_arguments("", EvaluateConfig, [*flags.split(), "--device", "cpu"], "evaluate"))
    shutil.copy(tmp_path / "made" / "predictions.jsonl", run / "predictions_before.jsonl")
    assert resume(full, data, run) == ""


@pytest.fixture(scope="session")
def evaluated(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "whole"
    evaluate(EvaluateConfig(data=(str(data / "evaluation"),), output_dir=folder, device="cpu"))
    return folder


QUICK = {("predictions.jsonl", cut), ("config.json", list_in_json), ("config.json", remove)}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if (name, damage) in QUICK else pytest.mark.slow)
        for name in ("config.json", "predictions.jsonl", "evaluation.json", "accuracy.png", "report.html")
        for damage in DAMAGES
    ],
)
def test_a_damaged_evaluation_is_refused_or_made_whole(evaluated, data, tmp_path, name, damage):
    folder = copy(evaluated, tmp_path)
    damage(folder / name)
    config = EvaluateConfig(data=(str(data / "evaluation"),), output_dir=folder, device="cpu")
    refusal = refusal_of(lambda: evaluate(config))
    if refusal:
        assert name in refusal or (name == "config.json" and "predictions of unknown settings" in refusal)
        assert "; " in refusal, "no remedy"
    else:
        for made in ("evaluation.json", "predictions.jsonl"):
            assert (folder / made).read_text() == (evaluated / made).read_text()
        assert (folder / "accuracy.png").read_bytes() == (evaluated / "accuracy.png").read_bytes()
        assert (folder / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_no_part_of_an_ablation(full, tmp_path, damage):
    for name in ("config.json", "metrics.jsonl", "predictions_before.jsonl", "predictions_after.jsonl"):
        run = copy(full, tmp_path)
        damage(run / name)
        with pytest.raises(UserError, match=r"full(: not a whole run \(|/predictions_)") as raised:
            FinishedRun.read("tars", 0, run)
        assert "; " in str(raised.value), "no remedy"
        shutil.rmtree(run)


@pytest.mark.parametrize("damage", [list_in_json, *(pytest.param(one, marks=pytest.mark.slow) for one in DAMAGES)])
def test_a_damaged_run_is_exported_without_a_traceback(full, tmp_path, damage):
    for name in ("config.json", "evaluation.json"):
        run = copy(full, tmp_path)
        damage(run / name)
        config = ExportConfig(model=str(run / "checkpoint-2"), output_dir=tmp_path / f"exported-{name}")
        refusal = refusal_of(lambda config=config: export(config))
        assert not refusal or name in refusal
        shutil.rmtree(run)


RECIPE = Recipe("espeak-ng", ("en",), None, 0.1, 3, 0)


@pytest.fixture
def prepared(tmp_path) -> Path:
    """What `prepare` leaves of two items."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    open_folder(folder, RECIPE, "jsonl")
    outcomes = [Outcome(id, "text", {"voice": "en", "seconds": 1.0}) for id in ("a", "b")]
    for outcome in outcomes:
        (folder / "recordings" / recording_name(outcome.id, outcome.transcript)).write_bytes(b"sound")
    lines = [json.dumps({"id": one.id, "transcript": "text", "gained": one.gained, "error": None}) + "\n" for one in outcomes]
    (folder / "preparation" / "finished.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_preparation(prepared, damage, capsys):
    path = prepared / "preparation" / "settings.json"
    damage(path)
    if damage is remove:
        assert open_folder(prepared, RECIPE, "jsonl")[0].keys() == {"a", "b"}
        assert "settings.json is missing; it is made again" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=r"settings.json is damaged \(.*\); remove it, and repeat the command"):
            open_folder(prepared, RECIPE, "jsonl")
        remove(path)
        assert open_folder(prepared, RECIPE, "jsonl")[0].keys() == {"a", "b"}
    damage(prepared / "preparation" / "finished.jsonl")
    assert open_folder(prepared, RECIPE, "jsonl")[0].keys() <= {"a"}, "what is not known to be done is spoken again"


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_analysis_is_compared_with_nothing(tmp_path_factory, tmp_path, damage):
    whole = tmp_path_factory.getbasetemp() / "analysed"
    if not whole.exists():
        analyse(AnalyseConfig(data=str(VALIDATION_DATA), items=4, output_dir=whole, device="cpu"))
    for name in ("analysis.json", "items.jsonl", "resamples.npz"):
        folder = copy(whole, tmp_path)
        damage(folder / name)
        with pytest.raises(UserError, match=r"--compare .*: cannot be read \(.*\); name the --output-dir of an analysis"):
            read_compared(f"--compare {folder}", folder)
        shutil.rmtree(folder)
