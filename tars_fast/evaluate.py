"""Evaluate a model on spoken and written versions of the same items: `python -m tars_fast.evaluate --model M --data NAME=DIR`.

Items are answered slice by slice, under `torchrun` one slice in each process at a time; what is done is appended to
predictions.jsonl, and the same command continues there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from tars_fast.data.audio import LongRecordingError
from tars_fast.data.items import HELD_OUT_DATA, load_questions, or_embedded
from tars_fast.data.transcription import normalised
from tars_fast.evaluation.answering import TRANSCRIBE, DataSlice, EvaluationSettings, Evaluator, slice_data
from tars_fast.evaluation.figures import (
    OVERALL,
    Reference,
    change_since,
    overall,
    overall_change,
    report,
    text_reference,
)
from tars_fast.evaluation.results import (
    PREDICTIONS,
    ItemResult,
    by_data,
    check_same_items,
    data_fingerprint,
    read_predictions,
    recordings_fingerprint,
)
from tars_fast.learning.rewards import load_text_similarity
from tars_fast.learning.workers import Workers, join_workers
from tars_fast.models.hub import adapter_rank, weights_fingerprint
from tars_fast.models.memory import GB, Workload
from tars_fast.models.presets import find_preset
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.speech_model import choose_device
from tars_fast.reports.console import open_console, say
from tars_fast.reports.plots import ACCURACY_PLOT, accuracy_plot, can_plot, write_png
from tars_fast.reports.run_page import Compared, write_report
from tars_fast.reports.tables import print_evaluation
from tars_fast.rollout.policy import choose_engine, load_policy
from tars_fast.support.cli import (
    FAILED,
    INTERRUPTED,
    check_numbers,
    make_output_folder,
    new_output_folder,
    require_extra,
    run_command,
)
from tars_fast.support.files import write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import LongAudio, Modality, Question, UserError

_CONTENTS = {
    "weights": "the model's weights have changed",
    "data_fingerprint": "the items' ids, texts or answers have changed",
    "recordings": "recordings have changed",
}
"""What messages call the settings that say what is in a place, not which place."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy on spoken and written input by three scorers, modality recovery rate, similarity of answers and of states."""

    model: str = "pocket"
    """A preset, or a checkpoint folder."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SOURCE or SOURCE, once for each data set; without a name it is called like the file or folder. pocket, or without
    any: the embedded held-out items."""
    output_dir: Path | None = None
    """Where evaluation.json, predictions.jsonl, accuracy.png and config.json go; what is there of the same evaluation is
    continued. None: a new folder runs/evaluate-<model>-<date>-<time>."""
    reference: str | None = None
    """Text accuracy that MRR divides by: a fraction, or the folder of another evaluation, whose text accuracy of the same items
    is taken. None: this model's own."""
    compare: Path | None = None
    """Folder of another evaluation of the same items: differences with intervals, paired by item, and McNemar's exact test."""
    long_audio: LongAudio = "refuse"
    """Recordings longer than the model hears at once: refuse says how many and stops; chunk puts several clips into one
    prompt; truncate keeps the beginning."""
    transcribe: bool = False
    """Also have every recording transcribed, and report the word error rate; every item needs a transcript."""
    samples: int = 0
    """Completions an item, at --temperature, behind the sampled accuracies; 0 leaves them out."""
    temperature: float = 1.0
    """Of the sampled completions."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens. None: the preset's."""
    behaviour_model: str = "auto"
    """Text embedder behind behaviour_similarity. auto: the preset's."""
    rollout_batch_size: int | None = None
    """Completions in flight. None: the preset's."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What generates. auto: on CUDA vLLM where it is installed, else transformers."""
    kv_cache_gb: float | None = None
    """vLLM's KV cache in GB (1e9 bytes). None: what the completions in flight need, at most what is free."""
    seed: int = 0
    """Of the sampled completions, and of the guesses that VoiceBench's rules make."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. auto: bfloat16 on CUDA for models trained with LoRA, else float32."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            positive=("temperature", "rollout_batch_size", "max_new_tokens", "kv_cache_gb"),
            not_negative=("samples", "seed"),
        )
        if self.transcribe:
            require_extra("analysis")

    def sources(self) -> dict[str, str]:
        """What to read for each name. Raises UserError where a name is missing, reserved or used twice."""
        sources: dict[str, str] = {}
        for given in self.data or (str(HELD_OUT_DATA),):
            name, separator, source = given.partition("=")
            # A path may hold the sign too.
            if not separator or "/" in name:
                name, source = Path(given).stem, given
            if not name or not source or name == OVERALL:
                raise UserError(f"--data {given}: give NAME=SOURCE, NAME not {OVERALL!r}")
            if name in sources:
                raise UserError(f"--data {given}: {name!r} is there twice; tell them apart by NAME=SOURCE")
            sources[name] = or_embedded(source, HELD_OUT_DATA)
        return sources


def read_reference(given: str | None, data: Mapping[str, Sequence[Question]]) -> Reference | None:
    """Raises UserError where it is no fraction, and no evaluation of all these items either."""
    if given is None:
        return None
    try:
        fraction = float(given)
    except ValueError:
        own = {(name, question.id) for name, questions in data.items() for question in questions}
        others = [other for other in read_predictions(Path(given), "--reference") if other.key in own]
        check_same_items(data, others, f"--reference {given}")
        return text_reference(others)
    if not 0 < fraction <= 1:
        raise UserError(f"--reference {given}: a fraction above 0 and at most 1, or the folder of another evaluation")
    return fraction


def read_compared(path: Path | None, data: Mapping[str, Sequence[Question]]) -> list[ItemResult] | None:
    """Raises UserError where it is no evaluation of these items."""
    if path is None:
        return None
    others = [other for other in read_predictions(path, "--compare") if other.data in data]
    check_same_items(data, others, f"--compare {path}")
    return others


def check_transcripts(data: Mapping[str, Sequence[Question]]) -> None:
    """Raises UserError where an item's recording cannot be compared with what it says."""
    for name, questions in data.items():
        missing = [question.id for question in questions if not normalised(question.transcript or "")]
        if missing:
            raise UserError(
                f"--transcribe: {len(missing)} of {len(questions)} items of data {name!r} have no transcript (the first: "
                f"{missing[0]!r}); add 'transcript' to them, or leave --transcribe out"
            )


