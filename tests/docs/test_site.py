"""The documentation as a site, opened from a folder: it builds without a warning, fits a phone and a desk, finds words, and
fetches nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        lacking = "no mkdocs: pip install -e '.[docs]'"
        (pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip)(lacking)
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def visit(browser, site: Path, width: int, scheme: str):
    """(page, what happened in it that should not have)."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    happened: list[str] = []
    page.on("console", lambda message: happened.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: happened.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: happened.append(f"{page.url}: {request.url} failed"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or happened.append(request.url))
    page.goto((site / "index.html").as_uri())
    return page, happened


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (DESK, "dark")])
def test_every_page_fits_and_is_quiet(site, browser, width, scheme):
    page, happened = visit(browser, site, width, scheme)
    # A server answers with 404.html, so its links begin at the server's root.
    paths = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(paths) > 20
    for path in paths:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path.name} is wider than {width}"
        broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src)"
        assert page.evaluate(broken) == [], path.name
    assert happened == []


def test_diagrams_are_legible_on_a_phone(site, browser):
    page, _ = visit(browser, site, PHONE, "light")
    for name, diagrams in (("how-a-step-works", 1), ("architecture", 1)):
        page.goto((site / f"{name}.html").as_uri())
        shown = page.locator("img[src$='.svg']")
        assert shown.count() == diagrams
        # Drawn 460 wide with letters of 13.
        assert 13 * shown.first.bounding_box()["width"] / 460 >= 10


def test_search_finds_words_without_a_server(site, browser):
    page, happened = visit(browser, site, DESK, "light")
    page.keyboard.press("f")
    page.keyboard.type("overlong filtering")
    page.locator("a.md-search-result__link[href*='method.html']").first.wait_for(timeout=60_000)
    assert happened == []
