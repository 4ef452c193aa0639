"""Two processes, as torchrun starts them, that hold half of a model's weights each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_halves(script: Path, source: Path) -> list[str]:
    """Two processes of a script that prints that both are equal to the whole; returns what they say of it."""
    paths = [str(TESTS), str(TESTS / "models"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*TORCHRUN, str(script), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    said = [line.removeprefix("equal") for line in done.stdout.splitlines() if line.startswith("equal")]
    assert len(said) == 2, done.stdout
    return said
