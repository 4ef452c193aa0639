"""Processes that were not started alike are refused in one line of all of them, by rank."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tars_fast.config import TrainConfig
from tars_fast.learning.likeness import check_alike, code_fingerprint, settings_fingerprint
from tars_fast.learning.workers import Workers
from tars_fast.types import UserError

SCRIPT = """
import sys
from pathlib import Path
from tars_fast.config import TrainConfig
from tars_fast.learning import likeness
from tars_fast.learning.workers import join_workers, locked_by_first
from tars_fast.types import UserError

likeness._PATIENCE = 0.5
folder = Path(sys.argv[1])

def said(check, *given):
    try:
        check(*given)
        return "alike"
    except UserError as error:
        return str(error)

with join_workers() as workers:
    odd = workers.rank == 2
    code = likeness.code_fingerprint()
    settings = likeness.settings_fingerprint(TrainConfig(learning_rate=0.5 if odd else 0.25, data=f"on-{workers.rank}"))
    lines = [
        said(likeness.check_alike, workers, "code", code),
        said(likeness.check_alike, workers, "code", code | {"torch": "1.0"} if odd else code),
        said(likeness.check_alike, workers, "settings", settings),
        said(likeness.check_alike, workers, "data", {"training": "b", "validation": "c"} if odd else {"training": "a"}),
    ]
    shared, own = folder / "shared", folder / f"of-{workers.rank}"
    for place in (shared, own):
        with locked_by_first(place, workers):
            lines.append(said(likeness.check_shared, workers, place))
    (folder / f"said-{workers.rank}").write_text("\\n".join(lines))
"""


@pytest.mark.slow
def test_the_process_that_differs_is_named_in_all_of_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True, capture_output=True)
    first, second, third = ((tmp_path / f"said-{rank}").read_text().splitlines() for rank in range(3))
    assert first[:5] == second[:5] == third[:5]
    assert first[0] == first[4] == "alike"
    for line, what, detail in (
        (first[1], "code", "(torch 1.0, not 2."),
        (first[2], "settings", "(learning_rate 0.5, not 0.25)"),
        (first[3], "data", "(training b, not a, validation c, not None)"),
    ):
        assert line.startswith("process 2 on "), line
        assert f"has other {what} than process 0 {detail}" in line
        assert line.endswith("; start all processes alike")
    assert "process 1 on" in second[5]
    assert "does not see what process 0 writes there; name a folder that all machines share" in second[5]


def test_what_is_compared(monkeypatch):
    code = code_fingerprint()
    assert len(code["files of tars_fast"]) == len(code["files of tars_kernels"]) == 12
    assert code["torch"]
    # Places may differ; whatever changes what is trained may not.
    one, other = (settings_fingerprint(TrainConfig(data=name, audio_cache_dir=name)) for name in ("a", "b"))
    assert one == other
    assert one != settings_fingerprint(TrainConfig(data="a", save_minutes=1.0))
    monkeypatch.setattr(Workers, "gather_all", lambda _, told: [told, (told[0], {"torch": 2})])
    with pytest.raises(UserError, match=r"process 1 on .*: has other code than process 0 \(torch 2, not 1\); start all"):
        check_alike(Workers(0, 2), "code", {"torch": 1})
