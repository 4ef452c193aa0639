"""The gradients of all processes, summed in buckets, in full fine-tuning while the update's last backward pass still runs.

With LoRA every process takes the optimiser's step, so each gets the sum, in one flat bucket a dtype: there are hundreds of
small gradients. Where the optimiser is sharded (`make_optimizer`) a gradient goes to the process that owns its parameter alone,
and the others forget theirs as soon as it is on its way.

DistributedDataParallel reduces in buckets too, but gives every gradient to all processes, and only in backward passes through a
module that it wraps; here the layers and the head are called one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tars_fast.learning.optimizer import held_parameters, is_sharded, numbered, own_part
from tars_fast.learning.workers import Workers
from tars_fast.models.memory import GRADIENT_BUCKET_BYTES


@dataclass(frozen=True)
class Bucket:
    """Gradients that are sent together."""

    parameters: list[nn.Parameter]
    owner: int | None
    """The process that gets their sum; None: all of them."""


class GradientSum:
    """Sums the gradients of what an optimiser updates over all processes, once an update; `finish` must be called by all."""

    def __init__(self, optimizer: torch.optim.Optimizer, workers: Workers):
        parameters, own = held_parameters(optimizer), held_parameters(own_part(optimizer))
        self._workers = workers
        self.is_sharded = is_sharded(optimizer)
        self.own = own
        """Those whose sum this process gets."""
        if self.is_sharded:
            numbers = numbered(parameters)
            shares = workers.gather([numbers[parameter] for parameter in own])
            owners = {number: rank for rank, share in enumerate(shares) for number in share}
            placed = [(parameter, owners[number]) for parameter, number in numbers.items()]
            # A backward pass begins with the last layer.
            self._buckets = make_buckets(placed[::-1], GRADIENT_BUCKET_BYTES)
        else:
            self._buckets = make_buckets([(parameter, None) for parameter in parameters], None)
        self._num_sent = 0
        self._sent: list[torch.distributed.Work] = []

    @contextmanager
    def sent_while_they_come(self, is_last: bool) -> Iterator[None]:
        """Around a backward pass: if it is the last of this update, buckets of a sharded optimiser are sent as they fill.

        Every process sends them in the same order, so that one waits for those before it. A process that has fewer backward
        passes than others, or none, sends what is left in `finish`.
        """
        if not (is_last and self.is_sharded):
            yield
            return
        missing = [len(bucket.parameters) for bucket in self._buckets]

        def count(number: int, _parameter: Tensor) -> None:
            missing[number] -= 1
            while self._num_sent < len(missing) and not missing[self._num_sent]:
                self._send_next()

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(count, number))
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _send_next(self) -> None:
        bucket = self._buckets[self._num_sent]
        self._num_sent += 1
        for parameter in bucket.parameters:
            # Missing gradients become 0, so that momentum and weight decay act in every process alike.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._workers.size == 1:
            return
        flat = _flattened([parameter.grad for parameter in bucket.parameters if parameter.grad is not None])
        if bucket.owner is None:
            work = torch.distributed.all_reduce(flat, async_op=True)
        else:
            work = torch.distributed.reduce(flat, bucket.owner, async_op=True)
        self._sent.append(work)
        is_kept = bucket.owner in (None, self._workers.rank)
        sizes = [parameter.numel() for parameter in bucket.parameters]
        for parameter, part in zip(bucket.parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter) if is_kept else None

    def finish(self) -> None:
        """Send what is left, zeros for parameters without a gradient, and wait; then only `own` have a gradient, the sum."""
        with self._workers.together():
            while self._num_sent < len(self._buckets):
                self._send_next()
            for work in self._sent:
                work.wait()
        self._sent.clear()
        self._num_sent = 0

    def clip(self, max_norm: float) -> Tensor:
        """Scale the sums so that the norm of all is at most `max_norm`; returns the norm before, the same in all processes."""
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.own if parameter.grad is not None])
        if self.is_sharded:
            # A process without parameters has its norm of 0 on the CPU.
            square = norm.float().square().to(self._buckets[0].parameters[0].device)
            with self._workers.together():
                torch.distributed.all_reduce(square)
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.own, max_norm, norm)
        return norm


def _flattened(gradients: Sequence[Tensor]) -> Tensor:
    """[sum of sizes] all of them; a single one is not copied."""
    return gradients[0].reshape(-1) if len(gradients) == 1 else torch.cat([gradient.flatten() for gradient in gradients])


def make_buckets(placed: Sequence[tuple[nn.Parameter, int | None]], max_bytes: int | None) -> list[Bucket]:
    """Parameters with their owners as buckets, each of one owner and dtype, in the order in which they become full.

    Args:
        placed: in the order in which gradients come.
        max_bytes: of a bucket with more than one parameter; None: no limit.
    """
    buckets: list[Bucket] = []
    filling: dict[tuple[int | None, torch.dtype], Bucket] = {}
    for parameter, owner in placed:
        key = owner, parameter.dtype
        num_bytes = parameter.nbytes + sum(held.nbytes for held in filling[key].parameters) if key in filling else 0
        if key not in filling or (max_bytes is not None and num_bytes > max_bytes):
            filling[key] = Bucket([], owner)
            buckets.append(filling[key])
        filling[key].parameters.append(parameter)
    places = numbered(parameter for parameter, _ in placed)
    return sorted(buckets, key=lambda bucket: places[bucket.parameters[-1]])
