"""Evaluate a model on spoken and written versions of the same items: `python -m tars_fast.evaluate --model M --data NAME=DIR`.

Items are answered slice by slice, under `torchrun` one slice in each process at a time. Results are appended to
predictions.jsonl, where the same command continues after an interruption.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from tars_fast.config import JUDGE_SETTINGS, check_judge_url
from tars_fast.data.audio import LongRecordingError
from tars_fast.data.items import load_questions, or_bundled
from tars_fast.data.splits import data_fingerprint
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
    read_predictions,
    recordings_fingerprint,
)
from tars_fast.learning.rewards.behaviour import load_text_similarity
from tars_fast.learning.rewards.judge import Judge, find_judge
from tars_fast.learning.workers import Workers, join_workers, locked_by_first
from tars_fast.models.hub import adapter_rank, weights_fingerprint
from tars_fast.models.memory import Workload
from tars_fast.models.prompts import PromptFormat, PromptSize, load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import choose_device
from tars_fast.reports.plots import ACCURACY_PLOT, accuracy_plot, can_plot, write_png
from tars_fast.reports.run_page import Compared, write_report
from tars_fast.reports.tables import print_evaluation
from tars_fast.rollout.policy import choose_engine, load_model_and_engine
from tars_fast.support.cli import (
    FAILED,
    INTERRUPTED,
    as_paths,
    check_choices,
    check_conditions,
    check_file_names,
    check_numbers,
    new_output_folder,
    plain_settings,
    require_extra,
    run_command,
)
from tars_fast.support.console import PlainConsole, open_console, say
from tars_fast.support.files import append, listing, remove_partial, write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.text import GB
from tars_fast.support.timing import explain_out_of_memory
from tars_fast.types import LongAudio, Modality, Question, UserError

_CONTENTS = {
    "weights": "the model's weights have changed",
    "data_fingerprint": "the items' ids, texts or answers have changed",
    "recordings": "recordings have changed",
}
"""How messages name the settings that are hashes."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy on spoken and written input by three scorers, modality recovery rate, similarity of answers and of states."""

    model: str = "pocket"
    """A preset, or a checkpoint folder."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=SOURCE or SOURCE, once for each data set; the default name is that of the file or folder. pocket,
    pocket-hard: bundled held-out items, NAME@validation others, pocket@held_out_neural the same in a neural voice. Without any:
    those of the model's own task."""
    output_dir: Path | None = None
    """Folder of evaluation.json, predictions.jsonl, accuracy.png and config.json; an evaluation that has begun there is
    continued. None: a new folder runs/evaluate-<model>-<date>-<time>."""
    reference: str | None = None
    """Text accuracy that MRR divides by: a fraction, or the folder of another evaluation, which gives its text accuracy of the
    same items. None: this model's own."""
    compare: Path | None = None
    """Folder of another evaluation of the same items: differences with intervals, paired by item, and McNemar's exact test."""
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
    judge_url: str | None = None
    """Where a model grades answers to open questions, any OpenAI-compatible address, as http://localhost:8000/v1; questions
    without an answer are then taken too."""
    reward_concurrency: int = 16
    """Requests to it that are under way at the same time, as in training."""
    reward_timeout: float = 60.0
    """Seconds that a request to it may take."""
    judge_model: str | None = None
    """That model's name there. None: the first that is listed, with which the evaluation is continued."""
    judge_template: Path | None = None
    """A jinja2 file of what it is told, from question, answer and scale. None: a plain request for a mark."""
    judge_scale: float = 10.0
    """The best mark it may give, 0 being the worst."""
    transcribe: bool = False
    """Also have every recording transcribed, and report the word error rate; every item needs a transcript."""
    samples: int = 0
    """Completions of each prompt, at --temperature, for the sampled accuracies; 0 leaves them out."""
    temperature: float = 1.0
    """Temperature of the sampled completions."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens. None: the preset's."""
    behaviour_model: str = "auto"
    """Text embedder of behaviour_similarity. auto: the preset's."""
    rollout_batch_size: int | None = None
    """Completions in flight. None: the preset's."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What generates. auto: on CUDA vLLM where it is installed, else transformers."""
    kv_cache_gb: float | None = None
    """vLLM's KV cache in GB (1e9 bytes). None: what the completions in flight need, at most what is free."""
    seed: int = 0
    """Seed of the sampled completions, and of the guesses that VoiceBench's rules make."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. auto: bfloat16 on CUDA for models trained with LoRA, else float32."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "compare", "prompt_template", "judge_template")
        check_file_names(self, "model", "reference")
        check_choices(self)
        check_numbers(
            self,
            positive=(
                "temperature",
                "rollout_batch_size",
                "max_new_tokens",
                "kv_cache_gb",
                "judge_scale",
                "reward_concurrency",
                "reward_timeout",
            ),
            not_negative=("samples", "seed"),
        )
        check_conditions(
            self, [((*JUDGE_SETTINGS, "reward_concurrency", "reward_timeout"), self.judge_url is not None, "--judge-url")]
        )
        check_judge_url(self.judge_url)
        if self.transcribe:
            require_extra("analysis")

    def sources(self) -> dict[str, str]:
        """Name of each data set -> its source. Raises UserError where a name is missing, reserved or used twice."""
        sources: dict[str, str] = {}
        for given in self.data or (or_bundled(None, "held_out", find_preset(self.model).bundled_data),):
            name, separator, source = given.partition("=")
            # A path may hold the sign too.
            if not separator or "/" in name:
                name, source = Path(given).stem, given
            if not name or not source or name == OVERALL:
                raise UserError(f"--data {given}: give NAME=SOURCE, NAME not {OVERALL!r}")
            if name in sources:
                raise UserError(f"--data {given}: {name!r} is there twice; tell them apart by NAME=SOURCE")
            sources[name] = or_bundled(source, "held_out")
        return sources


@dataclass(frozen=True)
class EvaluationOutcome:
    """How an evaluation ended."""

    output_dir: Path
    """The evaluation's folder."""
    is_finished: bool
    """False: it was interrupted, and the same settings with this folder continue it."""
    evaluation: dict[str, dict[str, Any]] | None
    """The content of evaluation.json: figures by the name of the data, and `overall`. None where the evaluation was
    interrupted, and in all processes but the first."""

    @property
    def num_failed(self) -> int:
        """Number of items that could not be evaluated."""
        return self.evaluation[OVERALL]["num_failed"] if self.evaluation else 0


