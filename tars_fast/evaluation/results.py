"""Results of every item of an evaluation, `predictions.jsonl`, and a check that two evaluations are of the same items.

The key of an item is (name of its data, id); resuming, comparing and dividing by a reference match items by it. An item that
could not be evaluated has a result too, with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tars_fast.data.sources import stamp
from tars_fast.evaluation.scorers import Grade, Reading
from tars_fast.support.cli import first_line
from tars_fast.types import Modality, Question, UserError

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Answered:
    """How the model answered one item in one modality."""

    completion: str
    """The greedy completion."""
    truncated: bool
    readings: Mapping[str, Reading]
    """Readings by the scorer's name."""
    sampled_accuracy: float | None
    """Share of correct sampled completions; None: there are none, or no answer to grade them by."""
    grades: Mapping[str, Grade] = field(default_factory=dict)
    """Of an open question, by name in `scorers.GRADES`."""

    @property
    def is_correct(self) -> bool | None:
        """Whether the strict scorer, which training rewards, reads the right answer; None: the item has none."""
        return self.readings["strict"].correct if "strict" in self.readings else None

    @property
    def is_unparsed(self) -> bool | None:
        """Whether the strict scorer could read no answer; None: the item has none."""
        return self.readings["strict"].extracted is None if "strict" in self.readings else None


@dataclass(frozen=True)
class Transcribed:
    """A recording written down by the model."""

    transcription: str
    """What the model wrote."""
    transcript: str
    """What the recording says."""
    word_error_rate: float


@dataclass(frozen=True)
class Evaluated:
    """An item that could be evaluated."""

    speech: Answered
    text: Answered
    behaviour_similarity: float
    layer_cosine: tuple[float, ...]
    """[L] cosine of pooled completion states, speech against text, layers 1 .. L."""
    transcribed: Transcribed | None

    def __getitem__(self, modality: Modality) -> Answered:
        return self.speech if modality is Modality.SPEECH else self.text


@dataclass(frozen=True)
class ItemResult:
    """One item of one evaluation: a line of `predictions.jsonl`."""

    data: str
    """Name of the data it comes from."""
    id: str
    category: str
    question: str
    answer: str
    """The reference answer."""
    evaluated: Evaluated | None
    failed: str | None
    """Why it could not be evaluated."""

    @classmethod
    def of(cls, data: str, question: Question, evaluated: Evaluated | None, failed: str | None) -> ItemResult:
        """The result of `question`, an item of the data set called `data`."""
        return cls(data, question.id, question.category, question.text, question.reference, evaluated, failed)

    @property
    def key(self) -> tuple[str, str]:
        return self.data, self.id

    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ItemResult:
        """Raises ValueError, KeyError or TypeError for anything that `to_line` does not write."""
        values = json.loads(line)
        if values["evaluated"] is not None:
            fields = values["evaluated"]
            for modality in Modality:
                readings = {name: Reading(**reading) for name, reading in fields[modality].pop("readings").items()}
                grades = {name: Grade(**grade) for name, grade in fields[modality].pop("grades", {}).items()}
                fields[modality] = Answered(**fields[modality], readings=readings, grades=grades)
            transcribed = fields.pop("transcribed")
            fields["layer_cosine"] = tuple(fields["layer_cosine"])
            values["evaluated"] = Evaluated(**fields, transcribed=None if transcribed is None else Transcribed(**transcribed))
        return cls(**values)


def recordings_fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 over the `stamp` of each recording, in order: it changes with the files, on this machine, and reads none."""
    return hashlib.sha256(
        "\n".join(stamp(audio) for question in questions for audio in question.recordings or [None]).encode()
    ).hexdigest()


def read_predictions(path: Path, flag: str) -> list[ItemResult]:
    """Read the results of an evaluation from its folder, its evaluation.json, or a jsonl file by itself.

    A last line without its end is left out.

    Args:
        flag: the option of the command line that named the path, for the message.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = path / PREDICTIONS if path.is_dir() else path
    path = path.with_name(PREDICTIONS) if path.suffix == ".json" else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); name the --output-dir of an evaluation") from error
    # What kill -9 cut off has no end of line.
    lines = text.split("\n")[:-1]
    try:
        return [ItemResult.from_line(line) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{flag} {path}: not the predictions of an evaluation by this version ({error!r:.200}); remove the file and repeat "
            "that evaluation"
        ) from error


def read_own(path: Path, data: str, questions: Sequence[Question], remedy: str) -> list[ItemResult]:
    """A run's own results of `questions`, in their order; more than these may stand in the file.

    Args:
        data: the name of the questions' data.
        remedy: what makes the file again, for the message.

    Raises:
        UserError: the file cannot be read, or lacks items.
    """
    try:
        found = {result.key: result for result in read_predictions(path, "--resume")}
        if missing := [question.id for question in questions if (data, question.id) not in found]:
            raise ValueError(f"lacks {len(missing)} of {len(questions)} items")
    except (UserError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--resume: {path} is damaged or missing ({reason}); make it again by {remedy}") from error
    return [found[data, question.id] for question in questions]


def by_data(results: Iterable[ItemResult]) -> dict[str, list[ItemResult]]:
    """Items by the name of their data, in order."""
    data_sets: dict[str, list[ItemResult]] = {}
    for result in results:
        data_sets.setdefault(result.data, []).append(result)
    return data_sets


def check_same_items(data: Mapping[str, Sequence[Question]], others: Sequence[ItemResult], what: str) -> None:
    """Raises UserError where another evaluation is not of the same items; the message says how many differ.

    Args:
        data: the items of this evaluation, by the name of their data.
        others: the results of the other evaluation.
        what: what the message calls the other evaluation.
    """
    own = {
        (name, question.id): (question.text, question.reference) for name, questions in data.items() for question in questions
    }
    theirs = {other.key: (other.question, other.answer) for other in others}
    missing = [key for key in own if key not in theirs]
    added = [key for key in theirs if key not in own]
    changed = [key for key in own if key in theirs and own[key] != theirs[key]]
    if missing or added or changed:
        first = (missing or added or changed)[0]
        raise UserError(
            f"{what}: not an evaluation of the same items: {len(missing)} of these {len(own)} are not in it, {len(added)} of "
            f"its are not here, {len(changed)} ask or answer something else (the first: {first[1]!r} of data {first[0]!r}); "
            "both need the same --data, names included, and to be finished"
        )
