"""The kernels' own tests, in processes whose Triton interprets where there is no GPU; this one keeps Triton as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "kernels" / "tests").glob("test_*.py"))
LONG = ("test_distillation", "test_losses", "test_similarity", "test_tracing")
GROUPS = [[path] for path in FILES if path.stem in LONG] + [[path for path in FILES if path.stem not in LONG]]
"""Each in a process of its own: the long ones beside one another, the others one after the other, as importing takes 3 s."""


@pytest.mark.parametrize("tier", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("files", GROUPS, ids=lambda files: files[0].stem if len(files) == 1 else "others")
def test_kernels(files, tier):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-m", "slow"] if tier == "slow" else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
