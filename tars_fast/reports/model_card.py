"""The model card of a checkpoint: what it is, where it comes from, how it was trained and what it reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tars_fast.models.registry import PRESETS

_OF_THE_MACHINE = {"output_dir", "resume", "dry_run", "device", "audio_cache_gb", "audio_cache_dir", "audio_cache_dir_gb"}
_OF_THE_MACHINE |= {"push_to_hub", "log"}
"""Settings of a run that the model card leaves out, because they describe the machine and not the model."""


@dataclass(frozen=True)
class CardSubject:
    """The model that a card is about."""

    title: str
    base: str | None
    """The model it was trained from, where that is known."""
    dtype: str | None
    """Of its weights; None: it is a LoRA adapter."""
    merge_first: str = ""
    """Folder of the base with an adapter that was part of it while this one was trained."""


def name_of(base: str | None) -> str | None:
    """The name by which others find a base model: on the hub, or of a preset whose weights come with this package."""
    for name, preset in PRESETS.items():
        if base in (name, preset.source):
            return name if Path(preset.source).exists() else preset.source
    return base


def model_card(subject: CardSubject, run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        run: config.json of the run; empty where it is not known.
        evaluation: evaluation.json; empty where there is none of this checkpoint.
    """
    base, merge_first = name_of(subject.base), subject.merge_first
    kind = "LoRA adapter" if subject.dtype is None else f"model in {subject.dtype}"
    head = [f"library_name: {'peft' if subject.dtype is None else 'transformers'}", "tags:", "- speech", "- tars"]
    if base is not None and "/" in base and not Path(base).exists():
        head.append(f"base_model: {base.partition('@')[0]}")
    lines = ["---", *head, "---", "", f"# {subject.title}", ""]
    lines.append(
        f"A speech LLM trained with tars_fast (TARS, arXiv 2601.05543): {kind}"
        + (f", base model `{base}`." if base is not None else ".")
    )
    if merge_first:
        lines += [
            "",
            f"**Merge the base's own adapter first.** This adapter was trained on the base with `{merge_first}` merged into "
            f"it. Load the base, add the adapter in its folder `{merge_first}`, merge it (peft: `merge_and_unload`), and "
            "only then put this one on top; straight on the base it gives a model that was never trained.",
        ]
    fingerprint = run.get("data_fingerprint")
    if fingerprint:
        lines += ["", "## Data", "", "SHA-256 over ids, texts and answers of the items, in order:", ""]
        lines += [f"- {part}: `{digest}`" for part, digest in fingerprint.items()]
    rows = list(evaluation_rows(evaluation))
    if rows:
        lines += ["", "## Evaluation", "", "Greedy; % with 95 % bootstrap intervals over items.", ""]
        lines += ["| | items | speech | text | MRR |", "|---|---|---|---|---|", *rows]
    if run:
        kept = {name: value for name, value in run.items() if name not in _OF_THE_MACHINE | {"data_fingerprint"}}
        lines += ["", "## Training", "", "```json", json.dumps(kept, indent=2), "```"]
    return "\n".join(lines) + "\n"


def evaluation_rows(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """A table row for every report of a run's or an evaluation's evaluation.json."""
    for name, report in evaluation.items():
        if isinstance(report, Mapping) and report.get("speech_accuracy") is not None and name != "change":
            figures = [("speech_accuracy", 100), ("text_accuracy", 100), ("mrr", 1)]
            cells = (_cell(report, figure, scale) for figure, scale in figures)
            yield f"| {name} | {report['num_items']} | " + " | ".join(cells) + " |"


def _cell(report: Mapping[str, Any], name: str, scale: float) -> str:
    if report.get(name) is None:
        return "-"
    interval = report[f"{name}_ci95"]
    return f"{scale * report[name]:.1f}" + (f" ({scale * interval[0]:.1f} to {scale * interval[1]:.1f})" if interval else "")
