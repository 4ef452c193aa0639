"""`report.html` of a run: its figures, curves and items as sections of a `page`.

`write_report` makes it from a folder of `train` or `evaluate`. What other commands show on pages of their own is public here:
`draw_sample`, `training_curves`, `curves_picture`, `settings_section`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.evaluation.figures import OVERALL
from tars_fast.evaluation.metrics import Curve
from tars_fast.evaluation.results import PREDICTIONS, Evaluated, ItemResult, Transcribed, by_data, read_predictions
from tars_fast.reports.figure import accuracy_figure, as_svg, can_draw, curves_figure
from tars_fast.reports.log import figure_rows, shown
from tars_fast.reports.page import REPORT, Answer, Item, Picture, Sample, Section, Stage, Table, data_uri, write_page
from tars_fast.types import Modality, Question, Recording, UserError

MOST_ITEMS = 80
"""On the page, drawn evenly from what became of them; what a browser of a phone shows without delay."""
MOST_AUDIO_BYTES = 4 << 20
"""Of all recordings on the page together, before base64 adds a third."""
_LARGEST_AS_IS = 128 << 10
"""Bytes of a recording that is taken over as it was written; a larger one is encoded again, if that makes it small enough."""
_LARGEST_RECORDING = 256 << 10
"""Bytes; 40 s at the rate that recordings are encoded at."""
_MOST_CHARACTERS = 6000
"""Of a question or completion."""
_MP3_COMPRESSION = 0.9
"""Of soundfile's 0 to 1: 36 kbit/s for speech, where a recognisable voice matters and not its beauty."""
_OUTCOMES = ("speech wrong, text right", "both wrong", "speech right, text wrong", "both right", "failed")
"""In the order of the page: what was answered wrongly because it was heard comes first."""
_HEARD = ("misheard", "heard right", "")


@dataclass(frozen=True)
class Compared:
    """Another evaluation of the same items, which this one is held against."""

    results: Sequence[ItemResult]
    reports: Mapping[str, Mapping[str, Any]]
    """By the name of the data, `overall` among them."""


def write_report(
    output_dir: Path,
    data: Mapping[str, Sequence[Question]],
    compared: Compared | None = None,
    sections: Sequence[Section] = (),
) -> None:
    """`report.html` of the folder of a finished training run or evaluation.

    Args:
        output_dir: holds evaluation.json, config.json and predictions; metrics.jsonl is shown where there is one.
        data: the items that were evaluated, by the name of their data; where their recordings are is in no file.
        compared: what an evaluation was compared with.
        sections: more, behind the others.
    """
    settings = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("evaluation", settings)
    results, reports, changes = _read_evaluation(output_dir, compared)
    found = [*_figures(reports, changes), *_layer_curves(reports)]
    if (output_dir / "metrics.jsonl").exists():
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found += training_curves([json.loads(line) for line in lines])
    found += [*sections, settings_section(settings)]
    kind = "trained" if "before" in results and compared is None else "evaluated"
    write_page(output_dir / REPORT, f"{settings['model']}, {kind}", found, draw_sample(results, data))


def _read_evaluation(
    output_dir: Path, compared: Compared | None
) -> tuple[dict[str, list[ItemResult]], dict[str, dict[str, Mapping[str, Any]]], dict[str, Mapping[str, Any]]]:
    """(items by stage, reports by data and stage, changes by data)."""
    evaluation = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))
    if (output_dir / "predictions_after.jsonl").exists():
        stages = {when: read_predictions(output_dir / f"predictions_{when}.jsonl", REPORT) for when in ("before", "after")}
        (name,) = by_data(stages["after"])
        return stages, {name: {when: evaluation[when] for when in stages}}, {name: evaluation["change"]}
    results = read_predictions(output_dir / PREDICTIONS, REPORT)
    # A mean over one data set says nothing new.
    names = [name for name in evaluation if name != OVERALL or len(evaluation) > 2]
    changes = {name: evaluation[name]["change"] for name in names if "change" in evaluation[name]}
    if compared is None:
        return {"this model": results}, {name: {"this model": evaluation[name]} for name in names}, changes
    reports = {name: {"before": compared.reports[name], "after": evaluation[name]} for name in names}
    return {"before": list(compared.results), "after": results}, reports, changes


