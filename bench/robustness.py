"""Accuracy from recordings that are made harder, or are of other voices: `python bench/robustness.py --output FILE`.

Every model answers every data set greedily, as it is and under each `--augment` (what `prepare --augment` does, seeded by the
item's place). Beside the JSON goes a PNG where there are augmentations: accuracy against the signal-to-noise ratio. With
`--recogniser` the first fifty recordings of each data set are also transcribed, which says whether they can be understood.

What bench/results has is of the bundled model and of the default run's last checkpoint (`python -m tars_fast.train --output-dir
runs/default`). The held-out questions were spoken by `prepare` with the functions in examples/smol: all of them by
`voices.py:piper` with `--voices joe`, the first hundred by `kokoro_voices.py:kokoro` with all of its voices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import numpy as np
import torch

from tars_fast.api import Policy, load_policy
from tars_fast.data.audio import SAMPLE_RATE, decode
from tars_fast.data.augmentation import parse_augmentation
from tars_fast.data.items import load_questions, or_bundled
from tars_fast.data.recognition import load_recogniser
from tars_fast.data.transcription import word_error_rate
from tars_fast.evaluation.metrics import Curve, bootstrap_interval, mean
from tars_fast.learning.rewards.total import completion_rewards
from tars_fast.prepare import augment, encode
from tars_fast.reports.plots import curves_plot, write_png
from tars_fast.support.provenance import provenance
from tars_fast.types import Modality, Question

CLEAN = "clean"
NUM_RECOGNISED = 50
KINDS = {"noise": "white noise", "speech-noise": "noise with the spectrum of the speech"}
Figures = dict[str, object]


def augmented(questions: Sequence[Question], text: str, folder: Path) -> list[Question]:
    """The same questions, their recordings changed and written into `folder`."""
    changed = []
    for number, question in enumerate(questions):
        assert question.audio is not None, "spoken items are read"
        wave, _ = augment(decode(question.audio), [parse_augmentation(text)], np.random.default_rng(number))
        path = folder / f"{number}.flac"
        path.write_bytes(encode(wave))
        changed.append(dataclasses.replace(question, audio=path))
    return changed


def accuracy(policy: Policy, questions: Sequence[Question], modality: Modality) -> Figures:
    completions = [completion for (completion,) in policy.answer(questions, modality)]
    figure = bootstrap_interval(mean, completion_rewards(completions, questions)["accuracy"].tolist())
    return {f"{modality}_accuracy": figure.value, f"{modality}_accuracy_ci95": figure.interval}


def recognised(questions: Sequence[Question], source: str) -> Figures:
    """Word error rate over some items, and the share of those in which every word is right."""
    recognise = load_recogniser(source)
    errors = [
        word_error_rate(question.text, recognise(decode(question.audio), SAMPLE_RATE))
        for question in questions[:NUM_RECOGNISED]
        if question.audio is not None
    ]
    rate, whole = bootstrap_interval(mean, errors), bootstrap_interval(mean, [error == 0 for error in errors])
    return {
        "num_items": len(errors),
        "word_error_rate": rate.value,
        "word_error_rate_ci95": rate.interval,
        "all_words_right": whole.value,
        "all_words_right_ci95": whole.interval,
    }


def panel(figures: Mapping[str, Figures]) -> dict[str, Curve]:
    """Curves over the ratio in dB, of a model on a data set; what has none is a level."""
    ratios_of: dict[str, dict[float, str]] = {}
    for name in figures:
        if ":" in name:
            parsed = parse_augmentation(name)
            ratios_of.setdefault(parsed.kind, {})[parsed.lowest_snr] = name
    ratios = sorted({ratio for own in ratios_of.values() for ratio in own})

    def curve(names: Mapping[float, str]) -> Curve:
        own = sorted(names)
        low, high = zip(*(figures[names[ratio]]["speech_accuracy_ci95"] for ratio in own), strict=True)
        return Curve(own, [figures[names[ratio]]["speech_accuracy"] for ratio in own], low, high)

    curves = {KINDS[kind]: curve(names) for kind, names in ratios_of.items()}
    return curves | {name: curve(dict.fromkeys(ratios, name)) for name in figures if ":" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME=SOURCE; start=pocket")
    parser.add_argument("--data", action="append", help="NAME=SOURCE; held_out=pocket")
    parser.add_argument("--augment", nargs="*", default=[], help="each alone, as prepare takes them")
    parser.add_argument("--recogniser", help="as prepare takes it")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the chart goes beside it")
    arguments = parser.parse_args()
    for given in map(parse_augmentation, arguments.augment):
        if given.lowest_snr != given.highest_snr:
            parser.error("--augment: each needs one ratio, to stand at one place of the chart")
    torch.set_num_threads(1)
    sources = dict(one.split("=", 1) for one in arguments.data or ["held_out=pocket"])
    data = {name: load_questions(or_bundled(source, "held_out")) for name, source in sources.items()}
    report: dict[str, object] = provenance() | {"command": shlex.join(["python", "bench/robustness.py", *sys.argv[1:]])}
    report["data"] = {
        name: {
            "num_items": len(questions),
            "mean_seconds": round(float(np.mean([len(decode(q.audio)) / SAMPLE_RATE for q in questions])), 3),
            "most_frequent_answer": max(Counter(q.answer for q in questions).values()) / len(questions),
        }
        for name, questions in data.items()
    }
    if arguments.recogniser:
        report["recognised"] = {name: recognised(questions, arguments.recogniser) for name, questions in data.items()}
    accuracies: dict[str, dict[str, dict[str, Figures]]] = {}
    for name, source in (one.split("=", 1) for one in arguments.model or ["start=pocket"]):
        accuracies[name] = {}
        with load_policy(source, engine="transformers", device="cpu", dtype="float32") as policy:
            for data_name, questions in data.items():
                own = {CLEAN: accuracy(policy, questions, Modality.SPEECH) | accuracy(policy, questions, Modality.TEXT)}
                for text in arguments.augment:
                    with tempfile.TemporaryDirectory() as folder:
                        own[text] = accuracy(policy, augmented(questions, text, Path(folder)), Modality.SPEECH)
                print(name, data_name, json.dumps(own), flush=True)
                accuracies[name][data_name] = own
    report["accuracy"] = accuracies
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(":" in text for text in arguments.augment):
        panels = {f"{data_name}, {name}": panel(own) for name, sets in accuracies.items() for data_name, own in sets.items()}
        write_png(
            arguments.output.with_suffix(".png"), curves_plot(panels, "signal-to-noise ratio, dB", "accuracy from speech")
        )


if __name__ == "__main__":
    main()
