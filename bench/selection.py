"""Accuracy over a budget of spoken items, chosen for the model and uniformly: `python bench/selection.py --output FILE`.

The written corpus is the bundled training questions, and the synthesiser of `prepare` hands out their recordings, so that
voices are those of the held-out items. For each seed and budget `prepare --budget` takes a part of it, once with `--select-for`
and once without; the embedded model is trained on each for the same steps and evaluated on the bundled held-out items. Runs
that are there already in --folder are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import TRAINING_DATA, read_items
from tars_fast.support.provenance import provenance
from tars_fast.types import Recording

CHOICES = {"uniform": (), "selected": ("--select-for", "pocket")}
FIGURES = ("speech_accuracy", "speech_accuracy_sampled", "text_accuracy")
_FIELDS = ("id", "question", "options", "answer_set", "answer", "category")


def run(command: str, *flags: object) -> None:
    # From here, so that `prepare` finds this file's synthesiser.
    subprocess.run([sys.executable, "-m", f"tars_fast.{command}", *map(str, flags)], check=True, cwd=Path(__file__).parent)


@functools.cache
def recordings() -> dict[str, Recording]:
    """The bundled recording of each training question, by its text."""
    return {item.question.text: item.audio for item in read_items(TRAINING_DATA)}


def bundled(text: str, voice: str, seed: int) -> tuple[np.ndarray, int]:
    """A synthesiser for `prepare`: the bundled recording of a question."""
    return decode(recordings()[text]), SAMPLE_RATE


def write_corpus(path: Path) -> None:
    """The bundled training questions as written items."""
    rows = [{name: item.fields[name] for name in _FIELDS if name in item.fields} for item in read_items(TRAINING_DATA)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--folder", type=Path, required=True, help="where spoken items and runs go")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--train", default="", help="further flags of tars_fast.train, in one string")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    corpus = arguments.folder / "corpus.jsonl"
    write_corpus(corpus)
    runs = []
    for seed in range(arguments.seeds):
        for budget in arguments.budgets:
            for choice, flags in CHOICES.items():
                folder = arguments.folder / f"{choice}-{budget}-{seed}"
                spoken = folder / "spoken"
                if not (folder / "run" / "evaluation.json").is_file():
                    run(
                        "prepare",
                        "--data",
                        corpus,
                        "--output-dir",
                        spoken,
                        "--budget",
                        budget,
                        "--seed",
                        seed,
                        "--jobs",
                        1,
                        "--synthesiser",
                        "selection:bundled",
                        *flags,
                    )
                    trained = ("--data", spoken, "--eval-data", "pocket", "--output-dir", folder / "run", "--seed", seed)
                    run("train", *trained, *shlex.split(arguments.train))
                evaluation = json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))
                clusters = json.loads((spoken / "choice.json").read_text(encoding="utf-8"))["clusters"]
                given = [[len(one["ids"]), one["budget"], one["misalignment"]] for one in clusters]
                figures = {name: evaluation["after"][name] for name in FIGURES if name in evaluation["after"]}
                before = {name: evaluation["before"][name] for name in figures}
                runs.append({"choice": choice, "budget": budget, "seed": seed, "before": before} | figures)
                runs[-1]["clusters_size_budget_misalignment"] = given
                write_report(arguments, runs)


def write_report(arguments: argparse.Namespace, runs: list[dict]) -> None:
    """The figures of the runs so far, and the means of each budget over seeds."""
    means: dict[str, dict[str, float]] = {}
    for choice in CHOICES:
        for budget in arguments.budgets:
            own = [one for one in runs if (one["choice"], one["budget"]) == (choice, budget)]
            if own:
                means[f"{choice} {budget}"] = {
                    name: statistics.mean(one[name] for one in own) for name in FIGURES if name in own[0]
                } | {"seeds": len(own)}
    report = provenance() | {
        "command": shlex.join(["python", "bench/selection.py", *sys.argv[1:]]),
        "means": means,
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
