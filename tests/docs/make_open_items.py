"""Write bundled questions without their answer set: `python tests/docs/make_open_items.py open_items.jsonl`."""

import json
import sys
from itertools import islice
from pathlib import Path

from tars_fast.data.items import TRAINING_DATA, read_items

path = Path(sys.argv[1])
folder = path.parent / path.stem
folder.mkdir(parents=True, exist_ok=True)
lines = []
# As many as leave some for each side of a split by id.
for item in islice(read_items(TRAINING_DATA), 24):
    words = item.fields["answer_set"]
    (folder / f"{item.question.id}.ogg").write_bytes(item.audio.read_bytes())
    row = {"id": item.question.id, "question": item.question.text, "audio": f"{folder.name}/{item.question.id}.ogg"}
    answer = item.fields["answer"]
    lines.append(json.dumps(row | {"answer_number": words.index(answer), "answer_text": [answer]}) + "\n")
path.write_text("".join(lines))
