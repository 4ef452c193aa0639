"""How far two processes are from one: `python bench/equality.py --output FILE`.

Two ways to divide the work, in float32 over gloo, unless a case says otherwise:

- questions: each process has whole weights and its own questions, of which the second has none in one of three steps; the
  embedded model. Of all weights after these steps the distance between two processes and one, in parts of what one process
  has changed them by; of the gradients' norms the largest relative difference. (tests/learning/test_gradients.py)
- weights: each process has half of every layer (`--tensor-parallel 2`), with vLLM in both; small checkpoints of genuine
  classes. The largest difference of log-probabilities and entropies in nats, of pooled states (which are of the order of 1),
  and of gradients clipped to a norm of 1. (tests/rollout/half_of_an_engine.py)

The bounds of these tests are held here too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch

from tars_fast.config import TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning.workers import ALONE
from tars_fast.models.registry import PRESETS
from tars_fast.support.provenance import provenance

TESTS = Path(__file__).parents[1] / "tests"
FAMILIES = ("qwen2-audio", "qwen2.5-omni")


def divided_questions() -> dict[str, object]:
    from several_steps import CASES, Taken, steps_of_two, take_steps, trained

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(objective="tars", questions_per_step=4, num_steps=4)
        config = settings.resolve(PRESETS["pocket"], output_dir=Path(folder), tokens_per_micro_batch=512)
        of_two, of_one = steps_of_two(CASES, load_questions(TRAINING_DATA)[:3], config, Path(folder))
        figures = {}
        for name, case in CASES.items():
            ranks = [Taken(**taken[name]) for taken, _ in of_two]
            alone = take_steps(case, config, of_one, ALONE)
            change = alone.weights - trained(case.make(config, ALONE))
            norms = torch.tensor([taken.grad_norms for taken in (*ranks, alone)])
            figures[name] = {
                "same_weights_in_both": torch.equal(ranks[0].weights, ranks[1].weights),
                "weights": ((ranks[0].weights - alone.weights).norm() / change.norm()).item(),
                "gradient_norm": (norms / norms[-1] - 1).abs().max().item(),
            }
    return figures


def divided_weights() -> dict[str, object]:
    from checkpoints import MAKERS
    from halves import run_halves

    figures = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            said = run_halves(TESTS / "rollout" / "half_of_an_engine.py", MAKERS[family](Path(folder)))
        first, second = (json.loads(line) for line in said)
        figures[family] = {
            part: {name: max(value, second[part][name]) for name, value in own.items()} for part, own in first.items()
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "learning")]
    torch.set_num_threads(1)
    report = provenance() | {"command": f"python bench/equality.py --output {arguments.output}", "processes": 2}
    report |= {"questions": divided_questions(), "weights": divided_weights()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