def _figures(
    reports: Mapping[str, Mapping[str, Mapping[str, Any]]], changes: Mapping[str, Mapping[str, Any]]
) -> Iterator[Section]:
    """Accuracy, MRR and the rest, a section for each data set."""
    for name, stages in reports.items():
        columns = dict(stages) | ({"change": changes[name]} if name in changes else {})
        title = "Mean over the data" if name == OVERALL else f"Accuracy on {name}"
        notes = ["95 % bootstrap intervals in brackets; a change is paired by item."]
        notes += [f"{stage}: {report['num_items']} items, {report['num_failed']} failed." for stage, report in stages.items()]
        for modality in Modality:
            accuracy = f"{modality}_accuracy"
            if f"{accuracy}_mcnemar_p" in changes.get(name, {}):
                change = changes[name]
                notes.append(
                    f"{modality}: {change[f'{accuracy}_gained']} items became right, {change[f'{accuracy}_lost']} wrong; "
                    f"McNemar's exact test p = {change[f'{accuracy}_mcnemar_p']:.2g}."
                )
        rows = figure_rows(columns, differences=("change",))
        tables = [Table(("", *columns), rows)] if rows else []
        pictures = []
        if can_draw() and all(report["num_items"] for report in stages.values()):
            alt = f"Greedy accuracy of spoken and written questions, {' and '.join(stages)}"
            pictures = [Picture(as_svg(accuracy_figure({name: stages})), f"{alt}; the numbers are in the table.")]
        yield Section(title, notes, tables, pictures)


def _layer_curves(reports: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[Section]:
    """Cosine of pooled states by layer."""
    pictures = []
    for name, stages in reports.items():
        known = {stage: report for stage, report in stages.items() if "layer_cosine" in report}
        curves = {stage: layer_curve(one["layer_cosine"], one["layer_cosine_ci95"]) for stage, one in known.items()}
        if curves:
            alt = f"Cosine of pooled hidden states by layer, {name}, {' and '.join(known)}, with 95 % intervals"
            pictures.append(curves_picture(curves, "layer", "cosine", alt))
    if pictures:
        yield Section(
            "Hidden states, speech to text",
            ["Each item's spoken and written completion, their states averaged over tokens, compared layer by layer."],
            pictures=pictures,
        )


def layer_curve(values: Sequence[float | None], intervals: Sequence[Sequence[float | None]]) -> Curve:
    """A figure of each layer, or of whatever counts from 1.

    Args:
        values: [L]
        intervals: [L] of (low, high)
    """
    low, high = zip(*intervals, strict=True)
    return Curve(range(1, len(values) + 1), values, low, high)


def curves_picture(
    curves: Mapping[str, Curve], x_label: str, y_label: str, alt: str, spec: str = ".3f", order: Sequence[str] = ()
) -> Picture:
    """Curves over the same places, and their numbers with intervals as a table.

    Args:
        alt: what the picture shows, in words.
        spec: format of the numbers.
        order: see `curves_figure`.
    """
    columns = []
    for curve in curves.values():
        unknown = [None] * len(curve.x)
        ends = zip(curve.low or unknown, curve.high or unknown, strict=True)
        columns.append([shown(value, end, spec) for value, end in zip(curve.y, ends, strict=True)])
    (places,) = {tuple(curve.x) for curve in curves.values()}
    rows = [(f"{place:g}", *cells) for place, *cells in zip(places, *columns, strict=True)]
    return draw_curves(curves, x_label, y_label, alt, Table((x_label, *curves), rows), order)


def draw_curves(
    curves: Mapping[str, Curve], x_label: str, y_label: str, alt: str, numbers: Table, order: Sequence[str] = ()
) -> Picture:
    """`curves_picture` with another table, for curves of many points."""
    return Picture(as_svg(curves_figure({"": curves}, x_label, y_label, order)) if can_draw() else None, alt, numbers)


_OVER_STEPS = {
    "R_acc": {"speech": "accuracy/speech", "text": "accuracy/text"},
    "R_fmt": {"speech": "format/speech", "text": "format/text"},
    "R_rep and R_beh, speech": {"R_rep": "reward/representation", "R_beh": "reward/behaviour"},
    "Total reward": {"speech": "reward/speech", "text": "reward/text"},
    "Entropy, nats a token": {"speech": "entropy/speech", "text": "entropy/text"},
}
"""Title -> curves -> what metrics.jsonl calls them."""


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Iterator[Section]:
    """What metrics.jsonl holds, over the steps: a section, or none where there are no steps.

    Args:
        metrics: its lines.
    """
    if not metrics:
        return
    steps = [line["step"] for line in metrics]
    pictures = []
    for label, names in _OVER_STEPS.items():
        curves = {title: Curve(steps, [line[name] for line in metrics]).thinned() for title, name in names.items()}
        ends = [(title, shown(curve.y[0], None, ".3f"), shown(curve.y[-1], None, ".3f")) for title, curve in curves.items()]
        numbers = Table(("", "beginning", "end"), ends)
        pictures.append(draw_curves(curves, "step", label, f"{label} over {len(steps)} steps", numbers))
    yield Section("Training", ["Means over each step's completions; in a long run over neighbouring steps too."], (), pictures)


def settings_section(settings: Mapping[str, Any]) -> Section:
    """All of them, folded away."""
    listed = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in settings.items()]
    return Section("Settings", settings=Table(("setting", "value"), listed))


