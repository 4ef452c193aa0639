"""The speech LLM of examples/smol from nothing to its evaluation: `python bench/smol.py --folder FOLDER --output FILE`.

Runs the commands of examples/smol/README.md one after the other, times each, and collects what the warm model answers. What is
there already is not made again, so the same command goes on where it was stopped; the seconds of a command that was stopped are
those of all its starts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from tars_fast.data.synthesis import ACCENTS, SPEAKERS
from tars_fast.support.files import write_atomically
from tars_fast.support.provenance import provenance

SMOL = Path(__file__).parents[1] / "examples" / "smol"
HELD_OUT_SPEAKERS = ("f4", "m4", "m7", "Michael")
PARTS = {
    "training": [speaker for speaker in SPEAKERS if speaker not in HELD_OUT_SPEAKERS],
    "held_out": HELD_OUT_SPEAKERS,
}


def voices(part: str) -> list[str]:
    return ["+".join(pair) for pair in product(ACCENTS, PARTS[part])]


def commands(warm_up: list[str]) -> dict[str, tuple[str, list[str]]]:
    """By name what a command leaves when it is done, and its arguments, in the folder that it runs in."""
    prepared = ["-m", "tars_fast.prepare", "--data"]
    spoken = {
        f"speak {part}": (
            f"data/{part}/items.jsonl",
            [*prepared, f"data/{part}.jsonl", "--output-dir", f"data/{part}", "--voices", *voices(part)],
        )
        for part in PARTS
    }
    learned = ["--questions", "data/training.jsonl", "--speech", "data/training/items.jsonl", "--output-dir", "warm-up"]
    evaluated = ["-m", "tars_fast.evaluate", "--data", "data/held_out/items.jsonl", "--output-dir"]
    return {
        "assemble": ("smol/preset.json", [f"{SMOL}/assemble.py", "--output-dir", "smol"]),
        "questions": ("data/held_out.jsonl", [f"{SMOL}/questions.py", "--output-dir", "data"]),
        **spoken,
        "warm up": ("warm-up/projector.safetensors", [f"{SMOL}/warm_up.py", "--model", "smol", *learned, *warm_up]),
        "assemble warm": ("warm/preset.json", [f"{SMOL}/assemble.py", "--warm-up", "warm-up", "--output-dir", "warm"]),
        "evaluate": ("evaluated/evaluation.json", [*evaluated, "evaluated", "--model", "warm"]),
    }


def run(folder: Path, warm_up: list[str]) -> Mapping[str, float]:
    """Seconds by command."""
    record = folder / "seconds.json"
    seconds = json.loads(record.read_text()) if record.is_file() else {}
    for name, (made, arguments) in commands(warm_up).items():
        if (folder / made).is_file():
            continue
        started = time.perf_counter()
        try:
            subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
        finally:
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 1)
            write_atomically(record, json.dumps(seconds))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is made")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    arguments, warm_up = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    seconds = run(arguments.folder.resolve(), warm_up)
    evaluation = json.loads((arguments.folder / "evaluated" / "evaluation.json").read_text())
    command = shlex.join(["python", "bench/smol.py", *warm_up])
    report = provenance() | {"command": command, "seconds": seconds, "evaluation": evaluation}
    write_atomically(arguments.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
