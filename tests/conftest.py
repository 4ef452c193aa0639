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
from pages import CHROMIUM

from tars_fast.config import PRESETS, RunConfig, TrainConfig
from tars_fast.data import TRAINING_DATA, load_questions
from tars_fast.models import SpeechModel, load_model, make_trainable

# A shell that starts the tests in the background has them ignore Ctrl-C, which some are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# Nothing here needs the hub; without it a name that is not a folder fails at once instead of after a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"


def new_model(**changes) -> SpeechModel:
    """The embedded model as the loop prepares it, fully trainable unless `changes` say otherwise."""
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    settings = {"lora_rank": 0, "lora_alpha": 32.0, "freeze_audio": True, "gradient_checkpointing": False, "adapter": None}
    make_trainable(model, **(settings | changes))
    return model


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
    return TrainConfig(questions_per_step=4, num_steps=4).resolve(
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
