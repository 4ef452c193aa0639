"""A page in one file, which needs neither network nor server, to be looked at and listened to.

Dataclasses of this module are all its content, so adding to it takes no HTML. Texts of data and models are escaped, and a
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
    """A plot, what it shows in words, and its numbers."""

    svg: bytes | None
    """None: matplotlib is not installed; words and numbers stay."""
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
    items: Sequence[Item] = ()
    """Below each other; the browsable sample is not among them."""
    settings: Table | None = None
    """Folded away."""


@dataclass(frozen=True)
class Answer:
    """A completion, split where it departs from that of the other modality."""

    same: str
    """The words at the beginning that both completions share."""
    differing: str
    """The first word that differs; empty where none does."""
    rest: str
    correct: bool | None
    """None: no rule can tell."""
    note: str
    """In words: how it was read, and whether it was cut off."""


@dataclass(frozen=True)
class ItemEvaluation:
    """An item in one evaluation."""

    name: str
    """"before", "after", "this model", or the step of a sample."""
    speech: Answer | None
    """None: there is none; where the item could not be evaluated, `failed` says why."""
    text: Answer | None
    divergence: str
    """In words: where the two completions begin to differ; empty where one is missing."""
    rewards: Mapping[str, float]
    transcription: str | None
    """The recording written down by the model."""
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
    """Both answers in the last evaluation."""
    change: str
    """Change of the spoken answer since the first evaluation; empty where there is one evaluation."""
    recognition: str
    """"misheard" or "heard right", by the last transcription; empty where there is none."""
    transcript: str | None
    """What the recording says."""
    audio: str | None
    """data: URI."""
    audio_note: str
    """Why there is no recording, or that it was encoded again."""
    evaluations: Sequence[ItemEvaluation]


@dataclass(frozen=True)
class Sample:
    """Some of all items, in the order of the page."""

    items: Sequence[Item]
    num_all: int
    notes: Sequence[str] = ()
    """What the tags of items mean."""


def write_page(path: Path, title: str, sections: Sequence[Section], sample: Sample | None = None) -> None:
    """Write a self-contained HTML file, atomically."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_ASSETS)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (_ASSETS / "report.js").read_text(encoding="utf-8")
    # Browsers run this script alone on the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.jinja")
    page = template.render(title=title, sections=sections, sample=sample, script=Markup(script), digest=digest)
    # A surrogate that a tokeniser left behind has no UTF-8.
    write_atomically(path, page.encode("utf-8", errors="replace"))


def data_uri(kind: str, content: bytes) -> str:
    """Args: kind, a media type such as image/svg+xml."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
