"""Compare arms of training on identical data, steps, seeds and prompts: `python -m tars_fast.ablate --arms grpo,tars`.

Every arm and seed is one run of `tars_fast.train` in a folder of its own, OUT/<arm>/seed-<number>; what is finished there is
not done again. An arm is nothing but settings of `tars_fast.train`, so another one takes no code.
"""

from __future__ import annotations

import dataclasses
import fcntl
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import tyro
from rich.markup import escape

from tars_fast.config import TrainConfig
from tars_fast.evaluation.ablation import START, Arms, FinishedRun, check_runs
from tars_fast.learning.run import load_data
from tars_fast.models.architecture import LAYER_PARTS, find_layers
from tars_fast.models.registry import architecture_of, find_preset, list_checkpoints
from tars_fast.reports.ablation_page import print_ablation, write_ablation_page, write_tables
from tars_fast.reports.console import open_console, say
from tars_fast.support.cli import FAILED, INTERRUPTED, check_numbers, require_extra, run_command
from tars_fast.support.files import write_atomically
from tars_fast.support.progress import item_progress
from tars_fast.support.provenance import provenance
from tars_fast.types import Question, UserError

if TYPE_CHECKING:
    from rich.console import Console

ARMS: dict[str, dict[str, str]] = {
    "grpo": {"representation_weight": "0", "behaviour_weight": "0"},
    "rep": {"behaviour_weight": "0"},
    "beh": {"representation_weight": "0"},
    "tars": {},
    **{f"rep-{part}": {"behaviour_weight": "0", "representation_layers": part} for part in LAYER_PARTS},
}
"""The paper's arms, those of its Fig. 3 last: settings that differ from the defaults of `tars_fast.train`."""
_NAMED = ("model", "data", "eval_data", "num_steps")
"""Settings of `tars_fast.train` that the command has by the same name."""
_OF_THE_COMMAND = {*_NAMED, "seed", "output_dir", "resume", "dry_run"}
_OF_EVERY_ARM = {"disjoint_from", "skip_unusable", "long_audio", "eval_items", "questions_per_step"}
"""Arms that differ in these would not be trained on the same, from the same; nor in what is the command's."""
_LOG = "log.txt"
_SETTINGS = "ablation_settings.json"
_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class AblateConfig:
    """Train several arms with several seeds each, and compare them with intervals over seeds and items."""

    arms: str = "grpo,rep,beh,tars"
    """Names with commas between them: grpo (neither R_rep nor R_beh), rep, beh, tars, rep-shallow, rep-middle, rep-deep,
    rep-last, or of --define."""
    define: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME:SETTING=VALUE,... once for each arm of one's own, with settings of `tars_fast.train`:
    half:representation_weight=0.5,behaviour_weight=0.5."""
    baseline: str | None = None
    """The arm that the others are compared with. None: grpo, where it is among the arms, else the first one."""
    seeds: int = 5
    """Runs of each arm, with seeds 0, 1 and so on; the same ones in every arm."""
    model: str = "pocket"
    """What all arms start from: a preset, or a folder or a name on the hub with a checkpoint."""
    data: str | None = None
    """Training items. None, or pocket: embedded spoken arithmetic."""
    eval_data: str | None = None
    """Evaluation items; pocket: the embedded held-out ones. None: these too, or with --data of one's own a tenth of it."""
    num_steps: int | None = None
    """Rollout batches that every run trains on. None: the preset's."""
    setting: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SETTING=VALUE of `tars_fast.train` for all arms, once for each: learning_rate=1e-4."""
    output_dir: Path = Path("runs/ablation")
    """One folder an arm, in it one a seed; tables, pictures and report.html beside them. The same command again does what is
    missing; more seeds or arms may be asked for."""
    jobs: int | None = None
    """Runs at a time, each on a GPU of its own as far as there are some. None: one for each GPU, on a CPU one."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("seeds", "num_steps", "jobs"))


@dataclass(frozen=True)
class Run:
    """One training run."""

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
    """{setting: value} of SETTING=VALUE each.

    Raises:
        UserError: for what is no setting, has no such values, is there twice, or among `refused`.
    """
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings: dict[str, str] = {}
    for one in given:
        name, separator, value = one.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or name not in fields:
            raise UserError(f"{flag} {one}: give SETTING=VALUE, SETTING one of those of python -m tars_fast.train --help")
        if name in refused:
            remedies = {"seed": "use --seeds"} | dict.fromkeys(("output_dir", "resume", "dry_run"), "that is for ablate to say")
            remedies |= {own: f"use --{own.replace('_', '-')}" for own in _NAMED}
            raise UserError(f"{flag} {one}: must be the same in all arms; {remedies.get(name, f'use --setting {one}')}")
        if name in settings:
            raise UserError(f"{flag} {one}: {name} is there twice")
        settings[name] = value.strip()
        parse_training(f"{flag} {one}", as_arguments({name: settings[name]}))
    return settings


