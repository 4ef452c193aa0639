"""Data from parquet, saved datasets and the hub: published formats, recordings, mistakes, and leaks across formats."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Image

from tars_fast.config import TrainConfig
from tars_fast.data import sources
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import HELD_OUT_DATA, load_questions, read_items, read_usable, split_options
from tars_fast.data.splits import check_leaks, split_by_id
from tars_fast.learning.run import load_data
from tars_fast.types import Question, UserError

SUBJECTS = (
    "law", "engineering", "other", "biology", "business", "economics", "health", "philosophy", "psychology", "history",
    "chemistry", "physics",
)  # fmt: skip
INSTRUCTION = "What is the answer to the above multiple choice question? Select one of the following: A, B, C, or D."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Arrow copies of parquet files, which datasets keeps, go with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[sources._LARGEST_IN_MEMORY, -1], ids=["read at once", "by datasets"])
def largest_in_memory(request, monkeypatch):
    """Small parquet files are read in one way, and large ones in another."""
    monkeypatch.setattr(sources, "_LARGEST_IN_MEMORY", request.param)


def tone(hertz: int, format: str = "WAV", rate: int = SAMPLE_RATE) -> bytes:
    """One second, so that the spectrum's bin k is k Hz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate), rate, format=format)
    return buffer.getvalue()


def samples(hertz: int) -> list[float]:
    return soundfile.read(io.BytesIO(tone(hertz)))[0].tolist()


def pitch(question: Question) -> int:
    wave = decode(question.audio)
    assert len(wave) == SAMPLE_RATE
    return int(np.abs(np.fft.rfft(wave)).argmax())


def dataset(rows: list[dict], feature: object = None) -> Dataset:
    """`audio` of each row: bytes, which become the column that datasets of the hub have."""
    rows = [{**row, "audio": {"bytes": row["audio"], "path": None}} for row in rows]
    return Dataset.from_list(rows).cast_column("audio", feature or Audio(sampling_rate=16_000))


def mmsu_row(subject: str, number: int, **changes: object) -> dict:
    prompt = f"Statements on {subject} {number}:\nI. One.\nII. Two.\n\nWhich hold?\nA. neither\nB. I only\nC. II only\nD. both"
    row = {
        "prompt": f"{prompt}\n\n{INSTRUCTION}",
        "reference": "C",
        "question_id": number,
        "cot_content": "",
        "category": subject,
    }
    return row | {"src": f"ori_mmlu-{subject}", "audio": tone(300 + SUBJECTS.index(subject))} | changes


@pytest.fixture
def mmsu() -> DatasetDict:
    return DatasetDict({name: dataset([mmsu_row(name, number) for number in range(2)]) for name in SUBJECTS})


def check_mmsu(questions: list[Question]) -> None:
    assert len(questions) == 24
    assert [question.category for question in questions[::2]] == list(SUBJECTS)
    assert len({question.id for question in questions}) == 24
    third = questions[2]
    assert (third.id, third.answer, third.choices) == ("ori_mmlu-engineering_0", "C", ("A", "B", "C", "D"))
    # Whole, and as it was recorded.
    assert third.text == third.transcript == mmsu_row("engineering", 0)["prompt"]
    assert [pitch(question) for question in questions[::2]] == list(range(300, 312))


def test_mmsu_saved_to_disk(mmsu, tmp_path):
    mmsu.save_to_disk(tmp_path / "mmsu")
    check_mmsu(load_questions(tmp_path / "mmsu"))
    (first, second) = load_questions(f"{tmp_path / 'mmsu'}@physics")
    assert (first.category, second.id) == ("physics", "ori_mmlu-physics_1")


