"""The tile of the row kernels: the default, what was tuned for a GPU, and the command that tunes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tars_kernels import rows

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import tune

VOCABULARY = 5000


def test_a_tuned_tile_replaces_the_default_on_its_gpu(monkeypatch):
    other = {"ROWS": 2, "LANES": 4096, "num_warps": 16}
    monkeypatch.setattr(rows, "TUNED_TILES", {"9.0": other})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), other), ((8, 0), tune.DEFAULT)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert rows.tile(VOCABULARY) == expected
    assert rows.tile(1000)["ROWS"] == 1


def test_tuning_takes_what_is_faster_than_noise():
    default = tune.CANDIDATES.index(tune.DEFAULT)
    times = {5000: [2.0] * len(tune.CANDIDATES), 6000: [2.0] * len(tune.CANDIDATES)}
    assert tune.fastest(times, tune.CANDIDATES) is None
    times[5000][default - 1] = 1.5
    assert tune.fastest(times, tune.CANDIDATES) == tune.CANDIDATES[default - 1]
    times[6000][default - 1] = float("inf")
    assert tune.fastest(times, tune.CANDIDATES) is None


@pytest.mark.slow
def test_every_candidate_computes_the_same(capsys):
    assert tune.main(["--dry", "--vocabularies", str(VOCABULARY), "--num-tokens", "2", "--repeats", "1"]) == 0
    assert "fastest:" in capsys.readouterr().out
