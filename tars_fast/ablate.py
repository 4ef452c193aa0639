"""Compare arms of training on identical data, steps, seeds and prompts: `python -m tars_fast.ablate --arms grpo,tars`.

Every arm and seed is one run of `tars_fast.train` in a folder of its own, OUT/<arm>/seed-<number>; finished runs are not
repeated. An arm is a set of settings of `tars_fast.train`, so a new arm takes no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from tars_fast.config import TrainConfig
from tars_fast.evaluation.ablation import START, Arms, FinishedRun, check_runs
from tars_fast.learning.run import load_data
from tars_fast.models.architecture import LAYER_PARTS, find_layers
from tars_fast.models.registry import architecture_of, find_preset, list_checkpoints
from tars_fast.reports.ablation_page import print_ablation, write_ablation_page, write_tables
from tars_fast.support.cli import (
    FAILED,
    INTERRUPTED,
    as_paths,
    check_file_names,
    check_numbers,
    flag_of,
    require_extra,
    run_command,
)
from tars_fast.support.command_line import as_arguments, parse_arguments
from tars_fast.support.console import PlainConsole, open_console, say
from tars_fast.support.files import remove_partial, write_atomically
from tars_fast.support.locks import LOCK, locked
from tars_fast.support.progress import item_progress
from tars_fast.support.provenance import provenance
from tars_fast.types import Question, UserError

ARMS: dict[str, dict[str, str]] = {
    "grpo": {"objective": "grpo"},
    "rep": {"objective": "tars", "behaviour_weight": "0"},
    "beh": {"objective": "tars", "representation_weight": "0"},
    "tars": {"objective": "tars"},
    "opd": {},
    "opd-moving": {"teacher": "moving"},
    "cord": {"objective": "cord", "teacher": "moving", "text_anchor": "kl"},
    "tars+opd": {"objective": "tars+opd"},
    **{f"rep-{part}": {"objective": "tars", "behaviour_weight": "0", "representation_layers": part} for part in LAYER_PARTS},
}
"""Settings that differ from the defaults of `tars_fast.train`: the paper's arms, other objectives, and those of its Fig. 3."""
_TRAIN = "python -m tars_fast.train"
_PASSED_ON = ("model", "data", "eval_data", "num_steps")
"""Settings of `tars_fast.train` that this command has by the same name."""
_OF_THE_COMMAND = {*_PASSED_ON, "seed", "output_dir", "resume", "resume_if_exists", "dry_run"}
"""Settings of `tars_fast.train` that this command gives to every run."""
_OF_ONE_RUN = {"early_stop", "push_to_hub"}
"""Settings that no run of an ablation may have: arms train for the same number of steps, and would overwrite each other."""
_SAME_IN_ALL_ARMS = {"disjoint_from", "skip_unusable", "long_audio", "eval_items", "questions_per_step"}
_SAME_IN_ALL_ARMS |= {"eval_every", "validation_data"}
"""Settings that an arm may not override, because all arms train and are evaluated on the same items; `--setting` may."""
_LOG = "log.txt"
_SETTINGS = "ablation_settings.json"
_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class AblateConfig:
    """Train several arms with several seeds each, and compare them with intervals over seeds and items."""

    arms: str = "grpo,rep,beh,tars"
    """Names with commas between them: grpo (neither R_rep nor R_beh), rep, beh, tars, opd, opd-moving, cord, tars+opd,
    rep-shallow, rep-middle, rep-deep, rep-last, or of --define."""
    define: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME:SETTING=VALUE,... once for each arm of one's own, with settings of `tars_fast.train`:
    half:representation_weight=0.5,behaviour_weight=0.5."""
    baseline: str | None = None
    """The arm that the others are compared with. None: grpo, where it is among the arms, else the first arm."""
    seeds: int = 5
    """Number of runs of each arm, with seeds 0, 1 and so on."""
    model: str = "pocket"
    """The model that all arms start from: a preset, or a folder or a name on the hub with a checkpoint."""
    data: str | None = None
    """Training items; pocket, pocket-hard: bundled spoken arithmetic. None: that of the model's own task."""
    eval_data: str | None = None
    """Evaluation items, from the same places; bundled data give their held-out items, pocket@validation others. None: the
    held-out items of bundled --data, or with --data of one's own a tenth of it."""
    num_steps: int | None = None
    """Rollout batches that every run trains on. None: the preset's."""
    setting: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SETTING=VALUE of `tars_fast.train` for all arms, once for each: learning_rate=1e-4."""
    output_dir: Path = Path("runs/ablation")
    """Holds a folder for each arm with a folder for each seed, and tables, plots and report.html. The same command continues
    there, also with more seeds or arms."""
    jobs: int | None = None
    """Runs at a time, each on a GPU of its own as far as there are enough. None: one for each GPU, on a CPU one."""

    def __post_init__(self) -> None:
        as_paths(self, "output_dir")
        check_file_names(self, "model")
        check_numbers(self, positive=("seeds", "num_steps", "jobs"))


@dataclass(frozen=True)
class AblationOutcome:
    """How an ablation ended."""

    output_dir: Path
    """The ablation's folder."""
    is_finished: bool
    """False: it was interrupted, and the same settings with this folder continue it."""
    ablation: dict[str, Any] | None
    """The content of ablation.json, over the runs that are finished. None where none is."""
    failed: Mapping[str, str]
    """Reason by the name of each run that failed."""

    @property
    def num_failed(self) -> int:
        """Number of runs that failed."""
        return len(self.failed)