def test_mmsu_as_parquet_without_its_category(mmsu, tmp_path, largest_in_memory):
    """As `hf download` leaves it: a file a split; the split is the category then."""
    for name, rows in mmsu.items():
        (tmp_path / "mmsu").mkdir(exist_ok=True)
        rows.remove_columns("category").to_parquet(tmp_path / "mmsu" / f"{name}-00000-of-00001.parquet")
    questions = load_questions(tmp_path)
    check_mmsu(sorted(questions, key=lambda question: SUBJECTS.index(question.category)))
    assert len(load_questions(f"{tmp_path}@law")) == 2


def test_mmsu_of_the_hub(mmsu, monkeypatch):
    """What the hub would send, without the hub."""
    calls = []
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments: calls.append(arguments) or mmsu)
    check_mmsu(load_questions("mmsu"))
    check_mmsu(load_questions("hlt-lab/voicebench:mmsu"))
    assert len(load_questions("hlt-lab/voicebench:mmsu@health")) == 2
    load_questions("someone/else")
    assert calls == [("hlt-lab/voicebench", "mmsu")] * 3 + [("someone/else", None)]


def obqa_row(number: int = 0) -> dict:
    prompt = f"There is fog {number} around:\nA. a marsh\nB. a tundra\nC. the plains\nD. a desert\n{INSTRUCTION}"
    return {"audio": tone(300, "FLAC"), "prompt": prompt, "reference": "A"}


def test_openbookqa_has_no_ids_of_its_own(tmp_path, largest_in_memory):
    rows = [obqa_row(number) for number in range(40)]
    dataset(rows).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    questions = load_questions(tmp_path / "test-00000-of-00001.parquet")
    assert questions[7].text == rows[7]["prompt"]
    # They follow from the content, so an item stays on its side whatever is put before it.
    ids = {question.text: question.id for question in questions}
    assert len(set(ids.values())) == 40
    dataset([obqa_row(99), *rows[::-1]]).to_parquet(tmp_path / "more.parquet")
    more = load_questions(tmp_path / "more.parquet")
    assert all(question.id == ids[question.text] for question in more[1:])
    held_out = {question.id for question in split_by_id(questions, 0.3)[1]}
    assert held_out <= {question.id for question in split_by_id(more, 0.3)[1]}
    # Splits of published runs hang on it.
    assert questions[0].id == "d8a522ba11883b76"


def test_several_recordings_of_one_question_without_ids(tmp_path):
    dataset([obqa_row(), obqa_row(), obqa_row(1)]).save_to_disk(tmp_path / "data")
    first, again, other = load_questions(tmp_path / "data")
    assert again.id == f"{first.id}-2"
    assert other.id not in (first.id, again.id)


def tars_row(number: int = 0, **changes: object) -> dict:
    options = ["cool and disengaged.", "the source of all moral actions.", "the first spring.", "all of the above."]
    spoken = "\n".join(f"Option {letter}: {option}" for letter, option in zip("ABCD", options, strict=True))
    row = {
        "key": f"mmlu@{number}",
        "question_id": number,
        "question": f"Hume {number} describes reason as:",
        "options": options,
    }
    row |= {"answer": options[1], "answer_index": 1, "question_for_tts": "", "tts_wer": 0.03, "audio": tone(500, rate=44_100)}
    return row | {"prompt_for_tts": f"Hume {number} describes reason as:\n\n{spoken}"} | changes


def test_the_released_training_set(tmp_path):
    DatasetDict({"train": dataset([tars_row(1), tars_row(2, options=["same", "same", ""], answer_index=0)])}).save_to_disk(
        tmp_path / "d"
    )
    first, second = load_questions(tmp_path / "d")
    assert (first.id, first.answer, first.choices) == ("mmlu@1", "B", ("A", "B", "C", "D"))
    assert first.text.startswith("Hume 1 describes reason as:\nA. cool and disengaged.\nB. the source")
    assert first.transcript == tars_row(1)["prompt_for_tts"]
    assert pitch(first) == 500
    # Published data are taken as they are.
    assert (second.text.partition("\n")[2], second.answer) == ("A. same\nB. same\nC.", "A")