@dataclass(frozen=True)
class Job:
    """An evaluation whose settings and data have been checked."""

    config: EvaluateConfig
    workers: Workers
    output_dir: Path
    prompts: PromptFormat
    """Its preset has the values of the settings that are None or auto."""
    data: Mapping[str, Sequence[Question]]
    slices: Sequence[DataSlice]
    reference: Reference | None
    """None: this model's own text accuracy."""
    compared: Sequence[ItemResult] | None
    """The results of the evaluation that `--compare` names."""
    judge: Judge | None
    """Grades answers to open questions; None: no one does."""
    settings: Mapping[str, Any]
    """What config.json holds as `evaluation` beside the settings that were given."""
    device: torch.device
    dtype: torch.dtype


def evaluate(config: EvaluateConfig) -> EvaluationOutcome:
    """Check, answer what has not been answered yet, report; alone, or as one of the processes that torchrun started.

    Raises:
        UserError: settings, data, model or folder are not usable.
        TrainingError: memory ran out.
    """
    with join_workers() as workers:
        job = plan_job(config, workers)
        console = open_console() if workers.is_first else PlainConsole(quiet=True)
        with locked_by_first(job.output_dir, workers):
            done = read_output(job)
            pending = find_pending(job.slices, done)
            # Every process reads the folder before the first one writes there.
            workers.gather(None)
            if workers.is_first:
                remove_partial(job.output_dir)
            if pending:
                try:
                    answer_slices(job, pending, done, console)
                except KeyboardInterrupt:
                    if workers.is_first:
                        print(f"stopped; continue with the same command and --output-dir {job.output_dir}", file=sys.stderr)
                    return EvaluationOutcome(job.output_dir, False, None)
            # Only the first process reports: torchrun would end it in the middle of its report, were another to fail earlier.
            return EvaluationOutcome(job.output_dir, True, write_results(job, console) if workers.is_first else None)


