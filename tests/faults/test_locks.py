"""Two processes never write into one folder, and a process that was killed holds none."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tars_fast.ablate import AblateConfig, ablate
from tars_fast.analyse import AnalyseConfig, analyse
from tars_fast.config import TrainConfig
from tars_fast.evaluate import EvaluateConfig, evaluate
from tars_fast.export import ExportConfig, export
from tars_fast.prepare import PrepareConfig, run
from tars_fast.support.locks import LOCK, locked
from tars_fast.train import train
from tars_fast.types import UserError


def hold(folder: Path, held) -> None:
    with locked(folder):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`; killed at the end."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(10)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize(
    "command",
    [
        lambda folder, _: train(TrainConfig(output_dir=folder, device="cpu")),
        lambda folder, _: train(TrainConfig(output_dir=folder, resume=True, device="cpu")),
        lambda folder, data: evaluate(EvaluateConfig(data=(f"{data}/evaluation",), output_dir=folder, device="cpu")),
        lambda folder, data: analyse(AnalyseConfig(data=f"{data}/evaluation", output_dir=folder, device="cpu")),
        lambda folder, data: ablate(AblateConfig(data=f"{data}/training", eval_data=f"{data}/evaluation", output_dir=folder)),
        lambda folder, _: export(ExportConfig(model="pocket", output_dir=folder)),
        lambda folder, data: run(PrepareConfig(data=f"{data}/training", output_dir=folder)),
    ],
    ids=["train", "resume", "evaluate", "analyse", "ablate", "export", "prepare"],
)
def test_the_second_process_is_refused_by_name_and_number(holder, tmp_path, data, command):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"--output-dir {folder}: process {holder.pid} on \S+ is writing there; wait for it"):
        command(folder, data)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_killed_process_holds_nothing(holder, tmp_path):
    folder = tmp_path / "run"
    holder.kill()
    holder.join()
    assert (folder / LOCK).read_text().startswith(f"process {holder.pid} ")
    with locked(folder):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(UserError, match=f"process {os.getpid()} "), locked(folder):
            pass
    assert list(folder.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