def test_mmlu_as_text_to_be_spoken(tmp_path):
    rows = [{"question": "Which?", "subject": "law", "choices": ["x", "y"], "answer": 1}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (question,) = load_questions(tmp_path / "a.parquet", spoken=False)
    assert (question.text, question.answer, question.category, question.audio) == ("Which?\nA. x\nB. y", "B", "law", None)
    with pytest.raises(UserError, match=r"a\.parquet, row 0: 'audio' missing or empty"):
        load_questions(tmp_path / "a.parquet")


def own_row(**changes: object) -> dict:
    row = {"id": 7, "question": "Which?", "answer": "two", "answer_set": ["one", "two"], "audio": tone(400)}
    return row | {"category": "counting", "transcript": "Which one?"} | changes


@pytest.mark.parametrize("feature", ["Audio", "struct", "bytes", "path", "array", "list", "base64"])
def test_recordings_in_any_column(tmp_path, feature, largest_in_memory):
    (tmp_path / "spoken").mkdir()
    (tmp_path / "spoken" / "a.wav").write_bytes(tone(400))
    plain = {key: value for key, value in own_row().items() if key != "audio"}
    rows = {
        "Audio": lambda: dataset([own_row()]),
        "struct": lambda: Dataset.from_list([own_row(audio={"bytes": tone(400), "path": "else.wav"})]),
        "bytes": lambda: Dataset.from_list([own_row()]),
        "path": lambda: Dataset.from_list([plain | {"audio": "spoken/a.wav"}]),
        "array": lambda: Dataset.from_list([plain | {"audio": {"array": samples(400), "sampling_rate": SAMPLE_RATE}}]),
        "list": lambda: Dataset.from_list([plain | {"audio": [{"bytes": tone(400), "path": None}]}]),
        "base64": lambda: Dataset.from_list([plain | {"audio": base64.b64encode(tone(400)).decode()}]),
    }[feature]()
    rows.to_parquet(tmp_path / "a.parquet")
    (question,) = load_questions(tmp_path / "a.parquet")
    assert question == Question("7", "Which?", "two", ("one", "two"), question.audio, "counting", "Which one?")
    assert str(question.audio) == f"{tmp_path / 'a.parquet'}, row 0"
    assert pitch(question) == 400


def test_recordings_are_hashable_places_and_can_be_read_in_parallel(mmsu, tmp_path):
    mmsu.save_to_disk(tmp_path / "mmsu")
    once, again = load_questions(tmp_path / "mmsu"), load_questions(tmp_path / "mmsu")
    assert once == again
    assert len({question.audio for question in once + again}) == 24
    with ThreadPoolExecutor(4) as pool:
        pitches = list(pool.map(pitch, once * 5))
    assert pitches == [300 + number // 2 for number in range(24)] * 5
    assert "torchcodec" not in sys.modules


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([tars_row(answer_index=4)], ["row 0: item 'mmlu@0'", "'answer_index' is 4, not 0 to 3"]),
        ([tars_row(answer_index=-1)], ["'answer_index' is -1, not 0 to 3"]),
        ([tars_row(), tars_row(1, answer_index=None)], ["row 1: item 'mmlu@1'", "'answer_index' missing or empty"]),
        ([tars_row(options=None)], ["'options' missing or empty; TARS has the options there"]),
        ([tars_row(options=["one"])], ["2 to 26", "['one']"]),
        ([tars_row(), tars_row()], ["row 1: id 'mmlu@0' already stands in row 0"]),
        ([tars_row(question=" ")], ["'question' missing or empty"]),
        ([tars_row(key=None)], ["row 0: 'key' missing or empty"]),
        ([mmsu_row("law", 0, prompt="What is law?")], ["item 'ori_mmlu-law_0'", "'prompt' holds no options", "A., B."]),
        ([mmsu_row("law", 0, prompt="")], ["'prompt' missing or empty"]),
        ([mmsu_row("law", 0, reference="E")], ["answer 'E' is none of A, B, C, D"]),
        ([mmsu_row("law", 0), mmsu_row("law", 0)], ["row 1: id 'ori_mmlu-law_0' already stands in row 0"]),
        ([own_row(answer="three")], ["row 0: item '7'", "answer 'three' is none of one, two"]),
        ([own_row(category=[1])], ["'category' must be a text, not [1]"]),
        ([{"text": "Which?", "audio": b""}], ["row 0: 'question', 'answer' missing or empty", "an item is id"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, rows, fragments):
    dataset(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        load_questions(tmp_path / "data")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data'}, row ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        ({"bytes": None, "path": None}, "cannot be read (its row holds no audio)"),
        ({"bytes": b"", "path": None}, "cannot be read (its row holds no audio)"),
        ({"bytes": None, "path": "gone.wav"}, "gone.wav, which is not there)"),
        ({"bytes": b"no sound", "path": "a.wav"}, "cannot be decoded"),
        (
            "https://x.org/a.wav",
            "cannot be read (its row's 'audio' is a URL, which is not fetched (https://x.org/a.wav); download",
        ),
        (["a.wav", "b.wav"], "cannot be read (its row's 'audio' is a list of 2; an item has one recording)"),
        ("a\0.wav", "a\0.wav, which is not there)"),
    ],
)
def test_bad_recordings_are_named(tmp_path, audio, reason, largest_in_memory):
    Dataset.from_list([own_row(audio=audio)]).to_parquet(tmp_path / "data.parquet")
    (question,) = load_questions(tmp_path / "data.parquet")
    with pytest.raises(UserError) as caught:
        decode(question.audio)
    assert str(caught.value).startswith(f"recording {tmp_path / 'data.parquet'}, row 0: ")
    assert reason in str(caught.value)


def test_sources_that_are_none(tmp_path, largest_in_memory):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"data .*broken\.parquet: cannot be read as a dataset \(.*\); is it whole\?"):
        load_questions(tmp_path / "broken.parquet")
    with pytest.raises(UserError, match=r"data .*gone\.parquet: cannot be read as a dataset"):
        load_questions(tmp_path / "gone.parquet")
    both = DatasetDict({"train": dataset([own_row()]), "test": dataset([own_row()])})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"both: has the splits train, test; name one of them, as in .*both@train"):
        load_questions(tmp_path / "both")
    assert len(load_questions(f"{tmp_path / 'both'}@test")) == 1
    with pytest.raises(UserError, match=r"both@dev: has no split 'dev'; it has train, test"):
        load_questions(f"{tmp_path / 'both'}@dev")
    Dataset.from_list([own_row(audio=[0.0, 0.1])]).save_to_disk(tmp_path / "floats")
    with pytest.raises(UserError, match=r"floats: column 'audio' holds List.*; it must hold whole files"):
        load_questions(tmp_path / "floats")
    (tmp_path / "items.jsonl").write_text("")
    with pytest.raises(UserError, match=r"items\.jsonl@law: a jsonl file has no splits; leave @law out"):
        load_questions(f"{tmp_path / 'items.jsonl'}@law")
    # Offline, as in all tests; a folder's name with a slash in it looks like one of the hub's.
    with pytest.raises(
        UserError, match=r"data owner/name: cannot be read as a dataset \(.*\); check the spelling; from the hub"
    ):
        load_questions("owner/name")
    with pytest.raises(UserError, match=r"data dir/items\.jsonl: cannot be read .*No such file"):
        load_questions("dir/items.jsonl")


