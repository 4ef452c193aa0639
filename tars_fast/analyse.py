"""Look inside a model: `python -m tars_fast.analyse --model MODEL --data DATA --output-dir OUT [--compare OTHER]`.

Drift of completions, alignment of prompts by layer and token by token, probes by flags, and, with `--checkpoints`, which of
these go with the gap in accuracy; `analysis.drift`, `analysis.alignment`, `analysis.paths` and `analysis.probes` say what the
figures are. Everything runs by transformers, whose layers can be read and changed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch

from tars_fast.analysis.drift import CORRELATED, SCALARS, Analysis, AnalysisSettings, change_since, over_models
from tars_fast.analysis.paths import PathIntervention
from tars_fast.analysis.probes import Calibration, repeated
from tars_fast.data.items import load_questions, or_bundled
from tars_fast.data.splits import choose_by_id, data_fingerprint
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator, slice_data
from tars_fast.evaluation.figures import change_since as accuracy_change_since
from tars_fast.evaluation.figures import report, text_reference
from tars_fast.evaluation.results import ItemResult
from tars_fast.learning.rewards.behaviour import HashedNgrams
from tars_fast.models.hub import weights_fingerprint
from tars_fast.models.preset import Preset
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.registry import find_preset, list_checkpoints
from tars_fast.models.speech_model import SpeechModel, choose_device, load_module
from tars_fast.reports.analysis_page import Analysed, draw_analysis, item_results, write_analysis
from tars_fast.reports.tables import print_analysis, print_failures
from tars_fast.rollout.engine import RolloutEngine
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.cli import (
    FAILED,
    as_paths,
    check_choices,
    check_file_names,
    check_numbers,
    make_output_folder,
    new_output_folder,
    require_extra,
    run_command,
)
from tars_fast.support.console import PlainConsole, open_console, say
from tars_fast.support.files import explain_cannot_write, listing, remove_partial, replaced_atomically, write_atomically
from tars_fast.support.locks import locked
from tars_fast.support.progress import item_progress
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import LongAudio, Question, UserError

ANALYSIS = "analysis.json"
ITEMS = "items.jsonl"
RESAMPLES = "resamples.npz"
_BASE_LAYER = 5
"""Alignments are stable from this layer on (arXiv 2603.01502); shallow models take the layer in their middle."""
_MATCHING = ("data", "num_items", "seed", "num_layers", "base_layer", "max_new_tokens", "long_audio")
"""Settings that two analyses must share to be compared."""
_CORRELATED = (*SCALARS, *CORRELATED)
"""Figures whose resamples are read of every checkpoint."""
_FEWEST_MODELS = 3
"""Over two models every correlation is 1 or -1."""


@dataclass(frozen=True)
class AnalyseConfig:
    """Drift of completions, alignment of layers and probes of what causes the gap, with 95 % intervals over items."""

    model: str = "pocket"
    """A preset, or a checkpoint folder."""
    data: str | None = None
    """Items with a recording and a text; pocket, pocket-hard: bundled held-out ones. None: those of the model's own task."""
    items: int | None = None
    """At most so many of the items, chosen by a hash of their ids. None: all."""
    output_dir: Path | None = None
    """Folder of report.html, analysis.json, items.jsonl, resamples.npz, drift.png and cka.png. None: a new folder
    runs/analyse-<model>-<date>-<time>."""
    compare: str | None = None
    """Another model, for example that before training, which is analysed first, into OUTPUT_DIR/compared; or the folder of an
    analysis of the same items. Differences have intervals, paired by item."""
    checkpoints: Path | None = None
    """Folder of a run that was trained from the model: each of its checkpoints is analysed first, into
    OUTPUT_DIR/checkpoint-<steps>; over the model and them, every figure by layer is correlated with the accuracy gap."""
    base_layer: int | None = None
    """Layer, from 1, whose states pair the tokens of speech and text. None: 5, or the middle of a model of fewer than 10
    layers."""
    other_base_layers: tuple[int, ...] | None = None
    """Layers that pair tokens too, to see whether the choice matters. None: a quarter, half, three quarters of the way."""
    calibrate: tuple[int, ...] = ()
    """Probes: at each of these layers, 0 to L - 1 (0: the embeddings), give speech the mean and deviation of text."""
    repeat: tuple[int, ...] = ()
    """Probes: repeat each word of the text so many times."""
    angle_projection: tuple[int, ...] = ()
    """Probes: at each of these layers, 0 to L - 1 (0: the embeddings), give audio tokens on the alignment path the direction
    of their word's state; first the --critical-tokens least similar ones, then all of them."""
    length_normalisation: tuple[int, ...] = ()
    """Probes: the same with the length of their word's state."""
    critical_tokens: int = 3
    """Audio tokens of a recording that these probes take for the least similar ones."""
    long_audio: LongAudio = "refuse"
    """Recordings longer than the model takes at once: refuse says how many and stops; chunk puts several clips into one
    prompt; truncate keeps the beginning."""
    system_prompt: str | None = None
    """What prompts begin with; {answer_format} in it stands for what the format says of itself. None: the checkpoint's own."""
    prompt_template: Path | None = None
    """A jinja2 file of the user's turn, from question (the text, and in a spoken prompt the recording), options, modality,
    category, id and answer_format. None: the checkpoint's own, by default the question alone."""
    answer_format: str | None = None
    """How completions write their answer: think, in tags behind the reasoning; plain, without; or a file that says how it is
    asked for and read. None: the checkpoint's own."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens. None: the preset's."""
    rollout_batch_size: int | None = None
    """Completions in flight. None: the preset's."""
    seed: int = 0
    """Seed of resamples and random halves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. auto: bfloat16 on CUDA for models trained with LoRA, else float32."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "checkpoints", "prompt_template")
        check_file_names(self, "model", "compare")
        check_choices(self)
        positive = ("items", "max_new_tokens", "rollout_batch_size", "critical_tokens")
        check_numbers(self, positive=positive, not_negative=("seed",))
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
        ("--angle-projection", config.angle_projection, 0),
        ("--length-normalisation", config.length_normalisation, 0),
    ):
        highest = num_layers if lowest else num_layers - 1
        for layer in layers:
            if not lowest <= layer <= highest:
                raise UserError(f"{flag} {layer}: {config.model} has {num_layers} layers; give {lowest} to {highest}")
    return base, others


@dataclass(frozen=True)
class AnalysisOutcome:
    """How an analysis ended."""

    output_dir: Path
    """The analysis's folder."""
    analysis: dict[str, Any]
    """The content of analysis.json."""

    @property
    def num_failed(self) -> int:
        """Number of items that could not be analysed."""
        return self.analysis["num_failed"]


