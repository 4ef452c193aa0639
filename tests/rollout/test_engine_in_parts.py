"""vLLM in two processes on half of the weights each, and the trainer on the same halves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import MAKERS
from halves import run_halves
from items import first_items
from processes import TORCHRUN

from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("name", ["qwen2-audio", "qwen2.5-omni"])
def test_two_halves_sample_and_train_as_the_whole(name, tmp_path):
    """Log-probabilities, pooled states and gradients, with full fine-tuning and LoRA, before and after an update."""
    run_halves(Path(__file__).with_name("half_of_an_engine.py"), MAKERS[name](tmp_path))


def train(items: Path, run: Path, *flags: str, launcher: list[str]) -> list[dict[str, float]]:
    """The metrics of two steps."""
    command = ["-m", "tars_fast.train", "--device", "cpu", "--engine", "vllm", "--eval-samples", "0", "--num-steps", "2"]
    command += ["--questions-per-step", "2", "--save-every", "1", "--output-dir", str(run), *flags]
    command += ["--data", str(items / "training"), "--eval-data", str(items / "evaluation")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_halves_is_that_of_one_process_which_may_go_on_with_it(tmp_path):
    first_items(TRAINING_DATA, 8, tmp_path / "training")
    first_items(HELD_OUT_DATA, 2, tmp_path / "evaluation")
    halves = train(tmp_path, tmp_path / "halves", "--tensor-parallel", "2", launcher=TORCHRUN)
    shutil.copytree(tmp_path / "halves", tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-2")
    whole = train(tmp_path, tmp_path / "whole", "--resume", launcher=[sys.executable])
    assert [step["step"] for step in whole] == [step["step"] for step in halves] == [1, 2]
    for own, expected in zip(halves[1:], whole[1:], strict=True):
        compared = {name for name in expected if not name.startswith(("seconds/", "beside/", "logprob_diff"))}
        assert {name: own[name] for name in compared} == pytest.approx(
            {name: expected[name] for name in compared}, rel=1e-3, abs=1e-4
        )
