"""examples/slurm/train.sh: its shell, its arguments by the real parsers, and when the job goes back into the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from snippets import ROOT
from torch.distributed.run import parse_args

from tars_fast.config import TrainConfig
from tars_fast.support.command_line import parse_arguments

SCRIPT = ROOT / "examples" / "slurm" / "train.sh"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_GPUS_ON_NODE": "8"}


def run(folder: Path, *arguments: str, status: int = 0, finished: bool = False) -> tuple[int, list[str], str]:
    """(exit status, what srun was given, what scontrol was told) of the script beside stand-ins for Slurm's commands."""
    (folder / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/given\nexit {status}\n')
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder}/told\n[ "$1" != show ] || echo n1\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    (folder / "run").mkdir(exist_ok=True)
    if finished:
        (folder / "run" / "evaluation.json").touch()
    environment = {**os.environ, **SLURM, "PATH": f"{folder}:{os.environ['PATH']}", "OUTPUT_DIR": str(folder / "run")}
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, (folder / "given").read_text().splitlines(), (folder / "told").read_text()


def test_the_shell_is_right():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_its_arguments_are_those_of_torchrun_and_of_train(tmp_path):
    _, given, _ = run(tmp_path, "--num-steps", "10")
    launched = parse_args(given[given.index("torchrun") + 1 :])
    assert (launched.nnodes, launched.nproc_per_node, launched.max_restarts) == ("1:4", "8", 10)
    assert (launched.rdzv_backend, launched.rdzv_endpoint, launched.rdzv_id) == ("c10d", "n1:20007", "7-0")
    assert launched.module
    assert launched.training_script == "tars_fast.train"
    config = parse_arguments("", TrainConfig, launched.training_script_args, "train")
    assert (config.output_dir, config.resume_if_exists, config.num_steps) == (tmp_path / "run", True, 10)
    assert config.save_minutes == 20


@pytest.mark.parametrize(
    ("status", "finished", "requeued"), [(0, False, True), (0, True, False), (1, False, False), (2, False, False)]
)
def test_it_goes_back_into_the_queue_where_it_has_made_room(tmp_path, status, finished, requeued):
    ended, _, told = run(tmp_path, status=status, finished=finished)
    assert ended == status
    assert ("requeue 7" in told) is requeued


def test_torchrun_ignores_the_signal_and_its_processes_do_not(tmp_path):
    """What the script starts, with a process in the place of torchrun."""
    _, given, _ = run(tmp_path)
    shell = given[given.index("bash") : given.index("torchrun")]
    ends = "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(0)); signal.raise_signal(signal.SIGUSR1)"
    script = f'kill -USR1 $$; python3 -c "{ends}" && echo both'
    done = subprocess.run([*shell, "bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "both\n"
