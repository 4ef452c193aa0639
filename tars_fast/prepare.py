"""Text questions become spoken ones, and data are checked before they are used: `python -m tars_fast.prepare`.

Voice and seed of every item follow from --seed and its id alone: any number of jobs, in any order, interrupted or not, makes
the same recordings. A recording appears whole or not at all; then a line in `finished.jsonl` says how it was made, and the next
run goes on with what is left. The items are written last, as training reads them: `items.jsonl` beside the recordings, or
`items.parquet` with the recordings inside.

With `--budget` only a part of the items is spoken: which one, `analysis/active_selection.py` says.

Left out on purpose: more than one machine (give each a part of the items, and join the folders), and recorded noise or rooms
around the speech (a synthesiser of your own may add them).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np

from tars_fast.data.audio import MIN_SECONDS, SAMPLE_RATE, on_integer_scale, resample
from tars_fast.data.augmentation import Augmentation, parse_augmentation
from tars_fast.data.items import UsableItem, or_bundled, read_items, read_usable, shown_options
from tars_fast.data.parquet import write_parquet
from tars_fast.data.quality import NOTES, UNUSABLE, Finding, Inspection, inspect_items
from tars_fast.data.recognition import load_recogniser
from tars_fast.data.sources import read_rows
from tars_fast.data.splits import without_repeats
from tars_fast.data.synthesis import VOICES, Synthesiser
from tars_fast.data.transcription import word_error_rate
from tars_fast.support.cli import FAILED, as_paths, check_numbers, first_line, load_function, require_extra, run_command
from tars_fast.support.console import PlainConsole
from tars_fast.support.files import append, explain_cannot_write, remove_partial, write_atomically
from tars_fast.support.locks import LOCK, locked
from tars_fast.support.progress import track
from tars_fast.types import Question, Recording, UserError

ESPEAK = "espeak-ng"
OutputFormat = Literal["jsonl", "parquet"]
Speak = Callable[[str, str, int], tuple[np.ndarray, int]]
"""(text, voice, seed) -> ([samples] float32 mono in [-1, 1], sample rate in Hz)."""


@dataclass(frozen=True)
class PrepareConfig:
    """Make spoken questions of written ones (--data), or look for what is wrong with spoken ones (--check)."""

    data: str | None = None
    """Text items: id, question, options or answer_set, answer; or texts alone, for objectives that need no answers. A jsonl
    file, a parquet file or a dataset of the hub."""
    output_dir: Path | None = None
    """New folder, or that of an earlier run of the same settings, which goes on: the items, and preparation/."""
    output_format: OutputFormat = "jsonl"
    """jsonl: items.jsonl, and a file in recordings/ for each item. parquet: items.parquet, with the recordings inside."""
    synthesiser: str = ESPEAK
    """espeak-ng, or module:function with the signature (text, voice, seed) -> (wave, rate)."""
    voices: tuple[str, ...] = ()
    """What the synthesiser calls them; one is drawn for each item. None given: 70 of espeak-ng's, else "default"."""
    augment: tuple[str, ...] = ()
    """What is done to each recording, in this order: noise:DB (white noise at so many dB of signal-to-noise ratio, or drawn
    for each item between two, as in noise:5..20), speech-noise:DB (noise with the recording's own spectrum), telephone (300 to
    3400 Hz at 8 kHz)."""
    recogniser: str | None = None
    """Verifies each recording: module:function, (wave, rate) -> text, or a speech recognition checkpoint. None: no check."""
    max_word_error_rate: float = 0.1
    """An item is spoken again where the word error rate of the recogniser's text is higher."""
    retries: int = 3
    """Further voices and seeds for an item that failed, before it is given up."""
    max_seconds: float = 30.0
    """Longest recording that the model takes; --check refuses longer ones, preparing counts them."""
    seed: int = 0
    """Seed of the choice of voices and of the synthesiser's noise."""
    jobs: int | None = None
    """Worker processes; each loads its own synthesiser and recogniser. None: one a core for espeak-ng without a recogniser,
    else 1."""
    budget: int | None = None
    """Speak so many of the items, drawn uniformly, or chosen for a model with --select-for; which ones stands in choice.json.
    None: all of them."""
    select_for: str | None = None
    """A preset or checkpoint: clusters of items whose spoken and written forms it takes differently get more of --budget
    (SALAD, arXiv 2510.13632)."""
    clusters: int | None = None
    """Clusters of the items, with --select-for. None: so many that their probes take a quarter of --budget, at most 64."""
    probes: int = 4
    """Items of each cluster that are spoken first, and measured, with --select-for; part of the budget."""
    embedder: str | None = None
    """Text embedder that the items are clustered by: hashed-ngrams, or a sentence-transformers model. None: that of R_beh for
    the model, hashed-ngrams for pocket, else Qwen/Qwen3-Embedding-0.6B."""
    check: str | None = None
    """Spoken items to be checked, bundled ones by name too (pocket-hard@validation); nothing is made."""
    output: Path | None = None
    """JSON file for what --check finds. None: shown only."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir", "output")
        check_numbers(
            self,
            positive=("jobs", "max_seconds", "budget", "clusters", "probes"),
            not_negative=("seed", "retries", "max_word_error_rate"),
        )
        if (self.check is None) == (self.data is None):
            raise UserError("--data or --check: give one of them, text items to be spoken or spoken items to be checked")
        if self.data is not None and self.output_dir is None:
            raise UserError("--output-dir: name the folder for the spoken items")
        if self.select_for is not None and self.budget is None:
            raise UserError(f"--select-for {self.select_for}: needs --budget, the number of items to be spoken")
        for flag, value in (("--clusters", self.clusters), ("--embedder", self.embedder)):
            if value is not None and self.select_for is None:
                raise UserError(f"{flag} {value}: needs --select-for, whose clusters it is about; leave it out")
        if self.budget is not None and self.data is None:
            raise UserError(f"--budget {self.budget}: --check makes no items; leave it out")
        if self.augment and self.data is None:
            raise UserError(f"--augment {' '.join(self.augment)}: --check makes no items; leave it out")
        for augmentation in self.augment:
            parse_augmentation(augmentation)
        if self.budget is not None:
            require_extra("train")
        if self.output is not None and not self.output.parent.is_dir():
            raise UserError(f"--output {self.output}: no folder {self.output.parent}; make it first")
        if self.check is not None and self.output_format != "jsonl":
            raise UserError(f"--output-format {self.output_format}: --check makes no items; leave it out")


@dataclass(frozen=True)
class Recipe:
    """The settings that a recording depends on."""

    synthesiser: str
    voices: tuple[str, ...]
    recogniser: str | None
    max_word_error_rate: float
    retries: int
    seed: int
    augment: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One item with its recording, or why there is none; a line of finished.jsonl."""

    id: str
    transcript: str
    gained: Mapping[str, Any]
    """Further columns of the item: voice, seconds, augmentation, word_error_rate."""
    error: str | None = None


