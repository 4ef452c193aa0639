"""Find the fastest tile of the row kernels on this GPU: `bench/tune.sh`, which writes it into `tars_kernels/tiles.json`.

Every candidate computes `policy_loss` with its gradient at the vocabularies of speech models, is held to the default's result,
and is timed in turns with the others. A candidate replaces the default where it is faster by more than `MARGIN`, in the
geometric mean over the vocabularies. Nothing is written with `--dry`, which also runs without a GPU, interpreted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from time import perf_counter

import tars_kernels
import torch
import triton
from tars_kernels import rows
from torch import Tensor

VOCABULARIES = (32000, 50257, 151936, 156032)
CANDIDATES = [
    {"ROWS": num_rows, "LANES": lanes, "num_warps": warps}
    for num_rows, lanes, warps in product((1, 2, 4, 8), (2048, 4096, 8192), (8, 16, 32))
    # 16 to 64 elements a thread: fewer leave no reads in flight, more spill.
    if 16 <= num_rows * lanes // (32 * warps) <= 64
]
DEFAULT = rows._LONG_ROWS
# The package gives its name to the function.
policy_loss = import_module("tars_kernels.policy_loss")
MARGIN = 1.02
"""Differences below are noise."""


def milliseconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        return triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median")
    start = perf_counter()
    run()
    return 1e3 * (perf_counter() - start)


def loss_and_gradient(logits: Tensor, targets: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    loss = tars_kernels.policy_loss(logits, targets, advantages).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def time_candidates(vocabulary: int, num_tokens: int, repeats: int, candidates: Sequence[dict[str, int]]) -> list[float]:
    """Median milliseconds of each candidate; infinite for one that cannot run.

    Raises:
        ValueError: a candidate gives another result than the default.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(num_tokens, vocabulary, dtype=torch.bfloat16, device=device, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (num_tokens,), device=device, generator=generator)
    advantages = torch.randn(num_tokens, device=device, generator=generator)
    times: list[list[float]] = [[] for _ in candidates]
    chosen, expected = policy_loss.tile, loss_and_gradient(logits, targets, advantages)
    try:
        for _ in range(repeats):
            for candidate, found in zip(candidates, times, strict=True):
                policy_loss.tile = lambda _, candidate=candidate: candidate
                try:
                    loss, gradient = loss_and_gradient(logits, targets, advantages)
                except triton.runtime.errors.OutOfResources:
                    found.append(math.inf)
                    continue
                if not torch.allclose(loss, expected[0], rtol=1e-4) or not torch.allclose(gradient, expected[1], rtol=0.02):
                    raise ValueError(f"{candidate}: another loss or gradient than the default's at vocabulary {vocabulary}")
                found.append(milliseconds(lambda: loss_and_gradient(logits, targets, advantages)))
    finally:
        policy_loss.tile = chosen
    return [statistics.median(found) for found in times]


def fastest(times: dict[int, list[float]], candidates: Sequence[dict[str, int]]) -> dict[str, int] | None:
    """The candidate that beats the default by more than the margin, over all vocabularies; None where there is none."""
    default = candidates.index(DEFAULT)

    def speedup(number: int) -> float:
        return math.exp(statistics.mean(math.log(row[default] / row[number]) for row in times.values()))

    usable = [number for number in range(len(candidates)) if all(math.isfinite(row[number]) for row in times.values())]
    best = max(usable, key=speedup)
    return candidates[best] if speedup(best) > MARGIN else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry:
        print("error: bench/tune.py: torch sees no CUDA GPU; --dry shows what it does", file=sys.stderr)
        return 2
    times = {one: time_candidates(one, options.num_tokens, options.repeats, CANDIDATES) for one in options.vocabularies}
    for number, candidate in enumerate(CANDIDATES):
        print(candidate, "  ".join(f"{vocabulary}: {row[number]:.3f} ms" for vocabulary, row in times.items()))
    best = fastest(times, CANDIDATES)
    print("fastest:", best or "the default")
    if not options.dry:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        tiles = {name: tile for name, tile in rows.TUNED_TILES.items() if name != capability}
        tiles |= {} if best is None else {capability: best}
        path = Path(rows.__file__).with_name("tiles.json")
        path.write_text(json.dumps(tiles, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}; bench/compile_kernels.py looks whether it compiles without spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
