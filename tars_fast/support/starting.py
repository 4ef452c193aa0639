"""What happens before a command's own code runs: Ctrl-C while its imports load."""

from __future__ import annotations

import os
import sys
from types import TracebackType

INTERRUPTED = 130
"""What shells give a process that Ctrl-C ended."""


def is_command() -> bool:
    """Whether the package is being imported to run one of its modules by `python -m`."""
    return sys.argv[:1] == ["-m"] and any(argument.startswith("tars_fast.") for argument in sys.orig_argv)


def interrupt_in_one_line() -> None:
    """Have a command that Ctrl-C ends print one line, also in the seconds that its imports take."""
    otherwise = sys.excepthook

    def said(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            otherwise(kind, error, traceback)
            return
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    sys.excepthook = said
