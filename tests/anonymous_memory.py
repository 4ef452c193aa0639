"""Memory of this process that no file backs, and its peak while something runs: for scripts in processes of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def anonymous() -> int:
    """Bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def peak_of(run: Callable[[], Result]) -> tuple[Result, int]:
    """(what `run` returns, bytes that its peak was above the memory before)."""
    base, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    done.set()
    watcher.join()
    return result, peak[0] - base
