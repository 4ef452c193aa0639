"""Wrong use of the command: one line that names item, value and remedy, exit status 2, and nothing trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tars_fast import evaluate, train
from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.learning import run as run_module
from tars_fast.support.cli import MISUSED

ONE_SECOND = 0.1 * np.sin(0.2 * np.arange(SAMPLE_RATE))
"""Sound enough for every check; nothing here depends on what the model makes of it."""


def question(name: str) -> dict[str, object]:
    return {"id": name, "question": f"What is {name}?", "answer": "one", "answer_set": ["one", "two"], "audio": f"{name}.wav"}


def write_items(folder: Path, items: Sequence[dict[str, object]]) -> None:
    folder.mkdir(exist_ok=True)
    for item in items:
        soundfile.write(folder / f"{item['id']}.wav", ONE_SECOND, SAMPLE_RATE, subtype="FLOAT")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Good items in training/ (t1, t2, t3) and evaluation/ (e1, e2), for each test to spoil."""
    write_items(tmp_path / "training", [question(name) for name in ("t1", "t2", "t3")])
    write_items(tmp_path / "evaluation", [question(name) for name in ("e1", "e2")])
    return tmp_path


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(folder, monkeypatch, capsys) -> Run:
    """The smallest run on those items, plus the given flags (a later one wins) -> (exit status, stderr)."""

    def run(*flags: object, command=train) -> tuple[int, str]:
        settings = ["--data", folder / "training", "--max-new-tokens", 4, "--device", "cpu"]
        if command is train:
            settings += ["--eval-data", folder / "evaluation", "--output-dir", folder / "run"]
            settings += ["--num-steps", 1, "--questions-per-step", 1, "--eval-samples", 0]
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, (*settings, *flags))])
        capsys.readouterr()
        status = command.main()
        return status, capsys.readouterr().err

    return run


def assert_refused(outcome: tuple[int, str], folder: Path, *fragments: str) -> None:
    status, stderr = outcome
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
    for fragment in fragments:
        assert fragment in stderr
    assert not (folder / "run" / "metrics.jsonl").exists()
    assert not (folder / "run" / "predictions_before.jsonl").exists()


def test_the_same_run_unspoiled_trains_and_is_not_overwritten(folder, run):
    """What all the other tests lean on: these items and settings by themselves are good."""
    status, stderr = run()
    assert (status, stderr) == (0, "")
    written = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    assert folder / "run" / "metrics.jsonl" in written

    status, stderr = run()
    assert status == MISUSED
    assert stderr == f"error: --output-dir {folder / 'run'}: already holds a run; add --resume or name another folder\n"
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == written


