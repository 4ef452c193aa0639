"""A page in one file that needs neither network nor server, to be looked at and listened to.

Everything that stands on it is a dataclass below, so adding to it takes no HTML. Whatever data or model wrote is escaped, and a
content security policy keeps the browser from running or fetching anything but what this module put there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tars_fast.support.files import write_atomically

REPORT = "report.html"
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Table:
    """Cells are shown as they are, the first of each row as its title."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A drawing, what it shows in words, and its numbers."""

    svg: bytes | None
    """None: nothing is installed that draws; words and numbers stay."""
    alt: str
    numbers: Table | None = None

    @property
    def source(self) -> str | None:
        return None if self.svg is None else data_uri("image/svg+xml", self.svg)


@dataclass(frozen=True)
class Section:
    """A headline and what stands below it, in this order."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    settings: Table | None = None
    """Folded away."""


@dataclass(frozen=True)
class Answer:
    """One completion, taken apart where it leaves the one beside it."""

    same: str
    """Word for word what the other one begins with."""
    differing: str
    """The first word that differs; empty where none does."""
    rest: str
    correct: bool
    extracted: str | None
    """What was read as its answer."""
    truncated: bool


@dataclass(frozen=True)
class Stage:
    """What one evaluation made of an item."""

    name: str
    """"before", "after", or "this model"."""
    speech: Answer | None
    """None: it could not be evaluated, `failed` says why."""
    text: Answer | None
    divergence: str
    """Where the two completions part, in words."""
    rewards: Mapping[str, float]
    heard: str | None
    """Transcription of the recording by the model."""
    failed: str | None


@dataclass(frozen=True)
class Item:
    """One question of the browsable sample."""

    id: str
    data: str
    category: str
    question: str
    answer: str
    outcome: str
    """What became of both answers in the last stage."""
    change: str
    """Of the spoken answer since the first stage; empty where there is one stage."""
    heard: str
    """"misheard" or "heard right", by the last transcription; empty where there is none."""
    transcript: str | None
    """What was said."""
    audio: str | None
    """data: URI."""
    audio_note: str
    """Why there is none, or that it was encoded again."""
    stages: Sequence[Stage]


@dataclass(frozen=True)
class Sample:
    """Items to browse, in this order, out of all there are."""

    items: Sequence[Item]
    num_all: int
    notes: Sequence[str] = ()
    """What their tags mean, where words are needed."""


def write_page(path: Path, title: str, sections: Sequence[Section], sample: Sample | None = None) -> None:
    """Write one self-contained HTML file in one go."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_ASSETS)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (_ASSETS / "report.js").read_text(encoding="utf-8")
    # The one script that a browser runs on this page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.jinja")
    page = template.render(title=title, sections=sections, sample=sample, script=Markup(script), digest=digest)
    # A surrogate that a tokeniser left behind has no UTF-8.
    write_atomically(path, page.encode("utf-8", errors="replace"))


def data_uri(kind: str, content: bytes) -> str:
    """Args: kind, a media type such as image/svg+xml."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
