"""How far two processes with half of the weights each are from one with all: `python bench/tensor_parallel.py --output FILE`.

Small checkpoints of genuine classes, float32, vLLM's CPU build in both processes; what is compared is in
tests/rollout/half_of_an_engine.py, whose bounds are held here too. The figures are the largest differences of both processes:
log-probabilities and entropies in nats, pooled states (which are of the order of 1), gradients clipped to a norm of 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
from tars_fast.support.provenance import provenance

TESTS = Path(__file__).parents[1] / "tests"
FAMILIES = ("qwen2-audio", "qwen2.5-omni")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from checkpoints import MAKERS
    from halves import run_halves

    report = provenance() | {"command": f"python bench/tensor_parallel.py --output {arguments.output}", "processes": 2}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            said = run_halves(TESTS / "rollout" / "half_of_an_engine.py", MAKERS[family](Path(folder)))
        first, second = (json.loads(line) for line in said)
        report[family] = {
            part: {name: max(value, second[part][name]) for name, value in figures.items()} for part, figures in first.items()
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