SETTINGS = [
    (
        ["--model", "qwen9"],
        ["--model qwen9", "neither a preset (pocket, pocket-hard, qwen2-audio-7b", "nor a name on the hub"],
    ),
    (["--model", "./qwen9"], ["--model ./qwen9", "neither a preset", "nor a folder"]),
    (["--model", "a" * 256], ["--model aaa", "a name of more than 255 bytes"]),
    (["--output-dir", "runs/" + "é" * 128], ["--output-dir runs/", "a name of more than 255 bytes"]),
    (["--group-size", "3"], ["--group-size 3", "must be even and at least 4"]),
    (["--objective", "tars+opd", "--group-size", "2"], ["--group-size 2", "must be even and at least 4"]),
    (["--objective", "opd", "--group-size", "1"], ["--group-size 1", "must be even and at least 4"]),
    (
        ["--objective", "opd", "--group-size", "2", "--max-redraws", "1"],
        ["--group-size 2", "2 is for objectives that compare none"],
    ),
    (
        ["--objective", "opd", "--group-size", "2", "--select", "disagreement"],
        ["--group-size 2", "must be even and at least 4"],
    ),
    (["--clip-low", "1.5"], ["--clip-low 1.5", "must be at least 0 and below 1"]),
    (["--clip-low", "nan"], ["--clip-low nan", "must be at least 0 and below 1"]),
    (["--clip-high", "-0.1"], ["--clip-high -0.1", "must be 0 or greater"]),
    (["--loss-type", "cispo"], ["--clip-high 0.28", "with --loss-type cispo it is the largest ratio itself; give 1 or more"]),
    (["--loss-type", "vespo", "--importance-level", "sequence"], ["--importance-level sequence", "vespo", "leave it out"]),
    (["--objective", "tars", "--kl-coef", "0.01"], ["--kl-coef 0.01", "full fine-tuning has none; add --lora-rank 8"]),
    (
        ["--objective", "grpo", "--kl-coef", "0.01", "--lora-rank", "4", "--rollout-ahead", "1"],
        ["--kl-coef 0.01", "or --rollout-ahead 0"],
    ),
    (["--entropy-coef", "-1"], ["--entropy-coef -1", "must be 0 or greater"]),
    (["--temperature", "0"], ["--temperature 0", "must be greater than 0"]),
    (["--learning-rate", "nan"], ["--learning-rate nan", "must be greater than 0"]),
    (["--num-steps", "0"], ["--num-steps 0", "must be greater than 0"]),
    (["--warmup-fraction", "1.1"], ["--warmup-fraction 1.1", "must lie between 0 and 1"]),
    (["--lora-rank", "-8"], ["--lora-rank -8", "must be 0 or greater"]),
    (["--lora-targets", "attention"], ["--lora-targets attention", "no effect without LoRA", "add --lora-rank 8"]),
    (["--lora-rank", "4", "--lora-targets", "v_proj,fc1"], ["--lora-targets v_proj,fc1", "no linear layer 'fc1'", "v_proj"]),
    (["--tensor-parallel", "2"], ["--tensor-parallel 2: needs 2 processes, 1 started", "torchrun --nproc-per-node 2"]),
    (["--tensor-parallel", "2", "--dry-run"], ["--tensor-parallel 2: needs rollouts by vLLM; add --engine vllm"]),
    (["--tensor-parallel", "2", "--rollout-ahead", "1"], ["--tensor-parallel 2: not beside --rollout-ahead 1", "leave one"]),
    (
        ["--tensor-parallel", "2", "--objective", "tars", "--reward", "exact"],
        ["--tensor-parallel 2: not beside --reward; leave"],
    ),
    (["--router-replay"], ["--router-replay: it is for rollouts by vLLM", "leave it out"]),
    # The embedded model takes 1,024 tokens, prompt included.
    (["--max-new-tokens", "1020"], ["item 't1'", "1020 new ones", "model's 1024", "lower --max-new-tokens"]),
]


@pytest.mark.parametrize(("flags", "fragments"), SETTINGS, ids=[" ".join(flags) for flags, _ in SETTINGS])
def test_settings(folder, run, flags, fragments):
    assert_refused(run(*flags), folder, *fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(folder, run):
    assert_refused(run("--device", "cuda"), folder, "--device cuda", "no CUDA GPU", "use --device cpu")


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(folder, run, monkeypatch):
    monkeypatch.setattr(run_module, "available_bytes", lambda _device: 10**6)
    monkeypatch.setattr(run_module, "load_model_and_engine", lambda *_, **__: pytest.fail("loaded"))
    outcome = run("--engine", "transformers")
    assert_refused(outcome, folder, "--model pocket: ", "weights, do not fit into 1.00 MB; ", "no setting: ")


def test_model_folder_with_another_architecture(folder, run):
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "qwen2"}')
    assert_refused(run("--model", folder / "other"), folder, f"--model {folder / 'other'}", "a qwen2 checkpoint", "qwen2_audio")