@dataclass(frozen=True)
class Run:
    """A training run."""

    arm: str
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / "evaluation.json").is_file()

    @property
    def num_steps_done(self) -> int:
        try:
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0


def parse_settings(flag: str, given: Sequence[str], refused: set[str]) -> dict[str, str]:
    """Split each SETTING=VALUE; returns value by setting.

    Args:
        refused: settings that must not be among them.

    Raises:
        UserError: a setting is refused, does not exist, is given twice, or has a value of another kind.
    """
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings: dict[str, str] = {}
    for assignment in given:
        name, separator, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or name not in fields:
            raise UserError(f"{flag} {assignment}: give SETTING=VALUE, SETTING one of those of {_TRAIN} --help")
        if name in refused:
            remedies = {"seed": "use --seeds"} | dict.fromkeys(
                ("output_dir", "resume", "resume_if_exists", "dry_run"), "that is for ablate to say"
            )
            remedies |= {own: f"use {flag_of(own)}" for own in _PASSED_ON} | dict.fromkeys(_OF_ONE_RUN, "leave it out")
            remedy = remedies.get(name, f"use --setting {assignment}")
            raise UserError(f"{flag} {assignment}: must be the same in all arms; {remedy}")
        if name in settings:
            raise UserError(f"{flag} {assignment}: {name} is there twice")
        settings[name] = value.strip()
        try:
            parse_training(f"{flag} {assignment}", as_arguments(TrainConfig, {name: settings[name]}))
        except UserError as error:
            # What a setting means may depend on others: `plan_runs` looks at them together.
            if isinstance(error.__cause__, SystemExit):
                raise
    return settings


def choose_arms(config: AblateConfig) -> dict[str, dict[str, str]]:
    """Settings of every arm, in the order of `--arms`. Raises UserError for an unknown arm or a wrong definition."""
    known = dict(ARMS)
    for given in config.define:
        name, separator, rest = given.partition(":")
        if not separator or re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is None:
            raise UserError(f"--define {given}: give NAME:SETTING=VALUE,...; NAME of small letters, digits, - and _")
        if name in known:
            raise UserError(f"--define {given}: there is an arm called {name} already")
        known[name] = parse_settings(f"--define {name}:", rest.split(","), _SAME_IN_ALL_ARMS | _OF_THE_COMMAND | _OF_ONE_RUN)
    names = [name.strip() for name in config.arms.split(",")]
    for name in names:
        if name == START:
            raise UserError(f"--arms {config.arms}: {START} is what all arms start from; call the arm something else")
        if name not in known:
            raise UserError(f"--arms {config.arms}: {name!r} is none of {', '.join(known)}; add it by --define")
    if len(set(names)) < len(names):
        raise UserError(f"--arms {config.arms}: an arm is there twice")
    return {name: known[name] for name in names}


