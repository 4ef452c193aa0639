"""Small disks and small data."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with `training`, of sixteen items, and `evaluation`, of four."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of its own, of so many KB; skipped where the test may not mount one."""
    mounted = []

    def mount(kilobytes: int, options: str = "rw") -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,{options}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounts no file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
