"""Seconds and memory of the analysis: `python bench/analyse.py --output bench/results/analyse_cpu.json`.

On the pocket model's held-out items, beside the structure of the released analysis: an item at a time, a row for each modality
through the whole model with logits and `output_hidden_states`, every layer's states to the host, cosines token by token. That
gives the teacher-forced drift alone, from completions made before; ours gives all else in the same pass. So both what drift
takes (hearing and the forward pass) and the whole are listed. Each contender runs in a process of its own; their figures are
compared before any time is believed. `--growth N` instead prints the memory in use after every tenth slice of 32 items.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch

from tars_fast.analysis.drift import Analysis, AnalysisSettings
from tars_fast.data.items import HELD_OUT_DATA, load_questions
from tars_fast.evaluation.answering import slice_data
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.provenance import provenance
from tars_fast.types import Completion, Modality, Question

_GROWTH = 1600
"""Items: the bundled ones four times over."""
CONTENDERS = ("ours", "released structure")
SETTINGS = AnalysisSettings(max_new_tokens=40, base_layer=2, other_base_layers=(1, 3), seed=0)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.inference_mode()
def released_structure(model: SpeechModel, questions: Sequence[Question], written: Sequence[Completion]) -> list[list[float]]:
    """Cosine of each item by layer, averaged over the tokens of its written completion."""
    layers: list[list[float]] = []
    for question, completion in zip(questions, written, strict=True):
        states = []
        for modality in (Modality.TEXT, Modality.SPEECH):
            (prompt,) = model.encode_prompts([question], modality)
            token_ids = torch.tensor([prompt.token_ids + completion.token_ids], device=model.device)
            inputs = model.embed_tokens(token_ids, [prompt], [0])
            output = model.language_model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False)
            model.head(output.last_hidden_state)
            states.append([layer[0, len(prompt.token_ids) :].float().cpu() for layer in output.hidden_states[1:]])
        for number, (text, speech) in enumerate(zip(*states, strict=True)):
            if len(layers) <= number:
                layers.append([])
            cosines = [torch.cosine_similarity(x, y, dim=0).item() for x, y in zip(speech, text, strict=True)]
            layers[number].append(sum(cosines) / len(cosines))
    return layers


def measure(contender: str, num_items: int) -> dict[str, object]:
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    model.set_audio_cache(0, None, 0)
    engine = TransformersEngine(model, preset.rollout_batch_size)
    questions = load_questions(HELD_OUT_DATA)[:num_items]
    if contender == "ours":
        analysis = Analysis(model, engine, SETTINGS)
        started = time.perf_counter()
        for part in slice_data("", questions):
            analysis.add(part.questions)
        report = analysis.report()
        seconds = time.perf_counter() - started
        drift = analysis.seconds["encode"] + analysis.seconds["forward"]
        layers = report["drift"]["forced"]["tokens"]
        made = {"seconds": seconds, "drift_seconds": drift} | {
            f"{part}_seconds": value for part, value in analysis.seconds.items()
        }
    else:
        greedy = Sampling(num_completions=1, max_new_tokens=SETTINGS.max_new_tokens, temperature=0.0, seed=0)
        with torch.no_grad():
            written = engine.generate(model.encode_prompts(questions, Modality.TEXT), range(num_items), greedy)
        started = time.perf_counter()
        layers = [statistics.mean(layer) for layer in released_structure(model, questions, written)]
        seconds = time.perf_counter() - started
        made = {"seconds": seconds, "drift_seconds": seconds}
    return made | {"peak_bytes": peak_bytes(), "forced_tokens": layers}


def growth(num_items: int) -> dict[int, int]:
    """Resident bytes by the number of items analysed so far; beyond 400 items the same ones are repeated."""
    import psutil

    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    model.set_audio_cache(0, None, 0)
    analysis = Analysis(model, TransformersEngine(model, preset.rollout_batch_size), SETTINGS)
    questions = load_questions(HELD_OUT_DATA)
    used = {}
    for number in range(1, num_items // 32 + 1):
        start = 32 * (number - 1) % (len(questions) - 32)
        analysis.add(questions[start : start + 32])
        if number % 10 == 0:
            used[analysis.num_items] = psutil.Process().memory_info().rss
    return used


def run_alone(*arguments: str) -> dict:
    """The output of this script in a new process, so that no earlier work counts as its memory."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", nargs=2, metavar=("CONTENDER", "ITEMS"), help="one measurement, in this process")
    parser.add_argument("--growth", type=int, metavar="N", help="memory by the number of items, in this process")
    arguments = parser.parse_args()
    if arguments.growth is not None:
        print(json.dumps(growth(arguments.growth)))
        return
    if arguments.only is not None:
        print(json.dumps(measure(arguments.only[0], int(arguments.only[1]))))
        return
    figures: dict[str, dict[str, object]] = {}
    for num_items in arguments.items:
        runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
        # By turns, so that what else the machine does meets both.
        for _ in range(arguments.repeats):
            for name in CONTENDERS:
                runs[name].append(run_alone("--only", name, str(num_items)))
        found = [runs[name][0].pop("forced_tokens") for name in CONTENDERS]
        difference = max(abs(x - y) for x, y in zip(*found, strict=True))
        assert difference < 1e-4, f"the two disagree by {difference}"
        figures[str(num_items)] = {
            name: {
                what if what == "peak_bytes" else f"{what}_per_100_items": round(
                    statistics.median(run[what] for run in made) * (1 if what == "peak_bytes" else 100 / num_items), 3
                )
                for what in made[0]
            }
            for name, made in runs.items()
        }
        figures[str(num_items)]["largest_difference_of_drift"] = difference
    report = provenance() | {
        "command": " ".join(["python", *sys.argv]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "items": figures,
        "resident_bytes_after_items": run_alone("--growth", str(_GROWTH)),
    }
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