def test_a_text_that_is_cut_within_a_character(tmp_path, largest_in_memory):
    """Arrow believes its writer; the other rows are read."""
    texts = [b"Which?", "gr\u00fc".encode()[:-1], b"Who?"]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    column = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    pq.write_table(pa.table({"id": ["a", "b", "c"], "question": column, "answer": [0, 0, 0], "choices": [["x", "y"]] * 3}),
                   tmp_path / "data.parquet")  # fmt: skip
    first, second, third = read_items(tmp_path / "data.parquet", spoken=False)
    assert str(second.error) == f"{tmp_path / 'data.parquet'}, row 1: a text is not UTF-8; write it again"
    assert (first.question.id, third.question.id) == ("a", "c")


@pytest.mark.usefixtures("largest_in_memory")
def test_pictures_and_files_that_differ(tmp_path):
    picture = {"bytes": b"no picture at all", "path": None}
    rows = dataset([own_row(picture=picture)], Audio()).cast_column("picture", Image())
    rows.to_parquet(tmp_path / "data.parquet")
    assert load_questions(tmp_path / "data.parquet")[0].id == "7"
    rows.select_columns("audio").to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"row 0: 'question', 'answer' missing or empty"):
        load_questions(tmp_path / "data.parquet")
    rows.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=f"data {tmp_path}: cannot be read as a dataset"):
        load_questions(tmp_path)


