"""One JSON of a run on a GPU: `python bench/report.py RAW OUTPUT`.

RAW is what pytest wrote: `--benchmark-json` gives the figures and a chart of them, `--junitxml` how many tests passed where.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from tars_fast.support.provenance import provenance


def summary(raw: dict[str, object]) -> dict[str, object]:
    """Card, versions and the figures of every entry."""
    kernels = [entry["extra_info"] for entry in raw["benchmarks"] if "operation" in entry["extra_info"]]
    others = {
        entry["fullname"]: entry["stats"]["median"] for entry in raw["benchmarks"] if "operation" not in entry["extra_info"]
    }
    return provenance() | {"datetime": raw["datetime"], "kernels": kernels, "other_median_seconds": others}


def summary_of_tests(root: ElementTree.Element) -> dict[str, object]:
    """How many tests of each module passed, failed or were skipped; the names of those that failed."""
    modules: dict[str, Counter[str]] = {}
    failed = []
    for case in root.iter("testcase"):
        outcome = "passed"
        if case.find("skipped") is not None:
            outcome = "skipped"
        elif case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        modules.setdefault(case.get("classname"), Counter())[outcome] += 1
    suite = next(root.iter("testsuite"))
    return provenance() | {
        "datetime": suite.get("timestamp"),
        "seconds": float(suite.get("time")),
        **sum(modules.values(), Counter()),
        "modules": modules,
        "failures": failed,
    }


def draw(report: dict[str, object], path: Path) -> None:
    """Draw time, with the limit as a line, and memory for the middle shape of every operation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["kernels"] if row["gradient"] or row["contender"] == "released loop"]
    names = list(dict.fromkeys(row["operation"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(3.4 * len(names), 6), squeeze=False)
    for column, name in enumerate(names):
        tokens = sorted({row["shape"]["num_tokens"] for row in rows if row["operation"] == name})
        middle = tokens[len(tokens) // 2]
        chosen = [row for row in rows if row["operation"] == name and row["shape"]["num_tokens"] == middle]
        labels = [row["contender"] for row in chosen]
        top, bottom = axes[:, column]
        top.bar(labels, [row["median_ms"] for row in chosen], color="#4878a8")
        best = chosen[0]
        top.axhline(best["median_ms"] * best["percent_of_ceiling"] / 100, color="#b04030", linestyle="--", label="limit")
        top.set(title=f"{name}\n{middle} tokens", ylabel="ms" if column == 0 else None, yscale="log")
        top.legend(frameon=False)
        memory = [(row["peak_bytes_above_inputs"] or 0) / 2**30 for row in chosen]
        bottom.bar(labels, memory, color="#7a9a5a")
        bottom.set(ylabel="GiB above the inputs" if column == 0 else None)
        for axis in (top, bottom):
            axis.tick_params(axis="x", rotation=45)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['device']}, forward and backward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("output", type=Path, help="JSON to write; the chart goes beside it as .png")
    arguments = parser.parse_args()
    is_tests = arguments.raw.suffix == ".xml"
    text = arguments.raw.read_text()
    report = summary_of_tests(ElementTree.fromstring(text)) if is_tests else summary(json.loads(text))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if is_tests:
        return
    draw(report, arguments.output.with_suffix(".png"))
    print(f"{'operation':20} {'tokens':>6} {'contender':18} {'pass':8} {'ms':>9} {'% of limit':>10} {'MiB':>8}")
    for row in report["kernels"]:
        memory = "" if row["peak_bytes_above_inputs"] is None else f"{row['peak_bytes_above_inputs'] / 2**20:.0f}"
        what = f"{row['operation']:20} {row['shape']['num_tokens']:>6} {row['contender']:18}"
        both = "both" if row["gradient"] else "forward"
        print(f"{what} {both:8} {row['median_ms']:>9.3f} {row['percent_of_ceiling']:>10.1f} {memory:>8}")


if __name__ == "__main__":
    main()