def choose_baseline(config: AblateConfig, arms: Mapping[str, Any]) -> str:
    """The baseline's name. Raises UserError where it is none of the arms."""
    baseline = config.baseline or ("grpo" if "grpo" in arms else next(iter(arms)))
    if baseline not in arms:
        raise UserError(f"--baseline {baseline}: none of --arms {config.arms}")
    return baseline


def parse_training(flag: str, arguments: Sequence[str]) -> TrainConfig:
    """The settings that `tars_fast.train` will have. Raises UserError for arguments that it would not take."""
    return parse_arguments(flag, TrainConfig, arguments, _TRAIN)


def plan_runs(config: AblateConfig, arms: Mapping[str, Mapping[str, str]], shared: Mapping[str, str]) -> list[Run]:
    """The runs of all arms, seed by seed, so that the finished ones can be compared whenever time is over.

    Args:
        shared: settings of all arms, of `--setting`.

    Raises:
        UserError: `tars_fast.train` would not take the settings of an arm.
    """
    given = {name: getattr(config, name) for name in _PASSED_ON}
    shared = dict(shared) | {name: str(value) for name, value in given.items() if value is not None}
    preset = find_preset(config.model)
    commands = {}
    for arm, settings in arms.items():
        commands[arm] = as_arguments(TrainConfig, {**shared, **settings})
        parsed = parse_training(f"--arms {arm}", commands[arm])
        try:
            parsed.as_preset(preset)
            architecture = architecture_of(preset)
            find_layers(parsed.representation_layers, architecture.num_layers)
            architecture.find_lora_targets(parsed.lora_targets)
        except UserError as error:
            raise UserError(f"--arms {arm}: {error}") from error
    runs = []
    for seed in range(config.seeds):
        for arm in arms:
            folder = config.output_dir / arm / f"seed-{seed}"
            own = ("--seed", str(seed), "--output-dir", str(folder))
            runs.append(Run(arm, seed, folder, (sys.executable, "-m", "tars_fast.train", *commands[arm], *own)))
    return runs


def open_output(config: AblateConfig, arms: Mapping[str, Mapping[str, str]], shared: Mapping[str, str]) -> dict[str, Any]:
    """Write ablation_settings.json, whose content is returned; for `shared` see `plan_runs`.

    Raises:
        UserError: the folder cannot be written to, or holds runs with other settings.
    """
    path = config.output_dir / _SETTINGS
    settings = {name: getattr(config, name) for name in _PASSED_ON} | {"setting": dict(shared)}
    earlier = {}
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if earlier[name] != settings[name]]
            changed += [f"arm {arm}" for arm in arms if earlier["arms"].get(arm, arms[arm]) != arms[arm]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--output-dir {config.output_dir}: its {path.name} is not an ablation's, or damaged; name another folder, or "
                "remove that file and give the settings of the runs"
            ) from error
        if changed:
            raise UserError(
                f"--output-dir {config.output_dir}: holds runs with other settings ({', '.join(changed)}); give the same ones "
                "or name another folder"
            )
    elif any(config.output_dir.glob("*/seed-*/config.json")):
        print(f"warning: {path} is missing; it is made again of the settings given now", flush=True)
    settings["arms"] = earlier.get("arms", {}) | {arm: dict(own) for arm, own in arms.items()}
    write_atomically(path, json.dumps(settings, indent=2) + "\n")
    return settings