@dataclass(frozen=True)
class Job:
    """An analysis whose settings and data have been checked."""

    config: AnalyseConfig
    output_dir: Path
    preset: Preset
    """The preset with the settings that the user gave."""
    prompts: PromptFormat
    source: str
    """Source of the data."""
    questions: Sequence[Question]
    sizes: Sequence[PromptSize]
    settings: AnalysisSettings
    device: torch.device
    dtype: torch.dtype
    settings_written: Mapping[str, Any]
    """`settings` of analysis.json."""
    is_reported: bool = True
    """Whether there is a page with pictures, and all is printed: not of every checkpoint of a run."""


def analyse(config: AnalyseConfig) -> AnalysisOutcome:
    """Analyse the model, and before it those that it is compared with, where they have no analysis yet.

    Raises:
        UserError: settings, data, model or folder are not usable; or the analysis is there, but its items that failed are not
            those of the analysis that it is compared with.
        TrainingError: memory ran out.
    """
    job = plan_job(config)
    checkpoints = plan_checkpoints(job)
    with locked(job.output_dir):
        remove_partial(job.output_dir)
        compared = None
        if config.compare is not None:
            folder = Path(config.compare)
            if not (folder / ANALYSIS).exists():
                folder = analyse_compared(job, config.compare)
            compared = read_compared(f"--compare {folder}", folder)
            check_compared(compared, job)
        for checkpoint in checkpoints:
            analyse_first(checkpoint, job)
        return run_job(job, compared, checkpoints)