def plan_job(config: EvaluateConfig, workers: Workers) -> Job:
    """Read the data and the model's configuration, but no weights.

    Raises:
        UserError: settings or data are not usable.
    """
    preset = find_preset(config.model).with_settings(config)
    device, dtype = choose_device(config.device, config.dtype, uses_lora=preset.lora_rank > 0)
    sources = config.sources()
    judge = find_judge(config)
    data = {name: load_questions(source, answered=judge is None) for name, source in sources.items()}
    check_graded(data, judged=judge is not None)
    if config.transcribe:
        check_transcripts(data)
    if any(question.rule == "ifeval" for questions in data.values() for question in questions):
        require_extra("ifeval")
    reference = read_reference(config.reference, data)
    compared = read_compared(config.compare, data)
    prompts = load_prompt_format(preset, preset.source, config.long_audio)
    data = {name: prompts.ask(questions) for name, questions in data.items()}
    rank = adapter_rank(preset.source)
    engine_name = choose_engine(config.engine, prompts.family, device, dtype, rank, preset.source)
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
        "system_prompt": preset.system_prompt,
        "prompt_template": preset.question_template,
        "answer_format": dataclasses.asdict(preset.answers),
        "judge": None if judge is None else judge.describe(),
        "behaviour_model": preset.behaviour_model,
        "rollout_batch_size": preset.rollout_batch_size,
        "engine": engine_name,
        "kv_cache_gb": config.kv_cache_gb,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Job(
        config=config,
        workers=workers,
        output_dir=config.output_dir or workers.gather(new_output_folder(config.model, "evaluate-"))[0],
        prompts=prompts,
        data=data,
        slices=slices,
        reference=reference,
        compared=compared,
        judge=judge,
        settings=settings,
        device=device,
        dtype=dtype,
    )


def read_reference(given: str | None, data: Mapping[str, Sequence[Question]]) -> Reference | None:
    """The reference of `--reference`. Raises UserError where it is neither a fraction nor an evaluation of all these items."""
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
    """The results of `--compare`. Raises UserError where it is no evaluation of these items."""
    if path is None:
        return None
    others = [other for other in read_predictions(path, "--compare") if other.data in data]
    check_same_items(data, others, f"--compare {path}")
    return others


def check_graded(data: Mapping[str, Sequence[Question]], *, judged: bool) -> None:
    """Raises UserError where an item can be graded by nothing."""
    for name, questions in data.items():
        ungraded = [question.id for question in questions if not question.is_graded(judged=judged)]
        if ungraded:
            remedy = "add 'answer' to them" if judged else "add 'answer' to them, or name a judge by --judge-url"
            raise UserError(
                f"data {name!r}: {len(ungraded)} of {len(questions)} items have nothing to grade answers by (the first: "
                f"{ungraded[0]!r}); {remedy}"
            )


def check_transcripts(data: Mapping[str, Sequence[Question]]) -> None:
    """Raises UserError where an item has no transcript, which transcriptions are compared with."""
    for name, questions in data.items():
        missing = [question.id for question in questions if not normalised(question.transcript or "")]
        if missing:
            raise UserError(
                f"--transcribe: {len(missing)} of {len(questions)} items of data {name!r} have no transcript (the first: "
                f"{missing[0]!r}); add 'transcript' to them, or leave --transcribe out"
            )


def find_pending(slices: Sequence[DataSlice], done: Mapping[tuple[str, str], ItemResult]) -> list[DataSlice]:
    """The slices that are not done. A slice with a failed item, which may have been corrected since, is done again as a whole,
    so that its results do not depend on when the item failed."""

    def is_done(part: DataSlice) -> bool:
        results = [done.get((part.data, question.id)) for question in part.questions]
        return all(result is not None and result.failed is None for result in results)

    return [part for part in slices if not is_done(part)]


def read_output(job: Job) -> dict[tuple[str, str], ItemResult]:
    """The results that an earlier start of the same evaluation left in the folder, by the key of the item.

    Raises:
        UserError: the folder holds another evaluation or something else.
    """
    output_dir, settings = job.output_dir, job.settings
    written = output_dir / "config.json"
    done = {}
    if (output_dir / PREDICTIONS).exists():
        if not written.exists():
            raise UserError(f"--output-dir {output_dir}: holds predictions of unknown settings; name another folder")
        done = {result.key: result for result in read_predictions(output_dir, "--output-dir")}
    if written.exists():
        try:
            earlier = json.loads(written.read_text(encoding="utf-8"))["evaluation"]
            if not isinstance(earlier, dict):
                raise TypeError("no settings")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output-dir {output_dir}: its config.json is not an evaluation's, or damaged; name another folder"
            ) from error
        changed = sorted(name for name in settings if name != "recordings" and earlier.get(name) != settings[name])
        if not changed and has_stale_results(job.slices, earlier.get("recordings") or [], settings["recordings"], done):
            changed = ["recordings"]
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