def test_a_small_parquet_file_is_read_without_datasets(tmp_path):
    """Whose import takes longer than the reading, and which leaves a copy."""
    code = "import sys; from tars_fast.data.items import *; load_questions(HELD_OUT_DATA); print('datasets' in sys.modules)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"
    assert not (tmp_path / "cache").exists()


def test_a_path_with_the_signs_of_a_source_is_a_path(tmp_path):
    dataset([own_row()]).save_to_disk(tmp_path / "a:b@train")
    assert len(load_questions(tmp_path / "a:b@train")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which?\nA. x\nB. y", ("Which?", ["x", "y"])),
        ("Which?\n\nOption A: x\noption b) y\n (C) z", ("Which?", ["x", "y", "z"])),
        (f"Which?\nA. x\nB. y\n\n{INSTRUCTION}", ("Which?", ["x", "y"])),
        ("I. one\nII. two\nA. I\nB. II\nC. ", ("I. one\nII. two", ["I", "II", ""])),
        ("A. first\nB. second\nWhich?\nA. A\nB. B", ("A. first\nB. second\nWhich?", ["A", "B"])),
        ("A. Smith asks\nwhat to do", ("A. Smith asks\nwhat to do", [])),
        ("Which?\nA. long\n  option\nB. y", ("Which?", ["long\n  option", "y"])),
        ("What is two plus three?", ("What is two plus three?", [])),
    ],
)
def test_options_inside_a_text(text, expected):
    assert split_options(text) == expected


def lettered_question(text: str, name: str) -> Question:
    return Question(name, text, "A", ("A", "B", "C", "D"))


def test_leaks_across_formats(tmp_path):
    """The same question as the training set has it, and as VoiceBench asks it."""
    row = tars_row(5)
    dataset([row]).save_to_disk(tmp_path / "training")
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row["options"], strict=True))
    leak = {"prompt": f"{row['question']}\n{lettered}\n{INSTRUCTION}", "reference": "B", "audio": tone(300)}
    dataset([obqa_row(), leak]).save_to_disk(tmp_path / "benchmark")
    training, held_out = load_questions(tmp_path / "training"), load_questions(tmp_path / "benchmark")
    with pytest.raises(UserError, match=f"evaluation item '{held_out[1].id}' asks what training item 'mmlu@5' asks"):
        check_leaks(training, held_out)
    check_leaks(training, held_out[:1])
    # In another order the options are still the same; another option makes another question.
    options = "A. all of the above\nB. the first spring\nC. Cool and disengaged\nD. the source of all moral actions"
    turned = lettered_question(f"Hume 5 describes reason as\n{options}", "t")
    with pytest.raises(UserError, match="'t' asks what"):
        check_leaks(training, [turned])
    check_leaks(training, [lettered_question(turned.text.replace("first", "last"), "t")])


