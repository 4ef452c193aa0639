"""What tests of a page share: its elements, hostile text, and a browser that keeps account of what happens."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = '</p><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} & "quoted" $\\frac$ \ud800'
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser"))), None
)
_ENDED = "(audio) => new Promise((done) => { audio.onended = () => done(true); setTimeout(() => done(audio.ended), 20000); })"


class Elements(HTMLParser):
    """Tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._in_code = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        self._in_code = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._in_code = False
        # Between cells there is no space in the file.
        self.text += " " * (tag in ("th", "td", "li"))

    def handle_data(self, data):
        if not self._in_code:
            self.text += data

    @property
    def words(self) -> str:
        """The text, whatever spaces there are in it, as one."""
        return " ".join(self.text.split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_nothing_foreign(page: str) -> Elements:
    """One script, no handlers, no links, nothing that is fetched."""
    elements = Elements(page)
    assert len(elements.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert not {"a", "iframe", "object", "form", "base"} & {tag for tag, _ in elements.tags}
    for _, attributes in elements.tags:
        assert all(attributes[name].startswith("data:") for name in ("src", "href") if name in attributes)
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = (meta["content"] for meta in elements.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    return elements


@contextmanager
def on_a_phone(browser, path: Path):
    """The page, 375 px wide: it is no wider, its pictures are there, nothing is said or fetched while it is used."""
    page = browser.new_page(viewport={"width": 375, "height": 700})
    happened, requests = [], []
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda one: happened.append(str(one)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 375, "wider than a phone"
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    yield page
    assert not happened
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "blob"}


def check_plays(item) -> None:
    """Open an item; its recording plays to its end."""
    item.locator("summary").click()
    player = item.locator("audio")
    # A click, as on the button: browsers play nothing that nobody asked for.
    player.click(position={"x": 22, "y": player.bounding_box()["height"] / 2})
    assert player.evaluate(_ENDED), "the recording did not play to its end"
    assert player.evaluate("(audio) => audio.error === null && audio.currentTime > 0.5")
