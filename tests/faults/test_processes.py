"""Processes that end in the middle of their work: killed, interrupted, or started in a way that cannot work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import kill_elastic
import psutil
import pytest
import soak
import torch
from runs import settings_of

from tars_fast.evaluate import EvaluateConfig, evaluate
from tars_fast.learning.workers import join_workers
from tars_fast.models.checkpoint import fault_of
from tars_fast.models.registry import ASSETS, list_checkpoints
from tars_fast.support.cli import FAILED, INTERRUPTED, load_function
from tars_fast.types import UserError


@pytest.mark.slow
def test_a_killed_run_loses_nothing(tmp_path):
    """A few of the kills of `python tests/faults/kill.py`, whose log is bench/results/kill_log_cpu.json."""
    runs = kill.KilledRuns(tmp_path, num_steps=6)
    rng = random.Random(0)
    for _ in range(3):
        runs.kill_once(rng)
    runs.finish()


@pytest.mark.slow
def test_machines_that_come_and_go_lose_nothing(tmp_path):
    """A few of the kills of `python tests/faults/kill_elastic.py`, whose log is bench/results/kill_log_elastic.json."""
    runs = kill_elastic.ElasticRuns(tmp_path, num_steps=8)
    try:
        for number in range(2):
            runs.kill_once(random.Random(number))
        runs.finish()
    finally:
        runs.close()


@pytest.mark.slow
def test_nothing_grows_with_the_steps(tmp_path):
    """A short one of `python tests/faults/soak.py`, whose figures are bench/results/soak_cpu.json."""
    _, marks = soak.soak(tmp_path, num_steps=100, save_every=5)
    for name in ("threads", "files", "checkpoints"):
        assert soak.growth(marks, name) == 0, name
    assert marks[-1]["checkpoints"] == 2
    assert abs(soak.growth(marks, "other_bytes")) < 10_000
    assert soak.growth(marks, "rss") < 20e6


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("module", ["evaluate", pytest.param("train", marks=pytest.mark.slow)])
def test_ctrl_c_while_imports_load_is_one_line(module):
    process = subprocess.Popen(
        [sys.executable, "-m", f"tars_fast.{module}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "interrupted\n")
    assert process.returncode == INTERRUPTED


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_where_one_of_several_processes_is_killed_another_says_how_to_go_on(data, tmp_path, killed):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tars_fast.train"]
    command += [*settings_of(data, 300), "--save-every", "1", "--output-dir", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list_checkpoints(run)) == 2, process)
    workers = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == killed]
    workers[0].kill()
    _, said = process.communicate(timeout=120)
    own, _, of_torchrun = said.partition("Traceback")
    assert process.returncode == FAILED
    assert [line[:9] for line in own.splitlines() if "--resume" in line] == ["stopped: "]
    assert "tars_fast/" not in of_torchrun, "the traceback is torchrun's own"
    assert [fault_of(folder) for _, folder in list_checkpoints(run)] == [None, None]


@pytest.mark.parametrize("given", ["4", "many", "0x2"])
def test_several_processes_without_torchrun_are_refused(monkeypatch, given):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", given)
    with (
        pytest.raises(UserError, match=f"WORLD_SIZE is {given} in the environment, without a right LOCAL_RANK; start"),
        join_workers(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_workers() as workers:
        assert workers.size == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (":f", "no module and function"),
        ("json", "no module and function"),
        ("./data.txt:f", r"\./data\.txt is neither the name of a module nor a \.py file"),
        ("json:__doc__", "__doc__ is str, no function"),
        ("exiting:f", "SystemExit"),
        ("absent:f", "No module named 'absent'"),
    ],
)
def test_what_is_no_function(tmp_path, monkeypatch, name, reason):
    (tmp_path / "exiting.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=rf"--synthesiser {name}: {reason}; give module:function"):
        load_function("--synthesiser", name)


def test_a_pickle_that_runs_code_is_refused_and_not_run(data, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "pocket", folder)
    (folder / "model.safetensors").unlink()

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"a": Harmful()}, folder / "pytorch_model.bin")
    config = EvaluateConfig(model=str(folder), data=(str(data / "evaluation"),), output_dir=tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match=r"--model .*: cannot be loaded \(.*safetensors"):
        evaluate(config)
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()
