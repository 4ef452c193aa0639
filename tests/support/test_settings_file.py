"""Settings in files: what they say is what the same flags say, and what is wrong is named with its line."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import yaml

from tars_fast import evaluate, train
from tars_fast.ablate import AblateConfig
from tars_fast.analyse import AnalyseConfig
from tars_fast.config import TrainConfig
from tars_fast.evaluate import EvaluateConfig
from tars_fast.export import ExportConfig
from tars_fast.models.registry import find_preset
from tars_fast.support.cli import MISUSED, parse_command_line, plain_settings
from tars_fast.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples" / "settings"
PROGRAM = "python -m tars_fast.train"


EVALUATE = "python -m tars_fast.evaluate"


def parse(*arguments: object, config_class: type = TrainConfig, program: str = PROGRAM):
    return parse_command_line(config_class, [str(one) for one in arguments], program)[0]


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


@pytest.mark.parametrize("flags", [("--define", "one:clip_low=0.2"), ("--define=one:clip_low=0.2",)])
def test_a_setting_that_may_stand_there_several_times(tmp_path, flags):
    path = write(tmp_path / "arms.yaml", "arms: half,none\ndefine:\n- half:clip_low=0.1\n- none:clip_low=0.3\n")
    found = parse("--config", path, config_class=AblateConfig)
    assert found.define == ("half:clip_low=0.1", "none:clip_low=0.3")
    assert parse("--config", path, *flags, config_class=AblateConfig).define == ("one:clip_low=0.2",)


VALUES = {
    "disjoint_from": ("my data.jsonl", "-b", "None"),
    "system_prompt": "--help",
    "reward_pattern": "-x",
    "reward": ("exact", "pattern"),
    "objective": "tars",
    "data": "7",
    "learning_rate": 4e-4,
    "audio_cache_gb": 1.0,
    "rollout_ahead": 1,
    "log": ("trackio",),
    "gradient_checkpointing": False,
    "audio_cache_dir": Path("kept here"),
}
TEXTS = {
    "a.yaml": """
        disjoint_from: [my data.jsonl, -b, None]
        system_prompt: --help
        reward_pattern: -x
        reward: [exact, pattern]
        objective: tars
        data: 7
        learning_rate: 4e-4
        audio_cache_gb: 1
        rollout_ahead: 1
        log: trackio
        gradient_checkpointing: false
        audio_cache_dir: kept here
    """,
    "a.toml": """
        disjoint_from = ["my data.jsonl", "-b", "None"]
        system_prompt = "--help"
        reward_pattern = "-x"
        reward = ["exact", "pattern"]
        objective = "tars"
        data = 7
        learning_rate = 4e-4
        audio_cache_gb = 1
        rollout_ahead = 1
        log = "trackio"
        gradient_checkpointing = false
        audio_cache_dir = "kept here"
    """,
    "config.json": json.dumps(plain_settings(TrainConfig(**VALUES)) | {"data_fingerprint": {}, "rewards": {}}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_are_taken_as_the_file_has_them(tmp_path, name):
    config = parse("--config", write(tmp_path / name, TEXTS[name]))
    assert config == TrainConfig(**VALUES)
    assert {name: type(getattr(config, name)) for name in VALUES} == {name: type(value) for name, value in VALUES.items()} | {
        "audio_cache_dir": type(Path())
    }


def test_the_file_of_a_command_with_settings_that_must_be_given(tmp_path):
    path = write(tmp_path / "a.yaml", "model: runs/a/checkpoint-2\noutput_dir: there\n")
    assert parse("--config", path, config_class=ExportConfig) == ExportConfig("runs/a/checkpoint-2", Path("there"))
    path = write(tmp_path / "b.yaml", "output_dir: there\n")
    with pytest.raises(UserError, match=r"^--model: must be given; see "):
        parse("--config", path, config_class=ExportConfig)
    assert parse("--config", path, "--model", "m", config_class=ExportConfig) == ExportConfig("m", Path("there"))
    path = write(tmp_path / "c.yaml", "calibrate: [1, 2]\nother_base_layers: 3\n")
    found = parse("--config", path, config_class=AnalyseConfig)
    assert (found.calibrate, found.other_base_layers) == ((1, 2), (3,))


@pytest.mark.parametrize("name", ["config.json", "copy.yaml"])
def test_settings_of_a_run_start_another(tmp_path, name):
    given = plain_settings(parse(*FLAGS)) | {"output_dir": "runs/old", "resume_if_exists": True, "push_to_hub": "me/mine"}
    given |= {"data_fingerprint": {"training": "1"}, "rewards": {"accuracy": 1.0}}
    path = write(tmp_path / name, json.dumps(given, indent=1))
    assert parse("--config", path) == parse(*FLAGS)
    for program, config_class in ((EVALUATE, EvaluateConfig), ("python -m tars_fast.export", ExportConfig)):
        with pytest.raises(UserError, match=r"is what a run of tars_fast\.train has written; give it to that command$"):
            parse("--config", path, config_class=config_class, program=program)


def test_settings_of_an_evaluation_start_another(tmp_path):
    flags = ("--data", "mine=here=there", "--samples", 2, "--system-prompt=-x", "--temperature", 0.5)
    expected = parse(*flags, config_class=EvaluateConfig)
    given = plain_settings(expected) | {"output_dir": "runs/old", "evaluation": {"model": "pocket"}}
    path = write(tmp_path / "copy.json", json.dumps(given))
    assert parse("--config", path, config_class=EvaluateConfig, program=EVALUATE) == expected
    with pytest.raises(UserError, match=r"is what a run of tars_fast\.evaluate has written; give it to that command$"):
        parse("--config", path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "seed: 1\nlearning_rat: 2\n",
            r"a\.yaml, line 2: learning_rat: no setting of .*; do you mean learning_rate\?",
        ),
        ("a.yaml", "seed: 1\nqqq: 2\n", r"line 2: qqq: no setting of .*; see .* --help"),
        ("a.toml", "seed = 1\n\nnum_steps = 'many'\n", r"a\.toml, line 3: num_steps: 'many' is no whole number; see .* --help"),
        ("a.toml", 'system_prompt = """\nseed = 3\n"""\nlog = [\n]\nseed = \'x\'\n', r"line 6: seed: 'x' is no whole number"),
        ("a.yaml", "engine: fast\n", r"line 1: engine: 'fast' is none of auto, vllm, transformers"),
        ("a.yaml", "seed: 1\nlearning_rate: fast\n", r"line 2: learning_rate: 'fast' is no number"),
        ("a.yaml", "seed: 1.5\n", r"line 1: seed: 1\.5 is no whole number"),
        ("a.yaml", "seed: true\n", r"line 1: seed: True is no whole number"),
        ("a.yaml", "seed:\n", r"line 1: seed: None is no whole number"),
        ("a.yaml", f"learning_rate: 1{'0' * 400}\n", r"line 1: learning_rate: 10*0 is no number"),
        ("a.yaml", "model: yes\n", r"line 1: model: True is no text"),
        ("a.yaml", "cuda_graphs: 1\n", r"line 1: cuda_graphs: 1 is neither true nor false"),
        ("a.yaml", "rollout_ahead: true\n", r"line 1: rollout_ahead: True is none of 0, 1"),
        ("a.yaml", "log: [tensorboard, paper]\n", r"line 1: log: 'paper' is none of tensorboard, wandb, trackio"),
        ("a.yaml", "audio_cache_dir: 2024-01-01\n", r"line 1: audio_cache_dir: datetime\..* is no path"),
        ("a.yaml", "seed: 1\nmodel: [a, b]\n", r"line 2: model: takes one value, no list"),
        ("a.yaml", "seed: 1\nsystem_prompt: [a]\n", r"line 2: system_prompt: takes one value, no list"),
        ("a.yaml", "log: [[tensorboard]]\n", r"line 1: log: takes one value, no list"),
        ("a.yaml", "log: &a [*a]\n", r"is no YAML \("),
        ("a.yaml", f"seed: {'[' * 3000}\n", r"is no YAML \(maximum recursion depth exceeded.*\)"),
        (
            "a.yaml",
            "learning-rate: 1e-3\nlearning_rate: 2e-3\n",
            r"line 2: learning_rate is there twice, first in line 1; leave",
        ),
        ("a.toml", "learning-rate = 1e-3\nlearning_rate = 2e-3\n", r"line 2: learning_rate is there twice, first in line 1; "),
        ("a.yaml", "freeze_audio: false\nseed: -1\n", r"line 2: --seed -1: must be 0 or greater"),
        ("a.yaml", "# four\n\nseed: 1\nclip_low: 3\n", r"line 4: --clip-low 3\.0: must be at least 0 and below 1"),
        ("a.yaml", "model:\n  name: pocket\n", r"line 1: model: takes one value, no settings"),
        ("a.yaml", "seed: 1\nseed: 2\n", r"line 2: seed is there twice, first in line 1; leave one of them out"),
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


@pytest.mark.parametrize("flags", [("--clip-low", "3"), ("--clip_low", "3"), ("--clip-low=3",), ("--clip_low=3",)])
def test_an_error_of_a_flag_names_no_line_of_the_file(tmp_path, flags):
    path = write(tmp_path / "a.yaml", "clip_low: 0.1\nobjective: opd\n")
    with pytest.raises(UserError, match=r"^--clip-low 3\.0"):
        parse("--config", path, *flags)


def test_flags_say_what_the_file_lacks(tmp_path):
    path = write(tmp_path / "b.yaml", "teacher: moving\nobjective: tars\n")
    assert parse("--config", path, "--objective", "tars+opd").teacher == "moving"


@pytest.mark.parametrize("flags", [("--reward", "exact"), ("--reward=exact",)])
def test_a_flag_that_may_be_given_several_times_wins_over_the_file(tmp_path, flags):
    path = write(tmp_path / "a.yaml", "reward: [overlong]\nobjective: tars\ncuda_graphs: true\n")
    config = parse("--config", path, *flags, "--no-cuda-graphs")
    assert (config.reward, config.cuda_graphs) == (("exact",), False)


@pytest.mark.parametrize("arguments", [("--config",), ("--config=", "a.yaml"), ("--config", "a.yaml", "--config", "b.yaml")])
def test_one_file(arguments):
    with pytest.raises(UserError, match="--config: give one file of settings"):
        parse(*arguments)
    with pytest.raises(UserError, match=r"--config nowhere\.yaml: cannot be read \(No such file or directory\)"):
        parse("--config", "nowhere.yaml")
    # It could be read only once.
    with pytest.raises(UserError, match=r"--config /dev/null: cannot be read \(no regular file\)"):
        parse("--config", "/dev/null")


def test_printed_settings_are_a_file_that_gives_them_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--print_config", *map(str, FLAGS)])
    assert train.main() == 0
    printed = capsys.readouterr().out
    again = parse("--config", write(tmp_path / "printed.yaml", printed))
    assert again == train.resolve(parse(*FLAGS))
    assert yaml.safe_load(printed)["questions_per_step"] == 32, "the preset's, in the place of None"


@pytest.mark.parametrize("flags", [(), ("--answer-format", "plain"), ("--system-prompt", "Think.")])
def test_printed_settings_are_those_of_the_same_run(tmp_path, flags):
    preset, config = find_preset("pocket"), parse(*flags)
    own = {"output_dir": tmp_path, "tokens_per_micro_batch": 64}
    assert train.resolve(config).resolve(preset, **own) == config.resolve(preset, **own)


def test_printed_settings_of_an_evaluation_are_those_of_the_same_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate", "--print-config", "--answer-format", "plain"])
    assert evaluate.main() == 0
    path = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    printed, given = parse("--config", path, config_class=EvaluateConfig), EvaluateConfig(answer_format="plain")
    preset = find_preset("pocket")
    assert printed.max_new_tokens == preset.max_new_tokens
    assert preset.with_settings(printed) == preset.with_settings(given)


COMMANDS = [path.stem for path in sorted(Path(train.__file__).parent.glob("*.py")) if "run_command(" in path.read_text("utf-8")]
OF_ALL = [
    (("--nonsense", "3"), "--nonsense: no setting of "),
    (("--output_dri=x",), "--output-dri: no setting of "),
    (("extra",), ""),
]
OF_SOME = [
    ("train", ("--num-steps", "x"), "--num-steps: 'x' is no whole number"),
    ("train", ("--eval-every", "1.5"), "--eval-every: '1.5' is no whole number"),
    ("train", ("--seed", "x"), "--seed: 'x' is no whole number"),
    ("train", ("--kv-cache-gb", "it's"), '--kv-cache-gb: "it\'s" is no number'),
    ("analyse", ("--other-base-layers", "1", "x"), "--other-base-layers: '1', 'x' is no whole number"),
    ("analyse", ("--calibrate", "1", "x"), "--calibrate: '1', 'x' is no whole number"),
    ("prepare", ("--max-seconds", "x"), "--max-seconds: 'x' is no number"),
    ("train", ("--learning-rat", "3"), f"--learning-rat: no setting of {PROGRAM}; do you mean --learning-rate?"),
    (
        "train",
        ("--engine", "fast"),
        "invalid choice 'fast' for argument '--engine'. Expected one of ('auto', 'vllm', 'transformers')",
    ),
    ("train", ("--model",), "Missing value for argument '"),
    ("train", ("extra",), "Unrecognized options: extra"),
    ("export", (), "--model, --output-dir: must be given"),
    ("export", ("--model", "pocket"), "--output-dir: must be given"),
    ("pocket", ("--no-tars",), "--no-tars: no setting of"),
]


@pytest.mark.parametrize(
    ("command", "arguments", "message"), [(command, *case) for command in COMMANDS for case in OF_ALL] + OF_SOME
)
def test_a_command_line_that_is_not_taken_is_answered_in_one_line(monkeypatch, capsys, command, arguments, message):
    monkeypatch.setattr("sys.argv", [command, *arguments])
    assert importlib.import_module(f"tars_fast.{command}").main() == MISUSED
    written = capsys.readouterr().err
    assert written.startswith(f"error: {message}")
    assert written.endswith((f"; see python -m tars_fast.{command} --help\n", "?\n"))
    assert written.count("\n") == 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_example_is_taken(path):
    config = parse("--config", path)
    assert train.resolve(config).num_steps is not None
    assert config.model in path.name
