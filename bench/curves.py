"""Learning curves of sets of runs side by side, seed by seed: `python bench/curves.py before=DIR after=DIR --output FILE`.

Each folder holds one run of `tars_fast.train` a seed, in folders of the same names. Written are final accuracies, the
difference of every set from the first one paired by held-out item, and median seconds a step; beside the JSON a PNG.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from report import provenance

from tars_fast.metrics import bootstrap_interval, mean_difference
from tars_fast.results import evaluated, read_predictions

FIGURES = ("speech_accuracy", "text_accuracy", "speech_accuracy_sampled", "text_accuracy_sampled")
_SMOOTHED = 10


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def answers_of(run: Path, figure: str) -> list[float]:
    """Of each held-out item after training."""
    modality, _, sampled = figure.partition("_accuracy")
    answered = [getattr(item, modality) for item in evaluated(read_predictions(run / "predictions_after.jsonl", "runs"))]
    return [one.sampled_accuracy if sampled else one.readings["strict"].correct for one in answered]


def figures_of(run: Path) -> dict[str, object]:
    metrics = read_metrics(run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    timed = [name for name in metrics[-1] if name.startswith(("seconds/", "beside/"))]
    other = [name for name in metrics[-1] if name.startswith(("without_backward/", "importance_ratio", "logprob_diff_mean"))]
    return {
        "num_steps": len(metrics),
        "after": {name: evaluation["after"][name] for name in FIGURES},
        "change": {name: evaluation["change"][name] for name in FIGURES},
        "median_seconds_per_step": {name: statistics.median(step.get(name, 0.0) for step in metrics) for name in timed},
        "mean_over_steps": {name: float(np.mean([step[name] for step in metrics])) for name in other},
    }


def compare(first: list[Path], other: list[Path]) -> dict[str, object]:
    """`other` minus `first` after training, paired by item, mean over seeds; and of the curves."""
    difference: dict[str, object] = {}
    for name in FIGURES:
        means = [np.mean([answers_of(run, name) for run in runs], axis=0) for runs in (other, first)]
        difference[name], difference[f"{name}_ci95"] = bootstrap_interval(mean_difference, *means)
    for modality in ("speech", "text"):
        name = f"accuracy/{modality}"
        curves = [np.mean([[step[name] for step in read_metrics(run)] for run in runs], axis=0) for runs in (other, first)]
        difference[f"{name}_mean_over_steps"] = float((curves[0] - curves[1]).mean())
    return difference


def draw(sets: Mapping[str, list[Path]], path: Path) -> None:
    """Sampled accuracy on the training items by step, each seed thin and their mean thick, smoothed over 10 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    for panel, modality in zip(panels, ("speech", "text"), strict=True):
        for (label, runs), colour in zip(sets.items(), ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=False):
            curves = []
            for run in runs:
                values = [step[f"accuracy/{modality}"] for step in read_metrics(run)]
                curves.append(np.convolve(values, np.ones(_SMOOTHED) / _SMOOTHED, mode="valid"))
                panel.plot(curves[-1], color=colour, alpha=0.25, linewidth=1)
            panel.plot(np.mean(curves, axis=0), color=colour, label=label)
        panel.set(title=f"{modality}, sampled at temperature 1", xlabel="step", ylabel="accuracy in training")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="LABEL=FOLDER, the first one is what the others are compared with")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the chart goes beside it")
    arguments = parser.parse_args()
    folders = {label: Path(folder) for label, _, folder in (one.partition("=") for one in arguments.sets)}
    names = sorted(run.name for run in next(iter(folders.values())).iterdir() if (run / "evaluation.json").is_file())
    sets = {label: [folder / name for name in names] for label, folder in folders.items()}
    first = next(iter(sets))
    report = provenance() | {
        "runs": {label: {run.name: figures_of(run) for run in runs} for label, runs in sets.items()},
        f"minus_{first}": {label: compare(sets[first], runs) for label, runs in sets.items() if label != first},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(sets, arguments.output.with_suffix(".png"))
    print(json.dumps(report[f"minus_{first}"], indent=1))


if __name__ == "__main__":
    main()
