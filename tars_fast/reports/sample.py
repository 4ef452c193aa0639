"""The sample of items on a page, to be read, filtered and listened to."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import zip_longest
from typing import Any

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.evaluation.results import Evaluated, ItemResult, Transcribed
from tars_fast.evaluation.scorers import GRADES
from tars_fast.reports.page import Answer, Item, ItemEvaluation, Sample, Section, data_uri
from tars_fast.types import Modality, Question, Recording, UserError

MOST_ITEMS = 80
"""On the page, evenly of every outcome; a phone's browser shows as many without delay."""
MOST_AUDIO_BYTES = 4 << 20
"""All recordings of the page together, before base64 adds a third."""
MOST_SAMPLED_STEPS = 10
"""Steps of training whose completions are on the page."""
MOST_SAMPLE_BYTES = 1 << 20
"""As `MOST_AUDIO_BYTES`, of these."""
_LARGEST_AS_IS = 128 << 10
"""Bytes of the largest recording that goes into the page as it is; larger ones are encoded again, to mp3."""
_LARGEST_RECORDING = 256 << 10
"""Bytes of the largest recording after encoding: 40 s. Larger ones are left out."""
_MOST_CHARACTERS = 6000
"""Longest question or completion; of longer ones a part is left out."""
_MP3_COMPRESSION = 0.9
"""On soundfile's scale from 0 to 1: 36 kbit/s, enough to recognise words and voices."""
_OUTCOMES = ("speech wrong, text right", "both wrong", "speech right, text wrong", "both right", "open", "failed")
"""Outcomes in the order of the page: items that were lost because they were spoken come first."""
_RECOGNITIONS = ("misheard", "heard right", "")
"""Recognitions in the order of the page; empty: not transcribed."""


def sample_items(results: Mapping[str, Sequence[ItemResult]], data: Mapping[str, Sequence[Question]]) -> Sample:
    """Choose items of every outcome in turn, so that rare outcomes are seen too; the same items for the same results.

    Recordings go into the page as far as they find room.

    Args:
        results: by the name of the evaluation ("before", "after"); an item's outcome is that of the last one.
        data: the items, by the name of their data, for their recordings, which `results` do not name.
    """
    by_key = {name: {result.key: result for result in own} for name, own in results.items()}
    last = list(by_key.values())[-1]
    groups: defaultdict[tuple[int, int, str], list[tuple[str, str]]] = defaultdict(list)
    # By hash and not in the order of the data, which often means something.
    for key in sorted(last, key=lambda key: hashlib.sha256("\0".join(key).encode("utf-8", errors="replace")).digest()):
        groups[_group([own.get(key) for own in by_key.values()])].append(key)
    columns = [groups[group] for group in sorted(groups)]
    turns = [key for turn in range(max(map(len, columns), default=0)) for column in columns for key in column[turn : turn + 1]]
    recordings = {(name, question.id): question.audio for name, questions in data.items() for question in questions}
    items, room = [], MOST_AUDIO_BYTES
    for key in turns[:MOST_ITEMS]:
        item = _item([(name, own.get(key)) for name, own in by_key.items()])
        audio, note = _player(recordings.get(key), room)
        room -= 0 if audio is None else len(audio) * 3 // 4
        items.append(replace(item, audio=audio, audio_note=note))
    items.sort(key=lambda item: (_OUTCOMES.index(item.outcome), _RECOGNITIONS.index(item.recognition)))
    return Sample(items, len(last), _notes(items))


def _notes(items: Sequence[Item]) -> list[str]:
    notes = []
    if any(item.outcome == _OUTCOMES[0] for item in items):
        notes.append("Those answered wrongly when heard and rightly when read come first.")
    if any(item.recognition for item in items):
        notes.append(
            "“misheard”: asked to write down the recording, the model got at least one word wrong, case and punctuation aside; "
            "“heard right”: it got every word. A wrong answer to what was heard right points to the reasoning rather than "
            "to the hearing."
        )
    return notes


def _group(evaluations: Sequence[ItemResult | None]) -> tuple[int, int, str]:
    """(outcome, recognition, change); groups are sorted as on the page."""
    outcome, change = _outcome(evaluations)
    return _OUTCOMES.index(outcome), _RECOGNITIONS.index(_recognition(evaluations)), change


def _recognition(evaluations: Sequence[ItemResult | None]) -> str:
    """Whether the last transcription is right; empty where there is none."""
    transcribed = _transcribed(evaluations)
    return "" if transcribed is None else _RECOGNITIONS[0] if transcribed.word_error_rate > 0 else _RECOGNITIONS[1]