def test_resume_without_a_run(folder, run):
    message = f"--resume: no checkpoint in {folder / 'run'}; start without --resume"
    assert_refused(run("--resume"), folder, message)
    (folder / "run").mkdir()
    assert_refused(run("--resume"), folder, message)
    (folder / "run" / "checkpoint-5.partial").mkdir()  # cut off while it was written
    assert_refused(run("--resume"), folder, message)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        pytest.param(None, ["cannot be read", "No such file", "give a jsonl file or a folder"], id="missing"),
        pytest.param("", ["holds no items"], id="empty"),
        pytest.param(json.dumps(question("t1")) + '\n{"id": "t2", \n', ["line 2", "not JSON", "column"], id="broken line"),
    ],
)
def test_data_file(folder, run, content, fragments):
    path = folder / "training" / "spoiled.jsonl"
    if content is not None:
        path.write_text(content)
    assert_refused(run("--data", path), folder, str(path), *fragments)


def test_too_few_items_to_split(folder, run):
    """Without --eval-data a tenth is set aside by the hash of the id; of t1, t2 and t3 none falls into it."""
    assert_refused(run("--eval-data", "None"), folder, "3 items leave nothing to train or to evaluate on; give --eval-data")


@pytest.mark.parametrize("part", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        pytest.param({"answer": "three"}, ["line 2", "answer 'three' is none of one, two"], id="answer out of range"),
        pytest.param({"question": " "}, ["line 2", "'question' missing or empty", "an item is id,"], id="empty question"),
        pytest.param({"audio": "gone.wav"}, ["gone.wav: no such file", "relative to the file"], id="missing recording"),
        pytest.param({"audio": "items.jsonl"}, ["items.jsonl: cannot be decoded", "use wav, flac"], id="not a recording"),
        pytest.param({"question": "What is <|AUDIO|>?"}, ["audio placeholder", "remove it"], id="audio placeholder"),
        pytest.param({"answer_set": ["one", "two"], "options": ["a", "b"]}, ["line 2", "one of them"], id="options and set"),
    ],
)
def test_item(folder, run, part, change, fragments):
    first, second, *others = json.loads(f"[{','.join((folder / part / 'items.jsonl').read_text().splitlines())}]")
    write_items(folder / part, [first, second | change, *others])
    assert_refused(run(), folder, f"item {second['id']!r}: ", *fragments)


@pytest.mark.parametrize(
    ("change", "flags", "fragments"),
    [
        pytest.param(
            {"answer": ""},
            ["--objective", "tars"],
            ["'answer' missing or empty; an item is", "; --objective opd needs no answers"],
            id="tars",
        ),
        pytest.param(
            {"answer": None}, ["--objective", "grpo+opd"], ["'answer' missing", "; --objective opd needs no answers"], id="grpo"
        ),
        pytest.param(
            {"answer": None},
            ["--objective", "opd", "--text-anchor", "rollouts"],
            ["'answer' missing", "; --text-anchor kl needs no answers"],
            id="anchor",
        ),
        pytest.param(
            {"answer": None, "answer_set": None},
            ["--objective", "cord"],
            ["no possible answers, which --objective cord compares", "'answer_set', or train with --objective opd"],
            id="cord",
        ),
        pytest.param(
            {"answer": None, "answer_set": None, "question": None},
            ["--objective", "opd"],
            ["neither a question nor a transcript", "give 'question', or what the recording says as 'transcript'"],
            id="opd without a written prompt",
        ),
    ],
)
def test_items_without_what_the_objective_needs(folder, run, change, flags, fragments):
    items = [question("t1"), question("t2") | change, question("t3")]
    write_items(folder / "training", items)
    assert_refused(run(*flags), folder, "line 2: item 't2'", *fragments)


def test_evaluation_needs_answers(folder, run):
    unanswered = [question(name) | {"answer": None} for name in ("t1", "t2")]
    write_items(folder / "training", unanswered)
    flags = ("--objective", "opd", "--eval-data")
    source = folder / "training"
    assert_refused(
        run(*flags, "None"), folder, f"--data {source}: none of its items has an answer to evaluate by; give --eval-data"
    )
    write_items(folder / "evaluation", [question("e1"), question("e2") | {"answer": None}])
    assert_refused(run(*flags, folder / "evaluation"), folder, "line 2: item 'e2': 'answer' missing or empty; an item is id,")