def find_pending(slices: Sequence[DataSlice], done: Mapping[tuple[str, str], ItemResult]) -> list[DataSlice]:
    """The slices that are not done. A slice with a failed item, which may have been mended since, is done again as a whole, so
    that its results do not depend on when the item failed."""

    def is_done(part: DataSlice) -> bool:
        results = [done.get((part.data, question.id)) for question in part.questions]
        return all(result is not None and result.failed is None for result in results)

    return [part for part in slices if not is_done(part)]


def open_output(
    output_dir: Path, settings: Mapping[str, Any], slices: Sequence[DataSlice]
) -> dict[tuple[str, str], ItemResult]:
    """Read what an evaluation of the same has left in the folder.

    Args:
        settings: with a fingerprint of each slice's recordings, in order; those of pending slices may have changed.

    Raises:
        UserError: it holds an evaluation of something else, or something else.
    """
    written = output_dir / "config.json"
    done = {}
    if (output_dir / PREDICTIONS).exists():
        if not written.exists():
            raise UserError(f"--output-dir {output_dir}: holds predictions of unknown settings; name another folder")
        done = {result.key: result for result in read_predictions(output_dir, "--output-dir")}
    if written.exists():
        try:
            earlier = json.loads(written.read_text(encoding="utf-8"))["evaluation"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output-dir {output_dir}: its config.json is not an evaluation's; name another folder"
            ) from error
        changed = sorted(name for name in settings if name != "recordings" and earlier.get(name) != settings[name])
        if not changed:
            recorded = [*earlier.get("recordings", []), *[None] * len(slices)]
            now = zip(slices, recorded, settings["recordings"], strict=False)
            stale = [part for part, before, after in now if before != after]
            changed = ["recordings"] if len(find_pending(stale, done)) < len(stale) else []
        if changed:
            listed = ", ".join(
                _CONTENTS.get(name) or f"{name} {_in_words(earlier.get(name))} -> {_in_words(settings[name])}"
                for name in changed
            )
            raise UserError(
                f"--output-dir {output_dir}: holds an evaluation with other settings or contents ({listed}); give the same "
                "ones or name another folder"
            )
    return done


def _in_words(value: object) -> str:
    return ", ".join(f"{name}={source}" for name, source in value.items()) if isinstance(value, dict) else str(value)


def write_predictions(path: Path, results: Sequence[ItemResult]) -> None:
    """The whole file in one go."""
    write_atomically(path, "".join(result.to_line() for result in results))


