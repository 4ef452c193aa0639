"""Write items for the examples of a page: `python tests/docs/make_items.py my_items.jsonl`; tones in the place of speech."""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000

path = Path(sys.argv[1])
folder = path.parent / path.stem
folder.mkdir(parents=True, exist_ok=True)
lines = []
# As many as leave some for each side of a split by id.
for number in range(24):
    tone = 0.1 * np.sin(0.05 * (1 + number) * np.arange(SAMPLE_RATE))
    soundfile.write(folder / f"{number}.wav", tone, SAMPLE_RATE)
    item = {
        "id": f"q{number}",
        "question": f"What is {number} minus {number}?",
        "answer": "zero",
        "answer_set": ["zero", "one"],
    }
    lines.append(json.dumps(item | {"audio": f"{folder.name}/{number}.wav", "transcript": item["question"]}) + "\n")
path.write_text("".join(lines))
