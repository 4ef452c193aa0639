"""The scripts of the evidence: which rate an arm gets, and that every objective can be timed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from tars_fast.ablate import parse_settings, parse_training
from tars_fast.config import TrainConfig
from tars_fast.support.command_line import as_arguments

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield
    # Their names are too common to be left importable for other tests.
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCH:
            del sys.modules[name]


def test_the_rate_that_keeps_text_wins(bench):
    from evidence import RATES, choose_rate

    def figures(speech: float, text: list[float]) -> dict[str, object]:
        mean = {"speech_accuracy_sampled": speech, "speech_accuracy": speech, "text_accuracy_sampled": sum(text) / len(text)}
        return {**mean, "text_accuracy_sampled_by_seed": text}

    start = {"text_accuracy_sampled_by_seed": [0.98, 0.99]}
    arms = {"tars_1e-4": figures(0.5, [0.98, 0.985]), "tars_2e-4": figures(0.6, [0.97, 0.985])}
    # At the second a whole point is lost in a seed, which is allowed.
    arms |= {"tars_4e-4": figures(0.9, [0.99, 0.97])}
    found = choose_rate({"start": start, "arms": arms, "failed": {}}, "tars", RATES["pocket-hard"], {})
    assert (found["chosen"], found["keeps_text"]) == ("2e-4", True)
    assert found["tried"]["4e-4"]["most_lost_in_text"] == pytest.approx(0.02)
    only = {name: own for name, own in arms.items() if name == "tars_4e-4"}
    failed = {"tars_1e-4, seed 0": "stopped: NaN"}
    found = choose_rate({"start": start, "arms": only, "failed": failed}, "tars", RATES["pocket-hard"], {})
    assert (found["chosen"], found["keeps_text"]) == ("4e-4", False)
    assert found["stopped"] == {"1e-4": "stopped: NaN", "2e-4": None}
    # One seed of two was stopped.
    short = {"tars_1e-4": arms["tars_1e-4"], "tars_2e-4": figures(0.9, [0.99])}
    failed = {"tars_2e-4, seed 1": "NaN"}
    found = choose_rate({"start": start, "arms": short, "failed": failed}, "tars", RATES["pocket-hard"], {})
    assert (found["chosen"], found["stopped"]["2e-4"]) == ("1e-4", "NaN")
    # A later command tries one of these rates again, and with other seeds: what the first found of the others stays.
    later = choose_rate({"start": start, "arms": {"tars_2e-4": arms["tars_2e-4"]}, "failed": {}}, "tars", ["2e-4"], found)
    assert later["chosen"] == "2e-4"
    assert later["tried"].keys() == {"1e-4", "2e-4"}
    assert later["stopped"].keys() == {"4e-4"}


def test_arms_and_variants_are_settings(bench):
    from evidence import ARMS, RATES, VARIANTS, by_rate

    for table in (ARMS, VARIANTS):
        for name, settings in by_rate(table, RATES["pocket"]).items():
            values = parse_settings(f"--define {name}:", settings.split(","), set())
            config = parse_training(name, as_arguments(TrainConfig, values))
            assert config.learning_rate in map(float, RATES["pocket"]), name


def test_every_objective_is_timed(bench, capsys):
    import objectives
    from train_step import cases_of

    workload = cases_of("tiny")["lora"]
    anchored = [name for name, own in objectives.ARMS.items() if dataclasses.replace(workload.config(), **own).anchors_by_kl]
    assert anchored == ["opd, anchored"]
    found = objectives.measure(workload, 1)
    assert found.keys() == objectives.ARMS.keys()
    assert all(seconds["seconds/update"] > 0 for seconds in found.values())
    assert "seconds/teacher" in found["opd"]
    assert "seconds/teacher" not in found["tars"]
