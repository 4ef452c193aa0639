"""Settings in files: what they say is what the same flags say, and what is wrong is named with its line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tars_fast import train
from tars_fast.ablate import AblateConfig
from tars_fast.config import TrainConfig
from tars_fast.support.cli import MISUSED, parse_command_line
from tars_fast.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples" / "settings"
PROGRAM = "python -m tars_fast.train"


def parse(*arguments: object, config_class: type = TrainConfig):
    return parse_command_line(config_class, [str(one) for one in arguments], PROGRAM)[0]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


YAML = """
model: pocket
learning-rate: 4e-4
num_steps: 3
disjoint_from: [mmsu, obqa]
cuda_graphs: false
gradient_checkpointing: true
eval_items: null
audio_cache_dir: kept here
"""
TOML = """
model = "pocket"
learning-rate = 4e-4
num_steps = 3
disjoint_from = ["mmsu", "obqa"]
cuda_graphs = false
gradient_checkpointing = true
audio_cache_dir = "kept here"
"""
FLAGS = (
    "--model",
    "pocket",
    "--learning-rate",
    "4e-4",
    "--num-steps",
    3,
    "--disjoint-from",
    "mmsu",
    "obqa",
    "--no-cuda-graphs",
)
FLAGS += ("--gradient-checkpointing", "True", "--audio-cache-dir", "kept here")


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.toml", TOML)])
def test_a_file_says_what_the_same_flags_say_and_flags_win(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert parse("--config", path) == parse(*FLAGS)
    assert parse(f"--config={path}", "--num-steps", 7, "--cuda-graphs") == dataclasses.replace(
        parse(*FLAGS), num_steps=7, cuda_graphs=True
    )


def test_a_setting_that_may_stand_there_several_times(tmp_path):
    path = write(tmp_path / "arms.yaml", "arms: half,none\ndefine:\n- half:clip_low=0.1\n- none:clip_low=0.3\n")
    found = parse("--config", path, config_class=AblateConfig)
    assert found.define == ("half:clip_low=0.1", "none:clip_low=0.3")
    assert parse("--config", path, "--define", "one:clip_low=0.2", config_class=AblateConfig).define == ("one:clip_low=0.2",)


def test_settings_of_a_run_start_another(tmp_path):
    given = dict(dataclasses.asdict(parse(*FLAGS)), output_dir="runs/old", resume=True, rewards={"accuracy": 1.0})
    given |= {"data_fingerprint": {"training": "1"}, "audio_cache_dir": "kept here"}
    path = write(tmp_path / "config.json", json.dumps(given, indent=1))
    assert parse("--config", path) == parse(*FLAGS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "seed: 1\nlearning_rat: 2\n",
            r"a\.yaml, line 2: learning_rat: no setting of .*; do you mean learning_rate\?",
        ),
        ("a.yaml", "seed: 1\nqqq: 2\n", r"line 2: qqq: no setting of .*; see .* --help"),
        ("a.toml", "seed = 1\n\nnum_steps = 'many'\n", r"a\.toml, line 3: num_steps: 'many' is no value that"),
        ("a.yaml", "engine: fast\n", r"line 1: engine: 'fast' is no value that"),
        ("a.yaml", "# four\n\nseed: 1\nclip_low: 3\n", r"line 4: --clip-low 3\.0: must be at least 0 and below 1"),
        ("a.yaml", "model:\n  name: pocket\n", r"line 1: model: must be one value or a list of them"),
        ("a.yaml", "seed: 1\nseed: 2\n", r"is no YAML \(line 2: seed is there twice\)"),
        ("a.yaml", "seed: [1\n", r"is no YAML \(line 2: "),
        ("a.yaml", "- seed\n", r"is no YAML \(holds no settings by name\)"),
        ("a.toml", "seed =\n", r"is no TOML \("),
        (
            "a.yaml",
            "objective: tars\nteacher: moving\n",
            r"line 2: --teacher moving: has no effect without opd or cord in --objective",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=rf"^--config .*{message}") as caught:
        parse("--config", write(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_an_error_of_a_flag_names_no_line_of_the_file(tmp_path):
    path = write(tmp_path / "a.yaml", "clip_low: 0.1\nobjective: opd\n")
    with pytest.raises(UserError, match=r"^--clip-low 3\.0"):
        parse("--config", path, "--clip-low", "3")
    # A setting of the file that another one in it needs.
    assert parse("--config", write(tmp_path / "b.yaml", "teacher: moving\nobjective: tars+opd\n")).teacher == "moving"


@pytest.mark.parametrize("arguments", [("--config",), ("--config", "a.yaml", "--config", "b.yaml")])
def test_one_file(arguments):
    with pytest.raises(UserError, match="--config: give one file of settings"):
        parse(*arguments)
    with pytest.raises(UserError, match=r"--config nowhere\.yaml: cannot be read \(No such file or directory\)"):
        parse("--config", "nowhere.yaml")


def test_printed_settings_are_a_file_that_gives_them_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--print-config", *map(str, FLAGS)])
    assert train.main() == 0
    printed = capsys.readouterr().out
    again = parse("--config", write(tmp_path / "printed.yaml", printed))
    assert again == train.resolve(parse(*FLAGS))
    assert yaml.safe_load(printed)["questions_per_step"] == 32, "the preset's, in the place of None"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-steps", "x"), "--num-steps: 'x' is no INT"),
        (("--learning-rat", "3"), "Unrecognized options: --learning-rat, 3; do you mean --learning-rate?"),
        (
            ("--engine", "fast"),
            "invalid choice 'fast' for argument '--engine'. Expected one of ('auto', 'vllm', 'transformers')",
        ),
        (("--model",), "Missing value for argument '"),
        (("extra",), "Unrecognized options: extra"),
    ],
)
def test_a_command_line_that_is_not_taken_is_answered_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    assert train.main() == MISUSED
    written = capsys.readouterr().err
    assert written.startswith(f"error: {message}")
    assert written.endswith(f"; see {PROGRAM} --help\n")
    assert written.count("\n") == 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_example_is_taken(path):
    config = parse("--config", path)
    assert train.resolve(config).num_steps is not None
    assert config.model in path.name
