"""metrics.jsonl across a resumption."""

from __future__ import annotations

import json

import pytest

from tars_fast.reports.log import RunLog
from tars_fast.support import files


def write_steps(folder, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("".join(lines))


def line(step: int, **more: float) -> str:
    return json.dumps({"step": step, **more}) + "\n"


def steps(folder) -> list[int]:
    return [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_after_the_checkpoint_and_half_lines_are_dropped(tmp_path, capsys):
    write_steps(tmp_path, line(1), line(2), line(3), '{"step": 4, "lo')
    with RunLog(tmp_path, 10, num_completed=2):
        assert steps(tmp_path) == [1, 2]
    assert "warning" not in capsys.readouterr().out


def test_a_step_that_was_written_twice_counts_as_it_was_last(tmp_path):
    write_steps(tmp_path, line(1, loss=1.0), line(2, loss=2.0), line(1, loss=3.0))
    with RunLog(tmp_path, 10, num_completed=2):
        pass
    assert sorted(steps(tmp_path)) == [1, 2]


@pytest.mark.parametrize("lines", [(), (line(2), line(3)), (line(1), "nonsense\n", line(3))])
def test_steps_that_are_missing_are_said(tmp_path, capsys, lines):
    write_steps(tmp_path, *lines)
    if not lines:
        (tmp_path / "metrics.jsonl").unlink()
    with RunLog(tmp_path, 10, num_completed=3):
        pass
    said = " ".join(capsys.readouterr().out.split())
    missing = sorted({1, 2, 3} - set(steps(tmp_path)))
    assert f"lacks {len(missing)} of 3 steps, the first of them step {missing[0]}" in said


def test_a_kill_while_it_is_cut_back_loses_nothing(tmp_path, monkeypatch):
    write_steps(tmp_path, line(1), line(2), line(3))

    def killed(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, 10, num_completed=2)
    assert steps(tmp_path) == [1, 2, 3]
