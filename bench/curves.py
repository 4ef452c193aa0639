"""Sets of training runs side by side, seed by seed: `python bench/curves.py before=DIR after=DIR --output FILE`.

For what `tars_fast.ablate` cannot do itself: runs of two versions of the code. Each folder holds one run of `tars_fast.train` a
seed, in folders of the same names. Beside the JSON goes a PNG with the learning curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from tars_fast.evaluation.ablation import Arms, FinishedRun, check_runs
from tars_fast.reports.plots import curves_plot, write_png
from tars_fast.support.provenance import provenance


def median_seconds(runs: list[FinishedRun]) -> dict[str, float]:
    """Median seconds of each phase of a step."""
    names = [name for name in runs[0].metrics[-1] if name.startswith(("seconds/", "beside/"))]
    return {name: statistics.median(step.get(name, 0.0) for run in runs for step in run.metrics) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="LABEL=FOLDER, the first one is what the others are compared with")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the chart goes beside it")
    arguments = parser.parse_args()
    folders = {label: Path(folder) for label, _, folder in (one.partition("=") for one in arguments.sets)}
    names = sorted(run.name for run in next(iter(folders.values())).iterdir() if (run / "evaluation.json").is_file())
    runs = [
        FinishedRun.read(label, number, folder / name) for label, folder in folders.items() for number, name in enumerate(names)
    ]
    check_runs(runs)
    arms = Arms(runs, baseline=next(iter(folders)))
    report = provenance() | {"folders": names} | arms.report()
    report["median_seconds_per_step"] = {label: median_seconds(own) for label, own in arms.runs.items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    curves = {title: lines for title, lines in arms.curves().items() if title.startswith("accuracy")}
    write_png(arguments.output.with_suffix(".png"), curves_plot(curves, "step", "share of sampled completions"))
    print(json.dumps(report[f"minus_{arms.baseline}"], indent=1))


if __name__ == "__main__":
    main()
