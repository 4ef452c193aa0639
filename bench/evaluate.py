"""Seconds and items a second of an evaluation: `python bench/evaluate.py --output bench/results/evaluation_cpu.json`.

The pocket model on its 400 held-out items, greedy, from speech and from text: the whole command in a process of its own, and
beside it the evaluation alone, on a model that is loaded already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch

from tars_fast.data.items import HELD_OUT_DATA, load_questions
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator
from tars_fast.learning.rewards.behaviour import HashedNgrams
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import load_model
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.provenance import provenance
from tars_fast.types import Modality


def time_command() -> float:
    """Seconds of the whole command, from the shell to the table: imports, checks, loading, figures and picture included."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "tars_fast.evaluate", "--device", "cpu", "--engine", "transformers"]
        subprocess.run([*command, "--output-dir", folder], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def time_evaluation() -> tuple[float, int]:
    """(seconds, completions) of all items on a new model, whose cache has no audio embeddings yet."""
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    questions = load_questions(HELD_OUT_DATA)
    settings = EvaluationSettings(preset.max_new_tokens, num_samples=0, temperature=1.0, seed=0)
    with closing(TransformersEngine(model, preset.rollout_batch_size)) as engine:
        started = time.perf_counter()
        results = Evaluator(model, engine, HashedNgrams(), settings).evaluate(questions, "held_out", lambda _: None)
        seconds = time.perf_counter() - started
    assert all(result.failed is None for result in results), "items that fail would be fast"
    return seconds, len(Modality) * len(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    arguments = parser.parse_args()
    commands, evaluations = [], []
    for _ in range(arguments.repeats):
        commands.append(time_command())
        seconds, num_completions = time_evaluation()
        evaluations.append(seconds)
    num_items = num_completions // len(Modality)
    report = provenance() | {
        "command": f"python bench/evaluate.py --repeats {arguments.repeats} --output {arguments.output}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "num_items": num_items,
        "num_completions": num_completions,
        "command_seconds": [round(seconds, 2) for seconds in commands],
        "evaluation_seconds": [round(seconds, 2) for seconds in evaluations],
        "median_command_items_per_second": round(num_items / statistics.median(commands), 1),
        "median_evaluation_items_per_second": round(num_items / statistics.median(evaluations), 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