def has_stale_results(
    slices: Sequence[DataSlice],
    earlier: Sequence[str],
    current: Sequence[str],
    done: Mapping[tuple[str, str], ItemResult],
) -> bool:
    """Whether a slice is done whose recordings have changed since.

    Args:
        earlier: fingerprint of the recordings of each slice when the evaluation began.
        current: their fingerprints now.
    """
    pairs = zip_longest(earlier[: len(slices)], current)
    changed = [part for part, (before, now) in zip(slices, pairs, strict=True) if before != now]
    return len(find_pending(changed, done)) < len(changed)


def _in_words(value: object) -> str:
    return ", ".join(f"{name}={source}" for name, source in value.items()) if isinstance(value, dict) else str(value)


def check_sizes(
    sizes: Mapping[str, Sequence[PromptSize | UserError]], data: Mapping[str, Sequence[Question]], prompts: PromptFormat
) -> None:
    """Stop where the user has to decide; other unusable items fail one by one.

    Raises:
        UserError: recordings are too long, or none of a data set's items can be used.
    """
    for name, own in sizes.items():
        long = sum(isinstance(size, LongRecordingError) for size in own)
        if long:
            raise UserError(
                f"data {name!r}: {long} of {len(own)} recordings are longer than the {prompts.max_audio_seconds:g} s that the "
                "model encodes at once; choose --long-audio chunk or truncate, or cut them shorter"
            )
        if not any(isinstance(size, PromptSize) for size in own):
            raise UserError(
                f"data {name!r}: none of its {len(own)} items can be evaluated; item {data[name][0].id!r}: {own[0]}"
            )


def find_workload(job: Job, sizes: Mapping[str, Sequence[PromptSize | UserError]]) -> Workload:
    """Sizes that the engine's memory depends on; of all items, so that results do not depend on which are pending."""
    preset = job.prompts.preset
    longest_prompt = max(size.num_tokens for own in sizes.values() for size in own if isinstance(size, PromptSize))
    if job.config.transcribe:
        question = next(iter(job.data.values()))[0]
        transcribing, usual = (
            len(job.prompts.token_ids(question, Modality.SPEECH, [[0]] * len(question.recordings), instruction))
            for instruction in (TRANSCRIBE, None)
        )
        longest_prompt += max(0, transcribing - usual)
    return Workload(
        architecture=job.prompts.family.architecture(job.prompts.config),
        engine=job.settings["engine"],
        dtype_bytes=job.dtype.itemsize,
        lora_rank=adapter_rank(preset.source),
        group_size=2 * max(1, job.config.samples),
        max_new_tokens=preset.max_new_tokens,
        longest_prompt=longest_prompt,
        rollout_batch_size=preset.rollout_batch_size,
        trains=False,
        given_kv_cache=None if job.config.kv_cache_gb is None else int(job.config.kv_cache_gb * GB),
        on_gpu=job.device.type == "cuda",
    )


