"""Checks of a data set: every item is decoded, and every problem is listed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tars_fast.data.audio import MIN_SECONDS, SAMPLE_RATE, read_wave
from tars_fast.data.items import Item
from tars_fast.types import Recording, UserError

UNUSABLE = ("bad item", "duplicate id", "control token", "unreadable", "silent", "too short", "too long")
NOTES = ("clipped", "not 16 kHz", "no answer")
"""Problems that are only noted: training accepts such items, those without an answer where no reward needs it."""

_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
"""As every supported model spells them; the model itself refuses only those that it has."""
_SILENT_PEAK = 1e-3
"""A recording whose peak is lower is silent: -60 dB of full scale is below the noise of any room."""
_FULL_SCALE = 0.999
_CLIPPED_SHARE = 1e-3
"""A recording is clipped where a larger share of its samples is at full scale; a normalised one has a few such samples."""


@dataclass(frozen=True)
class Finding:
    """One problem of one item."""

    place: str
    """See `Item.place`."""
    id: str
    """Empty where the item could not be read."""
    problem: str
    """One of `UNUSABLE` or `NOTES`."""
    detail: str


@dataclass(frozen=True)
class Inspection:
    """All problems of one item."""

    findings: tuple[Finding, ...]
    seconds: float | None
    """Length of the recording; None where there is none that can be read."""

    @property
    def usable(self) -> bool:
        return not any(finding.problem in UNUSABLE for finding in self.findings)


def inspect_recording(recording: Recording, max_seconds: float) -> tuple[dict[str, str], float | None]:
    """Check one recording.

    Returns:
        (problem -> detail, length in seconds or None where it cannot be read).
    """
    try:
        wave, rate = read_wave(recording)
    except UserError as error:
        return {"unreadable": str(error)}, None
    problems: dict[str, str] = {}
    seconds = len(wave) / rate
    if seconds < MIN_SECONDS:
        problems["too short"] = f"{seconds:.3f} s, at least {MIN_SECONDS} s are needed"
    elif seconds > max_seconds:
        problems["too long"] = f"{seconds:.1f} s, more than {max_seconds:g} s"
    level = np.abs(wave)
    if len(wave) and level.max() < _SILENT_PEAK:
        problems["silent"] = f"no sample reaches {_SILENT_PEAK:g} of full scale"
    elif len(wave) and (share := float(np.mean(level >= _FULL_SCALE))) > _CLIPPED_SHARE:
        problems["clipped"] = f"{share:.1%} of its samples are at full scale"
    if rate != SAMPLE_RATE:
        problems["not 16 kHz"] = f"{rate} Hz, resampled when it is read"
    return problems, seconds


def inspect_item(item: Item, max_seconds: float) -> Inspection:
    name = "" if item.question is None else item.question.id
    findings = []
    if item.error is not None:
        detail = str(item.error).removeprefix(f"{item.place}: ")
        findings.append(Finding(item.place, name, "bad item" if item.question is None else "duplicate id", detail))
    if item.question is not None and (found := _CONTROL_TOKEN.search(item.question.text)):
        detail = f"its text holds {found[0]}, which models take for a sign of their own; remove it"
        findings.append(Finding(item.place, name, "control token", detail))
    if item.question is not None and not (item.question.has_answer or item.question.rubric or item.question.rule):
        objectives = "--objective opd trains" if not item.question.choices else "--objective opd and cord train"
        findings.append(Finding(item.place, name, "no answer", f"{objectives} on it, others do not, nor is it evaluated"))
    seconds = None
    if item.audio is not None:
        problems, seconds = inspect_recording(item.audio, max_seconds)
        findings.extend(Finding(item.place, name, problem, detail) for problem, detail in problems.items())
    return Inspection(tuple(findings), seconds)


def inspect_items(items: Sequence[Item], max_seconds: float, jobs: int) -> Iterator[Inspection]:
    """Check items in `jobs` threads, since decoding releases the interpreter's lock; results come in the order of `items`."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(lambda item: inspect_item(item, max_seconds), items)
        finally:
            pool.shutdown(cancel_futures=True)
