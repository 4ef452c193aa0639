"""Who does not come to a call of all processes is named, and those that wait for it end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from tars_fast.learning.watchdog import Beat, describe_wait

WAITING = """
import os, signal, sys, time
import torch
from tars_fast.learning.workers import join_workers
from tars_fast.support.timing import PhaseTimer

timer = PhaseTimer(torch.device("cpu"))
with join_workers({timeout}) as workers:
    sampling = workers.beside("sampling")
    assert workers.gather(workers.rank) == [*range(workers.size)]
    if workers.rank == {late_rank} % workers.size:
        with timer.phase("rollout"):
            {late}
    with timer.phase("optimiser"):
        {call}
print("done", workers.rank)
"""


# What it has written before is known.
FREEZE = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGSTOP)"


def start(num_processes: int, tmp_path, *, store: TCPStore | None = None, **parts: object) -> list[subprocess.Popen[str]]:
    """Processes of one run.

    Args:
        store: where they meet, as torchrun has one; without it the first of them holds it.
    """
    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(**{"timeout": 2.0, "call": "workers.gather(None)", "late_rank": -1, **parts}))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if store is not None:
        common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_processes)
    ]


@pytest.mark.parametrize(
    ("num_waiting", "late", "call", "state"),
    [
        (
            1,
            "time.sleep(0.5); os.kill(os.getpid(), signal.SIGSTOP)",
            "workers.gather(None)",
            "it was in 'rollout', and says nothing",
        ),
        pytest.param(2, "time.sleep(600)", "workers.gather(None)", "it is in 'rollout'", marks=pytest.mark.slow),
        pytest.param(1, "time.sleep(600)", "sampling.exchange({}, [(1, 0)])", "it is in 'rollout'", marks=pytest.mark.slow),
    ],
)
def test_every_process_that_waits_names_the_one_that_is_late(tmp_path, num_waiting, late, call, state):
    # The first process that ends would take its store with it, and the others could not ask who is late.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = start(num_waiting + 1, tmp_path, store=store, late=late, call=call)
    try:
        started = time.monotonic()
        for process in processes[:-1]:
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == 1
            (line,) = [line for line in stderr.splitlines() if line.startswith("stopped: ")]
            assert line.startswith(f"stopped: rank {num_waiting} has not come to the call in 'optimiser' for 2 s: {state}")
            assert "--resume" in line
            assert "--collective-timeout" in line
        assert time.monotonic() - started < 45
    finally:
        processes[-1].kill()
        processes[-1].communicate()


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_said(tmp_path):
    """The first process holds it, unless torchrun does."""
    first, second = start(2, tmp_path, late=FREEZE, late_rank=0)
    try:
        _, stderr = second.communicate(timeout=120)
        assert second.returncode == 1
        assert "stopped: a call in 'optimiser' has not ended for 2 s, and the run's store does not answer; start" in stderr
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
def test_a_process_that_comes_in_time_ends_nothing(tmp_path):
    processes = start(2, tmp_path, timeout=30.0, late="time.sleep(1)")
    for rank, process in enumerate(processes):
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == f"done {rank}\n", stderr


HERE = Beat(7, "in 'optimiser'", {"step": 3})


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ((HERE, Beat(4, "in 'rollout'", {"step": 2})), Beat(5, "in 'forward'", {"step": 2}), "has .*: it is in 'forward'"),
        (
            (HERE, Beat(4, "in 'rollout'", {"step": 2})),
            Beat(4, "in 'rollout'", {"step": 2}),
            "it was in 'rollout', and",
        ),
        ((HERE, None), None, "rank 1 has not come .*: it was at its start"),
        # Of another channel it has come to more.
        ((HERE, Beat(4, "in 'x'", {"other": 9})), Beat(5, "in 'x'", {"other": 9}), "rank 1 has not come"),
        ((HERE, Beat(4, "in 'optimiser'", {"step": 3})), Beat(5, "in 'optimiser'", {"step": 3}), "all 2 processes have come"),
        (
            (HERE, Beat(5, "in 'optimiser'", {"step": 3})),
            Beat(5, "in 'optimiser'", {"step": 3}),
            "^rank 1 holds up the call in 'optimiser' for 600 s: it was in 'optimiser', and says nothing any more$",
        ),
        ((HERE, Beat(4, "in 'upload'", {"step": 2})), Beat(5, "in 'upload'", {"step": 2}), None),
        ((HERE, Beat(5, "in 'upload'", {"step": 2})), Beat(5, "in 'upload'", {"step": 2}), "says nothing any more"),
    ],
)
def test_whom_a_process_waits_for(earlier, now, expected):
    found = describe_wait("step", "in 'optimiser'", 600.0, (earlier, (replace(HERE, number=8), now)))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(expected, found), found