def _transcribed(evaluations: Sequence[ItemResult | None]) -> Transcribed | None:
    """The last transcription."""
    known = [result.evaluated.transcribed for result in evaluations if result is not None and result.evaluated is not None]
    return next((transcribed for transcribed in reversed(known) if transcribed is not None), None)


def _outcome(evaluations: Sequence[ItemResult | None]) -> tuple[str, str]:
    """(both answers in the last evaluation, change of the spoken answer since the first): the filters of the page."""
    first, last = evaluations[0], evaluations[-1]
    if last is None or last.evaluated is None:
        return "failed", ""
    speech, text = last.evaluated.speech.is_correct, last.evaluated.text.is_correct
    if speech is None or text is None:
        return "open", ""
    outcome = {
        (True, True): "both right",
        (True, False): "speech right, text wrong",
        (False, True): "speech wrong, text right",
        (False, False): "both wrong",
    }[speech, text]
    if len(evaluations) == 1 or first is None or first.evaluated is None:
        return outcome, ""
    before = first.evaluated.speech.is_correct
    return outcome, ("stayed " if before == speech else "became ") + ("right" if speech else "wrong")


def _item(results: Sequence[tuple[str, ItemResult | None]]) -> Item:
    evaluations = [(name, result) for name, result in results if result is not None]
    last = evaluations[-1][1]
    all_results = [result for _, result in results]
    outcome, change = _outcome(all_results)
    transcribed = _transcribed(all_results)
    return Item(
        id=last.id,
        data=last.data,
        category=last.category,
        question=_cut(last.question),
        answer=last.answer,
        outcome=outcome,
        change=change,
        recognition=_recognition(all_results),
        transcript=None if transcribed is None else transcribed.transcript,
        audio=None,
        audio_note="",
        evaluations=[_item_evaluation(name, result) for name, result in evaluations],
    )


def _item_evaluation(name: str, result: ItemResult) -> ItemEvaluation:
    evaluated = result.evaluated
    if evaluated is None:
        return ItemEvaluation(name, None, None, "", {}, None, result.failed)
    place = first_divergence(evaluated.speech.completion, evaluated.text.completion)
    right = {modality: evaluated[modality].is_correct for modality in Modality}
    rewards = {f"R_acc, {modality}": float(known) for modality, known in right.items() if known is not None}
    rewards |= {
        f"{GRADES[name]}, {modality}": grade.value
        for modality in Modality
        for name, grade in evaluated[modality].grades.items()
    }
    rewards |= {
        "similarity of words": evaluated.behaviour_similarity,
        "similarity of states, mean over layers": sum(evaluated.layer_cosine) / len(evaluated.layer_cosine),
    }
    for modality in Modality:
        sampled = evaluated[modality].sampled_accuracy
        if sampled is not None:
            rewards[f"accuracy of samples, {modality}"] = sampled
    transcribed = evaluated.transcribed
    return ItemEvaluation(
        name,
        _read_answer(evaluated, Modality.SPEECH, place),
        _read_answer(evaluated, Modality.TEXT, place),
        _divergence(place),
        # An analysis has nan for what it does not compute.
        {name: value for name, value in rewards.items() if math.isfinite(value)},
        None
        if transcribed is None
        else f"{transcribed.transcription} ({100 * transcribed.word_error_rate:.0f} % of the words wrong)",
        None,
    )


def _divergence(place: int | None) -> str:
    """`first_divergence` in words."""
    return "the same words throughout" if place is None else f"they part at word {place + 1}"