def test_transcribed_speech_trains_without_answers(folder, run):
    """The smallest such run, in which every completion is cut off."""
    plain = [{"id": name, "audio": f"{name}.wav", "text": f"What is {name}?"} for name in ("t1", "t2", "t3")]
    write_items(folder / "training", plain)
    # What is cut off teaches nonsense, which the watch would see.
    status, stderr = run("--objective", "opd", "--distil-truncated", "--watch-every", 1, "--max-written-kl", 10)
    assert (status, stderr) == (0, "")
    (metrics,) = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics["divergence/speech"] > 0
    assert metrics["written_kl"] >= 0
    assert not [name for name in metrics if name.startswith(("accuracy/", "reward/", "disagreeing/"))]
    assert (folder / "run" / "report.html").is_file()


def test_question_longer_than_the_model_s_context(folder, run):
    item = question("t2") | {"question": "What is one" + " plus one" * 1000 + "?"}
    write_items(folder / "training", [question("t1"), item])
    status, stderr = run()
    # The tokenizer may warn of the length as well, before the line that counts.
    stderr = stderr.splitlines(keepends=True)[-1]
    assert_refused((status, stderr), folder, "item 't2'", "shorten the item or lower --max-new-tokens")
    num_tokens = re.search(r"its prompt has (\d+) tokens, which with 4 new ones is more than the model's 1024", stderr)
    assert int(num_tokens[1]) > 2000  # two words of one token each, a thousand times


def test_duplicate_id(folder, run):
    write_items(folder / "training", [question("t1"), question("t2"), question("t1")])
    assert_refused(run(), folder, "line 3", "id 't1' already stands in line 1", "ids must be unique")


