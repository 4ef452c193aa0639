"""Data-parallel training: each process (`torchrun`) samples and trains its share of every step's questions.

All processes hold the same trained parameters and take the same optimiser step, on gradients summed over all of them. With
`--tensor-parallel` they count as one, whose weights they share (`models/tensor_parallel.py`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tars_fast.models.tensor_parallel import check_number
from tars_fast.support.cli import FAILED, first_line
from tars_fast.support.locks import locked
from tars_fast.support.timing import is_out_of_memory
from tars_fast.types import TrainingError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    tensor_rank: int = 0
    """Among the processes that have a part of the weights each and do the same on it; these count as one in `rank`, `size`."""
    tensor_size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes and speaks for all."""
        return self.rank == 0 and self.tensor_rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's items; as even as can be."""
        return list(items[self.rank :: self.size])

    def spread(self, work: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """What `work` makes of all items, one result an item, in their order; each process works on its share."""
        shares = self.gather(work(self.share(items)))
        return [shares[number % self.size][number // self.size] for number in range(len(items))]

    def gather(self, value: Item) -> list[Item]:
        """What every process gave, by rank, at which those with parts of one copy of the weights are one; waits for all."""
        return self._gather_all(value)[:: self.tensor_size]

    def _gather_all(self, value: Item) -> list[Item]:
        number = self.size * self.tensor_size
        if number == 1:
            return [value]
        # One for each process to put its own in the place of.
        gathered = [value] * number
        with _explain_loss():
            torch.distributed.all_gather_object(gathered, value)
        return gathered

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of every parameter by the sum of all processes' ones."""
        if self.size == 1:
            return
        with _explain_loss():
            for parameter in parameters:
                torch.distributed.all_reduce(parameter.grad)

    def check_same(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises TrainingError where the processes no longer hold the same parameters, bit for bit."""
        is_alone = self.size * self.tensor_size == 1
        digests = self._gather_all([] if is_alone else [_digest(parameter) for parameter in parameters])
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
def locked_by_first(folder: Path, workers: Workers) -> Iterator[None]:
    """See `locked`: the first process holds the lock for all. Raises UserError in all of them."""
    with ExitStack() as stack:
        refusal = None
        if workers.is_first:
            try:
                stack.enter_context(locked(folder))
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


@contextmanager
def join_workers(tensor_parallel: int = 1) -> Iterator[Workers]:
    """For the length of the block one of the processes that `torchrun` started; alone, where it started none.

    Each process sees one GPU only, as if it were alone on the machine. Must come before anything asks CUDA.

    Args:
        tensor_parallel: how many have a part of the weights each; 1, or all of them.

    Raises:
        UserError: the environment speaks of several processes that cannot find each other; each would be a run of its own. Or
            there are more or fewer than `tensor_parallel`.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        check_number(tensor_parallel, 1)
        yield ALONE
        return
    if not given.isdecimal() or "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {given} in the environment, without LOCAL_RANK; start several processes by torchrun, and unset "
            "WORLD_SIZE for a single one"
        )
    size = int(given)
    if tensor_parallel > 1:
        check_number(tensor_parallel, size)
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    # Objects travel by gloo; gradients by NCCL where they are on a GPU.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with _ended_in_one_line():
            rank = torch.distributed.get_rank()
            yield Workers(rank, size) if tensor_parallel == 1 else Workers(tensor_rank=rank, tensor_size=size)
    finally:
        # vLLM, where it ran here, has ended the group with itself.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
