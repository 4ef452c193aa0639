"""Names the process that all others wait for, and ends those that wait, where a call of all processes takes too long.

A call through which processes exchange something ends when the last of them has come to it. Without a watchdog a process that
hangs is half an hour of silence, and then an error that names nobody.

Each process writes to the store of the run how many such calls it has come to and which phase it is in, every few seconds
and from a thread, so that a step costs the same whatever its number of calls and phases. Where a call lasts longer than the
limit, the process that waits in it reads what the others wrote: those with fewer calls have not come. Clocks of several
machines are never compared: that a process is alive shows in that its own count goes on between two looks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # imported there from C++

from tars_fast.support.cli import FAILED, first_line
from tars_fast.support.timing import place_now

_BEATS = 100
"""A process writes where it is so many times within the limit."""
_LONGEST_BEAT = 5.0
"""Seconds between two of them at most."""
_PATIENCE = 10.0
"""Seconds for the store to answer."""
_UNBOUNDED = ("in 'upload'",)
"""Where a process may be as long as it takes, while it is alive."""
_VERDICT = "verdict"


@dataclass(frozen=True)
class Beat:
    """What a process writes of itself."""

    number: int
    """Of its beats so far."""
    place: str
    """See `place_now`."""
    calls: dict[str, int]
    """By channel the calls of all processes that it has come to."""


@dataclass
class _Wait:
    place: str
    seconds: float = 0.0


def describe_wait(channel: str, place: str, seconds: float, looks: Sequence[Sequence[Beat | None]]) -> str | None:
    """Whom a process waits for; None where that is nobody to give up yet.

    Args:
        channel: of the call.
        place: where the waiting process is, as `place_now` says it.
        seconds: that it has waited.
        looks: what every process has written, by rank, at two times that are longer apart than two beats; the first process
            with the most calls is one that waits.
    """
    earlier, now = looks
    calls = [0 if beat is None else beat.calls.get(channel, 0) for beat in now]
    late = [rank for rank, number in enumerate(calls) if number < max(calls)]
    waited = f"for {seconds:.0f} s"
    states: dict[int, str] = {}
    silent, may_take_long = [], []
    for rank, (before, beat) in enumerate(zip(earlier, now, strict=True)):
        is_alive = before is not None and beat is not None and beat.number > before.number
        where = "at its start" if beat is None else beat.place
        states[rank] = f"it is {where}" if is_alive else f"it was {where}, and says nothing any more"
        if not is_alive:
            silent.append(rank)
        elif where in _UNBOUNDED:
            may_take_long.append(rank)
    if late:
        parts = [f"rank {rank} has not come to the call {place} {waited}: {states[rank]}" for rank in late]
        return None if set(late) <= set(may_take_long) else "; ".join(parts)
    if silent:
        return "; ".join(f"rank {rank} holds up the call {place} {waited}: {states[rank]}" for rank in silent)
    return f"all {len(now)} processes have come to the call {place} and it has not ended {waited}: is the network down?"


class Watchdog:
    """Threads that say where this process is, and end it where it waits for another one too long.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: seconds that a call of all processes may take.
        run: the same text in all processes, different in each start of them.
    """

    def __init__(self, rank: int, size: int, timeout: float, run: str) -> None:
        self._rank, self._size, self.timeout = rank, size, timeout
        self._run = run
        self._period = min(_LONGEST_BEAT, timeout / _BEATS)
        self._calls: Counter[str] = Counter()
        self._waits: dict[str, _Wait] = {}
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, args=arguments, name="watchdog", daemon=True)
            for work, arguments in ((self._beat, (self.connect(),)), (self._watch, ()))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads; nothing is watched any more."""
        self._closed.set()
        for thread in self._threads:
            thread.join(_PATIENCE)

    @contextmanager
    def waiting(self, channel: str) -> Iterator[None]:
        """Around a call of all processes, whose calls of one channel come in the same order everywhere."""
        self._calls[channel] += 1
        self._waits[channel] = _Wait(place_now())
        try:
            yield
            # NCCL's calls return before they end.
            if torch.cuda.is_initialized():
                torch.cuda.current_stream().synchronize()
        finally:
            del self._waits[channel]

    def write(self, store: Store, number: int) -> None:
        """The beat of this number, to a store that `connect` gave."""
        store.set(str(self._rank), json.dumps([number, place_now(), dict(self._calls)]))

    def connect(self) -> Store:
        # A connection of its own, because a call on the process group's may hold that one for long.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return PrefixStore(f"watchdog/{self._run}", TCPStore(address, port, is_master=False))

    def _beat(self, store: Store) -> None:
        number = 0
        while not self._closed.is_set():
            number += 1
            try:
                self.write(store, number)
                if self._waits and store.check([_VERDICT]):
                    _end(store.get(_VERDICT).decode())
            # The process that holds the store has ended, and with it the run.
            except RuntimeError:
                return
            self._closed.wait(self._period)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._period):
            now = time.monotonic()
            # Not more than that, or a process that was itself suspended would blame the others.
            passed, last = min(now - last, 2 * self._period), now
            for channel, wait in list(self._waits.items()):
                wait.seconds += passed
                if wait.seconds > self.timeout:
                    self._give_up(channel, wait)

    def _give_up(self, channel: str, wait: _Wait) -> None:
        answer: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=self._look, args=(channel, wait, answer), name="watchdog", daemon=True).start()
        try:
            verdict = answer.get(timeout=_PATIENCE + 10 * self._period)
        except Empty:
            verdict = f"a call {wait.place} has not ended for {wait.seconds:.0f} s, and the run's store does not answer"
        if self._waits.get(channel) is not wait:
            return
        if verdict is None:
            wait.seconds = 0.0
            return
        _end(verdict)

    def _look(self, channel: str, wait: _Wait, answer: SimpleQueue[str | None]) -> None:
        try:
            store = self.connect()
            earlier = self._read(store)
            time.sleep(3 * self._period)
            verdict = describe_wait(channel, wait.place, wait.seconds, (earlier, self._read(store)))
            if verdict is not None and self._waits.get(channel) is wait:
                # The others that wait say it too, before the end of this process ends them.
                store.set(_VERDICT, verdict)
                time.sleep(3 * self._period)
            answer.put(verdict)
        except RuntimeError as error:
            waited = f"a call {wait.place} has not ended for {wait.seconds:.0f} s"
            answer.put(f"{waited}, and the run's store does not answer ({first_line(error):.100})")

    def _read(self, store: Store) -> list[Beat | None]:
        names = [str(rank) for rank in range(self._size)]
        return [Beat(*json.loads(store.get(name))) if store.check([name]) else None for name in names]


def _end(verdict: str) -> None:
    """End the process, whose main thread is in a call that nobody can interrupt."""
    line = (
        f"stopped: {verdict}; start the same command again, train with --resume and, where a call may take so long, a higher "
        "--collective-timeout\n"
    )
    os.write(2, line.encode())
    os._exit(FAILED)