def plan_job(config: AnalyseConfig) -> Job:
    """Read the data and the model's configuration, but no weights.

    Raises:
        UserError: data, layers or lengths are not usable.
    """
    preset = find_preset(config.model).with_settings(config)
    output_dir = config.output_dir or new_output_folder(config.model, "analyse-")
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    named = config.data or preset.bundled_data
    source = or_bundled(named, "held_out")
    questions = choose_by_id(load_questions(source), config.items)
    prompts = load_prompt_format(preset, preset.source, config.long_audio)
    questions = prompts.ask(questions)
    num_layers = prompts.family.architecture(prompts.config).num_layers
    base_layer, others = choose_layers(config, num_layers)
    settings = AnalysisSettings(preset.max_new_tokens, base_layer, others, config.seed)
    settings_written = dataclasses.asdict(settings) | {
        "model": config.model,
        "weights": weights_fingerprint(preset.source),
        "data": data_fingerprint(questions),
        "source": named,
        "long_audio": config.long_audio,
        "system_prompt": preset.system_prompt,
        "prompt_template": preset.question_template,
        "answer_format": dataclasses.asdict(preset.answers),
        "num_layers": num_layers,
        "num_items": len(questions),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Job(
        config=config,
        output_dir=output_dir,
        preset=preset,
        prompts=prompts,
        source=source,
        questions=questions,
        sizes=prompts.check_questions(questions, settings.max_new_tokens),
        settings=settings,
        device=device,
        dtype=dtype,
        settings_written=settings_written,
    )


def plan_checkpoints(job: Job) -> list[Job]:
    """Plan the analysis of every checkpoint that `--checkpoints` names; none without it.

    Raises:
        UserError: they are too few, or of another model.
    """
    run = job.config.checkpoints
    if run is None:
        return []
    found = [path for _, path in list_checkpoints(run)]
    if len(found) + 1 < _FEWEST_MODELS:
        raise UserError(
            f"--checkpoints {run}: holds {len(found)} checkpoints, and a correlation needs at least {_FEWEST_MODELS - 1}; name "
            "the folder of a run, which keeps as many as its --keep-checkpoints says"
        )
    jobs = []
    for path in found:
        try:
            other = plan_other(job, str(path), job.output_dir / path.name)
        except UserError as error:
            raise UserError(f"--checkpoints {run}: {path.name} cannot be analysed ({error})") from error
        kinds = [(prompts.family, prompts.family.architecture(prompts.config)) for prompts in (other.prompts, job.prompts)]
        if kinds[0] != kinds[1]:
            raise UserError(f"--checkpoints {run}: {path.name} is no checkpoint of {job.config.model}; give the run's --model")
        check_settings(f"--checkpoints {run}", other.settings_written, job.settings_written)
        jobs.append(dataclasses.replace(other, is_reported=False))
    return jobs


@dataclass(frozen=True, eq=False)
class Compared:
    """The analysis that this one is compared with, read from its folder."""

    flag: str
    """Flag and value that name it, for messages."""
    name: str
    """Name of the folder."""
    analysed: Analysed
    resamples: Mapping[str, np.ndarray]

    def unpaired(self, failed: Mapping[str, str]) -> list[str]:
        """The items that failed in it, or else among `failed`, but not in both."""
        return sorted(self.analysed.figures["failed"].keys() ^ failed.keys())


def read_compared(flag: str, path: Path, names: Sequence[str] | None = None) -> Compared:
    """The analysis in a folder.

    Args:
        names: of the figures whose resamples are read. None: all.

    Raises:
        UserError: the folder holds no analysis.
    """
    try:
        with np.load(path / RESAMPLES) as rows:
            chosen = {name: rows[name] for name in (rows if names is None else names)}
            return Compared(flag, path.name, read_analysis(path), chosen)
    # A file that a full disk cut off is no zip archive, or has no end.
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise UserError(f"{flag}: cannot be read ({error}); name the --output-dir of an analysis") from error


def read_analysis(path: Path) -> Analysed:
    """analysis.json and items.jsonl of a folder. Raises OSError or ValueError where they cannot be read."""
    figures = json.loads((path / ANALYSIS).read_text(encoding="utf-8"))
    if not isinstance(figures, dict) or not {"settings", "failed", "drift"} <= figures.keys():
        raise ValueError(f"its {ANALYSIS} is none")
    records = [json.loads(line) for line in (path / ITEMS).read_text(encoding="utf-8").splitlines()]
    if len(records) != figures.get("num_items") or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"its {ITEMS} does not hold {figures.get('num_items')} items")
    return Analysed(figures, records)


