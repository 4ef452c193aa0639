"""Processes that hold parts of a vocabulary, as one process can go through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from tars_kernels import vocabulary_parallel

Result = TypeVar("Result")


def found_by_parts(
    monkeypatch: pytest.MonkeyPatch, number: int, rounds: int, work: Callable[[int, object], Result]
) -> list[Result]:
    """What `work` of (rank, group) returns for each of `number` ranks.

    They take turns, round by round: an exchange gives what the others had for it when it was last their turn. Where one depends
    on another, the last of n is right in round n + 1. Sums of gradients are left to the caller.
    """
    rank, calls = 0, 0
    known: dict[tuple[int, int], torch.Tensor] = {}

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: object) -> None:
        nonlocal calls
        calls += 1
        known[rank, calls] = own.clone()
        for other, part in enumerate(parts):
            part.copy_(known.get((other, calls), torch.zeros_like(own)))

    for name, stand_in in (
        ("get_world_size", lambda _: number),
        ("get_rank", lambda _: rank),
        ("all_reduce", lambda *_, **__: None),
        ("all_gather", all_gather),
    ):
        monkeypatch.setattr(vocabulary_parallel.dist, name, stand_in)
    for _ in range(rounds):
        found = []
        for rank in range(number):
            calls = 0
            found.append(work(rank, object()))
    return found
