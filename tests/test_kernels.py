"""The kernels' own tests, in processes whose Triton interprets where there is no GPU; this one keeps Triton as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "kernels" / "tests").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels(path, pytestconfig):
    """All of them with --all, else their fast tier."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    command += ["--all"] if pytestconfig.option.all_tiers else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # All tests of a file may be slow ones.
    fine = (0,) if pytestconfig.option.all_tiers else (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert done.returncode in fine, done.stdout[-8000:]
