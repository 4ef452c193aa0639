"""The benchmark of the training side: its contenders compute the same, and it says so where they do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import train_step

    yield train_step
    # Their names are too common to be left importable for other tests.
    for name in ("train_step", "baselines", "engine", "report"):
        sys.modules.pop(name, None)


def test_tiny_run(train_step, tmp_path):
    path = tmp_path / "step.json"
    assert (
        train_step.main(["--shape", "tiny", "--repeats", "1", "--micro-batches", "8", "--no-memory", "--json", str(path)]) == 0
    )
    report = json.loads(path.read_text())
    assert {"device", "versions", "commit", "speedup_vs_released", "speedup_vs_trl"} <= report.keys()
    assert report["cases"].keys() == {"full", "lora"}
    for case in report["cases"].values():
        assert max(case["gradient_relative_error"].values()) < 1e-5
        found = case["contenders"]
        assert found["ours"]["forward_positions"] < found["trl_single_pass"]["forward_positions"]
        assert found["trl"]["forward_positions"] == 2 * found["trl"]["backward_positions"]
        assert found["released"]["forward_positions"] == 3 * found["released"]["backward_positions"]
        assert all(0 <= result["padding_share"] < 0.5 and result["median_seconds"] > 0 for result in found.values())


@pytest.mark.parametrize(("what", "factor"), [("gradient", 1.01), ("reward", 1.0)])
def test_nothing_is_timed_where_contenders_differ(train_step, monkeypatch, capsys, what, factor):
    def wrong(inputs):
        rewards_N, advantages_N = train_step.released_step(inputs)
        for parameter in inputs.model.trainable_parameters():
            parameter.grad *= factor
        return rewards_N + (what == "reward"), advantages_N

    monkeypatch.setitem(train_step.CONTENDERS, "released", train_step.Contender(wrong, 3))
    assert train_step.main(["--shape", "tiny", "--cases", "full", "--no-memory"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert what in err
    assert err.count("\n") == 1


def test_memory_of_a_step(train_step, tmp_path, capsys):
    found = {}
    with train_step.peak_memory(found):
        torch.ones(16 * 2**20).sum()
    assert 2**26 - 2**20 <= found["peak_bytes"] < 2**26 + 2**23
    workload = train_step.cases_of("tiny")["full"]
    rollout = train_step.make_rollout(train_step.make_model(workload), workload)
    torch.save((workload, rollout, torch.ones(len(rollout.completions))), tmp_path / "rollout.pt")
    train_step.main(["--worker", "trl_single_pass", "--worker-size", "8", "--worker-file", str(tmp_path / "rollout.pt")])
    assert int(capsys.readouterr().out) > 0
