"""What makes pages of the documentation lies beside them, in docs/."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "docs"))
FORKS = Path(__file__).with_name("forks.py")
FORKED = ("train", "evaluate", "analyse", "export", "plan")
"""Commands that start no processes of their own."""


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory):
    """Path of a program like this Python that runs what is FORKED in forks of a process that has its imports behind it."""
    folder = tmp_path_factory.mktemp("forks")
    address, program = folder / "socket", folder / "python"
    program.write_text(f"""#!/bin/sh
case "$1$2" in
    {" | ".join(f"-mtars_fast.{name}" for name in FORKED)}) exec {sys.executable} -S {FORKS} {address} "$@" ;;
    *) exec {sys.executable} "$@" ;;
esac
""")
    program.chmod(0o755)
    process = subprocess.Popen([sys.executable, FORKS, address], stdin=subprocess.PIPE)
    while not address.exists():
        assert process.poll() is None, "it did not start"
        time.sleep(0.05)
    yield program
    process.stdin.close()
    process.wait()
