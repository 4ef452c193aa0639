"""Data-parallel training: each process (`torchrun`) samples and trains its share of every step's questions.

All processes hold the same trained parameters, whose steps are taken on gradients summed over all of them (`gradients.py`).
With `--tensor-parallel` they count as one, whose weights they share (`models/tensor_parallel.py`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroup  # type: ignore[attr-defined]  # the first is from C++
from torch.distributed.rendezvous import rendezvous

from tars_fast.learning.watchdog import Watchdog
from tars_fast.models.tensor_parallel import check_number
from tars_fast.support.cli import FAILED, PREEMPTED, first_line
from tars_fast.support.locks import locked
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import TrainingError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MEETING = 180.0
"""Seconds for all processes to find each other, which torchrun starts at the same time."""
_TOLD = 5.0
"""Seconds within which a cluster tells all processes that it wants its machines back."""
_GRACE = 300.0
"""Seconds after which torch gives up a call that the watchdog should have ended, in words that name nobody."""


@dataclass(frozen=True)
class Workers:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    tensor_rank: int = 0
    """Among the processes that have a part of the weights each and do the same on it; these count as one in `rank`, `size`."""
    tensor_size: int = 1
    channel: str = "step"
    """Calls of all processes through one channel come in the same order everywhere; another thread has another one."""
    group: ProcessGroup | None = field(default=None, repr=False)
    """What these calls go through; None: the default one."""
    watchdog: Watchdog | None = field(default=None, repr=False)
    """Ends calls that take too long."""

    @property
    def is_first(self) -> bool:
        """The one that writes and speaks for all."""
        return self.rank == 0 and self.tensor_rank == 0

    @property
    def num_processes(self) -> int:
        """All that torchrun started, by whose ranks the watchdog names them."""
        return self.size * self.tensor_size

    def beside(self, channel: str) -> Workers:
        """The same processes with another channel, for another thread's calls; waits for all of them."""
        if self.num_processes == 1:
            return self
        limit = None if self.watchdog is None else timedelta(seconds=self.watchdog.timeout + _GRACE)
        with self.together():
            return replace(self, channel=channel, group=torch.distributed.new_group(timeout=limit, backend="gloo"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around every call that all processes take part in; where a device computes it, it has ended at the block's end. Alone
        there is nobody to wait for.

        Raises:
            TrainingError: another process has ended.
        """
        if self.num_processes == 1:
            yield
            return
        with ExitStack() as stack:
            if self.watchdog is not None:
                stack.enter_context(self.watchdog.waiting(self.channel))
            stack.enter_context(_explain_loss())
            yield

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's items; as even as can be."""
        return list(items[self.rank :: self.size])

    def spread(self, work: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """What `work` makes of all items, one result an item, in their order; each process works on its share."""
        shares = self.gather(work(self.share(items)))
        return [shares[number % self.size][number // self.size] for number in range(len(items))]

    def gather(self, value: Item) -> list[Item]:
        """What every process gave, by rank, at which those with parts of one copy of the weights are one; waits for all."""
        return self.gather_all(value)[:: self.tensor_size]

    def gather_all(self, value: Item) -> list[Item]:
        """What every process gave, also of those with parts of one copy of the weights; waits for all."""
        if self.num_processes == 1:
            return [value]
        # One for each process to put its own in the place of.
        gathered = [value] * self.num_processes
        with self.together():
            torch.distributed.all_gather_object(gathered, value, self.group)
        return gathered

    def exchange(self, given: Mapping[int, Item], pairs: Iterable[tuple[int, int]]) -> dict[int, Item]:
        """What other processes gave this one, by their rank; waits for these.

        Args:
            given: what each process is to get, by rank; it may be pickled, and be on the host only.
            pairs: (who gives, who gets), the same in all processes.
        """
        received: dict[int, Item] = {}
        with self.together():
            # In one order everywhere, so that of those that are left the first can always go on.
            for source, target in sorted(set(pairs)):
                if source == self.rank:
                    torch.distributed.send_object_list([given[target]], group=self.group, group_dst=target)
                elif target == self.rank:
                    parcel: list[Any] = [None]
                    torch.distributed.recv_object_list(parcel, group=self.group, group_src=source)
                    received[source] = parcel[0]
        return received

    def check_same(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises TrainingError where the processes no longer hold the same parameters, bit for bit."""
        digests = self.gather_all([_digest(parameter) for parameter in parameters] if self.num_processes > 1 else [])
        if any(digest != digests[0] for digest in digests):
            raise TrainingError("the processes' parameters have come apart; the last checkpoint is good")


ALONE = Workers()


@contextmanager
def _explain_loss() -> Iterator[None]:
    """Raises TrainingError where the processes lose each other, because one of them has ended."""
    try:
        yield
    # Gloo and NCCL have no error in common but this one.
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"another process of this run has ended ({first_line(error):.100}); start the same command again, train with "
            "--resume"
        ) from error


@contextmanager
def locked_by_first(folder: Path, workers: Workers, patience: float = 0.0) -> Iterator[None]:
    """See `locked`: the first process holds the lock for all. Raises UserError in all of them."""
    with ExitStack() as stack:
        refusal = None
        if workers.is_first:
            try:
                stack.enter_context(locked(folder, patience))
            except UserError as error:
                refusal = error
        refusal = workers.gather(refusal)[0]
        if refusal is not None:
            raise refusal
        yield


@torch.no_grad()
def _digest(parameter: Tensor) -> int:
    """A sum of bit patterns, which changes if any one element changes."""
    kind = {4: torch.int32, 2: torch.int16}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(kind).sum(dtype=torch.int64))


def is_under_torchrun() -> bool:
    """Whether torchrun has started this process, and starts another one in its place where it fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def preempted_status() -> int:
    """What a process ends with that has made room on SIGUSR1; torchrun would start one that fails again at once."""
    return 0 if is_under_torchrun() else PREEMPTED


@contextmanager
def preempted_in_one_line() -> Iterator[None]:
    """Within the block SIGUSR1, by which a cluster wants its machines back, ends the process, of several once all have it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        os.write(2, b"stopped: SIGUSR1 wants the machine back; start the same command again\n")
        # One that waits in a call for this process, and hears of its end before the signal, would end as by a failure.
        if is_under_torchrun():
            time.sleep(_TOLD)
        os._exit(preempted_status())

    previous = signal.signal(signal.SIGUSR1, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


@contextmanager
def _ended_in_one_line() -> Iterator[None]:
    """Say how to go on where torchrun ends this process, which it does as soon as another one has failed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        # Whatever the process was doing, an error of its own to be told included, cannot be waited for.
        os.write(2, b"stopped: torchrun ends this process; start the same command again, train with --resume\n")
        os._exit(FAILED)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _meet(backend: str, timeout: timedelta) -> None:
    """As `init_process_group`, whose `timeout` is for what the processes say to each other later on.

    Raises:
        TrainingError: they have not found each other; torchrun may have given them the address of a process that is gone.
    """
    try:
        # torch tries once more after a pause that it draws, about as long again: three times what it is given, give or take.
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_MEETING / 3)))
    except RuntimeError as error:
        raise TrainingError(
            f"the processes have not found each other in about {_MEETING:.0f} s ({first_line(error):.100}); start the same "
            "command again, train with --resume"
        ) from error
    store.set_timeout(timeout)
    torch.distributed.init_process_group(
        backend, store=PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=timeout
    )


def num_started() -> int:
    """How many processes `torchrun` started, this one among them; 1 without it.

    Raises:
        UserError: the environment speaks of several that cannot find each other; each would be a run of its own.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return 1
    numbers = ("LOCAL_RANK", "RANK", "MASTER_PORT", "WORLD_SIZE")
    missing = [name for name in numbers if not os.environ.get(name, "").isdecimal()]
    missing += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {given} in the environment, without a right {missing[0]}; start several processes by torchrun, and "
            "unset WORLD_SIZE for a single one"
        )
    return int(given)


@contextmanager
def join_workers(timeout: float = 1800.0, tensor_parallel: int = 1) -> Iterator[Workers]:
    """For the length of the block one of the processes that `torchrun` started; alone, where it started none.

    Each process sees one GPU only, as if it were alone on the machine. Must come before anything asks CUDA.

    Args:
        timeout: seconds that a call of all processes may take; then those that wait in it end with status 1 and a line that
            names those that have not come.
        tensor_parallel: how many have a part of the weights each; 1, or all of them.

    Raises:
        UserError: see `num_started`; or there are more or fewer than `tensor_parallel`.
        TrainingError: they have not found each other in time.
    """
    size = num_started()
    if size == 1:
        check_number(tensor_parallel, 1)
        yield ALONE
        return
    if tensor_parallel > 1:
        check_number(tensor_parallel, size)
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    # Objects travel by gloo; gradients by NCCL where they are on a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _meet(backend, timedelta(seconds=timeout + _GRACE))
    try:
        with _ended_in_one_line():
            rank = torch.distributed.get_rank()
            workers = Workers(rank, size) if tensor_parallel == 1 else Workers(tensor_rank=rank, tensor_size=size)
            run = workers.gather(uuid.uuid4().hex)[0]
            with closing(Watchdog(rank, size, timeout, run)) as watchdog:
                yield replace(workers, watchdog=watchdog)
    finally:
        # vLLM, where it ran here, has ended the group with itself.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