def draw_sample(results: Mapping[str, Sequence[ItemResult]], data: Mapping[str, Sequence[Question]]) -> Sample:
    """Items of every outcome in turn, so that what is rare is there to be looked at; recordings as far as they find room.

    Args:
        results: by the name of the stage ("before", "after"), the last one deciding what an item's outcome is.
        data: the items, by the name of their data, for their recordings; where those are is in no file.
    """
    found = {stage: {result.key: result for result in part} for stage, part in results.items()}
    last = list(found.values())[-1]
    groups: defaultdict[tuple[int, int, str], list[tuple[str, str]]] = defaultdict(list)
    # Not the first ones: data are often in an order that means something. The same items each time.
    for key in sorted(last, key=lambda key: hashlib.sha256("\0".join(key).encode("utf-8", errors="replace")).digest()):
        groups[_place([part.get(key) for part in found.values()])].append(key)
    columns = [groups[place] for place in sorted(groups)]
    turns = [key for place in range(max(map(len, columns), default=0)) for part in columns for key in part[place : place + 1]]
    recordings = {(name, question.id): question.audio for name, part in data.items() for question in part}
    items, left = [], MOST_AUDIO_BYTES
    for key in turns[:MOST_ITEMS]:
        item = _item([(stage, part.get(key)) for stage, part in found.items()])
        audio, note = _player(recordings.get(key), left)
        left -= 0 if audio is None else len(audio) * 3 // 4
        items.append(replace(item, audio=audio, audio_note=note))
    items.sort(key=lambda item: (_OUTCOMES.index(item.outcome), _HEARD.index(item.heard)))
    return Sample(items, len(last), _notes(items))


def _notes(items: Sequence[Item]) -> list[str]:
    notes = []
    if any(item.outcome == _OUTCOMES[0] for item in items):
        notes.append("Those answered wrongly when heard and rightly when read come first.")
    if any(item.heard for item in items):
        notes.append(
            "“misheard”: asked to write down the recording, the model got at least one word wrong, case and punctuation aside; "
            "“heard right”: it got every word. A wrong answer to what was heard right points to the reasoning rather than "
            "to the hearing."
        )
    return notes


def _place(stages: Sequence[ItemResult | None]) -> tuple[int, int, str]:
    """Where an item's group stands on the page."""
    outcome, change = _outcome(stages)
    return _OUTCOMES.index(outcome), _HEARD.index(_heard(stages)), change


def _heard(stages: Sequence[ItemResult | None]) -> str:
    """Whether the last transcription is right; empty where there is none."""
    transcribed = _transcribed(stages)
    return "" if transcribed is None else _HEARD[0] if transcribed.word_error_rate > 0 else _HEARD[1]


def _transcribed(stages: Sequence[ItemResult | None]) -> Transcribed | None:
    """The last one."""
    known = [result.evaluated.transcribed for result in stages if result is not None and result.evaluated is not None]
    return next((transcribed for transcribed in reversed(known) if transcribed is not None), None)


