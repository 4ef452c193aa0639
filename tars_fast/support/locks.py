"""One process writes into a folder at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tars_fast.support.cli import make_output_folder
from tars_fast.support.files import explain_cannot_write
from tars_fast.types import UserError

LOCK = ".lock"
"""Name of the file that is locked; it holds the process that writes, and is hidden where a folder's files are listed."""


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep `folder`, which is made where it is missing, to this process for the length of the block.

    The lock is the system's: it ends with the process, however that ends. A folder that was made and is still empty at the end
    is removed.

    Args:
        patience: seconds to wait for another process that holds it.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    is_new = not os.path.lexists(folder)
    make_output_folder(folder)
    with explain_cannot_write(folder):
        file = _lock(folder, time.monotonic() + patience)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        # Without room for it the lock holds as well.
        with suppress(OSError):
            file.flush()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            file.close()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _lock(folder: Path, deadline: float) -> TextIO:
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(100) or "another process"
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            raise UserError(f"--output-dir {folder}: {holder} is writing there; wait for it, or name another folder") from error
        except OSError:
            # Some network file systems have no locks.
            return file
        # The one that held it may have removed the file between the two lines above.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        file.close()
