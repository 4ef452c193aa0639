"""Each operation of `tars_kernels` beside its peers: `pytest bench/test_kernels.py --benchmark-only`.

A result is checked before it is timed. On a CUDA GPU the shapes are Qwen2-Audio-7B's and `extra_info` of every entry holds the
median time on the device, the rate, the part of what the same GPU reaches in this run (a copy, a bf16 product), and the peak of
memory above the inputs. Without a GPU small shapes run in plain PyTorch, whose figures say nothing about kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from time import perf_counter, process_time
from typing import NamedTuple

import pytest
import torch
from kernel_cases import ON_CPU, ON_GPU, OURS, Inputs, Operation, Shape, operations
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROUNDS = 20 if DEVICE.type == "cuda" else 5
SECONDS = 0.3
"""Slow contenders get fewer rounds, 3 at least, once they have taken so long."""
OPERATIONS = operations()
EAGER = {operation.name: operation.contenders["eager"] for operation in OPERATIONS if "eager" in operation.contenders}


class Case(NamedTuple):
    operation: Operation
    contender: str
    shape: Shape
    gradient: bool


CASES = [
    pytest.param(Case(operation, contender, shape, gradient), id=f"{contender}-{shape}-{'both' if gradient else 'forward'}")
    for operation in OPERATIONS
    for shape, gradient in product(ON_GPU if DEVICE.type == "cuda" else ON_CPU, (False, True))
    for contender in operation.contenders
    if operation.has_gradient or not gradient
]


def median_seconds(function: Callable[[], object]) -> float:
    """Median time on the device, caches emptied in between; on the CPU there is nothing to empty."""
    times: list[float] = []
    if DEVICE.type == "cpu":
        for _ in range(ROUNDS):
            start = perf_counter()
            function()
            times.append(perf_counter() - start)
        return statistics.median(times)
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)
    while len(times) < 3 or (len(times) < ROUNDS and sum(times) < SECONDS):
        # Empties the caches, and keeps the device busy for a millisecond, so that launches wait there, not on the host.
        for _ in range(16):
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@pytest.fixture(scope="module")
def ceilings() -> dict[str, float]:
    """What this machine reaches now: bytes a second of a copy (read and written), operations a second of a product."""
    size = 2**31 if DEVICE.type == "cuda" else 2**26
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    width = 8192 if DEVICE.type == "cuda" else 1024
    factors = [torch.randn(width, width, device=DEVICE).to(DTYPE) for _ in range(2)]
    for _ in range(3):
        target.copy_(source)
        _ = factors[0] @ factors[1]
    return {
        "copy": 2 * size / median_seconds(lambda: target.copy_(source)),
        "product": 2 * width**3 / median_seconds(lambda: factors[0] @ factors[1]),
    }


@pytest.fixture(scope="module")
def made() -> dict[Shape, Inputs]:
    """Inputs of the last shape only: three shapes at once would not fit."""
    return {}


def run(operation: Operation, contender: str, inputs: Inputs, gradient: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    with torch.set_grad_enabled(gradient):
        loss = operation.contenders[contender](inputs)
    gradients = torch.autograd.grad(loss, operation.leaves(inputs, contender), allow_unused=True) if gradient else ()
    return loss.detach(), gradients


def check(operation: Operation, contender: str, inputs: Inputs, gradient: bool) -> None:
    """A contender agrees with eager PyTorch, value and gradient, as far as bf16 products allow."""
    loss, gradients = run(operation, contender, inputs, gradient)
    with torch.set_grad_enabled(gradient):
        truth = EAGER[operation.name](inputs)
    tolerance = 2e-2 if DTYPE is torch.bfloat16 else 1e-4
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance, abs=tolerance)
    if gradient:
        for ours, theirs in zip(
            gradients, torch.autograd.grad(truth, operation.leaves(inputs, "eager"), allow_unused=True), strict=True
        ):
            if theirs is not None:
                if ours.shape != theirs.shape:
                    ours = ours[:, :-1].reshape(theirs.shape)
                assert (ours.double() - theirs.double()).norm() <= 3 * tolerance * theirs.double().norm()


@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark, made, ceilings, case):
    operation, contender, shape, gradient = case
    kind = "kernels" if DEVICE.type == "cuda" else "plain PyTorch, no GPU"
    benchmark.group = f"{operation.name}, {'forward and backward' if gradient else 'forward'} ({kind})"
    if shape not in made:
        made.clear()
        made[shape] = Inputs(shape, DEVICE, DTYPE)
    inputs = made[shape]
    try:
        check(operation, contender, inputs, gradient)
        benchmark.extra_info.update(figures(operation, contender, inputs, gradient, ceilings))
        benchmark.pedantic(lambda: (run(operation, contender, inputs, gradient), synchronise()), rounds=3)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip("does not fit into this GPU's memory")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="plain PyTorch beside plain PyTorch, on CPUs")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if {OURS, "eager"} <= one.contenders.keys()], ids=lambda one: one.name
)
def test_without_a_gpu_nothing_is_lost(benchmark, made, operation, gradient):
    """At most 1.1 times the processor time of eager PyTorch, taken in turns, so that other work counts for both.

    By one thread: several wait for each other by spinning, which takes processor time by chance.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = made.setdefault(ON_CPU[0], Inputs(ON_CPU[0], DEVICE, DTYPE))
    ratios: list[float] = []
    # Noise goes both ways; what is slower is slower six times.
    while len(ratios) < 6 and min(ratios, default=2.0) > 1.1:
        seconds: dict[str, list[float]] = {OURS: [], "eager": []}
        for _ in range(20):
            for contender, times in seconds.items():
                start = process_time()
                run(operation, contender, inputs, gradient)
                times.append(process_time() - start)
        ratios.append(statistics.median(seconds[OURS]) / statistics.median(seconds["eager"]))
    benchmark.group = "plain PyTorch beside eager"
    benchmark.extra_info.update({"operation": operation.name, "gradient": gradient, "ratio": min(ratios)})
    benchmark.pedantic(lambda: run(operation, OURS, inputs, gradient), rounds=1)
    torch.set_num_threads(threads)
    assert min(ratios) <= 1.1, ratios


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def figures(
    operation: Operation, contender: str, inputs: Inputs, gradient: bool, ceilings: dict[str, float]
) -> dict[str, object]:
    """Time, rate and memory of one contender."""
    shape = inputs.shape
    memory = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(operation, contender, inputs, gradient)
        memory = torch.cuda.max_memory_allocated() - before
    seconds = median_seconds(lambda: run(operation, contender, inputs, gradient))
    limits = {"copy": operation.num_bytes(shape, DTYPE.itemsize, gradient)}
    if operation.num_flops is not None:
        limits["product"] = operation.num_flops(shape, gradient)
    shares = {name: amount / seconds / ceilings[name] for name, amount in limits.items()}
    limit = max(shares, key=shares.get)
    return {
        "operation": operation.name,
        "contender": contender,
        "gradient": gradient,
        "shape": vars(shape),
        "median_ms": seconds * 1e3,
        "limit": limit,
        "rate": limits[limit] / seconds,
        "percent_of_ceiling": 100 * shares[limit],
        "ceiling": ceilings[limit],
        "peak_bytes_above_inputs": memory,
    }