def answer_slices(
    job: Job, pending: Sequence[DataSlice], done: Mapping[tuple[str, str], ItemResult], console: PlainConsole
) -> None:
    """Load the model and append the results of the pending slices to predictions.jsonl, round by round.

    Raises:
        UserError: the model cannot be loaded, or can take no item of a data set.
    """
    config, prompts, workers, preset = job.config, job.prompts, job.workers, job.prompts.preset
    sizes = {
        name: workers.spread(lambda share: prompts.prompt_sizes(share, preset.max_new_tokens), questions)
        for name, questions in job.data.items()
    }
    check_sizes(sizes, job.data, prompts)
    if job.judge is not None:
        job.judge.check([question for questions in job.data.values() for question in questions])
    with explain_out_of_memory("loading the model"):
        model, engine = load_model_and_engine(prompts, preset.source, job.device, job.dtype, find_workload(job, sizes))
    with closing(engine):
        num_items, num_pending = sum(map(len, job.data.values())), sum(len(part.questions) for part in pending)
        long = prompts.long_audio_notice([size for own in sizes.values() for size in own if isinstance(size, PromptSize)])
        if long is not None:
            say(console, long)
        where = f"{job.device}" if workers.size == 1 else f"{job.device} in {workers.size} processes"
        say(
            console,
            f"{config.model} on {where}, {model.module.dtype}, by {engine.name}; {num_pending} of {num_items} items to "
            f"evaluate; writing to {job.output_dir}",
        )
        text_similarity = load_text_similarity(preset.behaviour_model, job.device)
        # Only now: a folder is bound to its settings once they have proved good.
        if workers.is_first:
            again = {(part.data, question.id) for part in pending for question in part.questions}
            written = plain_settings(config) | {"evaluation": job.settings}
            write_atomically(job.output_dir / "config.json", json.dumps(written, indent=2) + "\n")
            write_predictions(job.output_dir / PREDICTIONS, [result for key, result in done.items() if key not in again])
        settings = EvaluationSettings(preset.max_new_tokens, config.samples, config.temperature, config.seed, config.transcribe)
        evaluator = Evaluator(model, engine, text_similarity, settings, workers, job.judge)
        refused = {
            name: {q.id: str(size) for q, size in zip(job.data[name], own, strict=True) if isinstance(size, UserError)}
            for name, own in sizes.items()
        }
        with explain_out_of_memory("evaluation"), item_progress(console, num_items, num_items - num_pending) as advance:
            for results in evaluator.evaluate_rounds(pending, refused):
                if workers.is_first:
                    append(job.output_dir / PREDICTIONS, "".join(result.to_line() for result in results))
                advance(len(results))


def write_predictions(path: Path, results: Sequence[ItemResult]) -> None:
    """Write the whole file, atomically."""
    write_atomically(path, "".join(result.to_line() for result in results))


def write_results(job: Job, console: PlainConsole) -> dict[str, dict[str, Any]]:
    """Put predictions.jsonl into the order of the data, write and print all that follows from it.

    Returns:
        The content of evaluation.json.
    """
    output_dir, data = job.output_dir, job.data
    done = {result.key: result for result in read_predictions(output_dir, "--output-dir")}
    results = [done[name, question.id] for name, questions in data.items() for question in questions]
    write_predictions(output_dir / PREDICTIONS, results)
    reference = text_reference(results) if job.reference is None else job.reference
    evaluation = make_report(results, reference, job.compared)
    write_atomically(output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    compared = None if job.compared is None else Compared(job.compared, make_report(job.compared, reference, None))
    plot(output_dir / ACCURACY_PLOT, evaluation, None if compared is None else compared.reports)
    write_report(output_dir, data, compared)
    print_evaluation(console, evaluation)
    say(console, f"written to {output_dir}: {listing(output_dir)}")
    return evaluation


def make_report(
    results: Sequence[ItemResult], reference: Reference, compared: Sequence[ItemResult] | None
) -> dict[str, dict[str, Any]]:
    """The content of evaluation.json: figures by the name of the data, and their mean as `overall`."""
    data_sets = by_data(results)
    evaluation = {name: report(own, reference) for name, own in data_sets.items()} | {OVERALL: overall(results, reference)}
    if compared is not None:
        before = by_data(compared)
        for name, own in data_sets.items():
            evaluation[name]["change"] = change_since(own, before[name])
        evaluation[OVERALL]["change"] = overall_change(results, compared)
    return evaluation


def plot(path: Path, evaluation: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Plot the accuracy by modality of every data set, beside that of the compared evaluation where there is one."""
    panels = {}
    for name, figures in evaluation.items():
        if name != OVERALL:
            panels[name] = {"this model": figures} if earlier is None else {"before": earlier[name], "after": figures}
    if can_plot() and all("speech_accuracy" in figures for panel in panels.values() for figures in panel.values()):
        write_png(path, accuracy_plot(panels))


def command(config: EvaluateConfig) -> int:
    """Evaluate; returns the exit status."""
    outcome = evaluate(config)
    if not outcome.is_finished:
        return INTERRUPTED
    return FAILED if outcome.num_failed else 0


def resolve(config: EvaluateConfig) -> EvaluateConfig:
    """The settings with the preset's in the place of None."""
    return dataclasses.replace(config, **find_preset(config.model).with_settings(config).settings_of(config))


def main() -> int:
    return run_command(command, EvaluateConfig, "python -m tars_fast.evaluate", resolve)


if __name__ == "__main__":
    sys.exit(main())
