"""The evaluation command on the bundled model: what it writes, and that nothing is lost, guessed or dropped on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import soundfile

from tars_fast import evaluate as module
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import VALIDATION_DATA, load_questions, read_items
from tars_fast.data.sources import read_rows, stamp
from tars_fast.evaluate import EvaluateConfig, command, evaluate, main
from tars_fast.evaluation.answering import Evaluator
from tars_fast.evaluation.results import read_predictions
from tars_fast.models.hub import weights_fingerprint
from tars_fast.models.registry import find_preset
from tars_fast.support.cli import FAILED, INTERRUPTED, parse_command_line
from tars_fast.types import UserError

ITEMS_AT_ONCE = 4
FILES = {"accuracy.png", "config.json", "evaluation.json", "predictions.jsonl", "report.html"}


@pytest.fixture(scope="module")
def kept_items(tmp_path_factory) -> Path:
    """Ten validation items as wav files of the user's own."""
    folder = tmp_path_factory.mktemp("kept") / "items"
    folder.mkdir()
    lines = []
    for item in islice(read_items(VALIDATION_DATA), 10):
        audio = f"{item.question.id}.wav"
        soundfile.write(folder / audio, decode(item.audio), SAMPLE_RATE, subtype="FLOAT")
        lines.append(json.dumps({**item.fields, "audio": audio}) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def items(kept_items, tmp_path) -> Path:
    """The ten items, to be spoiled."""
    return shutil.copytree(kept_items, tmp_path / "items")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr("tars_fast.evaluation.answering.ITEMS_AT_ONCE", ITEMS_AT_ONCE)


@pytest.fixture(scope="module")
def kept(kept_items) -> Path:
    """The folder of their evaluation."""
    folder = kept_items.with_name("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tars_fast.evaluation.answering.ITEMS_AT_ONCE", ITEMS_AT_ONCE)
        evaluated(folder, kept_items)
    return folder


def evaluated(output_dir: Path, *data: object, **changes) -> dict:
    """evaluation.json of an evaluation that must end well."""
    outcome = evaluate(config_of(output_dir, *data, **changes))
    assert (outcome.output_dir, outcome.is_finished, outcome.num_failed) == (output_dir, True, 0)
    assert outcome.evaluation == read(output_dir)
    return outcome.evaluation


def config_of(output_dir: Path, *data: object, **changes) -> EvaluateConfig:
    return EvaluateConfig(data=tuple(map(str, data)), output_dir=output_dir, device="cpu", **changes)


def read(output_dir: Path) -> dict:
    return json.loads((output_dir / "evaluation.json").read_text())


def test_several_data_sets_from_the_command_line(items, tmp_path, monkeypatch, capsys):
    whole, half = tmp_path / "out", tmp_path / "half.jsonl"
    half.write_text("".join(line.replace('"audio": "', '"audio": "items/') for line in items_lines(items)[:5]))
    arguments = [
        "--data",
        f"ten={items}",
        "--data",
        str(half),
        "--reference",
        "0.8",
        "--samples",
        "2",
        "--output-dir",
        str(whole),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--device", "cpu", *arguments])
    assert main() == 0
    assert {path.name for path in whole.iterdir()} == FILES
    evaluation = read(whole)
    assert list(evaluation) == ["ten", "half", "overall"]
    results = read_predictions(whole, "")
    assert [(result.data, result.id) for result in results[9:11]] == [("ten", "validation-0009"), ("half", "validation-0000")]
    for name, count in (("ten", 10), ("half", 5)):
        own = [result.evaluated for result in results if result.data == name]
        made = evaluation[name]
        assert (made["num_items"], made["num_failed"], len(own)) == (count, 0, count)
        for modality in ("speech", "text"):
            answers = [getattr(item, modality) for item in own]
            correct = np.mean([answer.readings["strict"].correct for answer in answers])
            assert made[f"{modality}_accuracy"] == pytest.approx(correct)
            sampled = np.mean([answer.sampled_accuracy for answer in answers])
            assert made[f"{modality}_accuracy_sampled"] == pytest.approx(sampled)
        assert made["mrr"] == pytest.approx(made["speech_accuracy"] / 0.8 * 100)
    mean = (evaluation["ten"]["speech_accuracy"] + evaluation["half"]["speech_accuracy"]) / 2
    assert evaluation["overall"]["speech_accuracy"] == pytest.approx(mean)
    assert evaluation["overall"]["mrr"] == pytest.approx(mean / 0.8 * 100)
    shown = capsys.readouterr().out
    for text in ("ten", "half", "mean", f"{100 * mean:.1f} [", "strict", "letter", "15/15"):
        assert text in shown
    again = parse_command_line(EvaluateConfig, ["--config", str(whole / "config.json")], "python -m tars_fast.evaluate")[0]
    assert again == EvaluateConfig(data=(f"ten={items}", str(half)), reference="0.8", samples=2, device="cpu")
    settings = json.loads((whole / "config.json").read_text())["evaluation"]
    assert settings["data"] == {"ten": str(items), "half": str(half)}
    assert settings["max_new_tokens"] == 40


def items_lines(folder: Path) -> list[str]:
    return (folder / "items.jsonl").read_text().splitlines(keepends=True)


def test_categories_and_transcription(items, kept, tmp_path, monkeypatch, capsys):
    """What the data says of an item beyond question and answer arrives in the figures, names that look like markup too."""
    original = module.load_questions

    def with_more(source, **settings):
        return [
            dataclasses.replace(question, category="[/b]" if number % 2 == 0 else "[bold]odd", transcript=question.text)
            for number, question in enumerate(original(source, **settings))
        ]

    monkeypatch.setattr(module, "load_questions", with_more)
    folder = tmp_path / "x[bold]y"
    made = evaluated(folder, f"[te[n]={items}", transcribe=True)["[te[n]"]
    results = read_predictions(folder, "")
    for category, start in (("[/b]", 0), ("[bold]odd", 1)):
        correct = [result.evaluated.speech.readings["strict"].correct for result in results[start::2]]
        assert made["categories"][category]["speech_accuracy"] == pytest.approx(np.mean(correct))
        assert made["categories"][category]["num_items"] == 5
    # The bundled model only ever does sums: it transcribes nothing, and the figure says so.
    assert made["word_error_rate"] > 0.5
    assert made["word_error_rate_ci95"][0] <= made["word_error_rate"] <= made["word_error_rate_ci95"][1]
    shown = capsys.readouterr().out
    assert "word error rate %" in shown
    assert "[te[n]: by category" in shown
    assert re.search(r"\n *\[/b\] +5 ", shown)
    assert re.search(r"\n *\[bold\]odd +5 ", shown)
    assert f"written to {folder}: " in shown
    plain = read(kept)["items"]
    assert plain["speech_accuracy"] == made["speech_accuracy"], "transcribing changes no answer"


KILLED = """
import os, signal
import tars_fast.evaluate as command
from tars_fast.evaluation import answering
answering.ITEMS_AT_ONCE = {size}
original, calls = command.append, []
def append(path, text):
    calls.append(1)
    if len(calls) == 3:
        first, second, *_ = text.splitlines(keepends=True)
        with path.open("a") as file:
            file.write(first + second[:30])
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, text)
command.append = append
command.main()
"""


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_result(items, tmp_path, monkeypatch):
    """kill -9 in the middle of writing the third of four slices, sampled completions included: bit for bit the same."""
    data = [f"ten={items}", f"again={items}"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    evaluated(unbroken, *data, samples=1)
    arguments = ["--samples", "1", "--device", "cpu", "--output-dir", str(broken)]
    arguments += [part for given in data for part in ("--data", given)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(size=ITEMS_AT_ONCE), *arguments], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (broken / "evaluation.json").exists()
    assert len(read_predictions(broken, "")) == 9, "two slices, a whole line, and half a line that is not taken"

    starts, original = [], Evaluator.evaluate_slice
    monkeypatch.setattr(
        Evaluator, "evaluate_slice", lambda self, *given: starts.append(given[0].start) or original(self, *given)
    )
    evaluated(broken, *data, samples=1)
    assert starts == [8, 0, 4, 8], "the rest of the first data, all of the second"
    for name in ("evaluation.json", "predictions.jsonl"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()


def test_ctrl_c_keeps_what_is_done_and_says_how_to_continue(items, tmp_path, monkeypatch, capsys):
    original = module.append

    def interrupted(path, text):
        original(path, text)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "append", interrupted)
    out = tmp_path / "out"
    assert command(config_of(out, items)) == INTERRUPTED
    assert capsys.readouterr().err == f"stopped; continue with the same command and --output-dir {out}\n"
    assert len(read_predictions(out, "")) == ITEMS_AT_ONCE
    monkeypatch.setattr(module, "append", original)
    assert evaluated(out, items)["items"]["num_items"] == 10


def test_other_settings_or_another_runs_folder_are_refused(items, tmp_path):
    out = tmp_path / "out"
    evaluated(out, items)
    written = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"holds an evaluation with other settings or contents \(max_new_tokens 40 -> 39\)"):
        command(config_of(out, items, max_new_tokens=39))
    (items / "items.jsonl").write_text("".join(items_lines(items)[:9]))
    with pytest.raises(UserError, match=r"contents \(the items' ids, texts or answers have changed\)"):
        command(config_of(out, items))
    assert {path: path.read_bytes() for path in out.iterdir()} == written
    (out / "config.json").write_text('{"num_steps": 3}')
    with pytest.raises(UserError, match=r"its config.json is not an evaluation's"):
        command(config_of(out, items))
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="holds predictions of unknown settings"):
        command(config_of(out, items))


def test_other_contents_in_the_same_places_are_refused(items, tmp_path, monkeypatch):
    """Retrained into the same folder, or recorded anew under the same names: nothing of it is taken for the same."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(find_preset("pocket").source, checkpoint)
    evaluated(out, items, model=str(checkpoint))
    monkeypatch.setattr(module, "load_model_and_engine", lambda *_: pytest.fail("nothing may be evaluated"))
    evaluated(out, items, model=str(checkpoint))
    written = {path: path.read_bytes() for path in out.iterdir()}
    recording = items / json.loads(items_lines(items)[5])["audio"]
    for path, message in ((checkpoint / "model.safetensors", "the model's weights"), (recording, "recordings")):
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(UserError, match=rf"--output-dir {out}: holds .* contents \({message} have changed\)"):
            command(config_of(out, items, model=str(checkpoint)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert {path: path.read_bytes() for path in out.iterdir()} == written
    evaluated(out, items, model=str(checkpoint))
    # Without the slice of that recording nothing is mixed.
    results = read_predictions(out, "")
    module.write_predictions(out / "predictions.jsonl", [*results[:4], *results[8:]])
    os.utime(recording, ns=(0, 0))
    monkeypatch.undo()
    monkeypatch.setattr("tars_fast.evaluation.answering.ITEMS_AT_ONCE", ITEMS_AT_ONCE)
    evaluated(out, items, model=str(checkpoint))
    assert read_predictions(out, "") == results


def test_fingerprints_tell_contents_apart_and_are_the_same_in_every_process(tmp_path):
    """Of an adapter with its base; of a dataset's rows, inside it or beside it, also where another process opens it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_model.safetensors").write_bytes(b"more")
    peft.LoraConfig(base_model_name_or_path=str(base)).save_pretrained(adapter)
    seen = {weights_fingerprint(str(adapter)), weights_fingerprint(str(base))}
    (base / "model.safetensors").write_bytes(b"weights of another size")
    seen |= {weights_fingerprint(str(adapter)), weights_fingerprint(str(base))}
    (adapter / "adapter_model.safetensors").write_bytes(b"more of it")
    seen.add(weights_fingerprint(str(adapter)))
    assert len(seen) == 5

    rows = [{"question": "Which?", "choices": ["x", "y"], "answer": 0, "audio": f"{number}.wav"} for number in range(2)]
    for row in rows:
        (tmp_path / row["audio"]).write_bytes(b"sound")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    code = "import sys; from tars_fast.data.sources import *; print([stamp(row.audio) for row in read_rows(sys.argv[1])])"
    given = [sys.executable, "-c", code, str(tmp_path / "rows.parquet")]
    stamps = [subprocess.run(given, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert stamps[0] == stamps[1]
    first, second = (stamp(row.audio) for row in read_rows(given[-1]))
    assert first != second
    (tmp_path / "1.wav").write_bytes(b"another")
    again = [stamp(row.audio) for row in read_rows(given[-1])]
    assert again[0] == first
    assert again[1] != second


@pytest.mark.slow
def test_two_processes_make_the_evaluation_of_one(items, tmp_path):
    """Three slices of each data set, one of which both have done before a kill -9 of both: byte for byte the same files."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    data = [f"ten={items}", f"again={items}"]
    evaluated(alone, *data, samples=2)
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(size=ITEMS_AT_ONCE))
    arguments = ["--samples", "2", "--device", "cpu", "--output-dir", str(both)]
    arguments += [part for given in data for part in ("--data", given)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert len(read_predictions(both, "")) == 15, "two rounds, whose second ends one data set, a whole line and half a line"
    small = f"answering.ITEMS_AT_ONCE = {ITEMS_AT_ONCE}"
    script.write_text(f"from tars_fast import evaluate\nfrom tars_fast.evaluation import answering\n{small}\nevaluate.main()")
    done = subprocess.run([*torchrun, str(script), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on cpu in 2 processes") == done.stdout.count("items 20/20") == 1, "one of them speaks"
    for name in ("evaluation.json", "predictions.jsonl"):
        assert (both / name).read_bytes() == (alone / name).read_bytes()


def test_a_finished_evaluation_is_compared_without_loading_the_model(kept_items, kept, tmp_path, monkeypatch, capsys):
    items, out, other = kept_items, shutil.copytree(kept, tmp_path / "out"), tmp_path / "other"
    first = read(out)["items"]
    other.mkdir()
    results = read_predictions(out, "")
    # The other run got three more spoken items wrong, and did not get to a fourth.
    right = [number for number, result in enumerate(results) if result.evaluated.text.readings["strict"].correct]
    lines = [result.to_line() for result in results]
    for number in right[:3]:
        record = json.loads(lines[number])
        record["evaluated"]["text"]["readings"]["strict"]["correct"] = False
        lines[number] = json.dumps(record) + "\n"
    lines[right[3]] = json.dumps(json.loads(lines[right[3]]) | {"evaluated": None, "failed": "gone"}) + "\n"
    (other / "predictions.jsonl").write_text("".join(lines))
    monkeypatch.setattr(module, "load_model_and_engine", lambda *_: pytest.fail("nothing is left to evaluate"))
    capsys.readouterr()
    made = evaluated(out, items, compare=other, reference=str(other))["items"]
    change = made["change"]
    assert change["num_items"] == 9
    assert change["text_accuracy"] == pytest.approx(3 / 9)
    assert (change["text_accuracy_gained"], change["text_accuracy_lost"]) == (3, 0)
    assert change["text_accuracy_mcnemar_p"] == 0.25
    assert change["speech_accuracy"] == 0
    assert "3 items became right, 0 wrong, of 9; McNemar's exact test p = 0.25" in capsys.readouterr().out
    kept = [r.evaluated for number, r in enumerate(results) if number != right[3]]
    speech = sum(item.speech.readings["strict"].correct for item in kept)
    text = sum(item.text.readings["strict"].correct for item in kept) - 3
    assert made["mrr"] == pytest.approx(100 * speech / text)
    assert made["mrr_same_model"] == first["mrr_same_model"]
    (other / "predictions.jsonl").write_text("".join(lines[:7]))
    for changes, flag in (({"compare": other}, "--compare"), ({"reference": str(other)}, "--reference")):
        with pytest.raises(UserError, match=rf"{flag} {other}: .* 3 of these 10 are not in it"):
            command(config_of(out, items, **changes))


def test_items_that_fail_are_listed_and_done_again_once_they_are_right(items, kept, tmp_path, monkeypatch, capsys):
    """One recording missing, one not finite, one that is gone once the work has begun: the rest as if they were not there."""
    whole = read(kept)["items"]
    names = [json.loads(line)["audio"] for line in items_lines(items)]
    contents = {name: (items / name).read_bytes() for name in names}
    (items / names[0]).unlink()
    wave, rate = soundfile.read(items / names[1])
    soundfile.write(items / names[1], np.where(np.arange(len(wave)) == 9, np.nan, wave), rate, subtype="FLOAT")
    load = module.load_model_and_engine

    def then_lost(*arguments):
        (items / names[6]).unlink()
        return load(*arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(module, "load_model_and_engine", then_lost)
    capsys.readouterr()
    assert command(config_of(out, items)) == FAILED
    monkeypatch.setattr(module, "load_model_and_engine", load)
    made = read(out)["items"]
    assert (made["num_items"], made["num_failed"]) == (7, 3)
    assert list(made["failed"]) == ["validation-0000", "validation-0001", "validation-0006"]
    for reason, fragment in zip(made["failed"].values(), ("no such file", "NaN", "o such file"), strict=True):
        assert fragment in reason
    shown = capsys.readouterr().out
    assert "items: 3 failed, counted by no figure:" in shown
    assert "validation-0006: " in shown
    good, broken = (read_predictions(folder, "") for folder in (kept, out))
    assert [one for one in broken if one.failed is None] == [
        other for one, other in zip(broken, good, strict=True) if one.failed is None
    ]
    for number in (0, 1, 6):
        (items / names[number]).write_bytes(contents[names[number]])
    assert evaluated(out, items)["items"] == whole


def test_data_of_which_nothing_can_be_used(items, tmp_path):
    for path in items.glob("*.wav"):
        path.unlink()
    with pytest.raises(UserError, match=r"data 'items': none of its 10 items can be evaluated; item 'validation-0000': "):
        command(config_of(tmp_path / "out", items))
    assert not (tmp_path / "out").exists(), "no settings are bound to the folder yet"


def test_long_recordings_are_for_the_user_to_decide(items, tmp_path, capsys):
    """Not failed items: leaving them out would make figures of the short ones, and cutting them off is a choice."""
    for line in items_lines(items)[:2]:
        path = items / json.loads(line)["audio"]
        wave, rate = soundfile.read(path)
        soundfile.write(path, np.concatenate([wave, np.zeros(4 * rate)]), rate, subtype="FLOAT")
    with pytest.raises(
        UserError, match=r"data 'items': 2 of 10 recordings are longer than the 4 s .*--long-audio chunk or trunc"
    ):
        command(config_of(tmp_path / "out", items))
    assert evaluated(tmp_path / "out", items, long_audio="truncate")["items"]["num_items"] == 10
    assert "2 of 10 recordings are longer than the 4 s" in capsys.readouterr().out


def test_without_arguments_it_evaluates_the_bundled_held_out_items():
    from tars_fast.data.items import BUNDLED, HELD_OUT_DATA

    assert EvaluateConfig().sources() == {"held_out": str(HELD_OUT_DATA)}
    assert EvaluateConfig(data=("pocket",)).sources() == {"pocket": str(HELD_OUT_DATA)}
    assert EvaluateConfig(data=("hard=pocket-hard@validation",)).sources() == {
        "hard": str(BUNDLED["pocket-hard"] / "validation.parquet")
    }
    assert EvaluateConfig(model="pocket-hard").sources() == {"held_out": str(BUNDLED["pocket-hard"] / "held_out.parquet")}
    assert len(load_questions(HELD_OUT_DATA)) == 400
    assert EvaluateConfig(data=("a=x", "b=y/c=d", "/e=f/g.jsonl")).sources() == {"a": "x", "b": "y/c=d", "g": "/e=f/g.jsonl"}
