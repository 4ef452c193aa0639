"""Kill training at random moments and resume it: `python tests/faults/kill.py --kills 100 --output FILE`.

Runs of a few steps, with a checkpoint after each, are killed by SIGKILL and resumed, until enough kills were made: one in five
while they load, the others at a moment drawn uniformly over the three steps that follow their first one. After every kill all
checkpoints must be whole, the newest no older than before, and metrics.jsonl must have every step up to it. Runs that come to
their end must have the metrics and the evaluation of an unbroken run. FILE lists every kill; the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from runs import make_data, read_metrics, settings_of, start

from tars_fast.models.checkpoint import fault_of
from tars_fast.models.registry import list_checkpoints
from tars_fast.support.files import PARTIAL, write_atomically
from tars_fast.support.provenance import provenance


class KilledRuns:
    """Runs that are killed and resumed, beside one that is not.

    Args:
        folder: receives data and runs.
        num_steps: of each run.
    """

    def __init__(self, folder: Path, num_steps: int):
        self.settings = [*settings_of(make_data(folder), num_steps), "--save-every", "1"]
        self.folder, self.unbroken, self.run = folder, folder / "unbroken", folder / "run"
        # The first process waits for the imports of the one that it is forked from.
        self._start(self.unbroken, "--help").join()
        started = time.monotonic()
        process = self._start(self.unbroken)
        self._wait_for_steps(process, 1)
        self.loading_seconds = time.monotonic() - started
        self._wait_for_steps(process, num_steps)
        self.step_seconds = (time.monotonic() - started - self.loading_seconds) / (num_steps - 1)
        process.join()
        assert (self.unbroken / "evaluation.json").exists(), (folder / "log.txt").read_text()
        self.num_finished = 0

    def _start(self, run: Path, *flags: str) -> BaseProcess:
        log = self.folder / "log.txt"
        self.said = len(log.read_text()) if log.exists() else 0
        return start([*self.settings, "--output-dir", str(run), *flags], self.folder / "log.txt")

    def _wait_for_steps(self, process: BaseProcess, count: int) -> None:
        """Wait until the process has logged so many steps of its own, or has ended."""
        while process.is_alive() and (self.folder / "log.txt").read_text()[self.said :].count("\nstep ") < count:
            time.sleep(0.01)

    def kill_once(self, rng: random.Random) -> dict[str, object]:
        """Start or resume the run, kill it at a random moment, and check what is left; returns what there was to see.

        Raises:
            AssertionError: something was lost, or is not what it is in an unbroken run.
        """
        while True:
            before = [step for step, _ in list_checkpoints(self.run)]
            process = self._start(self.run, *["--resume"] * bool(before))
            while_loading = rng.random() < 0.2
            if while_loading:
                after = rng.uniform(0.0, self.loading_seconds)
            else:
                self._wait_for_steps(process, 1)
                after = rng.uniform(0.0, 3 * self.step_seconds)
            process.join(after)
            if process.is_alive():
                break
            # It came to its end first.
            self._check_finished(process.exitcode)
            shutil.rmtree(self.run)
        process.kill()
        process.join()
        checkpoints = list_checkpoints(self.run)
        saved = [step for step, _ in checkpoints]
        newest = max(saved, default=0)
        assert newest >= max(before, default=0), f"checkpoints {before} became {saved}"
        for _, checkpoint in checkpoints:
            assert fault_of(checkpoint) is None, fault_of(checkpoint)
        if newest:
            steps = {line["step"] for line in read_whole_lines(self.run / "metrics.jsonl")}
            assert steps >= {*range(1, newest + 1)}, f"metrics.jsonl has {sorted(steps)} of {newest}"
        left = sorted(path.name for path in self.run.glob(f"*{PARTIAL}"))
        moment = "while loading" if while_loading else "in the steps"
        return {"moment": moment, "after_seconds": round(after, 3), "checkpoints": saved, "left": left}

    def _check_finished(self, status: int | None) -> None:
        assert status == 0, (self.folder / "log.txt").read_text()[-3000:]
        assert read_metrics(self.run) == read_metrics(self.unbroken), "metrics are not those of the unbroken run"
        own, other = ((run / "evaluation.json").read_text() for run in (self.run, self.unbroken))
        assert own == other, "the evaluation is not that of the unbroken run"
        assert not list(self.run.glob(f"*{PARTIAL}")), "what killed processes left is still there"
        self.num_finished += 1

    def finish(self) -> None:
        """Let the run come to its end, and check it."""
        resume = ["--resume"] * bool(list_checkpoints(self.run))
        process = self._start(self.run, *resume)
        process.join()
        self._check_finished(process.exitcode)
        shutil.rmtree(self.run)


def read_whole_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a file that a kill may have cut off in its last one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    log = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {"kills": [], "runs_finished": 0}
    with tempfile.TemporaryDirectory() as folder:
        killed = KilledRuns(Path(folder), given.steps)
        while len(log["kills"]) < given.kills:
            # Of its own for each kill, so that a log that goes on has the same moments as one that was never stopped.
            log["kills"].append(killed.kill_once(random.Random(f"{given.seed} {len(log['kills'])}")))
            log["runs_finished"] += killed.num_finished
            killed.num_finished = 0
            write(given, log, killed)
        killed.finish()
        log["runs_finished"] += 1
        write(given, log, killed)


def write(given: argparse.Namespace, log: dict, killed: KilledRuns) -> None:
    command = f"python tests/faults/kill.py --kills {given.kills} --steps {given.steps} --seed {given.seed} --output FILE"
    report = provenance() | {
        "command": command,
        "train": "python -m tars_fast.train " + " ".join(killed.settings).replace(str(killed.folder), "DATA"),
        "seconds_of_loading": round(killed.loading_seconds, 2),
        "seconds_of_a_step": round(killed.step_seconds, 2),
        "kills_made": len(log["kills"]),
        "kills_in_the_steps": sum(kill["moment"] == "in the steps" for kill in log["kills"]),
        "kills_that_left_something_half_written": sum(bool(kill["left"]) for kill in log["kills"]),
    }
    write_atomically(given.output, json.dumps(report | log, indent=1) + "\n")


if __name__ == "__main__":
    main()
