"""Look inside a model: `python -m tars_fast.analyse --model MODEL --data DATA --output-dir OUT [--compare OTHER]`.

Drift of completions, alignment of prompts by layer, and, where asked for, probes; see `analysis`, `alignment` and `probes` for
what the figures are. Everything is generated and run by transformers, so that each layer can be read and changed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from rich.console import Console

from tars_fast.analysis.drift import Analysis, AnalysisSettings, change_since
from tars_fast.analysis.probes import Calibration, repeated
from tars_fast.data.items import EMBEDDED, HELD_OUT_DATA, load_questions, or_embedded
from tars_fast.data.splits import choose_by_id
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator, slice_data
from tars_fast.evaluation.figures import change_since as accuracy_change_since
from tars_fast.evaluation.figures import report, text_reference
from tars_fast.evaluation.results import ItemResult, data_fingerprint
from tars_fast.learning.rewards import HashedNgrams
from tars_fast.models.hub import weights_fingerprint
from tars_fast.models.preset import Preset
from tars_fast.models.presets import find_preset
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.speech_model import SpeechModel, choose_device, load_module
from tars_fast.reports.analysis_page import Analysed, draw_analysis, item_results, write_analysis
from tars_fast.reports.console import open_console, say
from tars_fast.reports.tables import print_analysis, print_failures
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.cli import FAILED, check_numbers, make_output_folder, new_output_folder, require_extra, run_command
from tars_fast.support.files import write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import LongAudio, Question, UserError

ANALYSIS = "analysis.json"
ITEMS = "items.jsonl"
RESAMPLES = "resamples.npz"
_BASE_LAYER = 5
"""Paths are stable from there on (arXiv 2603.01502); shallow models take the layer in their middle."""
_MATCHING = ("data", "num_items", "seed", "num_layers", "base_layer", "max_new_tokens", "long_audio")
"""Settings without which two analyses do not compare."""


@dataclass(frozen=True)
class AnalyseConfig:
    """Drift of completions, alignment of layers and probes of what causes the gap, with 95 % intervals over items."""

    model: str = "pocket"
    """A preset, or a checkpoint folder."""
    data: str = EMBEDDED
    """Items with a recording and a text. pocket: the embedded held-out items."""
    items: int | None = None
    """At most so many of them, chosen by a hash of their ids. None: all."""
    output_dir: Path | None = None
    """Where report.html, analysis.json, items.jsonl, resamples.npz, drift.png and cka.png go. None: a new folder
    runs/analyse-<model>-<date>-<time>."""
    compare: str | None = None
    """Another model, say the one before training, which is analysed first, into OUTPUT_DIR/compared; or the folder of an
    analysis of the same items. Differences have intervals, paired by item."""
    base_layer: int | None = None
    """Layer, from 1, whose states tell which tokens of speech and text belong together. None: 5, or the middle of a model of
    fewer than 10."""
    other_base_layers: tuple[int, ...] | None = None
    """Layers that could have told as well, to see whether it matters. None: a quarter, half, three quarters of the way."""
    calibrate: tuple[int, ...] = ()
    """Probes: at each of these layers, 0 to L - 1 (0: the embeddings), give speech the mean and deviation of text."""
    repeat: tuple[int, ...] = ()
    """Probes: each word of the text so many times."""
    long_audio: LongAudio = "refuse"
    """Recordings longer than the model hears at once: refuse says how many and stops; chunk puts several clips into one
    prompt; truncate keeps the beginning."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens. None: the preset's."""
    rollout_batch_size: int | None = None
    """Completions in flight. None: the preset's."""
    seed: int = 0
    """Of resamples and random halves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. auto: bfloat16 on CUDA for models trained with LoRA, else float32."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("items", "max_new_tokens", "rollout_batch_size"), not_negative=("seed",))
        for times in self.repeat:
            if times < 2:
                raise UserError(f"--repeat {times}: must be at least 2")
        require_extra("analysis")


def choose_layers(config: AnalyseConfig, num_layers: int) -> tuple[int, tuple[int, ...]]:
    """(base layer, others). Raises UserError for layers that the model does not have."""
    base = min(_BASE_LAYER, max(1, num_layers // 2)) if config.base_layer is None else config.base_layer
    others = config.other_base_layers
    if others is None:
        others = tuple(sorted({max(1, num_layers * part // 4) for part in (1, 2, 3)} - {base}))
    for flag, layers, lowest in (
        ("--base-layer", (base,), 1),
        ("--other-base-layers", others, 1),
        ("--calibrate", config.calibrate, 0),
    ):
        highest = num_layers if lowest else num_layers - 1
        for layer in layers:
            if not lowest <= layer <= highest:
                raise UserError(f"{flag} {layer}: {config.model} has {num_layers} layers; give {lowest} to {highest}")
    return base, others


@dataclass(frozen=True)
class Compared:
    """Another analysis, read from its folder."""

    analysed: Analysed
    resamples: Mapping[str, np.ndarray]


def read_compared(path: Path) -> Compared:
    """Raises UserError where there is none."""
    try:
        with np.load(path / RESAMPLES) as rows:
            return Compared(read_analysis(path), dict(rows))
    # What a full disk cut off is no zip archive, or has no end.
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise UserError(f"--compare {path}: cannot be read ({error}); name the --output-dir of an analysis") from error


def read_analysis(path: Path) -> Analysed:
    """analysis.json and items.jsonl of a folder. Raises OSError or ValueError where they cannot be read."""
    figures = json.loads((path / ANALYSIS).read_text(encoding="utf-8"))
    if not isinstance(figures, dict) or not {"settings", "failed", "drift"} <= figures.keys():
        raise ValueError(f"its {ANALYSIS} is none")
    return Analysed(figures, [json.loads(line) for line in (path / ITEMS).read_text(encoding="utf-8").splitlines()])


def check_settings(given: str, theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError where two analyses are not of the same items, or not made in the same way."""
    changed = [name for name in _MATCHING if theirs.get(name) != settings[name]]
    if changed:
        # Two hashes tell nobody anything.
        told = {"data": "other items"}
        listed = ", ".join(told.get(name) or f"{name} {theirs.get(name)} -> {settings[name]}" for name in changed)
        raise UserError(f"--compare {given}: another analysis ({listed}); both need the same items and settings")


