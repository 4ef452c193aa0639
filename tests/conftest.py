"""Fixtures around the embedded model: 1.2 M parameters, so the real thing runs wherever a mock would."""

from __future__ import annotations

import os
import signal

# More threads than one gain nothing at this width, and sums then do not depend on the machine's cores; libraries read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import pytest
import torch
from embedded import new_model
from pages import CHROMIUM

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.requirements import installed, missing, supported
from tars_fast.types import UserError

# A shell that starts the tests in the background has them ignore Ctrl-C, which some are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# Nothing here needs the hub; without it a name that is not a folder fails at once instead of after a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"


# As they are imported.
ABSENT = {{"scikit-learn": "sklearn"}.get(name, name.replace("-", "_")) for name in supported("dev") if installed(name) is None}
REFUSALS = {missing(extra) for extra in ("train", "analysis", "speech")} - {None}


def skip_without_package(error: BaseException | None) -> None:
    """Skip what failed for want of a package that the extra `dev` brings: a ready-made image has few of them."""
    absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in ABSENT
    if absent or (isinstance(error, UserError) and str(error) in REFUSALS):
        pytest.skip(f"needs pip install -e '.[dev]': {error}", allow_module_level=True)


class Module(pytest.Module):
    """A file of tests, skipped where it imports what is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            skip_without_package(error.__cause__)
            raise


def pytest_pycollect_makemodule(module_path, parent) -> Module:
    return Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except Exception as error:
        skip_without_package(error)
        raise


pytest_runtest_call = pytest_runtest_setup


@pytest.fixture
def hub(monkeypatch):
    """A server that stands in for the Hugging Face hub, for huggingface_hub as it is."""
    from hub_server import TOKEN, hub_server
    from huggingface_hub import constants

    with hub_server() as state:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", state.address)
        # Its own storage has a protocol of its own; without it files go as large files of git.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


@pytest.fixture
def model() -> SpeechModel:
    """A fresh fully trainable embedded model; tests may change its weights."""
    return new_model()


@pytest.fixture
def lora_model() -> SpeechModel:
    return new_model(lora_rank=4)


@pytest.fixture(scope="session")
def questions():
    return load_questions(TRAINING_DATA)[:6]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return TrainConfig(objective="tars", questions_per_step=4, num_steps=4).resolve(
        PRESETS["pocket"], output_dir=tmp_path, tokens_per_micro_batch=4096
    )


@pytest.fixture
def make_model():
    """`new_model`, for tests that need a model prepared in their own way."""
    return new_model


@pytest.fixture
def browser():
    """A headless Chromium. Without one the test is skipped, or fails where BROWSER_TESTS is "required"."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sync_playwright = None
    if sync_playwright is None or CHROMIUM is None:
        lacking = "pip install playwright, apt-get install chromium-headless-shell, or name a Chromium in the variable CHROMIUM"
        (pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip)(f"no browser: {lacking}")
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, which builds usually are.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