def spoken_form(item: UsableItem) -> str:
    """The text to be spoken: all that the written prompt shows, so that both ask the same."""
    if item.question.transcript is not None:
        return item.question.transcript
    stem, options = shown_options(item.question)
    lines = [stem] if stem else []
    lines += [f"Option {letter}: {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    # A pause at the end of each, and a word for each gap to be filled in.
    return "\n".join(re.sub(r"_{2,}", " blank ", line if line[-1] in ".,;:!?" else f"{line}.") for line in lines)


def recording_name(id: str, transcript: str) -> str:
    """A file name that is safe on any system, unique to the item and its words, and begins with the id for a reader."""
    digest = hashlib.sha256(json.dumps([id, transcript]).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', id)[:40]}-{digest}.flac"


# In a worker


def watch_parent() -> None:
    """Make this worker end when its parent ends, however that ends."""

    def end_with_parent() -> None:
        parent = parent_process()
        assert parent is not None, "this is a worker"
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@functools.cache
def load_synthesiser(name: str) -> Speak:
    """Load espeak-ng or the user's function. Raises UserError where it cannot be loaded."""
    if name != ESPEAK:
        return load_function("--synthesiser", name)
    require_extra("speech")
    # Never left: it runs as long as the worker, whose end closes its pipes.
    synthesiser = Synthesiser().__enter__()

    def speak(text: str, voice: str, seed: int) -> tuple[np.ndarray, int]:
        rng = random.Random(seed)
        return synthesiser(text, voice, words_per_minute=rng.randint(140, 200), pitch=rng.randint(30, 70), seed=seed)

    return speak


cached_recogniser = functools.cache(load_recogniser)


def speak_item(id: str, transcript: str, recipe: Recipe, folder: Path) -> Outcome:
    """Synthesise one item, verify it where there is a recogniser, and write its recording.

    Raises:
        UserError: synthesiser or recogniser cannot be loaded, or raises it because no item can be spoken with these settings.
        OSError: the recording cannot be written.
    """
    speak = load_synthesiser(recipe.synthesiser)
    recognise = None if recipe.recogniser is None else cached_recogniser(recipe.recogniser)
    augmentations = [parse_augmentation(text) for text in recipe.augment]
    failures: list[str] = []
    for attempt in range(1 + recipe.retries):
        key = json.dumps([recipe.seed, attempt, id])
        rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()))
        voice, seed = rng.choice(recipe.voices), rng.randrange(2**31)
        try:
            wave = checked_wave(*speak(transcript, voice, seed))
            gained: dict[str, Any] = {"voice": voice, "seconds": round(len(wave) / SAMPLE_RATE, 3)}
            if augmentations:
                wave, gained["augmentation"] = augment(wave, augmentations, np.random.default_rng(seed))
            if recognise is not None:
                recognised = recognise(wave, SAMPLE_RATE)
                gained["word_error_rate"] = round(word_error_rate(transcript, recognised), 4)
        except UserError:
            raise
        except Exception as error:  # Others' code, which may raise anything: the item fails, not the run.
            failures.append(f"{voice}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if recognise is not None and gained["word_error_rate"] > recipe.max_word_error_rate:
            failures.append(f"{voice}: word error rate {gained['word_error_rate']}, heard {recognised[:200]!r}")
            continue
        write_atomically(folder / recording_name(id, transcript), encode(wave))
        return Outcome(id, transcript, gained)
    return Outcome(id, transcript, {}, error="; ".join(failures))


def checked_wave(wave: np.ndarray, rate: int) -> np.ndarray:
    """Bring a synthesiser's wave to 16 kHz. Raises ValueError where it cannot be speech."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"the synthesiser gave {wave.dtype} of shape {wave.shape}, not one channel of floats in [-1, 1]")
    if not np.isfinite(wave).all():
        raise ValueError("the synthesiser gave NaN or infinite samples")
    if wrong := on_integer_scale(wave):
        raise ValueError(f"the synthesiser gave floats on the scale of integers: {wrong}; divide them by 32768")
    wave = resample(wave.astype(np.float32), rate)
    if len(wave) < MIN_SECONDS * SAMPLE_RATE or not wave.any():
        raise ValueError(f"the synthesiser gave {len(wave) / SAMPLE_RATE:.2f} s, or silence")
    return wave


def augment(wave: np.ndarray, augmentations: Sequence[Augmentation], rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """([samples] float32 at 16 kHz, what was done, with the values drawn)."""
    done = []
    for augmentation in augmentations:
        wave, text = augmentation.apply(wave, rng)
        done.append(text)
    return wave, " ".join(done)


def encode(wave: np.ndarray) -> bytes:
    """Encode [samples] float32 at 16 kHz as a FLAC file of 16 bits."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


# In the command


GO_ON = "what is done stays, and the same command goes on from there"


def packed_recordings(folder: Path) -> dict[str, Recording]:
    """Recordings in the items.parquet of an earlier run, by their names.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "items.parquet"
    packed: dict[str, Recording] = {}
    for row in read_rows(str(path)) if path.is_file() else ():
        if isinstance(row.values, dict) and row.audio is not None:
            packed[recording_name(str(row.values.get("id")), str(row.values.get("transcript")))] = row.audio
    return packed


def open_folder(
    folder: Path, recipe: Recipe, output_format: OutputFormat
) -> tuple[dict[str, Outcome], Mapping[str, Recording]]:
    """Begin the output folder, or go on with that of an earlier run with the same settings.

    Returns:
        (id -> what the earlier run has finished and is still there, `packed_recordings`).

    Raises:
        UserError: it holds something else, or was begun with other settings.
    """
    settings_path, journal = (folder / "preparation" / name for name in ("settings.json", "finished.jsonl"))
    settings = json.loads(json.dumps(asdict(recipe) | {"output_format": output_format}))
    outcomes = read_journal(journal)
    if settings_path.is_file():
        begun = read_settings(settings_path)
    elif outcomes:
        print(f"warning: {settings_path} is missing; it is made again of the settings given now", flush=True)
        begun = settings
    else:
        begun = {}
        if any(path.name not in ("preparation", LOCK) for path in folder.iterdir()):
            raise UserError(f"--output-dir {folder}: holds something else; name a new folder")
    recordings = folder / "recordings"
    packed = packed_recordings(folder)
    names = packed.keys() | ({path.name for path in recordings.iterdir()} if recordings.is_dir() else set())
    finished = {outcome.id: outcome for outcome in outcomes if recording_name(outcome.id, outcome.transcript) in names}
    changed = [f"--{name.replace('_', '-')} {begun.get(name)!s:.60}" for name in settings if begun.get(name) != settings[name]]
    if finished and changed:
        raise UserError(f"--output-dir {folder}: was begun with {', '.join(changed)}; give the same, or name a new folder")
    with explain_cannot_write(folder):
        settings_path.parent.mkdir(exist_ok=True)
        recordings.mkdir(exist_ok=True)
    for part in (folder, settings_path.parent, recordings):
        remove_partial(part)
    write_atomically(settings_path, json.dumps(settings, indent=2) + "\n")
    write_atomically(journal, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in finished.values()))
    return finished, packed


def read_settings(path: Path) -> dict[str, Any]:
    """The recipe and the format that a folder was begun with. Raises UserError where settings.json is damaged."""
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        # Releases that knew neither another format nor augmentations wrote none.
        begun = {"output_format": "jsonl", "augment": [], **begun}
        if missing := [field.name for field in fields(Recipe) if field.name not in begun]:
            raise ValueError(f"no {missing[0]}")
        return begun
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--output-dir: {path} is damaged ({first_line(error)}); remove it, and repeat the command with the settings of "
            "before, of which it is made again"
        ) from error


def read_journal(path: Path) -> list[Outcome]:
    """The outcomes in finished.jsonl; lines that are damaged are left out, and their items spoken again."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
    outcomes = []
    for line in lines:
        with suppress(ValueError, TypeError, LookupError):
            outcome = Outcome(**json.loads(line))
            float(outcome.gained["seconds"])
            outcomes.append(outcome)
    if len(outcomes) < len(lines):
        print(f"warning: {len(lines) - len(outcomes)} lines of {path} are damaged; their items are spoken again", flush=True)
    return outcomes


def run_workers(transcripts: Mapping[str, str], recipe: Recipe, folder: Path, jobs: int) -> Generator[Outcome]:
    """Speak texts, given by id, in worker processes; outcomes come as they are ready."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=watch_parent)
    try:
        # Workers start with this mask and never get a Ctrl-C; this process gets it when the mask is lifted.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = [pool.submit(speak_item, id, transcript, recipe, folder) for id, transcript in transcripts.items()]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(f"--jobs {jobs}: a worker ended by itself, perhaps for want of memory; {GO_ON}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def read_texts(data: str) -> tuple[list[UsableItem], str | None]:
    """`read_usable` of what is to be spoken, with or without an answer.

    A published question with possible answers and no right one is no item, where others have one.
    """
    items, left_out = read_usable(data, spoken=False, answered=False)
    has_answers = any(item.question.has_answer for item in items)
    if has_answers and any(item.published and item.question.choices and not item.question.has_answer for item in items):
        return read_usable(data, spoken=False)
    return items, left_out


@dataclass
class Speaking:
    """An output folder, and what has been spoken into it."""

    recipe: Recipe
    folder: Path
    jobs: int
    finished: dict[str, Outcome]
    packed: Mapping[str, Recording]
    """See `packed_recordings`."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by id."""

    def speak(self, items: Sequence[UsableItem]) -> None:
        """Speak those of the items that neither are there already nor have failed in this run."""
        transcripts = {item.question.id: spoken_form(item) for item in items}
        done = {(outcome.id, outcome.transcript) for outcome in self.finished.values()}
        todo = {id: text for id, text in transcripts.items() if (id, text) not in done and id not in self.failed}
        if len(todo) < len(items):
            print(f"{len(items) - len(todo)} of {len(items)} items are there already", flush=True)
        spoken, failed = speak_items(todo, self.recipe, self.folder, self.jobs)
        self.finished |= spoken
        self.failed |= failed

    def recordings(self, items: Sequence[UsableItem]) -> dict[str, Recording]:
        """Those of the items that could be spoken, by id."""
        outcomes = [self.finished[item.question.id] for item in items if item.question.id not in self.failed]
        names = {outcome.id: recording_name(outcome.id, outcome.transcript) for outcome in outcomes}
        return {id: self.packed.get(name, self.folder / "recordings" / name) for id, name in names.items()}


def choose(config: PrepareConfig, budget: int, items: Sequence[UsableItem], speaking: Speaking) -> list[UsableItem]:
    """The items that the budget is spent on. Raises UserError, see `choose_items`."""
    # It brings torch and the model, which a command without a budget need not wait for.
    from tars_fast.analysis.active_selection import ChoiceSettings, choose_items

    different = without_repeats([item.question for item in items])
    if len(different) < len(items):
        print(f"{len(items) - len(different)} of {len(items)} items ask what another one asks, and are left out", flush=True)
    by_id = {item.question.id: item for item in items}

    def speak(questions: Sequence[Question]) -> dict[str, Recording]:
        probes = [by_id[question.id] for question in questions]
        speaking.speak(probes)
        return speaking.recordings(probes)

    settings = ChoiceSettings(budget, config.select_for, config.embedder, config.clusters, config.probes, config.seed)
    ids = choose_items(speaking.folder, different, settings, speak)
    return [by_id[id] for id in ids]


def prepare(config: PrepareConfig, data: str, folder: Path) -> int:
    """Speak the items of `data`, or those that --budget is spent on, into `folder`, and return the exit status."""
    voices = config.voices or (VOICES if config.synthesiser == ESPEAK else ("default",))
    recipe = Recipe(
        config.synthesiser,
        voices,
        config.recogniser,
        config.max_word_error_rate,
        config.retries,
        config.seed,
        config.augment,
    )
    small_workers = config.synthesiser == ESPEAK and config.recogniser is None
    jobs = config.jobs or ((os.cpu_count() or 1) if small_workers else 1)
    items, left_out = read_texts(data)
    if left_out is not None:
        print(left_out, flush=True)
    with locked(folder):
        speaking = Speaking(recipe, folder, jobs, *open_folder(folder, recipe, config.output_format))
        if config.budget is not None:
            items = choose(config, config.budget, items, speaking)
        speaking.speak(items)
        finished, failed = speaking.finished, speaking.failed
        written = [(item, finished[item.question.id]) for item in items if item.question.id not in failed]
        rows = [spoken_item(item, outcome) for item, outcome in written]
        if config.output_format == "parquet":
            pack_items(folder, rows, speaking.packed)
        else:
            write_items(folder, rows)
        ids = [item.question.id for item in items]
        failures = [json.dumps({"id": id, "error": failed[id]}) + "\n" for id in ids if id in failed]
        write_atomically(folder / "preparation" / "failed.jsonl", "".join(failures))
    lengths = [outcome.gained["seconds"] for _, outcome in written]
    print(f"{len(lengths)} items, {sum(lengths):.0f} s of speech, written to {folder}")
    if num_unanswered := sum(not item.question.has_answer for item in items):
        print(f"{num_unanswered} items have no answer; --objective opd trains on them")
    too_long = sum(length > config.max_seconds for length in lengths)
    if too_long:
        print(f"{too_long} recordings are longer than {config.max_seconds:g} s; training refuses them without --long-audio")
    if failed:
        print(f"{len(failed)} items failed and are left out; see {folder / 'preparation' / 'failed.jsonl'}", file=sys.stderr)
    return FAILED if failed else 0


def speak_items(
    transcripts: Mapping[str, str], recipe: Recipe, folder: Path, jobs: int
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Speak texts, given by id, and write down each in finished.jsonl as soon as its recording is there.

    Returns:
        (id -> outcome, id -> why it failed).
    """
    spoken: dict[str, Outcome] = {}
    failed: dict[str, str] = {}
    journal = folder / "preparation" / "finished.jsonl"
    with closing(run_workers(transcripts, recipe, folder / "recordings", jobs)) as outcomes:
        for outcome in track(outcomes, len(transcripts), "spoken"):
            if outcome.error is None:
                spoken[outcome.id] = outcome
                append(journal, json.dumps(asdict(outcome)) + "\n")
            else:
                failed[outcome.id] = outcome.error
    return spoken, failed


def spoken_item(item: UsableItem, outcome: Outcome) -> dict[str, object]:
    """An item as training reads it; `audio` is the recording's name."""
    audio = recording_name(outcome.id, outcome.transcript)
    return {**item.fields, "audio": audio, "transcript": outcome.transcript, **outcome.gained}


def write_items(folder: Path, items: Sequence[Mapping[str, object]]) -> None:
    """Write items.jsonl, whose recordings stand beside it."""
    lines = [json.dumps({**item, "audio": f"recordings/{item['audio']}"}) + "\n" for item in items]
    write_atomically(folder / "items.jsonl", "".join(lines))


def pack_items(folder: Path, items: Sequence[Mapping[str, object]], packed: Mapping[str, Recording]) -> None:
    """Write items.parquet, and delete the recordings that then stand inside; `packed` are those of the file it replaces."""
    recordings = folder / "recordings"

    def read_recording(name: str) -> bytes:
        path = recordings / name
        return path.read_bytes() if path.is_file() else packed[name].read_bytes()

    write_parquet(folder / "items.parquet", items, read_recording)
    shutil.rmtree(recordings)


def check(config: PrepareConfig, data: str) -> int:
    """Show what is wrong with the spoken items of `data`, and return the exit status."""
    items = list(read_items(data, answered=False))
    if not items:
        raise UserError(f"--check {data}: holds no items")
    inspections = list(
        track(inspect_items(items, config.max_seconds, config.jobs or os.cpu_count() or 1), len(items), "checked")
    )
    findings = [finding for inspection in inspections for finding in inspection.findings]
    show(inspections, findings)
    seconds = [inspection.seconds for inspection in inspections if inspection.seconds is not None]
    usable = sum(inspection.usable for inspection in inspections)
    if config.output is not None:
        report = {
            "data": data,
            "items": len(items),
            "usable": usable,
            "seconds_total": round(sum(seconds), 3),
            "seconds_mean": round(sum(seconds) / len(seconds), 3) if seconds else None,
            "problems": dict(Counter(finding.problem for finding in findings)),
            "findings": [asdict(finding) for finding in findings],
        }
        write_atomically(config.output, json.dumps(report, indent=2) + "\n")
    return 0 if usable == len(items) else FAILED


def show(inspections: Sequence[Inspection], findings: Sequence[Finding]) -> None:
    """Print a table: a line a problem, with the first item that has it."""
    from rich import box
    from rich.table import Table

    seconds = [inspection.seconds for inspection in inspections if inspection.seconds is not None]
    mean = sum(seconds) / len(seconds) if seconds else 0.0
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("problem", "items", "for example"):
        table.add_column(title, justify="right" if title == "items" else "left", overflow="fold")
    for problem in (*UNUSABLE, *NOTES):
        found = [finding for finding in findings if finding.problem == problem]
        if found:
            example = f"{found[0].id or found[0].place}: {found[0].detail}"
            table.add_row(problem + " (a note)" * (problem in NOTES), str(len(found)), example)
    usable = sum(inspection.usable for inspection in inspections)
    table.add_section()
    table.add_row("usable", str(usable), "all of them" if usable == len(inspections) else "")
    console = PlainConsole()
    console.print(f"{len(inspections)} items, {sum(seconds):.1f} s of speech, {mean:.1f} s an item", soft_wrap=True)
    console.print(table)


def run(config: PrepareConfig) -> int:
    if config.check is not None:
        return check(config, or_bundled(config.check, "training"))
    assert config.data is not None, "PrepareConfig asks for it"
    assert config.output_dir is not None, "PrepareConfig asks for it"
    return prepare(config, config.data, config.output_dir)


def main() -> int:
    return run_command(run, PrepareConfig, "python -m tars_fast.prepare")


if __name__ == "__main__":
    sys.exit(main())