def check_settings(flag: str, theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError where two analyses are not of the same items, or differ in settings that matter."""
    changed = [name for name in _MATCHING if theirs.get(name) != settings[name]]
    if changed:
        # `data` is a hash, whose values say nothing to a user.
        listed = ", ".join(
            "other items" if name == "data" else f"{name} {theirs.get(name)} -> {settings[name]}" for name in changed
        )
        raise UserError(f"{flag}: another analysis ({listed}); both need the same items and settings")


def check_compared(other: Compared, job: Job) -> None:
    """`check_settings`; also raises UserError where another version figures the other analysis."""
    check_settings(other.flag, other.analysed.figures["settings"], job.settings_written)
    try:
        item_results(other.analysed, "", job.questions)
        other.analysed.figures["paths"]
    except KeyError as error:
        raise UserError(f"{other.flag}: no analysis of these items by this version (no {error}); repeat it") from error


def run_probes(
    job: Job, model: SpeechModel, engine: RolloutEngine, calibrations: Sequence[Calibration], console: PlainConsole
) -> dict[str, Any]:
    """Accuracy without and with each change, and the paired differences; empty without probes."""
    probes: list[tuple[str, AbstractContextManager[None], Sequence[Question]]] = [
        *((f"calibrate_{own.layer}", own.applied(model), job.questions) for own in calibrations),
        *((f"repeat_{times}", nullcontext(), [repeated(q, times) for q in job.questions]) for times in job.config.repeat),
    ]
    if not probes:
        return {}
    settings = EvaluationSettings(job.settings.max_new_tokens, num_samples=0, temperature=1.0, seed=job.settings.seed)
    # Accuracies are all that is reported of probes: the cheapest text similarity will do.
    evaluator = Evaluator(model, engine, HashedNgrams(), settings)
    plain = answer(evaluator, job.questions, console, "no probe")
    figures: dict[str, Any] = {"plain": _accuracies(report(plain, text_reference(plain)))}
    for name, changed, questions in probes:
        with changed:
            results = answer(evaluator, questions, console, name)
        figures[name] = _accuracies(report(results, text_reference(plain)))
        figures[name]["change"] = _accuracies(accuracy_change_since(results, plain))
    return figures


def answer(evaluator: Evaluator, questions: Sequence[Question], console: PlainConsole, what: str) -> list[ItemResult]:
    """Answer the items greedily; `what` is the title of the progress display."""
    sizes = evaluator.model.prompts.prompt_sizes(questions, evaluator.settings.max_new_tokens)
    refused = {q.id: str(size) for q, size in zip(questions, sizes, strict=True) if isinstance(size, UserError)}
    with item_progress(console, len(questions), what=f"items, {what}") as advance:
        return evaluator.evaluate(questions, "", advance, refused)


def _accuracies(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if "accuracy" in name or name in ("num_items", "num_failed")}


def analyse_compared(job: Job, compare: str) -> Path:
    """The folder with the analysis of the model that `--compare` names; it is analysed here where it has not been.

    Raises:
        UserError: there is no such model, or the two analyses would not compare.
    """
    try:
        other = plan_other(job, compare, job.output_dir / "compared")
    except UserError as error:
        raise UserError(f"--compare {compare}: neither an analysis nor a model to analyse ({error})") from error
    check_settings(f"--compare {compare}", other.settings_written, job.settings_written)
    analyse_first(other, job)
    return other.output_dir


def plan_other(job: Job, model: str, output_dir: Path) -> Job:
    """Plan the same analysis of another model, without probes. Raises UserError as `plan_job` does."""
    alone: dict[str, Any] = {"compare": None, "checkpoints": None, "calibrate": (), "repeat": ()}
    alone |= {"angle_projection": (), "length_normalisation": ()}
    return plan_job(dataclasses.replace(job.config, model=model, output_dir=output_dir, **alone))


def analyse_first(other: Job, job: Job) -> None:
    """Analyse another model into a folder within that of `job`, where that has not been done.

    Raises:
        UserError: the folder holds another analysis.
    """
    # Here and not after hours of work that would be in vain.
    make_folder(job.output_dir)
    if (other.output_dir / ANALYSIS).exists():
        with suppress(OSError, ValueError):
            if read_analysis(other.output_dir).figures["settings"] == as_json(other.settings_written):
                return
    run_job(other, None)
    # The weights of one model at a time.
    gc.collect()


def run_job(job: Job, compared: Compared | None, checkpoints: Sequence[Job] = ()) -> AnalysisOutcome:
    """Load the model, analyse every item, write the results; those of `checkpoints` are there."""
    make_folder(job.output_dir)
    console = open_console()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with explain_out_of_memory("loading the model"):
        model = SpeechModel(load_module(job.prompts, job.preset.source, job.device, job.dtype), job.prompts)
    say(
        console,
        f"{job.config.model} on {job.device}, {job.dtype}; {len(job.questions)} items to analyse; writing to {job.output_dir}",
    )
    if long := job.prompts.long_audio_notice(job.sizes):
        say(console, long)
    calibrations = [Calibration(layer) for layer in job.config.calibrate]
    engine = TransformersEngine(model, job.preset.rollout_batch_size)
    analysis = Analysis(model, engine, job.settings, calibrations, interventions_of(job.config))
    with closing(engine), explain_out_of_memory("the analysis"):
        add_items(job, analysis, console)
        figures: dict[str, Any] = {"settings": job.settings_written} | analysis.report()
        probes = run_probes(job, model, engine, calibrations, console)
    figures["cost"]["peak_memory_bytes"] = peak_memory(job.device)
    figures |= {"probes": probes} if probes else {}
    own = [read_compared(f"--checkpoints {job.config.checkpoints}", other.output_dir, _CORRELATED) for other in checkpoints]
    return write_results(job, analysis, figures, compared, own, console)


def interventions_of(config: AnalyseConfig) -> list[PathIntervention]:
    """The probes of the alignment path: at each layer of the critical tokens, then of all."""
    kinds: dict[Literal["angle", "length"], Sequence[int]]
    kinds = {"angle": config.angle_projection, "length": config.length_normalisation}
    return [
        PathIntervention(kind, layer, num_tokens)
        for kind, layers in kinds.items()
        for layer in layers
        for num_tokens in (config.critical_tokens, None)
    ]


def add_items(job: Job, analysis: Analysis, console: PlainConsole) -> None:
    """Analyse all items, and write items.jsonl on the way.

    Raises:
        UserError: no item can be analysed.
    """
    questions = job.questions
    path = job.output_dir / ITEMS
    with (
        item_progress(console, len(questions)) as advance,
        explain_cannot_write(path),
        path.open("w", encoding="utf-8") as items,
    ):
        for part in slice_data("", questions):
            for record in analysis.add(part.questions):
                items.write(json.dumps(as_json(record)) + "\n")
            advance(len(part.questions))
    if not analysis.num_items:
        first, reason = next(iter(analysis.failed.items()))
        raise UserError(f"data {job.source}: none of its {len(questions)} items can be analysed; item {first!r}: {reason}")


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most, on CUDA those of PyTorch's tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_results(
    job: Job,
    analysis: Analysis,
    figures: dict[str, Any],
    compared: Compared | None,
    checkpoints: Sequence[Compared],
    console: PlainConsole,
) -> AnalysisOutcome:
    """Write and print all that follows from the sums over items.

    Args:
        figures: of analysis.json, without a comparison.

    Raises:
        UserError: an item failed in one of the analyses alone, so that nothing could be compared.
    """
    output_dir = job.output_dir
    rows = analysis.resamples()
    unpaired = [own for own in (*([compared] if compared else []), *checkpoints) if own.unpaired(analysis.failed)]
    before = None if compared is None or compared in unpaired else compared.analysed
    if compared is not None and before is not None:
        figures["change"] = change_since(rows, compared.resamples)
    if checkpoints and not any(own in unpaired for own in checkpoints):
        figures["checkpoints"] = over_models({job.config.model: rows} | {own.name: own.resamples for own in checkpoints})
    with replaced_atomically(output_dir / RESAMPLES) as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]  # names of arrays, none of them an option
    figures = as_json(figures)
    write_atomically(output_dir / ANALYSIS, json.dumps(figures, indent=2) + "\n")
    if job.is_reported:
        draw_analysis(output_dir, figures, None if before is None else before.figures)
        write_analysis(output_dir, read_analysis(output_dir), before, Path(job.source).stem, job.questions)
        print_analysis(console, figures)
    print_failures(console, Path(job.source).stem, figures)
    say(console, f"written to {output_dir}: {listing(output_dir)}")
    if unpaired:
        flag, odd = unpaired[0].flag, unpaired[0].unpaired(analysis.failed)
        raise UserError(
            f"{flag}: {len(odd)} items failed in one of the two analyses alone (the first: {odd[0]!r}); {output_dir} holds "
            "this one without a comparison"
        )
    return AnalysisOutcome(output_dir, figures)


def make_folder(output_dir: Path) -> None:
    """Raises UserError where the folder cannot be figures, or holds an analysis."""
    if (output_dir / ANALYSIS).exists():
        raise UserError(f"--output-dir {output_dir}: holds an analysis already; name another folder")
    make_output_folder(output_dir)


def as_json(value: Any) -> Any:
    """A value with lists in the place of tuples and None in the place of NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: as_json(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command(config: AnalyseConfig) -> int:
    """Analyse; returns the exit status."""
    return FAILED if analyse(config).num_failed else 0


def main() -> int:
    return run_command(command, AnalyseConfig, "python -m tars_fast.analyse")


if __name__ == "__main__":
    sys.exit(main())
