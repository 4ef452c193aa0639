"""Seconds by phase, where a process is, and what to lower where a phase runs out of memory."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tars_fast.types import TrainingError

_running: dict[int, list[str]] = {}
"""By thread the phases that it is in, the innermost last."""
_left: dict[int, str] = {}
"""By thread the phase that it was in last."""


@contextmanager
def entered(phase: str) -> Iterator[None]:
    """For the length of the block this thread is in a phase, as `place_now` says."""
    thread = threading.get_ident()
    phases = _running.setdefault(thread, [])
    phases.append(phase)
    try:
        yield
    finally:
        _left[thread] = phases.pop()


def place_now() -> str:
    """Where this process is: `in 'forward'`, with the phases of other threads too, or `behind 'forward'`; may be asked from
    any thread."""
    main = threading.main_thread().ident
    assert main is not None, "it runs"
    phases = [running[-1:] for _, running in sorted(_running.copy().items(), key=lambda item: item[0] != main)]
    if any(phases):
        return "in " + " and ".join(repr(phase) for (phase,) in filter(None, phases))
    return f"behind {_left[main]!r}" if main in _left else "at its start"


class PhaseTimer:
    """Wall-clock seconds by phase of a step; on CUDA a phase ends when the device is done with what this thread gave it.

    A phase that runs out of memory raises TrainingError, which names it and what to lower.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with explain_out_of_memory(name), torch.profiler.record_function(name):
            yield
            if self._on_cuda:
                torch.cuda.current_stream().synchronize()
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """`seconds/<phase>` since the last call."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


SETTINGS_BY_PHASE = {
    "loading the model": "--kv-cache-gb, or use --dtype bfloat16",
    "encode": "--questions-per-step",
    "rollout": "--kv-cache-gb, --rollout-batch-size or --max-new-tokens",
    "exchange": "--questions-per-step",
    "reward": "--questions-per-step, or use --behaviour-model hashed-ngrams",
    "teacher": "--tokens-per-micro-batch or --max-new-tokens",
    "forward": "--tokens-per-micro-batch or --max-new-tokens, or add --gradient-checkpointing True",
    "backward": "--tokens-per-micro-batch or --max-new-tokens, or add --gradient-checkpointing True",
    "hand-over": "--kv-cache-gb or --rollout-batch-size",
    "optimiser": "--lora-rank (0 is full fine-tuning, the largest of all)",
    "evaluation": "--rollout-batch-size or --max-new-tokens",
}
"""What to lower when memory runs out there."""

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or the CPU."""
    # torch's CPU allocator has no exception of its own.
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in _OUT_OF_MEMORY)


@contextmanager
def explain_out_of_memory(phase: str) -> Iterator[None]:
    """Name phase and remedy when the block, which is `entered`, runs out of memory.

    Raises:
        TrainingError: in the place of torch's error; any other passes.
    """
    try:
        with entered(phase):
            yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory in phase {phase!r}; lower {SETTINGS_BY_PHASE[phase]}; "
                "python -m tars_fast.plan shows what each phase needs"
            ) from error
        raise