def list_gpus() -> list[str]:
    """The GPUs by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(torch.cuda.device_count())]


class Runner:
    """Runs training commands in processes of their own, several at a time; passes Ctrl-C on to all of them.

    Args:
        num_jobs: number of processes at a time.
        gpus: see `list_gpus`; processes take them in turn.
    """

    def __init__(self, num_jobs: int, gpus: Sequence[str], console: PlainConsole) -> None:
        self._console = console
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(num_jobs):
            self._slots.put(slot)
        self._num_jobs, self._gpus = num_jobs, gpus

    def run(self, runs: Sequence[Run], advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Run all of them; after Ctrl-C only those that have begun, to the end of their step.

        Args:
            advance: called every other second with the number of training steps that were done since.

        Returns:
            Reason by the name of each run that failed.
        """
        failed: dict[str, str] = {}
        reported = sum(run.num_steps_done for run in runs) if advance else 0
        with ThreadPoolExecutor(self._num_jobs) as pool, self._forwarding_signals():
            pending: dict[Future[str | None], Run] = {pool.submit(self._run_one, run): run for run in runs}
            while pending:
                done = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done
                if advance is not None:
                    now = sum(run.num_steps_done for run in runs)
                    advance(now - reported)
                    reported = now
                for future in done:
                    run, reason = pending.pop(future), future.result()
                    if reason is not None:
                        failed[run.name] = reason
        return failed

    def _run_one(self, run: Run) -> str | None:
        if self.stopped:
            return None
        slot = self._slots.get()
        try:
            reason = self._train(run, slot)
        except OSError as error:
            reason = str(error)
        finally:
            self._slots.put(slot)
        if reason is not None:
            say(self._console, f"{run.name}: failed, {reason}", colour="red")
        return reason

    def _train(self, run: Run, slot: int) -> str | None:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._num_jobs)))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [*run.command, *(["--resume"] if list_checkpoints(run.folder) else [])]
        started = time.monotonic()
        with (run.folder / _LOG).open("a", encoding="utf-8") as log:
            begins_at = log.tell()
            # In a process group of its own, because the terminal's Ctrl-C would reach it beside the one that is passed on.
            # Without standard input, because a process in the background that reads the terminal waits forever.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
            self._running.add(process)
            # A signal that came while it was starting did not reach it.
            if self.stopped:
                process.send_signal(signal.SIGINT)
            status = process.wait()
            self._running.discard(process)
        # Status 1 with all files: some items could not be evaluated.
        if run.is_finished and status in (0, FAILED):
            say(self._console, f"{run.name}: finished in {time.monotonic() - started:.0f} s")
            return None
        if self.stopped:
            return None
        return describe_failure(run.folder / _LOG, status, begins_at)

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        def forward(number: int, _frame: FrameType | None) -> None:
            # Clusters repeat SIGTERM; only a second Ctrl-C means to give up the step.
            if self.stopped and number != signal.SIGINT:
                return
            if not self.stopped:
                print("stopping after the steps that are running; a second Ctrl-C stops at once", file=sys.stderr)
            self.stopped = True
            for process in list(self._running):
                process.send_signal(signal.SIGINT)

        numbers = [signal.SIGINT, signal.SIGTERM]
        # Under nohup it continues when the terminal closes.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def describe_failure(log: Path, status: int, begins_at: int) -> str:
    """The last line of a run's log, or what ended it.

    Args:
        begins_at: bytes in the log of earlier attempts.
    """
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name}); see {log}"
    written = log.read_bytes()[begins_at:].decode(errors="replace")
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    return f"{lines[-1] if lines else f'exit status {status}'}; see {log}"


@dataclass(frozen=True)
class Job:
    """An ablation whose settings and data have been checked."""

    config: AblateConfig
    arms: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    """Settings of all arms, of `--setting`."""
    baseline: str
    runs: Sequence[Run]
    num_steps: int
    """Number of steps of each run."""
    held_out: Sequence[Question]
    """The evaluation items."""


def ablate(config: AblateConfig) -> AblationOutcome:
    """Run what is missing, then compare the finished runs.

    Raises:
        UserError: settings, data or folder are not usable, or finished runs do not match.
    """
    job = plan_job(config)
    with locked(config.output_dir):
        remove_partial(config.output_dir)
        return run_job(job)