def choose_arms(config: AblateConfig) -> dict[str, dict[str, str]]:
    """Settings of every arm, in the order of `--arms`. Raises UserError for one that is not defined, or is defined badly."""
    known = dict(ARMS)
    for given in config.define:
        name, separator, rest = given.partition(":")
        if not separator or re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) is None:
            raise UserError(f"--define {given}: give NAME:SETTING=VALUE,...; NAME of small letters, digits, - and _")
        if name in known:
            raise UserError(f"--define {given}: there is an arm called {name} already")
        known[name] = parse_settings(f"--define {name}:", rest.split(","), _OF_EVERY_ARM | _OF_THE_COMMAND)
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
    """Raises UserError where it is none of the arms."""
    baseline = config.baseline or ("grpo" if "grpo" in arms else next(iter(arms)))
    if baseline not in arms:
        raise UserError(f"--baseline {baseline}: none of --arms {config.arms}")
    return baseline


def as_arguments(settings: Mapping[str, str]) -> list[str]:
    """Of the command line of `tars_fast.train`."""
    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if kinds[name] == "bool" and value.lower() in ("true", "false"):
            arguments.append(flag if value.lower() == "true" else flag.replace("--", "--no-", 1))
        elif kinds[name] == "bool | None":
            arguments += [flag, value.capitalize()]
        elif kinds[name].startswith("tuple"):
            arguments += [flag, *value.split()]
        else:
            arguments += [flag, value]
    return arguments


def parse_training(flag: str, arguments: Sequence[str]) -> TrainConfig:
    """The settings that `tars_fast.train` will have. Raises UserError for what it would not take."""
    try:
        # Its own words are many lines.
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            return tyro.cli(TrainConfig, args=list(arguments))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    except SystemExit as error:
        raise UserError(f"{flag}: no value that python -m tars_fast.train takes; see its --help") from error


def plan_runs(config: AblateConfig, arms: Mapping[str, Mapping[str, str]], shared: Mapping[str, str]) -> list[Run]:
    """Seed by seed, so that whatever is there when time is over compares.

    Args:
        shared: settings of all arms besides those that the command has by the same name.

    Raises:
        UserError: settings that cannot be.
    """
    given = {name: getattr(config, name) for name in _NAMED}
    shared = dict(shared) | {name: str(value) for name, value in given.items() if value is not None}
    preset = find_preset(config.model)
    commands = {}
    for arm, settings in arms.items():
        commands[arm] = as_arguments({**shared, **settings})
        parsed = parse_training(f"--arms {arm}", commands[arm])
        try:
            parsed.as_preset(preset)
            find_layers(parsed.representation_layers, architecture_of(preset).num_layers)
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
    """Make the folder and write down what is compared in it, which is returned; for `shared` see `plan_runs`.

    Raises:
        UserError: it cannot be written to, or holds runs with other settings.
    """
    path = config.output_dir / _SETTINGS
    settings = {name: getattr(config, name) for name in _NAMED} | {"setting": dict(shared)}
    earlier = {}
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if earlier[name] != settings[name]]
            changed += [f"arm {arm}" for arm in arms if earlier["arms"].get(arm, arms[arm]) != arms[arm]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--output-dir {config.output_dir}: its {path.name} is not an ablation's; name another") from error
        if changed:
            raise UserError(
                f"--output-dir {config.output_dir}: holds runs with other settings ({', '.join(changed)}); give the same ones "
                "or name another folder"
            )
    settings["arms"] = earlier.get("arms", {}) | {arm: dict(own) for arm, own in arms.items()}
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--output-dir {config.output_dir}: cannot be written to ({error.strerror}); name another folder"
        ) from error
    return settings


def list_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls them."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(torch.cuda.device_count())]


