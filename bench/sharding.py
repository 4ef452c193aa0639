"""What summing gradients over processes costs, and what sharing out the optimiser adds or saves: two processes on a CPU.

    torchrun --standalone --nproc-per-node 2 bench/sharding.py --json OUT

Arms take turns, and each round's ratio is of neighbours in time; a round's seconds are those of the slower process.

- `reduction`: gradients in buckets (`GradientSum`) against one call a parameter, for the 448 adapters of Qwen2-Audio-7B and for
  a small decoder in bfloat16; once more with an optimiser that is shared out, where a gradient goes to one process only.
- `step`: from gradients to weights, sum, clipping and update, with the optimiser shared out against the same on every process.

Nothing overlaps a backward pass here: on two cores it would compete with what it hides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch
from torch import nn

from tars_fast.learning.gradients import GradientSum
from tars_fast.learning.optimizer import held_parameters, make_optimizer, own_part
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.models.architecture import Architecture
from tars_fast.models.registry import PRESETS
from tars_fast.support.provenance import provenance

Arm = Callable[[], None]


def adapters(architecture: Architecture, rank: int) -> list[nn.Parameter]:
    """LoRA on all linear layers, in float32."""
    layer = [shape for inputs, outputs in architecture.linear_layers.values() for shape in ((rank, inputs), (outputs, rank))]
    return [nn.Parameter(torch.zeros(shape)) for shape in layer * architecture.num_layers]


def decoder(architecture: Architecture) -> list[nn.Parameter]:
    """As many parameters as it has, as large as they are, in bfloat16."""
    torch.manual_seed(0)
    sizes = architecture.text_parameter_sizes()
    return [nn.Parameter(torch.randn(size).mul_(0.02).bfloat16()) for size in sizes]


def one_by_one(parameters: Sequence[nn.Parameter]) -> Arm:
    def run() -> None:
        for parameter in parameters:
            torch.distributed.all_reduce(parameter.grad)

    return run


def stepping(optimizer: torch.optim.Optimizer, sums: GradientSum) -> Arm:
    def run() -> None:
        sums.finish()
        sums.clip(1.0)
        optimizer.step()

    return run


def compare(parameters: Sequence[nn.Parameter], arms: dict[str, Arm], rounds: int, workers: Workers) -> dict[str, object]:
    """Median seconds of each arm, and median, least and largest of its ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            torch.distributed.barrier()
            started = time.perf_counter()
            run()
            slowest = max(workers.gather(time.perf_counter() - started))
            # The first round connects and allocates.
            if turn:
                seconds[name].append(slowest)
    first, *others = arms
    ratios = {name: [own / base for own, base in zip(seconds[name], seconds[first], strict=True)] for name in others}
    return {
        "parameters": len(parameters),
        "numbers": sum(parameter.numel() for parameter in parameters),
        "median_seconds": {name: round(statistics.median(own), 4) for name, own in seconds.items()},
        f"ratio_to_{first.replace(' ', '_')}": {
            name: {"median": round(statistics.median(own), 3), "range": [round(min(own), 3), round(max(own), 3)]}
            for name, own in ratios.items()
        },
    }


def measure(rounds: int, workers: Workers) -> dict[str, object]:
    qwen = PRESETS["qwen2-audio-7b"].architecture
    assert qwen is not None
    small = dataclasses.replace(qwen, hidden_size=512, intermediate_size=1376, num_layers=4, vocabulary_size=16_000)
    lora, full = adapters(qwen, 8), decoder(small)
    sums = {
        "lora": GradientSum(make_optimizer(lora, 0.0, 0), workers),
        "full": GradientSum(make_optimizer(full, 0.0, 0), workers),
    }
    optimizers = {name: make_optimizer(full, 0.01, 0, sharded=name == "shared out") for name in ("replicated", "shared out")}
    of_full = {name: GradientSum(optimizer, workers) for name, optimizer in optimizers.items()}
    reduction = {
        "lora": compare(lora, {"one by one": one_by_one(lora), "one bucket": sums["lora"].finish}, rounds, workers),
        "full": compare(
            full,
            {"one by one": one_by_one(full), "one bucket": sums["full"].finish, "to owners": of_full["shared out"].finish},
            rounds,
            workers,
        ),
    }
    step = compare(full, {name: stepping(optimizers[name], of_full[name]) for name in optimizers}, rounds, workers)
    moments = {
        name: workers.gather(sum(8 * parameter.numel() for parameter in held_parameters(own_part(optimizer))))
        for name, optimizer in optimizers.items()
    }
    return {"reduction": reduction, "step": step | {"bytes_of_moments_by_process": moments}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with join_workers() as workers:
        if workers.size == 1:
            parser.error("start it by torchrun --nproc-per-node 2")
        report = measure(arguments.rounds, workers)
        if workers.is_first:
            print(json.dumps(report, indent=1))
            if arguments.json:
                command = f"torchrun --standalone --nproc-per-node {workers.size} bench/sharding.py --rounds {arguments.rounds}"
                text = json.dumps({**provenance(), "command": f"{command} --json {arguments.json}", **report}, indent=1)
                arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
