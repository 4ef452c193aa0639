"""Chat templates, which checkpoints from strangers bring: programs, rendered in a process whose time and memory are bounded.

jinja's sandbox, which transformers uses, keeps a template from files and other code, but not from a loop without end or a text
of gigabytes; neither can be stopped within a process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

_SECONDS = 10
"""Templates take less than a thousandth of one."""
_MEMORY_BYTES = 2 * 2**30
_LONGEST = 1_000_000
"""Characters of a prompt; more than the context of any supported model."""
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateError(ValueError):
    """A chat template failed, or took too long or too much; the message says which."""


def _start_process() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), str(_MEMORY_BYTES), str(_LONGEST)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Threads of a library that is not used here would take the memory it may have.
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        # A Ctrl-C is for this process; the other one ends when its input does.
        start_new_session=True,
    )
    atexit.register(process.communicate)
    return process


class _Worker:
    """The process, started when the first template is rendered, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """Does nothing where it runs already."""
        if self._process is None:
            self._process = _start_process()
        return self._process

    def ask(self, request: str) -> dict[str, str]:
        with self._lock:
            process = self.start()
            assert process.stdin is not None, "a pipe"
            assert process.stdout is not None, "a pipe"
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            except BaseException:
                # An answer that nobody read would be taken for the next one's.
                self._process = None
                process.kill()
                raise
            if not line:
                self._process = None
        if line:
            return json.loads(line)
        status = process.wait()
        if status == -signal.SIGALRM:
            return {"error": f"it takes longer than {_SECONDS} s"}
        return {"error": f"the process that renders it ended with status {status}, perhaps for want of memory"}


_worker = _Worker()


def start_rendering() -> None:
    """Start the process beside what comes before the first prompt, so that none waits for it."""
    _worker.start()


@lru_cache(maxsize=4096)
def _render(request: str) -> str:
    answer = _worker.ask(request)
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def render_template(template: str, messages: list[dict[str, object]], special_tokens: dict[str, object]) -> str:
    """A prompt by a chat template, as transformers' `apply_chat_template` renders it, with the generation prompt.

    Args:
        template: the jinja text.
        messages: as chat templates take them.
        special_tokens: what the tokenizer calls them -> the token; variables of the template.

    Raises:
        TemplateError: the template cannot be read, raises something, or takes too long, too much memory or too many characters.
    """
    request = {"template": template, "messages": messages, "special_tokens": special_tokens, "seconds": _SECONDS}
    return _render(json.dumps(request, default=str) + "\n")
