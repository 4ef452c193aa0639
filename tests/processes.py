"""Two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TESTS = Path(__file__).parent


def run_two(*arguments: object, beside: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """Run a script that may import what lies beside the tests; returns what it prints, and fails with what it says of an error.

    Args:
        beside: folders of tests that it imports from too.
    """
    paths = [str(TESTS), *(str(TESTS / name) for name in beside), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [*TORCHRUN, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