def voicebench_row(row: dict) -> dict:
    """What an item of the training set is in VoiceBench's format."""
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row["options"], strict=True))
    return {"prompt": f"{row['question']}\n{lettered}\n{INSTRUCTION}", "reference": "B", "audio": b"never read"}


def test_items_of_disjoint_from_are_left_out_of_training(tmp_path):
    """Items of the training set that a benchmark asks too, or whose ids stand in a file, in all ways of naming data."""
    dataset([tars_row(number) for number in range(40)]).save_to_disk(tmp_path / "training")
    dataset([obqa_row(), voicebench_row(tars_row(3)), voicebench_row(tars_row(8))]).save_to_disk(tmp_path / "benchmark")
    own = {"id": "mmlu@5", "question": "Anything?", "answer_set": ["yes", "no"], "answer": "no"}
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    config = TrainConfig(data=str(tmp_path / "training"), disjoint_from=(str(tmp_path / "benchmark"),))
    training, held_out, notes = load_data(config)
    assert {item.id for item in [*training, *held_out]} == {f"mmlu@{number}" for number in range(40)} - {"mmlu@3", "mmlu@8"}
    assert notes == [f"2 of 40 items left out, which are in {tmp_path / 'benchmark'} too"]
    # The others stay on their side of the split.
    everything, some, nothing = load_data(dataclasses.replace(config, disjoint_from=()))
    assert ([item for item in everything if item in training], [item for item in some if item in held_out]) == (
        training,
        held_out,
    )
    assert nothing == []
    both = dataclasses.replace(config, disjoint_from=(*config.disjoint_from, str(tmp_path / "own.jsonl")))
    assert load_data(both)[2] == [f"3 of 40 items left out, which are in {' '.join(both.disjoint_from)} too"]
    # An evaluation on the benchmark itself, which would else be refused.
    on_benchmark = dataclasses.replace(config, eval_data=str(tmp_path / "benchmark"))
    training, held_out, _ = load_data(on_benchmark)
    assert (len(training), len(held_out)) == (38, 3)
    with pytest.raises(UserError, match=r"asks what .*--disjoint-from"):
        load_data(dataclasses.replace(on_benchmark, disjoint_from=()))
    with pytest.raises(UserError, match=r"--disjoint-from .*: has all 40 items of --data; name other data"):
        load_data(dataclasses.replace(config, disjoint_from=(config.data,)))
    with pytest.raises(UserError, match=r"data absent\.jsonl: cannot be read"):
        load_data(dataclasses.replace(config, disjoint_from=("absent.jsonl",)))


def test_unusable_rows_of_published_data_are_left_out_of_training_only(tmp_path):
    rows = [tars_row(number) for number in range(40)]
    rows[3] |= {"answer_index": 4}
    rows[7] |= {"key": "mmlu@6"}
    dataset(rows).save_to_disk(tmp_path / "data")
    training, held_out, notes = load_data(TrainConfig(data=str(tmp_path / "data")))
    assert len(training) + len(held_out) == 38
    assert notes == [f"data {tmp_path / 'data'}: 2 of 40 rows left out, the first: {tmp_path / 'data'}, row 3: item 'mmlu@3': "
                     "'answer_index' is 4, not 0 to 3, the place of the right option counted from 0"]  # fmt: skip
    with pytest.raises(UserError, match="row 3"):
        load_data(TrainConfig(eval_data=str(tmp_path / "data")))
    dataset(rows[3:4]).save_to_disk(tmp_path / "bad")
    with pytest.raises(UserError, match="row 0: item 'mmlu@3': 'answer_index' is 4"):
        read_usable(tmp_path / "bad")


def test_bundled_items_are_read_like_a_users_own():
    (first, *_) = load_questions(str(HELD_OUT_DATA))
    assert str(first.audio) == f"{HELD_OUT_DATA}, row 0"
    assert first.audio.read_bytes().startswith(b"OggS")
    assert (first.category, first.transcript) == ("", None)