def check_compared(given: str, other: Analysed, settings: Mapping[str, Any], questions: Sequence[Question]) -> None:
    """`check_settings`. Raises UserError where the other analysis was made by another version, too."""
    check_settings(given, other.figures["settings"], settings)
    try:
        item_results(other, "", questions)
    except KeyError as error:
        raise UserError(f"--compare {given}: no analysis of these items by this version (no {error}); repeat it") from error


def answer(
    model: SpeechModel,
    engine: RolloutEngine,
    questions: Sequence[Question],
    settings: AnalysisSettings,
    console: Console,
    what: str,
) -> list[ItemResult]:
    """The evaluation of `evaluate`, greedy; `what` is what the progress display calls it."""
    how = EvaluationSettings(settings.max_new_tokens, num_samples=0, temperature=1.0, seed=settings.seed)
    sizes = model.prompts.try_questions(questions, settings.max_new_tokens)
    refused = {q.id: str(size) for q, size in zip(questions, sizes, strict=True) if isinstance(size, UserError)}
    with item_progress(console, len(questions), what=f"items, {what}") as advance:
        # Probes change accuracies, which is all that is reported of them: the cheapest text similarity will do.
        return Evaluator(model, engine, HashedNgrams(), how).evaluate(questions, "", advance, refused)


def run_probes(
    config: AnalyseConfig,
    model: SpeechModel,
    engine: RolloutEngine,
    questions: Sequence[Question],
    settings: AnalysisSettings,
    calibrations: Sequence[Calibration],
    console: Console,
) -> dict[str, Any]:
    """Accuracy without and with each change, and the paired differences."""
    probes: list[tuple[str, AbstractContextManager[None], Sequence[Question]]]
    probes = [(f"calibrate_{one.layer}", one.applied(model), questions) for one in calibrations]
    probes += [(f"repeat_{times}", nullcontext(), [repeated(q, times) for q in questions]) for times in config.repeat]
    if not probes:
        return {}
    plain = answer(model, engine, questions, settings, console, "no probe")
    made: dict[str, Any] = {"plain": _accuracies(report(plain, text_reference(plain)))}
    for name, changed, asked in probes:
        with changed:
            results = answer(model, engine, asked, settings, console, name)
        made[name] = _accuracies(report(results, text_reference(plain)))
        made[name]["change"] = _accuracies(accuracy_change_since(results, plain))
    return made


def _accuracies(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if "accuracy" in name or name in ("num_items", "num_failed")}


@dataclass(frozen=True)
class Prepared:
    """An analysis that can be done, as far as can be told without weights."""

    config: AnalyseConfig
    output_dir: Path
    preset: Preset
    """With the settings that the user gave."""
    prompts: PromptFormat
    source: str
    """Of the data."""
    questions: Sequence[Question]
    sizes: Sequence[PromptSize]
    settings: AnalysisSettings
    device: torch.device
    dtype: torch.dtype
    written: Mapping[str, Any]
    """What analysis.json says of it."""


