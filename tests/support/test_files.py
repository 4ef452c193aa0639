"""Files and folders that a kill finds whole or not at all."""

from __future__ import annotations

import shutil

import pytest

from tars_fast.models.registry import list_checkpoints
from tars_fast.support import files


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with two checkpoints, where a process is killed in the middle of the first deletion."""
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whole")
        (tmp_path / f"checkpoint-{step}" / "state").write_text("whole")

    def killed(folder, **settings):
        if folder.name.startswith("checkpoint-1.deleted"):
            (folder / "state").unlink()
            raise KeyboardInterrupt
        return delete(folder, **settings)

    delete = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed)
    return tmp_path


def test_a_deletion_that_is_killed_leaves_nothing_under_the_old_name(run, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(run / "checkpoint-1")
    assert [step for step, _ in list_checkpoints(run)] == [2]
    (left,) = run.glob("*" + files.PARTIAL)
    monkeypatch.undo()
    (run / f"metrics.jsonl{files.PARTIAL}").write_text("half a li")
    files.remove_partial(run)
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert not left.exists()


def test_a_folder_that_is_written_again_is_never_there_in_part(run):
    def write_again(step: int) -> None:
        with files.atomic_folder(run / f"checkpoint-{step}") as folder:
            (folder / "weights").write_text("new")

    with pytest.raises(KeyboardInterrupt):
        write_again(1)
    assert [step for step, _ in list_checkpoints(run)] == [2]
    write_again(2)
    assert [path.read_text() for path in (run / "checkpoint-2").iterdir()] == ["new"]
