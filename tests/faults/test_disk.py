"""A disk that is full, or read-only: one line with what was being written, nothing half written, nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import resource
import shutil
from pathlib import Path

import pytest
from runs import read_metrics

from tars_fast.ablate import AblateConfig, ablate
from tars_fast.analyse import AnalyseConfig, analyse
from tars_fast.config import TrainConfig
from tars_fast.evaluate import EvaluateConfig, evaluate
from tars_fast.export import ExportConfig, export
from tars_fast.models.audio_cache import AudioCache
from tars_fast.models.registry import list_checkpoints
from tars_fast.prepare import PrepareConfig, run
from tars_fast.support import files
from tars_fast.train import train
from tars_fast.types import TrainingError, UserError

FULL = r"cannot be written \(No space left on device: needs [\d.]+ MB, [\d.]+ MB are free\); make room and repeat the command"


def config_of(data: Path, output_dir: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        output_dir=output_dir,
        data=str(data / "training"),
        eval_data=str(data / "evaluation"),
        num_steps=3,
        questions_per_step=2,
        group_size=4,
        tokens_per_micro_batch=4096,
        save_every=1,
        eval_samples=0,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def partial(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(f"*{files.PARTIAL}")]


@pytest.mark.parametrize("kilobytes", [300, pytest.param(8000, marks=pytest.mark.slow)])
def test_room_for_the_checkpoints_is_looked_at_before_training(data, small_disk, kilobytes):
    disk = small_disk(kilobytes)
    with pytest.raises(UserError, match=r"run: 3 checkpoints more need 35\.\d\d MB, \d.\d\d MB are free; make room, or name"):
        train(config_of(data, disk / "run"))
    assert not (disk / "run" / "predictions_before.jsonl").exists(), "nothing was evaluated in vain"


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes of a disk free."""
    path = disk / "filling"
    path.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 100_000, 3_000_000])
def test_a_disk_that_fills_up_costs_no_step_that_was_saved(data, small_disk, tmp_path, monkeypatch, leave):
    """Full before the second step is logged, before its weights are written, or before the optimiser's state is."""
    disk = small_disk(45_000)
    config = config_of(data, disk / "run")

    def fill_after_first_checkpoint(history, _warn):
        if history[-1]["step"] == 2:
            fill(disk, leave)

    monkeypatch.setattr("tars_fast.train.check_progress", fill_after_first_checkpoint)
    with pytest.raises(TrainingError, match=FULL + r"; --resume continues from checkpoint-\d"):
        train(config)
    assert partial(disk) == []
    saved = [step for step, _ in list_checkpoints(config.output_dir)]
    assert saved == [1]
    (disk / "filling").unlink()
    monkeypatch.undo()
    assert train(dataclasses.replace(config, resume=True)).is_finished
    train(config_of(data, tmp_path / "unbroken"))
    assert read_metrics(config.output_dir) == read_metrics(tmp_path / "unbroken")


def test_a_full_disk_ends_an_evaluation(data, small_disk):
    disk = small_disk(24)
    config = EvaluateConfig(data=(str(data / "evaluation"),), output_dir=disk / "evaluation", device="cpu")
    with pytest.raises(UserError, match=FULL):
        evaluate(config)
    assert partial(disk) == []


def test_a_full_disk_ends_an_export_and_an_analysis(data, small_disk):
    disk = small_disk(24)
    with pytest.raises(UserError, match=r"exported: " + FULL):
        export(ExportConfig(model="pocket", output_dir=disk / "exported"))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device: .* are free\)"):
        analyse(AnalyseConfig(data=str(data / "evaluation"), output_dir=disk / "analysis", device="cpu"))
    assert partial(disk) == []
    assert not (disk / "exported").exists()


def test_a_limit_on_the_size_of_files_is_told_like_a_full_disk(data, tmp_path):
    """Where no test may mount a disk: the same through another error of the system."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, previous[1]))
    try:
        with pytest.raises(
            UserError, match=r"checkpoint-1: cannot be written \(File too large: needs 11\.\d\d MB, .* are free\)"
        ):
            train(config_of(data, tmp_path / "run"))
        with pytest.raises(UserError, match=r"exported: cannot be written \(File too large: needs 4\.\d\d MB, "):
            export(ExportConfig(model="pocket", output_dir=tmp_path / "exported"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert partial(tmp_path) == []
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "command",
    [
        lambda folder, data: train(config_of(data, folder)),
        lambda folder, data: evaluate(EvaluateConfig(data=(str(data / "evaluation"),), output_dir=folder, device="cpu")),
        lambda folder, data: analyse(AnalyseConfig(data=str(data / "evaluation"), output_dir=folder, device="cpu")),
        lambda folder, data: ablate(AblateConfig(data=str(data / "training"), output_dir=folder)),
        lambda folder, _: export(ExportConfig(model="pocket", output_dir=folder)),
        lambda folder, data: run(PrepareConfig(data=str(data / "training"), output_dir=folder)),
    ],
    ids=["train", "evaluate", "analyse", "ablate", "export", "prepare"],
)
def test_a_read_only_folder_is_one_line(data, small_disk, command):
    disk = small_disk(100, "ro")
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); make it writable, or name another"):
        command(disk, data)
    with pytest.raises(UserError, match=r"cannot be made \(Read-only file system\); name another folder"):
        command(disk / "new", data)


def test_what_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    """A line of which a part was written would otherwise stand before the next one."""
    path = tmp_path / "metrics.jsonl"
    files.append(path, "first\n")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.CannotWriteError, match=r"metrics.jsonl: cannot be written \(No space left .* needs 0\.00 MB"):
        files.append(path, "second\n")
    monkeypatch.undo()
    files.append(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_a_full_disk_leaves_no_half_embedding(small_disk):
    import torch

    disk = small_disk(24)
    cache = AudioCache(0, disk / "cache", 10**9)
    cache.put("a", (torch.zeros(100, 100),))
    assert list((disk / "cache").iterdir()) == []