def _outcome(stages: Sequence[ItemResult | None]) -> tuple[str, str]:
    """(both answers in the last stage, the spoken one since the first): what the page filters by."""
    first, last = stages[0], stages[-1]
    if last is None or last.evaluated is None:
        return "failed", ""
    speech, text = (_is_correct(last.evaluated, modality) for modality in Modality)
    outcome = {
        (True, True): "both right",
        (True, False): "speech right, text wrong",
        (False, True): "speech wrong, text right",
        (False, False): "both wrong",
    }[speech, text]
    if len(stages) == 1 or first is None or first.evaluated is None:
        return outcome, ""
    was = _is_correct(first.evaluated, Modality.SPEECH)
    return outcome, ("stayed " if was == speech else "became ") + ("right" if speech else "wrong")


def _is_correct(evaluated: Evaluated, modality: Modality) -> bool:
    return getattr(evaluated, modality).readings["strict"].correct


def _item(results: Sequence[tuple[str, ItemResult | None]]) -> Item:
    stages = [(name, result) for name, result in results if result is not None]
    last = stages[-1][1]
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
        heard=_heard(all_results),
        transcript=None if transcribed is None else transcribed.transcript,
        audio=None,
        audio_note="",
        stages=[_stage(name, result) for name, result in stages],
    )


def _stage(name: str, result: ItemResult) -> Stage:
    evaluated = result.evaluated
    if evaluated is None:
        return Stage(name, None, None, "", {}, None, result.failed)
    spoken, written = (evaluated.speech.completion, evaluated.text.completion)
    place = first_divergence(spoken, written)
    rewards = {f"R_acc, {modality}": float(_is_correct(evaluated, modality)) for modality in Modality}
    rewards |= {
        "similarity of words": evaluated.behaviour_similarity,
        "similarity of states, mean over layers": sum(evaluated.layer_cosine) / len(evaluated.layer_cosine),
    }
    for modality in Modality:
        sampled = getattr(evaluated, modality).sampled_accuracy
        if sampled is not None:
            rewards[f"accuracy of samples, {modality}"] = sampled
    divergence = "the same words throughout" if place is None else f"they part at word {place + 1}"
    heard = evaluated.transcribed
    return Stage(
        name,
        _answer(evaluated, Modality.SPEECH, place),
        _answer(evaluated, Modality.TEXT, place),
        divergence,
        # What an analysis does not look at is nan.
        {name: value for name, value in rewards.items() if math.isfinite(value)},
        None if heard is None else f"{heard.transcription} ({100 * heard.word_error_rate:.0f} % of the words wrong)",
        None,
    )


def _words(text: str) -> list[str]:
    """With the space before each, so that they join to the text."""
    return re.findall(r"\s*\S+", text)


def first_divergence(one: str, other: str) -> int | None:
    """Number of the first word, from 0, in which two completions differ, be it that one of them has ended; None: in no word."""
    words, others = one.split(), other.split()
    for place, (word, another) in enumerate(zip(words, others, strict=False)):
        if word != another:
            return place
    return None if len(words) == len(others) else min(len(words), len(others))


def _answer(evaluated: Evaluated, modality: Modality, place: int | None) -> Answer:
    answered = getattr(evaluated, modality)
    words = _words(answered.completion)
    place = len(words) if place is None else place
    same, differing = "".join(words[:place]), "".join(words[place : place + 1])
    rest = "".join(words[place + 1 :])
    reading = answered.readings["strict"]
    return Answer(
        _cut(same, from_start=True), _cut(differing), _cut(rest), reading.correct, reading.extracted, answered.truncated
    )


def _cut(text: str, from_start: bool = False) -> str:
    """At most `_MOST_CHARACTERS`, its end or its beginning left out."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"[…] {text[-_MOST_CHARACTERS:]}" if from_start else f"{text[:_MOST_CHARACTERS]} […]"


def _player(recording: Recording | None, room: int) -> tuple[str | None, str]:
    """(data: URI, what to say of it), the URI None where the recording cannot be had or finds no room."""
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
    """Of what browsers play, by its first bytes; None: something else."""
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