def prepare(config: AnalyseConfig) -> Prepared:
    """Raises UserError for data, layers or lengths that cannot be."""
    preset = find_preset(config.model).with_settings(config)
    output_dir = config.output_dir or new_output_folder(config.model, "analyse-")
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    source = or_embedded(config.data, HELD_OUT_DATA)
    questions = choose_by_id(load_questions(source), config.items)
    prompts = load_prompt_format(preset, preset.source, config.long_audio)
    num_layers = prompts.family.architecture(prompts.config).num_layers
    base_layer, others = choose_layers(config, num_layers)
    settings = AnalysisSettings(preset.max_new_tokens, base_layer, others, config.seed)
    written = dataclasses.asdict(settings) | {
        "model": config.model,
        "weights": weights_fingerprint(preset.source),
        "data": data_fingerprint(questions),
        "source": config.data,
        "long_audio": config.long_audio,
        "num_layers": num_layers,
        "num_items": len(questions),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    sizes = prompts.check_questions(questions, settings.max_new_tokens)
    return Prepared(config, output_dir, preset, prompts, source, questions, sizes, settings, device, dtype, written)


def run_analysis(config: AnalyseConfig) -> int:
    """Analyse the model, and before it the one that it is compared with, where that has not been done."""
    job = prepare(config)
    if config.compare is None:
        return analyse(job, None)
    folder = Path(config.compare)
    if not (folder / ANALYSIS).exists():
        folder = analyse_compared(job, config.compare)
    compared = read_compared(folder)
    check_compared(config.compare, compared.analysed, job.written, job.questions)
    return analyse(job, compared)


def analyse_compared(job: Prepared, compare: str) -> Path:
    """The folder of the analysis of the model that `--compare` names, which is done here where it has not been.

    Raises:
        UserError: it names none, or one whose analysis would not compare.
    """
    folder = job.output_dir / "compared"
    own: dict[str, Any] = {"model": compare, "compare": None, "output_dir": folder, "calibrate": (), "repeat": ()}
    try:
        other = prepare(dataclasses.replace(job.config, **own))
    except UserError as error:
        raise UserError(f"--compare {compare}: neither an analysis nor a model to analyse ({error})") from error
    check_settings(compare, other.written, job.written)
    # Before hours of work that would be for nothing.
    make_folder(job.output_dir)
    if (folder / ANALYSIS).exists() and read_compared(folder).analysed.figures["settings"] == as_json(other.written):
        return folder
    analyse(other, None)
    # One model's weights at a time.
    gc.collect()
    return folder


def analyse(job: Prepared, compared: Compared | None) -> int:
    """Load the model, look at every item, write down what was found."""
    config, settings, questions, device = job.config, job.settings, job.questions, job.device
    output_dir = job.output_dir
    make_folder(output_dir)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    console = open_console()
    with explain_out_of_memory("loading the model"):
        model = SpeechModel(load_module(job.prompts, job.preset.source, device, job.dtype), job.prompts)
    say(console, f"{config.model} on {device}, {job.dtype}; {len(questions)} items to analyse; writing to {output_dir}")
    if long := job.prompts.tell_long(job.sizes):
        say(console, long)
    calibrations = [Calibration(layer) for layer in config.calibrate]
    engine = TransformersEngine(model, job.preset.rollout_batch_size)
    analysis = Analysis(model, engine, settings, calibrations)
    with closing(engine), explain_out_of_memory("the analysis"):
        with item_progress(console, len(questions)) as advance, (output_dir / ITEMS).open("w", encoding="utf-8") as items:
            for part in slice_data("", questions):
                for record in analysis.add(part.questions):
                    items.write(json.dumps(as_json(record)) + "\n")
                advance(len(part.questions))
        if not analysis.num_items:
            first, reason = next(iter(analysis.failed.items()))
            raise UserError(f"data {config.data}: none of its {len(questions)} items can be analysed; item {first!r}: {reason}")
        made = analysis.report()
        probes = run_probes(config, model, engine, questions, settings, calibrations, console)
    made = {"settings": job.written} | made
    made["cost"]["peak_memory_bytes"] = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    made |= {"probes": probes} if probes else {}
    rows = analysis.resamples()
    # Items that failed in one of the two alone: nothing is paired, but this analysis is whole.
    unpaired = [] if compared is None else sorted(compared.analysed.figures["failed"].keys() ^ analysis.failed.keys())
    before = None
    if compared is not None and not unpaired:
        made["change"] = change_since(rows, compared.resamples)
        before = compared.analysed
    np.savez_compressed(output_dir / RESAMPLES, **rows)  # type: ignore[arg-type]  # names of arrays, none of them an option
    made = as_json(made)
    write_atomically(output_dir / ANALYSIS, json.dumps(made, indent=2) + "\n")
    draw_analysis(output_dir, made, None if before is None else before.figures)
    write_analysis(output_dir, read_analysis(output_dir), before, Path(job.source).stem, questions)
    print_analysis(console, made)
    print_failures(console, config.data, made)
    say(console, f"written to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")
    if unpaired:
        raise UserError(
            f"--compare {config.compare}: {len(unpaired)} items failed in one of the two analyses alone (the first: "
            f"{unpaired[0]!r}); {output_dir} holds this one without a comparison"
        )
    return FAILED if analysis.failed else 0


def make_folder(output_dir: Path) -> None:
    """Raises UserError where it cannot be made, or holds an analysis."""
    if (output_dir / ANALYSIS).exists():
        raise UserError(f"--output-dir {output_dir}: holds an analysis already; name another folder")
    make_output_folder(output_dir)


def as_json(value: Any) -> Any:
    """As JSON has it, which knows no NaN."""
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    return run_command(run_analysis, AnalyseConfig, "python -m tars_fast.analyse")


if __name__ == "__main__":
    sys.exit(main())