def run_job(job: Job) -> AblationOutcome:
    """See `ablate`, which has checked the settings and keeps the folder for this process."""
    config, settings = job.config, open_output(job.config, job.arms, job.shared)
    # Here and not after training: the runs that are there may not match.
    finished = read_finished(job.runs)
    console = open_console()
    missing = [run for run in job.runs if not run.is_finished]
    gpus = list_gpus()
    # At most as many as there are missing: they share the cores.
    num_jobs = min(config.jobs or max(1, len(gpus)), max(1, len(missing)))
    done = f"{len(job.runs) - len(missing)} of {len(job.runs)} runs are finished"
    say(console, f"{done}; {num_jobs} at a time in {config.output_dir}")
    runner = Runner(num_jobs, gpus, console)
    failed = run_missing(job, runner, missing, console)
    if missing:
        finished = read_finished(job.runs)
    ablation = write_comparison(job, settings, finished, failed, console) if finished else None
    if runner.stopped:
        print("stopped; the same command continues", file=sys.stderr)
    return AblationOutcome(config.output_dir, not runner.stopped, ablation, failed)


def plan_job(config: AblateConfig) -> Job:
    """Raises UserError where settings or data are not usable."""
    require_extra("analysis")
    arms = choose_arms(config)
    baseline = choose_baseline(config, arms)
    shared = parse_settings("--setting", config.setting, _OF_THE_COMMAND | _OF_ONE_RUN)
    runs = plan_runs(config, arms, shared)
    settings = [parse_training("--setting", run.command[3:]) for run in runs[: len(arms)]]
    num_steps = settings[0].as_preset(find_preset(config.model)).num_steps
    # All arms train on the same items: what the one that needs most of them takes is good for the others.
    _, held_out, _ = load_data(max(settings, key=lambda training: (training.needs_answers, training.parts.uses_agreement)))
    return Job(config, arms, shared, baseline, runs, num_steps, held_out)


def run_missing(job: Job, runner: Runner, missing: Sequence[Run], console: PlainConsole) -> dict[str, str]:
    """`Runner.run`, with a progress display on a terminal; in a file it would be hours of lines."""
    if not missing or not console.is_terminal:
        return runner.run(missing)
    num_done = sum(run.num_steps_done for run in missing)
    with item_progress(console, job.num_steps * len(missing), num_done, "steps of all runs") as advance:
        return runner.run(missing, advance)


def read_finished(runs: Sequence[Run]) -> list[FinishedRun]:
    """Raises UserError where finished runs cannot be read or do not match."""
    finished = [FinishedRun.read(run.arm, run.seed, run.folder) for run in runs if run.is_finished]
    check_runs(finished)
    return finished


def write_comparison(
    job: Job,
    settings: Mapping[str, Any],
    finished: Sequence[FinishedRun],
    failed: Mapping[str, str],
    console: PlainConsole,
) -> dict[str, Any]:
    """Write and print the comparison of the finished runs; returns the content of ablation.json."""
    output_dir, arms = job.config.output_dir, Arms(finished, job.baseline)
    ablation = arms.report() | {"failed": dict(failed), "settings": settings, "provenance": provenance()}
    write_atomically(output_dir / "ablation.json", json.dumps(ablation, indent=1) + "\n")
    write_tables(output_dir, ablation)
    write_ablation_page(output_dir, f"{job.config.model}, {', '.join(arms.names)}", arms, ablation, job.held_out)
    print_ablation(console, ablation)
    written = sorted(path.name for path in output_dir.iterdir() if path.is_file() and path.name != LOCK)
    say(console, f"written to {output_dir}: {', '.join(written)}")
    return ablation


def command(config: AblateConfig) -> int:
    """Run and compare; returns the exit status."""
    outcome = ablate(config)
    if not outcome.is_finished:
        return INTERRUPTED
    return FAILED if outcome.failed else 0


def main() -> int:
    return run_command(command, AblateConfig, "python -m tars_fast.ablate")


if __name__ == "__main__":
    sys.exit(main())