def recording(seconds: float, spoiled_by: float | None = None) -> np.ndarray:
    wave = np.resize(ONE_SECOND, round(seconds * SAMPLE_RATE))
    if spoiled_by is not None:
        wave[len(wave) // 2] = spoiled_by
    return wave


@pytest.mark.parametrize("part", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("wave", "fragments"),
    [
        pytest.param(recording(1.0, np.nan), ["holds NaN or infinite samples", "write it again"], id="NaN"),
        pytest.param(recording(1.0, np.inf), ["holds NaN or infinite samples", "write it again"], id="infinite"),
        pytest.param(recording(4.5), ["4.50 s", "encodes at most 4 s at once", "cut it shorter"], id="too long"),
        pytest.param(recording(0.05), ["0.05 s", "shorter than 0.1 s", "remove or re-record"], id="too short"),
        pytest.param(recording(0.0), ["0.00 s", "shorter than 0.1 s", "remove or re-record"], id="empty"),
    ],
)
def test_recording(folder, run, part, wave, fragments):
    name = f"{part[0]}2"
    path = folder / part / f"{name}.wav"
    soundfile.write(path, wave, SAMPLE_RATE, subtype="FLOAT")
    assert_refused(run(), folder, f"item {name!r}: recording {path}: ", *fragments)


def test_first_bad_recording_is_named(folder, run):
    """They are read in parallel; the message must not depend on which thread is first."""
    for name in ("t2", "t3"):
        (folder / "training" / f"{name}.wav").unlink()
    (folder / "evaluation" / "e1.wav").unlink()
    assert_refused(run(), folder, "item 't2'")


def test_evaluation_items_among_the_training_items(folder, run):
    assert_refused(
        run("--eval-data", folder / "training"),
        folder,
        "item 't1' is in both training and evaluation data",
        "remove it from one",
    )
    write_items(folder / "evaluation", [question("e1"), question("e2") | {"question": "What is T3 ?"}])
    assert_refused(run(), folder, "evaluation item 'e2' asks what training item 't3' asks", "--disjoint-from")


def test_training_items_that_must_not_be_trained_on(folder, run):
    flags = ("--disjoint-from", folder / "evaluation", folder / "training")
    assert_refused(run(*flags), folder, f"--disjoint-from {flags[1]} {flags[2]}: has all 3 items of --data", "name other data")
    assert_refused(run("--disjoint-from", "absent.jsonl"), folder, "data absent.jsonl", "cannot be read")


def test_what_was_left_out_is_said_and_stays_out(folder, run, monkeypatch):
    write_items(folder / "benchmark", [question("x") | {"question": question("t2")["question"]}])
    flags = ("--disjoint-from", folder / "benchmark")
    said = []
    monkeypatch.setattr(run_module, "print", lambda *texts, **_: said.extend(texts), raising=False)
    assert run(*flags) == (0, "")
    note = f"1 of 3 items left out, which are in {folder / 'benchmark'} too"
    assert said.count(note) == 1
    assert run("--resume", *flags) == (0, "")
    status, stderr = run("--resume")
    assert status == MISUSED
    assert f"disjoint_from ['{folder / 'benchmark'}'] -> []" in stderr


EVALUATION_SETTINGS = [
    (["--model", "qwen9"], ["--model qwen9", "neither a preset"]),
    (["--data", "absent.jsonl"], ["data absent.jsonl", "cannot be read", "give a jsonl file"]),
    (["--temperature", "0"], ["--temperature 0", "must be greater than 0"]),
    (["--rollout-batch-size", "0"], ["--rollout-batch-size 0", "must be greater than 0"]),
    (["--reference", "78"], ["--reference 78", "a fraction above 0 and at most 1"]),
    (["--reference", "absent"], ["--reference absent", "cannot be read", "name the --output-dir of an evaluation"]),
    (["--compare", "absent"], ["--compare absent", "cannot be read", "name the --output-dir of an evaluation"]),
    (["--data", "=absent.jsonl"], ["--data =absent.jsonl", "give NAME=SOURCE"]),
    (["--data", "overall=x"], ["--data overall=x", "NAME not 'overall'"]),
    (["--data", "other/training"], ["--data other/training", "'training' is there twice", "NAME=SOURCE"]),
    (["--transcribe"], ["--transcribe", "3 of 3 items of data 'training' have no transcript", "leave --transcribe out"]),
    (["--max-new-tokens", "1020"], ["item 't1'", "model's 1024", "lower --max-new-tokens"]),
]


@pytest.mark.parametrize(("flags", "fragments"), EVALUATION_SETTINGS, ids=[" ".join(flags) for flags, _ in EVALUATION_SETTINGS])
def test_evaluate_refuses_alike(folder, run, flags, fragments):
    assert_refused(run(*flags, "--output-dir", folder / "figures", command=evaluate), folder, *fragments)
    assert not (folder / "figures" / "predictions.jsonl").exists()
    assert not (folder / "figures" / "evaluation.json").exists()


def test_as_a_process():
    """The status reaches the shell, and nothing else reaches stderr, from whichever library."""
    command = [sys.executable, "-m", "tars_fast.train", "--model", "qwen9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --model qwen9: [^\n]+\n", done.stderr), done.stderr


def test_unusable_items_are_left_out_and_counted_where_that_is_asked_for(folder, run):
    soundfile.write(folder / "training" / "t2.wav", recording(4.5), SAMPLE_RATE, subtype="FLOAT")
    (folder / "evaluation" / "e1.wav").unlink()
    status, stderr = run("--skip-unusable")
    assert (status, stderr) == (0, "")
    predictions = (folder / "run" / "predictions_before.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in predictions] == ["e2"]
    (folder / "evaluation" / "e2.wav").unlink()
    status, stderr = run("--skip-unusable", "--output-dir", str(folder / "other"))
    assert status == 2
    assert re.fullmatch(r"error: --skip-unusable: 3 of 5 items left out; [^\n]+ nothing is left [^\n]+\n", stderr)
