"""Making, checking and reading spoken data, items a second: `python bench/prepare.py --output bench/results/prepare_cpu.json`.

The items are as long as OpenBookQA's (a sentence and four options of two words), spoken by espeak-ng. Every count is checked
before it is reported. Commands run as a user would run them, so their start is part of their seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.items import load_questions
from tars_fast.support.provenance import provenance

ADJECTIVES = ("wet", "green", "cold", "early", "distant", "quiet", "heavy", "narrow")
NOUNS = ("marsh", "tundra", "plain", "desert", "river", "planet", "magnet", "forest")


def write_items(path: Path, num_items: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(num_items):
            options = [f"a {adjective} {rng.choice(NOUNS)}" for adjective in rng.sample(ADJECTIVES, 4)]
            question = f"There is most likely going to be fog number {number} around which of these places?"
            item = {"id": f"item-{number}", "question": question, "options": options, "answer": rng.choice("ABCD")}
            file.write(json.dumps(item) + "\n")


def measure(what: str, num_items: int, work: Callable[[], object]) -> dict[str, object]:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(f"{what:45} {seconds:8.2f} s {num_items / seconds:10.1f} items/s", flush=True)
    return {"what": what, "items": num_items, "seconds": round(seconds, 3), "items_per_second": round(num_items / seconds, 1)}


def run(*flags: object) -> None:
    command = [sys.executable, "-m", "tars_fast.prepare", *map(str, flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def save_as_dataset(spoken: Path, folder: Path) -> None:
    """A parquet file of the same items with their recordings inside."""
    from datasets import Audio, Dataset

    rows = []
    for line in (spoken / "items.jsonl").read_text().splitlines():
        item = json.loads(line)
        content = (spoken / item.pop("audio")).read_bytes()
        rows.append({**item, "audio": {"bytes": content, "path": None}})
    Dataset.from_list(rows).cast_column("audio", Audio()).save_to_disk(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--jobs", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "load_average_before": round(os.getloadavg()[0], 2)}
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_items(folder / "text.jsonl", arguments.items)
        for jobs in arguments.jobs:
            flags = ("--data", folder / "text.jsonl", "--output-dir", folder / f"jobs{jobs}", "--jobs", jobs)
            figures.append(measure(f"prepare, espeak-ng, {jobs} jobs", arguments.items, lambda flags=flags: run(*flags)))
        spoken = folder / f"jobs{arguments.jobs[-1]}"
        for jobs in arguments.jobs:
            assert (folder / f"jobs{jobs}" / "items.jsonl").read_bytes() == (spoken / "items.jsonl").read_bytes()
            flags = ("--check", spoken, "--jobs", jobs)
            figures.append(measure(f"prepare --check, {jobs} jobs", arguments.items, lambda flags=flags: run(*flags)))
        packed = folder / "packed"
        flags = ("--data", folder / "text.jsonl", "--output-dir", packed, "--output-format", "parquet")
        figures.append(measure(f"prepare, espeak-ng, {os.cpu_count()} jobs, parquet", arguments.items, lambda: run(*flags)))
        save_as_dataset(spoken, folder / "saved")
        for source, kind in ((spoken, "jsonl"), (packed, "parquet"), (folder / "saved", "saved dataset")):
            figures.append(measure(f"load_questions, {kind}", arguments.items, lambda source=source: load_questions(source)))
            questions = load_questions(source)
            assert len(questions) == arguments.items
            seconds = []

            def decode_all(questions=questions, seconds=seconds) -> None:
                with ThreadPoolExecutor() as pool:
                    waves = pool.map(lambda question: decode(question.audio), questions)
                    seconds.extend(len(wave) / SAMPLE_RATE for wave in waves)

            figures.append(measure(f"decode, {kind}", arguments.items, decode_all))
    report = provenance() | machine | {"seconds_of_speech": round(sum(seconds), 1), "figures": figures}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
