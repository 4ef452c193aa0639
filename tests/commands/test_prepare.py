"""Spoken items made of written ones: reproducible, resumable, verified; and data in which every defect is really there."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset

from tars_fast import prepare
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import load_questions, read_items
from tars_fast.data.recognition import load_recogniser
from tars_fast.data.sources import read_rows
from tars_fast.data.transcription import word_error_rate
from tars_fast.prepare import read_texts, recording_name, spoken_form

SYNTHESISER = '''
import numpy as np

def tone(text, voice, seed):
    """Text becomes as many tenths of a second as it has words, pitch and noise follow from voice and seed."""
    if "unspeakable" in text:
        raise RuntimeError("no sound for that\\nsecond line")
    if "nothing" in text:
        return np.zeros(24_000, np.float32), 24_000
    if "matrix" in text:
        return np.ones((2, 24_000), np.float32), 24_000
    if "integers" in text:
        return np.full(24_000, 9000.0, np.float32), 24_000
    time = np.arange(2_400 * len(text.split())) / 24_000
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.3 * np.sin(2 * np.pi * int(voice) * time) + 0.01 * noise).astype(np.float32), 24_000

def held(text, voice, seed):
    """Waits while there are as many recordings as the file `enough` says."""
    import pathlib, time
    enough, recordings = pathlib.Path("enough"), pathlib.Path("out/recordings")
    while enough.exists() and len(list(recordings.glob("*.flac"))) >= int(enough.read_text()):
        time.sleep(0.02)
    return tone(text, voice, seed)

def deadly(text, voice, seed):
    import os
    os._exit(9)

def recognise_low_voices(wave, rate):
    """All words of a voice below 300 Hz, half of those of a higher one."""
    import json, pathlib
    said = json.loads(pathlib.Path("said.json").read_text())[str(round(len(wave) / rate * 10))]
    pitch = abs(np.fft.rfft(wave)).argmax() * rate / len(wave)
    return said if pitch < 300 else " ".join(said.split()[::2])
'''
WRITTEN = [
    {"id": "q/1", "question": "Which planet is largest?", "options": ["Mars", "Jupiter"], "answer": "B", "category": "space"},
    {"id": "q 2", "question": "What is two plus three?", "answer_set": ["four", "five"], "answer": "five"},
    {"id": "q3", "question": "Water is made of\nhydrogen and ____", "options": ["oxygen", "iron", "salt"], "answer": "A"},
]


def write_jsonl(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where commands run: items.jsonl to be spoken, and a module with synthesisers and a recogniser."""
    write_jsonl(tmp_path / "items.jsonl", WRITTEN)
    (tmp_path / "plugin.py").write_text(SYNTHESISER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Flags -> (exit status, stdout, stderr)."""

    def run(*flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, flags)])
        capsys.readouterr()
        status = prepare.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


TONES = ("--data", "items.jsonl", "--synthesiser", "plugin:tone", "--voices", 200, 250, 400, 500)


def contents(folder: Path) -> dict[str, bytes]:
    """What a preparation promises to make again byte by byte."""
    return {path.name: path.read_bytes() for path in [*folder.glob("items.*"), *folder.glob("recordings/*")]}


def start(*flags: object) -> subprocess.Popen:
    """In a process group of its own, all of which gets what is typed on its terminal."""
    command = [sys.executable, "-m", "tars_fast.prepare", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_written_items_are_spoken_by_espeak(run, folder):
    assert run("--data", "items.jsonl", "--output-dir", "out", "--jobs", 2)[0] == 0
    spoken, written = load_questions("out"), load_questions("items.jsonl", spoken=False)
    for question, source in zip(spoken, written, strict=True):
        assert (question.id, question.text, question.answer) == (source.id, source.text, source.answer)
        assert (question.choices, question.category) == (source.choices, source.category)
        info = soundfile.info(question.audio)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)
        wave = decode(question.audio)
        assert 1 < len(wave) / SAMPLE_RATE < 15
        assert 0.1 < np.abs(wave).max() < 1
    assert spoken[0].transcript == "Which planet is largest?\nOption A: Mars.\nOption B: Jupiter."
    assert spoken[2].transcript.startswith("Water is made of\nhydrogen and  blank .\nOption A: oxygen.")
    voices = {json.loads(line)["voice"] for line in Path("out/items.jsonl").read_text().splitlines()}
    assert len(voices) > 1
    before = contents(folder / "out")
    # Again, with another number of jobs; and with another seed.
    status, stdout, _ = run("--data", "items.jsonl", "--output-dir", "again", "--jobs", 1, "--max-seconds", 1)
    assert status == 0
    assert "3 recordings are longer than 1 s; training refuses them without --long-audio" in stdout
    assert contents(folder / "again") == before
    assert run("--data", "items.jsonl", "--output-dir", "other", "--jobs", 1, "--seed", 1)[0] == 0
    other = contents(folder / "other")
    assert all(other[name] != before[name] for name in before)


def test_a_recording_depends_on_its_own_item_only(run, folder):
    assert run(*TONES, "--output-dir", "out")[0] == 0
    write_jsonl(folder / "items.jsonl", WRITTEN[::-1])
    assert run(*TONES, "--output-dir", "reversed")[0] == 0
    write_jsonl(folder / "items.jsonl", WRITTEN[1:2])
    assert run(*TONES, "--output-dir", "one")[0] == 0
    whole, turned, one = (contents(folder / name) for name in ("out", "reversed", "one"))
    assert turned.pop("items.jsonl").splitlines()[::-1] == whole["items.jsonl"].splitlines()
    assert turned.items() < whole.items()
    name = recording_name("q 2", "What is two plus three?")
    assert one[name] == whole[name]


def test_names_of_recordings():
    assert recording_name("q/1", "x").startswith("q_1-")
    assert recording_name("q/1", "x") != recording_name("q/1", "y")
    assert len({recording_name(id, "x") for id in ("q/1", "q_1", "Q_1", "q 1", "ü", "\ud800", "a" * 50, "a" * 51)}) == 8
    for id in ("ü" * 300, "../../x", "a b"):
        name = recording_name(id, "x")
        assert name.isascii()
        assert len(name) < 70
        assert "/" not in name


def test_a_transcript_that_is_given_is_what_is_said(folder):
    write_jsonl(folder / "items.jsonl", [WRITTEN[0] | {"transcript": "Say this."}, WRITTEN[1]])
    first, second = read_items("items.jsonl", spoken=False)
    assert (spoken_form(first), spoken_form(second)) == ("Say this.", "What is two plus three?")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"question": "A. one\nB. two", "answer_set": ["one", "two"], "answer": "one"}, "Option A: one.\nOption B: two."),
        ({"question": "Which?\nA. x\nB. y", "answer_set": ["A", "B"], "answer": "A"}, "Which?\nOption A: x.\nOption B: y."),
        # The question's own lines, not what is answered.
        ({"question": "Who won?\nA. Anna\nB. Ben", "answer_set": ["yes", "no"], "answer": "no"}, "Who won?\nA. Anna\nB. Ben."),
        (
            {"question": "A. Anna\nB. Ben", "options": ["p", "q"], "answer": "A"},
            "A. Anna\nB. Ben.\nOption A: p.\nOption B: q.",
        ),
    ],
)
def test_lines_that_a_question_letters_itself(run, folder, item, said):
    write_jsonl(folder / "items.jsonl", [item])
    assert [spoken_form(item) for item in read_items("items.jsonl", spoken=False)] == [said]


def test_published_rows_that_are_no_items_are_left_out_and_counted(run, folder):
    rows = [{"question": question, "choices": ["y", "z"], "answer": answer} for question, answer in [("Who?", 0), ("When?", 7)]]
    write_jsonl(folder / "mmlu.jsonl", [*rows, rows[0] | {"question": " "}])
    status, stdout, _ = run("--data", "mmlu.jsonl", *TONES[2:], "--output-dir", "out")
    assert status == 0
    assert "data mmlu.jsonl: 2 of 3 rows left out, the first: mmlu.jsonl, line 2: 'answer' is 7, not 0 to 1" in stdout
    assert [question.text for question in load_questions("out")] == ["Who?\nA. y\nB. z"]


def test_texts_without_an_answer_are_spoken(run, folder):
    write_jsonl(
        folder / "written.jsonl", [WRITTEN[0], {"text": "Good morning."}, {"question": "Who?", "answer_set": ["I", "you"]}]
    )
    status, stdout, _ = run("--data", "written.jsonl", *TONES[2:], "--output-dir", "out")
    assert status == 0
    assert "3 items, " in stdout
    assert "2 items have no answer; --objective opd trains on them" in stdout
    questions = load_questions("out", answered=False)
    assert [(q.text, q.choices, q.answer) for q in questions[1:]] == [("Good morning.", (), ""), ("Who?", ("I", "you"), "")]
    assert questions[1].transcript == "Good morning."
    status, stdout, _ = run("--check", "out", "--output", "report.json")
    assert status == 0
    assert "no answer (a note)" in stdout
    findings = json.loads(Path("report.json").read_text())["findings"]
    objectives = ["--objective opd trains on it", "--objective opd and cord train on it"]
    assert [(f["problem"], f["detail"].split(",")[0]) for f in findings] == [("no answer", said) for said in objectives]
    # A published set without answers is spoken too; one that lacks some has rows that are no items.
    rows = [{"question": "Who?", "choices": ["y", "z"], "answer": answer} for answer in (0, None)]
    assert [item.question.answer for item in read_texts(write_jsonl(folder / "some.jsonl", rows))[0]] == ["A"]
    assert len(read_texts(write_jsonl(folder / "none.jsonl", rows[1:] * 2))[0]) == 2


def test_odd_options_of_published_data_survive(run, folder):
    """Options that are empty or stand twice; in the user's own file they are refused."""
    rows = [
        {"question": "Which?", "choices": ["x", "x", ""], "answer": 1},
        {"question": "Who?", "choices": ["y", "z"], "answer": 0},
    ]
    write_jsonl(folder / "mmlu.jsonl", rows)
    assert run("--data", "mmlu.jsonl", *TONES[2:], "--output-dir", "out")[0] == 0
    written, spoken = load_questions("mmlu.jsonl", spoken=False), load_questions("out")
    for before, after in zip(written, spoken, strict=True):
        assert (after.id, after.text, after.answer, after.choices) == (before.id, before.text, before.answer, before.choices)
    assert spoken[0].transcript == "Which?\nOption A: x.\nOption B: x.\nOption C: ."
    assert spoken[1].transcript == "Who?\nOption A: y.\nOption B: z."


def test_items_that_fail_are_listed_and_the_others_kept(run, folder):
    failing = [{"id": name, "question": f"Say {name}", "answer_set": ["a", "b"], "answer": "a"} for name in
               ("unspeakable", "nothing", "matrix", "integers")]  # fmt: skip
    write_jsonl(folder / "items.jsonl", [*failing, *WRITTEN])
    status, _, stderr = run(*TONES, "--output-dir", "out", "--retries", 1)
    assert status == 1
    assert stderr == "4 items failed and are left out; see out/preparation/failed.jsonl\n"
    assert [question.id for question in load_questions("out")] == ["q/1", "q 2", "q3"]
    failed = {
        line["id"]: line["error"] for line in map(json.loads, Path("out/preparation/failed.jsonl").read_text().splitlines())
    }
    assert "RuntimeError: no sound for that second line" in failed["unspeakable"]
    assert "ValueError: the synthesiser gave 1.00 s, or silence" in failed["nothing"]
    assert "shape (2, 24000), not one channel" in failed["matrix"]
    assert "floats on the scale of integers: samples go to 9000 where 1 is full scale; divide" in failed["integers"]
    assert all(error.count("Error") == 2 for error in failed.values())  # one retry
    # Put right, the same command makes what is missing.
    write_jsonl(folder / "items.jsonl", [item | {"question": "Say it now"} for item in failing] + WRITTEN)
    status, stdout, _ = run(*TONES, "--output-dir", "out", "--retries", 1)
    assert status == 0
    assert "3 of 7 items are there already" in stdout
    assert Path("out/preparation/failed.jsonl").read_text() == ""
    assert len(load_questions("out")) == 7


@pytest.mark.slow
def test_a_recogniser_sends_items_back_for_another_voice(run, folder):
    """Half of the voices are recognised badly; which one an item gets first follows from the seed."""
    colours = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
    items = [{"id": f"q{n}", "question": " ".join(colours[:n]), "answer_set": ["a", "b"], "answer": "a"} for n in range(3, 9)]
    write_jsonl(folder / "items.jsonl", items)
    Path("said.json").write_text(json.dumps({len(item["question"].split()): item["question"] for item in items}))
    verified = (*TONES, "--recogniser", "plugin:recognise_low_voices")
    assert run(*verified, "--output-dir", "out", "--retries", 20)[0] == 0
    lines = [json.loads(line) for line in Path("out/items.jsonl").read_text().splitlines()]
    assert {line["voice"] for line in lines} <= {"200", "250"}
    assert all(line["word_error_rate"] == 0 for line in lines)
    # Without another try some are given up, and those that remain are the same recordings.
    assert run(*verified, "--output-dir", "once", "--retries", 0)[0] == 1
    once = contents(folder / "once")
    once.pop("items.jsonl")
    assert 0 < len(once) < 6
    assert once.items() < contents(folder / "out").items()
    failed = [json.loads(line)["error"] for line in Path("once/preparation/failed.jsonl").read_text().splitlines()]
    assert len(failed) == 6 - len(once)
    assert all("word error rate 0.5" in error or "word error rate 0.4" in error or "0.3333" in error for error in failed)
    # A threshold that lets everything pass keeps the rate with the item.
    assert run(*verified, "--output-dir", "lax", "--retries", 0, "--max-word-error-rate", 1)[0] == 0
    rates = [json.loads(line)["word_error_rate"] for line in Path("lax/items.jsonl").read_text().splitlines()]
    assert sum(rate > 0 for rate in rates) == len(failed)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_killed_and_run_again_it_ends_the_same(run, folder, output_format):
    items = [{"id": f"q{n}", "question": f"Item {n}", "answer_set": ["a", "b"], "answer": "a"} for n in range(12)]
    write_jsonl(folder / "items.jsonl", items)
    flags = ("--data", "items.jsonl", "--synthesiser", "plugin:held", "--voices", 200, 250, "--jobs", 2)
    flags += ("--output-format", output_format)
    assert run(*flags, "--output-dir", "unbroken")[0] == 0
    Path("enough").write_text("4")
    process = start(*flags, "--output-dir", "out")
    recordings, journal = folder / "out" / "recordings", folder / "out" / "preparation" / "finished.jsonl"
    deadline = time.monotonic() + 120
    # Until both are held, and the journal knows what is done.
    while not (journal.exists() and journal.read_text().count("\n") == len(list(recordings.glob("*.flac"))) >= 4):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    Path("enough").unlink()
    # No orphan goes on writing; one that is dead but not yet buried has no command line.
    while any(Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list((folder / "out").glob("items.*"))
    done = {path: path.stat().st_mtime_ns for path in recordings.glob("*.flac")}
    assert 4 <= len(done) < 12
    # As if the journal had been cut off within a line, and a recording within a write.
    with journal.open("a") as file:
        file.write('{"id": "q11", "tra')
    (recordings / (recording_name("q11", "Item 11.") + ".partial")).write_bytes(b"fLaC")
    status, stdout, _ = run(*flags, "--output-dir", "out")
    assert status == 0
    kept = int(stdout.partition(" of 12 items are there already")[0].rpartition("\n")[2])
    assert kept >= len(done) - 2  # of the two that were in flight the journal may not know
    assert contents(folder / "out") == contents(folder / "unbroken")
    if output_format == "jsonl":
        assert sum(path.stat().st_mtime_ns == stamp for path, stamp in done.items()) == kept


def test_ctrl_c_ends_all_of_it(folder):
    Path("enough").write_text("1")
    process = start(
        "--data", "items.jsonl", "--synthesiser", "plugin:held", "--voices", 200, "--jobs", 1, "--output-dir", "out"
    )
    while not list(folder.glob("out/recordings/*.flac")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    Path("enough").unlink()
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert not (folder / "out" / "items.jsonl").exists()


PACKED = (*TONES, "--output-format", "parquet")


def test_both_formats_hold_the_same_items(run, folder):
    """As a run reads them, as a check reads them, and as others read them."""
    assert run(*TONES, "--output-dir", "out")[0] == 0
    status, stdout, _ = run(*PACKED, "--output-dir", "packed")
    assert status == 0
    assert "3 items, 3 s of speech, written to packed" in stdout
    assert {path.name for path in (folder / "packed").iterdir()} == {"items.parquet", "preparation"}
    beside, inside = load_questions("out"), load_questions("packed")
    for question, other in zip(beside, inside, strict=True):
        assert other == dataclasses.replace(question, audio=other.audio)
        assert question.audio.read_bytes() == other.audio.read_bytes()
        assert np.array_equal(decode(question.audio), decode(other.audio))
    assert [run("--check", name, "--output", f"{name}.json")[0] for name in ("out", "packed")] == [0, 0]
    reports = [json.loads(Path(f"{name}.json").read_text()) | {"data": ""} for name in ("out", "packed")]
    assert reports[0] == reports[1]
    lines = [json.loads(line) for line in Path("out/items.jsonl").read_text().splitlines()]
    rows = Dataset.from_parquet("packed/items.parquet", cache_dir="cache")
    assert set(rows.column_names) == {name for line in lines for name in line}
    assert rows.features["audio"] == Audio()
    names = [row["path"] for row in rows.cast_column("audio", Audio(decode=False))["audio"]]
    assert [f"recordings/{name}" for name in names] == [line["audio"] for line in lines]


def test_a_parquet_file_goes_on_where_it_was(run, folder):
    """More items, another text for one and one item less: what was spoken before is taken from the file that is there."""
    assert run(*PACKED, "--output-dir", "out")[0] == 0
    before = (folder / "out" / "items.parquet").read_bytes()
    assert run(*PACKED, "--output-dir", "again", "--jobs", 2)[0] == 0
    assert (folder / "again" / "items.parquet").read_bytes() == before
    write_jsonl(folder / "items.jsonl", [WRITTEN[1] | {"id": "new"}, WRITTEN[0] | {"question": "Which?"}, WRITTEN[1]])
    status, stdout, _ = run(*PACKED, "--output-dir", "out")
    assert status == 0
    assert "1 of 3 items are there already" in stdout
    assert run(*PACKED, "--output-dir", "anew")[0] == 0
    assert (folder / "out" / "items.parquet").read_bytes() == (folder / "anew" / "items.parquet").read_bytes()
    # Deleting the recordings came too late, or a run was interrupted before the items were written: both are there.
    (folder / "out" / "recordings").mkdir()
    status, stdout, _ = run(*PACKED, "--output-dir", "out")
    assert status == 0
    assert "3 of 3 items are there already" in stdout
    assert not (folder / "out" / "recordings").exists()
    assert (folder / "out" / "items.parquet").read_bytes() == (folder / "anew" / "items.parquet").read_bytes()


def test_the_format_of_a_folder_stays(run, folder):
    assert run(*TONES, "--output-dir", "out")[0] == 0
    before = contents(folder / "out")
    status, _, stderr = run(*PACKED, "--output-dir", "out")
    assert status == 2
    assert stderr == "error: --output-dir out: was begun with --output-format jsonl; give the same, or name a new folder\n"
    assert contents(folder / "out") == before
    # As it was begun before there was a choice, or an augmentation.
    settings = folder / "out" / "preparation" / "settings.json"
    written = json.loads(settings.read_text())
    del written["output_format"], written["augment"]
    settings.write_text(json.dumps(written))
    assert run(*PACKED, "--output-dir", "out")[::2] == (2, stderr)
    assert run(*TONES, "--output-dir", "out")[0] == 0
    assert run(*PACKED, "--output-dir", "packed")[0] == 0
    status, _, stderr = run(*TONES, "--output-dir", "packed")
    assert status == 2
    assert "--output-dir packed: was begun with --output-format parquet; give the same" in stderr
    assert len(load_questions("packed")) == 3


def test_a_parquet_file_that_is_damaged_is_never_replaced(run, folder):
    assert run(*PACKED, "--output-dir", "out")[0] == 0
    (folder / "out" / "items.parquet").write_bytes(b"PAR1 and no more")
    status, _, stderr = run(*PACKED, "--output-dir", "out")
    assert status == 2
    assert "data out/items.parquet: cannot be read as a dataset (" in stderr
    assert stderr.endswith("is it whole?\n")
    assert (folder / "out" / "items.parquet").read_bytes() == b"PAR1 and no more"


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_half_a_character_is_refused_before_anything_is_spoken(run, folder, output_format):
    write_jsonl(folder / "items.jsonl", [WRITTEN[0], WRITTEN[1] | {"id": "\ud800"}])
    status, _, stderr = run(*TONES, "--output-format", output_format, "--output-dir", "out")
    assert status == 2
    assert r"items.jsonl, line 2: item '\ud800': 'id' holds '\ud800', which no text can hold; correct it" in stderr
    assert not (folder / "out").exists()


def test_settings_of_a_folder_stay(run, folder):
    assert run(*TONES, "--output-dir", "out")[0] == 0
    before = contents(folder / "out")
    status, _, stderr = run(*TONES, "--output-dir", "out", "--seed", 1, "--retries", 7)
    assert status == 2
    assert stderr == "error: --output-dir out: was begun with --retries 3, --seed 0; give the same, or name a new folder\n"
    assert contents(folder / "out") == before
    # More items, and another text for one of them, are no other settings.
    write_jsonl(
        folder / "items.jsonl", [*WRITTEN, WRITTEN[1] | {"id": "new"}, WRITTEN[0] | {"id": "q/1", "question": "Which?"}][1:]
    )
    status, stdout, _ = run(*TONES, "--output-dir", "out")
    assert status == 0
    assert "2 of 4 items are there already" in stdout
    assert load_questions("out")[-1].transcript.startswith("Which?")


def test_augmented_recordings_are_those_without_and_what_was_asked_for(run, folder):
    noisy = (*TONES, "--augment", "noise:5..20", "telephone")
    assert run(*TONES, "--output-dir", "clean")[0] == 0
    assert run(*TONES, "--output-dir", "out", "--augment", "noise:5..20")[0] == 0
    assert run(*noisy, "--output-dir", "telephone", "--output-format", "parquet")[0] == 0
    rows = [json.loads(line) for line in Path("out/items.jsonl").read_text().splitlines()]
    clean = [json.loads(line) for line in Path("clean/items.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "augmentation"} for row in rows] == clean, "voices are the same"
    snrs = [float(row["augmentation"].removeprefix("noise:")) for row in rows]
    assert len(set(snrs)) == 3
    for before, after, snr in zip(load_questions("clean"), load_questions("out"), snrs, strict=True):
        wave, mixed = decode(before.audio), decode(after.audio)
        measured = 10 * np.log10(np.square(wave).sum() / np.square(mixed - wave).sum())
        assert measured == pytest.approx(snr, abs=0.5)
        assert 5 <= snr <= 20

    packed = [row.values["augmentation"] for row in read_rows("telephone")]
    assert packed == [f"noise:{snr:g} telephone" for snr in snrs]
    for question in load_questions("telephone"):
        wave = decode(question.audio)
        power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        assert power[len(power) // 2 + 1 :].sum() < 1e-6 * power.sum()
    assert run(*TONES, "--output-dir", "again", "--augment", "noise:5..20", "--jobs", 2)[0] == 0
    assert contents(folder / "again") == contents(folder / "out")
    status, _, stderr = run(*TONES, "--output-dir", "out")
    assert status == 2
    assert stderr == (
        "error: --output-dir out: was begun with --augment ['noise:5..20']; give the same, or name a new folder\n"
    )


def test_the_recogniser_hears_what_was_augmented(run, folder):
    said = {len(item["question"].split()): item["question"] for item in WRITTEN[1:2]}
    (folder / "said.json").write_text(json.dumps(said))
    write_jsonl(folder / "items.jsonl", WRITTEN[1:2])
    verified = ("--data", "items.jsonl", "--synthesiser", "plugin:tone", "--voices", 200)
    verified += ("--recogniser", "plugin:recognise_low_voices", "--retries", 0)
    assert run(*verified, "--output-dir", "out")[0] == 0
    # 30 dB louder than the tone, so that the loudest frequency is one of the noise.
    assert run(*verified, "--output-dir", "noisy", "--augment", "noise:-40")[0] == 1
    assert "word error rate" in (folder / "noisy" / "preparation" / "failed.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ((), ["--data or --check", "give one of them"]),
        (("--data", "items.jsonl"), ["--output-dir", "name the folder"]),
        ((*TONES, "--output-dir", "."), ["--output-dir .", "holds something else", "name a new folder"]),
        ((*TONES, "--output-dir", "items.jsonl"), ["--output-dir items.jsonl", "cannot be made (File exists)"]),
        ((*TONES, "--output-dir", "/proc/none/out"), ["--output-dir /proc/none/out", "cannot be made"]),
        ((*TONES, "--output-dir", "out", "--jobs", 0), ["--jobs 0", "greater than 0"]),
        ((*TONES, "--output-dir", "out", "--retries", -1), ["--retries -1", "0 or greater"]),
        (("--data", "none.jsonl", "--output-dir", "out"), ["data none.jsonl", "cannot be read", "give a jsonl file"]),
        ((*TONES, "--output-dir", "out", "--synthesiser", "absent:f"), ["--synthesiser absent:f", "No module", "give module:"]),
        ((*TONES, "--output-dir", "out", "--synthesiser", "plugin:f"), ["--synthesiser plugin:f", "no attribute 'f'"]),
        ((*TONES, "--output-dir", "out", "--synthesiser", "plugin:deadly"), ["--jobs 1", "a worker ended by itself"]),
        ((*TONES, "--output-dir", "out", "--recogniser", "none/there"), ["--recogniser none/there", "cannot be loaded"]),
        ((*TONES, "--output-dir", "out", "--budget", 4), ["--budget 4: the corpus has 3 different items"]),
        ((*TONES, "--output-dir", "out", "--budget", 0), ["--budget 0", "greater than 0"]),
        ((*TONES, "--output-dir", "out", "--clusters", 4), ["--clusters 4: needs --select-for", "leave it out"]),
        ((*TONES, "--output-dir", "out", "--select-for", "pocket"), ["--select-for pocket: needs --budget"]),
        ((*TONES, "--output-dir", "out", "--budget", 3, "--select-for", "pocket"), ["--budget 3: 1 cluster", "--probes"]),
        ((*TONES, "--output-dir", "out", "--budget", 3, "--select-for", "none/there", "--probes", 1), ["--model none/there"]),
        ((*TONES, "--output-dir", "out", "--augment", "hiss"), ["--augment hiss: is none of noise:DB, speech-noise:DB"]),
        ((*TONES, "--output-dir", "out", "--augment", "noise:9..5"), ["--augment noise:9..5: give -40 to 80 dB, the lower"]),
        (("--check", "items.jsonl", "--augment", "telephone"), ["--augment telephone", "--check makes no items"]),
        (("--check", "items.jsonl", "--budget", 3), ["--budget 3", "--check makes no items"]),
        (("--check", "none.jsonl"), ["data none.jsonl", "cannot be read"]),
        (("--check", "pocket-hard@test"), ["data pocket-hard@test", "has no split 'test'; it has training, validation"]),
        (("--check", "items.jsonl", "--output-format", "parquet"), ["--output-format parquet", "--check makes no items"]),
        (("--check", "items.jsonl", "--output", "none/report.json"), ["--output none/report.json", "no folder none"]),
    ],
)  # fmt: skip
def test_wrong_use(run, folder, flags, fragments):
    status, _, stderr = run(*flags)
    assert status == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in stderr
    assert (folder / "items.jsonl").read_text().count("\n") == 3


SUMS = [
    {"id": f"{one}{two}", "question": f"What is {one} plus {two}?", "answer_set": ["four", "five"], "answer": "five"}
    for one in ("two", "three", "four", "five")
    for two in ("one", "two", "three")
]
del SUMS[5]["answer"], SUMS[5]["answer_set"]


def test_a_budget_is_spent_where_speech_and_text_differ(run, folder):
    """The same command makes the same choice, also after its recordings and what was measured are gone."""
    write_jsonl(folder / "items.jsonl", [*SUMS, SUMS[0] | {"id": "again"}])
    flags = (*TONES, "--budget", 7, "--select-for", "pocket", "--clusters", 2, "--probes", 2)
    status, stdout, _ = run(*flags, "--output-dir", "out", "--jobs", 1)
    assert status == 0
    assert "1 of 13 items ask what another one asks, and are left out" in stdout
    choice = json.loads(Path("out/choice.json").read_text())
    assert [question.id for question in load_questions("out")] == choice["chosen"]
    assert len(choice["chosen"]) == sum(cluster["budget"] for cluster in choice["clusters"]) == 7
    assert sorted(id for cluster in choice["clusters"] for id in cluster["ids"]) == sorted(item["id"] for item in SUMS)
    for cluster in choice["clusters"]:
        assert set(cluster["ids"][: cluster["budget"]]) <= set(choice["chosen"])
        assert list(cluster["probes"]) == cluster["ids"][:2]
        assert cluster["misalignment"] == pytest.approx(np.mean(list(cluster["probes"].values())))
        assert cluster["misalignment"] > 0.01, "tones are no speech"
    more, less = sorted(choice["clusters"], key=lambda cluster: cluster["misalignment"], reverse=True)
    assert more["budget"] >= less["budget"] or more["budget"] == len(more["ids"])
    before = contents(folder / "out")
    (folder / "out" / "choice.json").unlink()
    for path in list((folder / "out" / "recordings").iterdir())[:3]:
        path.unlink()
    assert run(*flags, "--output-dir", "out", "--jobs", 1)[0] == 0
    assert json.loads(Path("out/choice.json").read_text()) == choice
    assert contents(folder / "out") == before


def fill_disk(monkeypatch, writer: str, name: str) -> None:
    """Have a function of `prepare` write its file onto a device that is full."""
    write = getattr(prepare, writer)

    def on_full_device(folder, *arguments):
        (folder / f"{name}.partial").symlink_to("/dev/full")
        write(folder, *arguments)

    monkeypatch.setattr(prepare, writer, on_full_device)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_no_recording(run, folder, monkeypatch):
    """The items do not fit: those of the run before stay, with the new recordings, and the same command goes on."""
    write_jsonl(folder / "items.jsonl", WRITTEN[:1])
    assert run(*PACKED, "--output-dir", "out")[0] == 0
    before = (folder / "out" / "items.parquet").read_bytes()
    write_jsonl(folder / "items.jsonl", WRITTEN)
    with monkeypatch.context() as patched:
        fill_disk(patched, "pack_items", "items.parquet")
        status, _, stderr = run(*PACKED, "--output-dir", "out")
    assert status == 2
    assert "out/items.parquet: cannot be written (No space left on device: " in stderr
    assert "are free); make room and repeat the command" in stderr
    assert (folder / "out" / "items.parquet").read_bytes() == before
    assert len(list((folder / "out" / "recordings").iterdir())) == 2
    status, stdout, _ = run(*PACKED, "--output-dir", "out")
    assert status == 0
    assert "3 of 3 items are there already" in stdout
    assert run(*PACKED, "--output-dir", "unbroken")[0] == 0
    assert (folder / "out" / "items.parquet").read_bytes() == (folder / "unbroken" / "items.parquet").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_nothing(run, folder, monkeypatch):
    """The journal stands on a device that is full; afterwards the same command goes on."""
    assert run(*TONES, "--output-dir", "out")[0] == 0
    before = contents(folder / "out")
    journal = folder / "out" / "preparation" / "finished.jsonl"
    (folder / "out" / "items.jsonl").unlink()
    with monkeypatch.context() as patched:
        fill_disk(patched, "write_items", "items.jsonl")
        status, _, stderr = run(*TONES, "--output-dir", "out")
    assert status == 2
    assert "out/items.jsonl: cannot be written (No space left on device: needs 0.00 MB, " in stderr
    assert journal.read_text().count("\n") == 3
    assert run(*TONES, "--output-dir", "out")[0] == 0
    assert contents(folder / "out") == before


def sound(seconds: float = 1.0, rate: int = SAMPLE_RATE, amplitude: float = 0.3, format: str = "WAV") -> bytes:
    wave = np.clip(amplitude * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate), -1, 1)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format)
    return buffer.getvalue()


def test_check_finds_every_defect(run, folder):
    recordings = {
        "good": sound(),
        "silent": sound(amplitude=1e-4),
        "clipped": sound(amplitude=3.0),
        "short": sound(0.05),
        "long": sound(31.0),
        "fast": sound(rate=44_100),
        "broken": sound()[:30],
        "cut": sound()[:12_000],
        "text": b"no sound at all",
        "nan": b"",  # written below
        "integers": b"",
    }
    (folder / "spoken").mkdir()
    items = []
    for name, content in recordings.items():
        (folder / "spoken" / f"{name}.wav").write_bytes(content)
        items.append(
            {"id": name, "question": f"What is {name}?", "answer_set": ["a", "b"], "answer": "a", "audio": f"{name}.wav"}
        )
    for name, sample in (("nan", np.nan), ("integers", 9000.0)):
        soundfile.write(folder / "spoken" / f"{name}.wav", np.full(SAMPLE_RATE, sample), SAMPLE_RATE, subtype="FLOAT")
    good = items[0]
    items += [
        good | {"id": "lost", "audio": "lost.wav"},
        good | {"question": "Again?", "audio": "silent.wav"},  # a duplicate that is silent as well
        good | {"id": "wrong", "answer": "c"},
        good | {"id": "few", "answer_set": ["a"]},
        good | {"id": "sign", "question": "What is <|AUDIO|>?"},
        {key: value for key, value in good.items() if key != "audio"} | {"id": "mute"},
    ]
    path = write_jsonl(folder / "spoken" / "items.jsonl", items)
    path.write_text(path.read_text() + '{"id": "half", \n["a list"]\n')
    status, stdout, stderr = run("--check", "spoken", "--output", "report.json", "--jobs", 2)
    assert (status, stderr) == (1, "")
    report = json.loads(Path("report.json").read_text())
    found: dict[str, set[str]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["problem"], set()).add(finding["id"] or finding["place"].rpartition(" ")[2])
        assert finding["detail"]
        assert "line " in finding["place"]
    assert found == {
        "silent": {"silent", "good"},
        "clipped": {"clipped"},
        "too short": {"short"},
        "too long": {"long"},
        "not 16 kHz": {"fast"},
        "unreadable": {"broken", "cut", "text", "nan", "integers", "lost"},
        "duplicate id": {"good"},
        "bad item": {"14", "15", "17", "18", "19"},
        "control token": {"sign"},
    }
    assert (report["items"], report["usable"]) == (19, 3)  # good, clipped, fast
    assert report["seconds_total"] == pytest.approx(1 + 1 + 1 + 0.05 + 31 + 1 + 1 + 1 + 1 + 1)
    assert report["seconds_mean"] == pytest.approx(report["seconds_total"] / 10, abs=1e-3)
    assert report["problems"]["bad item"] == 5
    for problem, number in report["problems"].items():
        (row,) = [line for line in stdout.splitlines() if line.strip().startswith(problem)]
        assert f" {number} " in row
    assert "19 items, 39.0 s of speech, 3.9 s an item" in stdout
    # What is only a note does not fail.
    write_jsonl(path, [item for item in items[:9] if item["id"] in ("good", "clipped", "fast")])
    status, stdout, _ = run("--check", "spoken")
    assert status == 0
    assert "not 16 kHz (a note)" in stdout
    # The limit is the model's.
    assert run("--check", "spoken", "--max-seconds", 0.9)[0] == 1


def test_words_are_compared_as_they_sound():
    assert word_error_rate("Option A: it's 21 degrees.", "option a it is twenty-one degrees") == 0
    assert word_error_rate("red green blue black", "red green black") == 0.25
    assert word_error_rate("red green", "red green blue black white") == 1.5
    assert (word_error_rate("", ""), word_error_rate("...", "word")) == (0, 1)


@pytest.fixture
def whisper(tmp_path) -> Path:
    """A random Whisper with a real tokenizer, small enough for a test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["Which planet is largest?"], trainer)
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    backend.add_special_tokens(names)
    stamps = [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    backend.add_tokens(stamps)
    tokenizer = WhisperTokenizerFast(
        tokenizer_object=backend, bos_token=names[0], eos_token=names[0], pad_token=names[0], unk_token=names[0]
    )
    end, begin, english, transcribe, translate, no_stamps = tokenizer.convert_tokens_to_ids(names)
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=16, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=begin,
    )  # fmt: skip
    # The weights decide what is recognised and for how long.
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=begin, eos_token_id=end, pad_token_id=end, bos_token_id=end, max_length=12, is_multilingual=True,
        no_timestamps_token_id=no_stamps, lang_to_id={"<|en|>": english}, task_to_id={"transcribe": transcribe,
        "translate": translate}, language="<|en|>", task="transcribe", return_timestamps=False, prev_sot_token_id=begin,
    )  # fmt: skip
    folder = tmp_path / "whisper"
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    return folder


def test_a_checkpoint_recognises_speech(run, folder, whisper):
    """Random weights recognise anything; what counts is that it is the same again, and that it is used."""
    recogniser = load_recogniser(str(whisper))
    wave = 0.1 * np.random.default_rng(0).normal(size=SAMPLE_RATE).astype(np.float32)
    text = recogniser(wave, SAMPLE_RATE)
    assert isinstance(text, str)
    assert text == recogniser(wave, SAMPLE_RATE)
    assert isinstance(recogniser(np.tile(wave, 65), SAMPLE_RATE), str)  # more than Whisper takes at once
    flags = ("--data", "items.jsonl", "--recogniser", whisper, "--retries", 0, "--output-dir")
    assert run(*flags, "out")[0] == 1
    assert "word error rate" in Path("out/preparation/failed.jsonl").read_text()
    assert run(*flags, "lax", "--max-word-error-rate", 1000)[0] == 0
    assert all(json.loads(line)["word_error_rate"] > 0.1 for line in Path("lax/items.jsonl").read_text().splitlines())


def test_as_a_process(folder):
    """The status reaches the shell, and nothing but the one line reaches stderr."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for flags in (["--check", "owner/name"], ["--check", "mmsu"]):
        command = [sys.executable, "-m", "tars_fast.prepare", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: data {flags[1]}: cannot be read as a dataset (")
        assert done.stderr.count("\n") == 1