def training_samples(lines: Sequence[Mapping[str, Any]], questions: Iterable[Question]) -> Iterator[Section]:
    """A section with completions of the first, the last and some of the steps between; none where there are no samples.

    Args:
        lines: of samples.jsonl.
        questions: the training items, for their recordings.
    """
    steps = list(dict.fromkeys(line["step"] for line in lines))
    if not steps:
        return
    count = min(len(steps), MOST_SAMPLED_STEPS)
    chosen = {steps[number * (len(steps) - 1) // max(1, count - 1)] for number in range(count)}
    recordings = {question.id: question.audio for question in questions}
    items, room = [], MOST_SAMPLE_BYTES
    for line in lines:
        if line["step"] in chosen:
            audio, note = _player(recordings.get(line["id"]), room)
            room -= 0 if audio is None else len(audio) * 3 // 4
            items.append(_sampled_item(line, audio, note))
    notes = [f"Completions of training questions at {count} of {len(steps)} steps, as they were sampled and rewarded."]
    yield Section("What the policy writes", notes, items=items)


def _sampled_item(line: Mapping[str, Any], audio: str | None, audio_note: str) -> Item:
    sampled = {m: line[m] for m in ("speech", "text") if line[m] is not None}
    texts = [one["completion"] for one in sampled.values()]
    place = first_divergence(*texts) if len(texts) == 2 else None
    answers: dict[str, Answer] = {}
    rewards: dict[str, float] = {}
    for modality, one in sampled.items():
        known = {"R": one.get("reward"), **one["rewards"], "advantage": one.get("advantage")}
        rewards |= {f"{name}, {modality}": value for name, value in known.items() if value is not None}
        accuracy = one["rewards"].get("accuracy")
        correct = None if accuracy is None else accuracy == 1
        answers[modality] = _answer(one["completion"], place, correct, "cut off" * one["truncated"])
    divergence = _divergence(place) if len(texts) == 2 else ""
    step = f"step {line['step']}"
    shown = ItemEvaluation(step, answers.get("speech"), answers.get("text"), divergence, rewards, None, None)
    return Item(
        id=line["id"],
        data="",
        category="",
        question=_cut(line["question"]),
        answer=line["answer"],
        outcome=step,
        change="",
        recognition="",
        transcript=None,
        audio=audio,
        audio_note=audio_note,
        evaluations=[shown],
    )


def _words(text: str) -> list[str]:
    """Words with the space before each, so that they join to the text."""
    return re.findall(r"\s*\S+", text)


def first_divergence(left: str, right: str) -> int | None:
    """Number, from 0, of the first word that two completions do not share, or None where all words are the same."""
    pairs = zip_longest(left.split(), right.split())
    return next((place for place, (word, other) in enumerate(pairs) if word != other), None)


def _read_answer(evaluated: Evaluated, modality: Modality, place: int | None) -> Answer:
    answered = evaluated[modality]
    correct, strict = answered.is_correct, answered.readings.get("strict")
    if correct is None:
        note = "graded by no rule"
    elif strict is None or strict.extracted is None:
        note = "no answer could be read"
    else:
        note = f"read as “{strict.extracted}”"
    return _answer(answered.completion, place, correct, note + ", cut off" * answered.truncated)


def _answer(completion: str, place: int | None, correct: bool | None, note: str) -> Answer:
    words = _words(completion)
    place = len(words) if place is None else place
    same, differing = "".join(words[:place]), "".join(words[place : place + 1])
    rest = "".join(words[place + 1 :])
    return Answer(_cut(same, from_start=True), _cut(differing), _cut(rest), correct, note)


def _cut(text: str, from_start: bool = False) -> str:
    """Shorten to `_MOST_CHARACTERS`, at the end or at the beginning."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"[…] {text[-_MOST_CHARACTERS:]}" if from_start else f"{text[:_MOST_CHARACTERS]} […]"


def _player(recording: Recording | None, room: int) -> tuple[str | None, str]:
    """(data: URI, note), the URI None where the recording cannot be read or finds no room."""
    if recording is None:
        return None, "no recording"
    if room <= 0:
        return None, "recording left out, so that the page stays small"
    try:
        content = recording.read_bytes()
        kind, note = _audio_type(content), ""
        if kind is None or len(content) > _LARGEST_AS_IS:
            kind, content, note = "audio/mpeg", _as_mp3(recording), "encoded again for this page"
    except (OSError, UserError) as error:
        return None, f"recording could not be read: {error}"
    if len(content) > min(room, _LARGEST_RECORDING):
        return None, "recording left out, so that the page stays small"
    return data_uri(kind, content), note


def _audio_type(content: bytes) -> str | None:
    """Media type, by the first bytes, of formats that browsers play; None: another format."""
    for start, kind in ((b"OggS", "audio/ogg"), (b"RIFF", "audio/wav"), (b"fLaC", "audio/flac"), (b"ID3", "audio/mpeg")):
        if content.startswith(start):
            return kind
    return "audio/mpeg" if content[:1] == b"\xff" and content[1:2] > b"\xe0" else None


def _as_mp3(recording: Recording) -> bytes:
    """16 kHz mono, which every browser plays."""
    import soundfile

    file = BytesIO()
    soundfile.write(file, decode(recording), SAMPLE_RATE, format="MP3", compression_level=_MP3_COMPRESSION)
    return file.getvalue()
