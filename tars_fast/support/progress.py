"""How far a long loop is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tars_fast.support.console import PlainConsole, say

Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def item_progress(
    console: PlainConsole, total: int, completed: int = 0, what: str = "items"
) -> Iterator[Callable[[int], None]]:
    """A bar, or where there is no terminal a line at most every `SECONDS_BETWEEN_LINES`, and one at the end.

    Yields:
        What to call with the number of items that have just been done.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=completed)
        started = last_line = time.monotonic()
        done = completed

        def advance(count: int) -> None:
            nonlocal last_line, done
            done += count
            progress.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and (now - last_line > SECONDS_BETWEEN_LINES or done == total):
                rate = (done - completed) / max(now - started, 1e-9)
                say(console, f"{what} {done}/{total}, {rate:.1f} a second")
                last_line = now

        yield advance


def track(results: Iterable[Result], total: int, what: str) -> Iterator[Result]:
    """Pass `results` on, saying how many of `total` have come."""
    with item_progress(PlainConsole(), total, what=what) as advance:
        for result in results:
            yield result
            advance(1)
