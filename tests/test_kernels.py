"""The kernels' own tests, in processes whose Triton interprets where there is no GPU; this one keeps Triton as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "kernels" / "tests").glob("test_*.py"))


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[Path, subprocess.Popen]]:
    """All of them at once: the interpreter uses one core."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {path: subprocess.Popen([*command, path], **options) for path in FILES}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels(processes, path):
    output, _ = processes[path].communicate()
    assert processes[path].returncode == 0, output[-8000:]