def append(path: Path, results: Sequence[ItemResult]) -> None:
    """On disk when this returns; an end in the middle leaves a line without its end, which no reader takes."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(result.to_line() for result in results))
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Job:
    """An evaluation whose settings are known."""

    config: EvaluateConfig
    output_dir: Path
    prompts: PromptFormat
    """Its preset has the settings that `None` and `auto` left to the preset."""
    data: Mapping[str, Sequence[Question]]
    settings: Mapping[str, Any]
    """What config.json says of it."""
    device: torch.device
    dtype: torch.dtype


def run_evaluation(config: EvaluateConfig) -> int:
    """Evaluate alone, or as one of the processes that torchrun started."""
    with join_workers() as workers:
        return evaluate_data(config, workers)


def evaluate_data(config: EvaluateConfig, workers: Workers) -> int:
    """Find what is left to do, do it, report."""
    preset = find_preset(config.model).with_settings(config)
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    sources = config.sources()
    data = {name: load_questions(source) for name, source in sources.items()}
    if config.transcribe:
        check_transcripts(data)
    reference = read_reference(config.reference, data)
    compared = read_compared(config.compare, data)
    prompts = load_prompt_format(preset, preset.source, config.long_audio)
    engine_name = choose_engine(config.engine, prompts.family, device, dtype, adapter_rank(preset.source))
    output_dir = config.output_dir or workers.gather(new_output_folder(config.model, "evaluate-"))[0]
    slices = [part for name, questions in data.items() for part in slice_data(name, questions)]
    settings = {
        "model": config.model,
        "weights": weights_fingerprint(preset.source),
        "data": sources,
        "data_fingerprint": {name: data_fingerprint(questions) for name, questions in data.items()},
        "recordings": [recordings_fingerprint(part.questions) for part in slices],
        "max_new_tokens": preset.max_new_tokens,
        "samples": config.samples,
        "temperature": config.temperature,
        "seed": config.seed,
        "transcribe": config.transcribe,
        "long_audio": config.long_audio,
        "behaviour_model": preset.behaviour_model,
        "rollout_batch_size": preset.rollout_batch_size,
        "engine": engine_name,
        "kv_cache_gb": config.kv_cache_gb,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    job = Job(config, output_dir, prompts, data, settings, device, dtype)
    console = open_console() if workers.is_first else Console(quiet=True)
    done = open_output(output_dir, settings, slices)
    make_output_folder(output_dir)
    pending = find_pending(slices, done)
    # Every process has read what is there before the first one changes it.
    workers.gather(None)
    for part in pending:
        for question in part.questions:
            done.pop((part.data, question.id), None)
    if pending:
        try:
            evaluate_parts(job, pending, list(done.values()), console, workers)
        except KeyboardInterrupt:
            if workers.is_first:
                print(f"stopped; continue with the same command and --output-dir {output_dir}", file=sys.stderr)
            return INTERRUPTED
    if not workers.is_first:
        # How it went is for the first to say: torchrun would end it in the middle of its report, were another to fail earlier.
        return 0
    if pending:
        done = {result.key: result for result in read_predictions(output_dir, "--output-dir")}
    results = [done[name, question.id] for name, questions in data.items() for question in questions]
    write_predictions(output_dir / PREDICTIONS, results)
    reference = text_reference(results) if reference is None else reference
    evaluation = make_report(results, reference, compared)
    write_atomically(output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    earlier = None if compared is None else make_report(compared, reference, None)
    draw(output_dir / ACCURACY_PLOT, evaluation, earlier)
    write_report(output_dir, data, None if compared is None or earlier is None else Compared(compared, earlier))
    print_evaluation(console, evaluation)
    written = ", ".join(sorted(path.name for path in output_dir.iterdir()))
    say(console, f"written to {output_dir}: {written}")
    return FAILED if evaluation[OVERALL]["num_failed"] else 0


def check_sizes(
    sizes: Mapping[str, Sequence[PromptSize | UserError]], data: Mapping[str, Sequence[Question]], prompts: PromptFormat
) -> None:
    """Items that cannot be used fail one by one, but not where that is for the user to decide.

    Raises:
        UserError: recordings are too long, or none of a data set's items can be used.
    """
    for name, part in sizes.items():
        long = sum(isinstance(size, LongRecordingError) for size in part)
        if long:
            raise UserError(
                f"data {name!r}: {long} of {len(part)} recordings are longer than the {prompts.max_audio_seconds:g} s that the "
                "model hears at once; choose --long-audio chunk or truncate, or cut them shorter"
            )
        if not any(isinstance(size, PromptSize) for size in part):
            raise UserError(
                f"data {name!r}: none of its {len(part)} items can be evaluated; item {data[name][0].id!r}: {part[0]}"
            )


def evaluate_parts(
    job: Job, pending: Sequence[DataSlice], done: Sequence[ItemResult], console: Console, workers: Workers
) -> None:
    """Load the model and append what it makes of the pending slices to predictions.jsonl, round by round, behind what is done.

    Raises:
        UserError: the model cannot be loaded, or takes no item of one data set.
    """
    config, prompts, data, preset = job.config, job.prompts, job.data, job.prompts.preset
    # All items, not only the pending ones: the engine's settings, and with them rounding, must not depend on what is left.
    sizes = {
        name: workers.spread(lambda share: prompts.try_questions(share, preset.max_new_tokens), questions)
        for name, questions in data.items()
    }
    check_sizes(sizes, data, prompts)
    longest_prompt = max(size.num_tokens for part in sizes.values() for size in part if isinstance(size, PromptSize))
    if config.transcribe:
        question = next(iter(data.values()))[0]
        lengths = [len(prompts.token_ids(question, Modality.SPEECH, [0], instruction)) for instruction in (TRANSCRIBE, None)]
        longest_prompt += max(0, lengths[0] - lengths[1])
    workload = Workload(
        architecture=prompts.family.architecture(prompts.config),
        engine=job.settings["engine"],
        dtype_bytes=job.dtype.itemsize,
        lora_rank=adapter_rank(preset.source),
        group_size=2 * max(1, config.samples),
        max_new_tokens=preset.max_new_tokens,
        longest_prompt=longest_prompt,
        rollout_batch_size=preset.rollout_batch_size,
        trains=False,
        given_kv_cache=None if config.kv_cache_gb is None else int(config.kv_cache_gb * GB),
        on_gpu=job.device.type == "cuda",
    )
    with explain_out_of_memory("loading the model"):
        model, engine = load_policy(prompts, preset.source, job.device, job.dtype, workload)
    total, left = sum(map(len, data.values())), sum(len(part.questions) for part in pending)
    long = prompts.tell_long([size for part in sizes.values() for size in part if isinstance(size, PromptSize)])
    if long is not None:
        say(console, long)
    where = f"{job.device}" if workers.size == 1 else f"{job.device} in {workers.size} processes"
    say(
        console,
        f"{config.model} on {where}, {model.module.dtype}, by {engine.name}; {left} of {total} items to evaluate; writing to "
        f"{job.output_dir}",
    )
    text_similarity = load_text_similarity(preset.behaviour_model, job.device)
    refused = {
        name: {q.id: str(size) for q, size in zip(data[name], part, strict=True) if isinstance(size, UserError)}
        for name, part in sizes.items()
    }
    # Not before: a folder is bound to its settings only once they have proved good.
    if workers.is_first:
        write_atomically(job.output_dir / "config.json", json.dumps({"evaluation": job.settings}, indent=2) + "\n")
        write_predictions(job.output_dir / PREDICTIONS, done)
    how = EvaluationSettings(preset.max_new_tokens, config.samples, config.temperature, config.seed, config.transcribe)
    with closing(engine), explain_out_of_memory("evaluation"), item_progress(console, total, total - left) as advance:
        for results in Evaluator(model, engine, text_similarity, how, workers).evaluate_rounds(pending, refused):
            if workers.is_first:
                append(job.output_dir / PREDICTIONS, results)
            advance(len(results))


def make_report(
    results: Sequence[ItemResult], reference: Reference, compared: Sequence[ItemResult] | None
) -> dict[str, dict[str, Any]]:
    """What evaluation.json holds: figures by the name of the data, and their mean as `overall`."""
    parts = by_data(results)
    evaluation = {name: report(part, reference) for name, part in parts.items()} | {OVERALL: overall(results, reference)}
    if compared is not None:
        before = by_data(compared)
        for name, part in parts.items():
            evaluation[name]["change"] = change_since(part, before[name])
        evaluation[OVERALL]["change"] = overall_change(results, compared)
    return evaluation


def draw(path: Path, evaluation: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Accuracy by modality of every data set, beside that of the compared evaluation where there is one."""
    panels = {}
    for name, figures in evaluation.items():
        if name != OVERALL:
            panels[name] = {"this model": figures} if earlier is None else {"before": earlier[name], "after": figures}
    if can_plot() and all(figures["num_items"] for panel in panels.values() for figures in panel.values()):
        write_png(path, accuracy_plot(panels))


def main() -> int:
    return run_command(run_evaluation, EvaluateConfig, "python -m tars_fast.evaluate")


if __name__ == "__main__":
    sys.exit(main())