class Runner:
    """Runs training commands side by side, each in a process of its own; Ctrl-C reaches all of them.

    Args:
        num_jobs: how many at a time.
        gpus: what CUDA_VISIBLE_DEVICES calls them; taken in turn.
    """

    def __init__(self, num_jobs: int, gpus: Sequence[str], console: Console) -> None:
        self._console = console
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(num_jobs):
            self._slots.put(slot)
        self._num_jobs, self._gpus = num_jobs, gpus

    def run(self, runs: Sequence[Run], advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Run them all, or, interrupted, those that have begun.

        Args:
            advance: told every other second how many training steps have been done since. None: nobody counts them.

        Returns:
            The reason of each that failed, by name.
        """
        failed: dict[str, str] = {}
        told = sum(run.num_steps_done for run in runs) if advance else 0
        with ThreadPoolExecutor(self._num_jobs) as pool, self._forwarding_signals():
            pending: dict[Future[str | None], Run] = {pool.submit(self._run_one, run): run for run in runs}
            while pending:
                done = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done
                if advance is not None:
                    now = sum(run.num_steps_done for run in runs)
                    advance(now - told)
                    told = now
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
            say(self._console, f"[red]{run.name}: failed[/red], {escape(reason)}")
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
            if not can_lock(log):
                return f"a process of an earlier command is still training it; see {log.name}"
            begins_at = log.tell()
            # A group of its own: the terminal's Ctrl-C would reach it beside the one that is passed on. From there it could not
            # read the terminal either, and would wait for it forever.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
            self._running.add(process)
            # Asked while it was starting, when it was not among those that are told.
            if self.stopped:
                process.send_signal(signal.SIGINT)
            status = process.wait()
            self._running.discard(process)
        # With a status of 1 some items could not be evaluated, where the figures are there all the same.
        if run.is_finished and status in (0, FAILED):
            say(self._console, f"{run.name}: finished in {time.monotonic() - started:.0f} s")
            return None
        if self.stopped:
            return None
        return describe_failure(run.folder / _LOG, status, begins_at)

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        def forward(number: int, _frame: FrameType | None) -> None:
            # Clusters repeat themselves; only a second Ctrl-C is meant to cost a step.
            if self.stopped and number != signal.SIGINT:
                return
            if not self.stopped:
                print("stopping after the steps that are running; once more stops at once", file=sys.stderr)
            self.stopped = True
            for process in list(self._running):
                process.send_signal(signal.SIGINT)

        numbers = [signal.SIGINT, signal.SIGTERM]
        # With nohup it goes on when the terminal closes.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def can_lock(log: TextIO) -> bool:
    """Hold a log, also for the process that is to write to it; False where one that outlived its command still does."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other one: some network file systems know no locks.
        return not isinstance(error, BlockingIOError)
    return True


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


def run_ablation(config: AblateConfig) -> int:
    """Run what is missing, then compare what there is."""
    require_extra("analysis")
    arms = choose_arms(config)
    baseline = choose_baseline(config, arms)
    shared = parse_settings("--setting", config.setting, _OF_THE_COMMAND)
    runs = plan_runs(config, arms, shared)
    training = parse_training("--setting", runs[0].command[3:])
    num_steps = training.as_preset(find_preset(config.model)).num_steps
    _, held_out, _ = load_data(training)
    settings = open_output(config, arms, shared)
    # What does not match is told before anything else trains.
    finished = read_finished(runs)
    gpus = list_gpus()
    console = open_console()
    missing = [run for run in runs if not run.is_finished]
    # Cores are shared out among those that there are.
    num_jobs = min(config.jobs or max(1, len(gpus)), max(1, len(missing)))
    done = f"{len(runs) - len(missing)} of {len(runs)} runs are finished"
    say(console, escape(f"{done}; {num_jobs} at a time in {config.output_dir}"))
    runner = Runner(num_jobs, gpus, console)
    # Nobody wants hours of lines in a file.
    if missing and console.is_terminal:
        num_done = sum(run.num_steps_done for run in missing)
        with item_progress(console, num_steps * len(missing), num_done, "steps of all runs") as advance:
            failed = runner.run(missing, advance)
    else:
        failed = runner.run(missing)
    if missing:
        finished = read_finished(runs)
    if finished:
        compare(config, baseline, settings, finished, failed, held_out, console)
    if runner.stopped:
        print("stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return FAILED if failed else 0


def read_finished(runs: Sequence[Run]) -> list[FinishedRun]:
    """Raises UserError where some cannot be read or do not match."""
    finished = [FinishedRun.read(run.arm, run.seed, run.folder) for run in runs if run.is_finished]
    check_runs(finished)
    return finished


def compare(
    config: AblateConfig,
    baseline: str,
    settings: Mapping[str, Any],
    finished: Sequence[FinishedRun],
    failed: Mapping[str, str],
    held_out: Sequence[Question],
    console: Console,
) -> None:
    """Write and print what the finished runs show."""
    arms = Arms(finished, baseline)
    made = arms.report() | {"failed": dict(failed), "settings": settings, "provenance": provenance()}
    write_atomically(config.output_dir / "ablation.json", json.dumps(made, indent=1) + "\n")
    write_tables(config.output_dir, made)
    write_ablation_page(config.output_dir, f"{config.model}, {', '.join(arms.names)}", arms, made, held_out)
    print_ablation(console, made)
    written = sorted(path.name for path in config.output_dir.iterdir() if path.is_file())
    say(console, escape(f"written to {config.output_dir}: {', '.join(written)}"))


def main() -> int:
    return run_command(run_ablation, AblateConfig, "python -m tars_fast.ablate")


if __name__ == "__main__":
    sys.exit(main())
