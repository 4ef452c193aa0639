"""Kill machines of an elastic run: `python tests/faults/kill_elastic.py --kills 20 --output FILE`.

One to three agents of torchrun, each with one training process, stand for machines; they meet in a store of this script's. At
random, in a rollout, a backward pass, the optimiser's step, a checkpoint or while loading, SIGKILL ends a training process,
an agent, an agent with its process (a machine), or all of them; then machines come and go, so that one to three are there.
All start the same command, with `--resume-if-exists`. A run that comes to its end must have every step once, and every item
once in each epoch, whatever the number of processes was; at no kill may more be lost than the steps since the last
checkpoint. FILE lists every kill; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from runs import make_data, settings_of
from torch.distributed import TCPStore

from tars_fast.data.items import load_questions
from tars_fast.models.checkpoint import fault_of
from tars_fast.models.registry import list_checkpoints
from tars_fast.support.files import PARTIAL, append, write_atomically
from tars_fast.support.provenance import provenance

MOMENTS = ("rollout", "backward", "optimiser", "checkpoint", "loading")
VICTIMS = ("process", "agent", "machine", "all")
LOADED = ["tars_fast.train", "torch.distributed.launcher.api", "torch.utils.tensorboard", "matplotlib.pyplot", "accelerate"]
LOADED += ["transformers.models.qwen2_audio.modeling_qwen2_audio", "transformers.models.auto.processing_auto", "tyro"]
"""What each training process would otherwise import anew."""
MAX_MACHINES = 3
QUESTIONS_PER_STEP = 4
SAVE_EVERY = 2


def work(settings: list[str], folder: Path) -> None:
    """A training process, which says in `folder` which phase it is in and on which items it trains."""
    from tars_fast import train
    from tars_fast.learning.update import Learner
    from tars_fast.support.timing import PhaseTimer

    # Those of the agent that it is forked from.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    now = folder / f"phase-{os.getpid()}"
    now.write_text("loading")
    phase, begin_rollout = PhaseTimer.phase, Learner.begin_rollout

    def marked_phase(timer, name):
        now.write_text(name)
        return phase(timer, name)

    def logged_rollout(learner, rollout, step=0):
        ids = [] if rollout is None else [question.id for question in rollout.questions]
        workers = learner.workers
        line = {"step": step + 1, "rank": workers.rank, "size": workers.size, "ids": ids, "time": time.time()}
        append(folder / f"items-{os.getpid()}.jsonl", json.dumps(line) + "\n")
        return begin_rollout(learner, rollout, step)

    PhaseTimer.phase, Learner.begin_rollout = marked_phase, logged_rollout
    sys.argv = ["train", *settings]
    status = train.main()
    if status:
        sys.exit(status)


def lead(settings: list[str], folder: Path, meeting: str, port: int) -> None:
    """An agent, as `torchrun --nnodes 1:3 --max-restarts 1000` starts it, whose process is forked instead of loaded anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    log = (folder / "log.txt").open("a")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    # Otherwise an agent keeps the address of the first process from before others came or went.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=MAX_MACHINES,
        nproc_per_node=1,
        run_id=meeting,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"is_host": False, "last_call_timeout": 5, "timeout": 600},
        max_restarts=1000,
        monitor_interval=0.1,
        start_method="fork",
        local_addr="localhost",
    )
    elastic_launch(config, work)(settings, folder)


class ElasticRuns:
    """Runs that lose and get machines.

    Args:
        folder: receives data and runs.
        num_steps: of each run.
    """

    def __init__(self, folder: Path, num_steps: int):
        self.settings = settings_of(make_data(folder), num_steps)
        self.settings[self.settings.index("--questions-per-step") + 1] = str(QUESTIONS_PER_STEP)
        self.settings += ["--save-every", str(SAVE_EVERY), "--resume-if-exists"]
        self.folder, self.num_steps, self.run = folder, num_steps, folder / "run"
        self.ids = sorted(question.id for question in load_questions(str(folder / "training")))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LOADED)
        self._agents: list[BaseProcess] = []
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._num_meetings = 0
        self.runs_finished = self.num_restarts = 0
        self._open_meeting()

    def _open_meeting(self) -> None:
        self._num_meetings += 1
        self._meeting = f"meeting-{self._num_meetings}"

    def _add_machines(self, number: int) -> None:
        settings = [*self.settings, "--output-dir", str(self.run)]
        for _ in range(number):
            agent = self._context.Process(target=lead, args=(settings, self.folder, self._meeting, self._store.port))
            agent.start()
            self._agents.append(agent)

    def _alive(self) -> list[BaseProcess]:
        return [agent for agent in self._agents if agent.is_alive()]

    def _workers(self) -> dict[int, str]:
        """Training processes and the phases they are in."""
        found = {}
        for agent in self._alive():
            try:
                for child in psutil.Process(agent.pid).children():
                    path = self.folder / f"phase-{child.pid}"
                    if path.exists():
                        found[child.pid] = path.read_text()
            except psutil.NoSuchProcess:
                continue
        return found

    def _steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _wait(self, condition: Callable[[], object], seconds: float = 1200.0) -> bool:
        """Whether it came true before the run had come to its end."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self._alive():
                if (self.run / "evaluation.json").exists():
                    return False
                # Where the first agent dies between meeting the others and telling them its address, theirs end too.
                self.num_restarts += 1
                self._open_meeting()
                self._add_machines(1)
            assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()[-5000:]
            time.sleep(0.005)
        return True

    def kill_once(self, rng: random.Random) -> dict[str, object]:
        """Kill something at a random moment, have machines come or go, wait for the first new step; returns what was to see.

        Raises:
            AssertionError: a step that was saved is lost.
        """
        moment, victim = rng.choice(MOMENTS), rng.choice(VICTIMS)
        self.num_restarts = 0
        if not self._alive():
            self._begin(rng)
        if moment == "loading":
            # One machine more, or all anew, so that something loads.
            self._change_machines(rng, restart=len(self._alive()) == MAX_MACHINES)
        elif not self._wait(lambda: self._steps() > 0) or not self._wait_for_steps(1):
            self._check_finished()
            self._begin(rng)
            self._wait_for_steps(1)
        if not self._wait(self._condition(moment)):
            self._check_finished()
            return self.kill_once(rng)
        steps, num_before = self._steps(), len(self._alive())
        half_written = sorted(path.name for path in self.run.glob(f"*{PARTIAL}"))
        # All that there ever were.
        there, killed_at = {int(path.stem.partition("-")[2]) for path in self.folder.glob("phase-*")}, time.monotonic()
        self._kill(victim, rng)
        saved = [step for step, checkpoint in list_checkpoints(self.run) if fault_of(checkpoint) is None]
        assert len(saved) == len(list_checkpoints(self.run)), "a checkpoint is not whole"
        self._change_machines(rng)
        num_after = len(self._alive())
        finished = not self._wait(lambda: self._first_new_step(there) is not None)
        resumed = self._first_new_step(there)
        seconds = round(time.monotonic() - killed_at, 1)
        newest = max(saved, default=0)
        assert finished or resumed > newest, f"steps up to {newest} were saved, and {resumed} was taken again"
        # One checkpoint may have been in the making.
        assert steps - newest <= 2 * SAVE_EVERY, f"{steps} steps were done, {newest} saved"
        return {
            "moment": moment,
            "killed": victim,
            "machines_before": num_before,
            "machines_after": num_after,
            "steps_done": steps,
            "newest_checkpoint": newest,
            "half_written": half_written,
            "went_on_with_step": None if finished else resumed,
            "starts_by_the_scheduler": self.num_restarts,
            "seconds_to_first_new_step": seconds,
        }

    def _begin(self, rng: random.Random) -> None:
        self._add_machines(rng.randint(1, MAX_MACHINES))

    def _wait_for_steps(self, count: int) -> bool:
        wanted = self._steps() + count
        return self._wait(lambda: self._steps() >= wanted)

    def _condition(self, moment: str) -> Callable[[], object]:
        if moment == "checkpoint":
            return lambda: list(self.run.glob(f"checkpoint-*{PARTIAL}"))
        return lambda: moment in self._workers().values()

    def _kill(self, victim: str, rng: random.Random) -> None:
        agents = self._alive()
        chosen = agents if victim == "all" else [rng.choice(agents)]
        for agent in chosen:
            try:
                children = psutil.Process(agent.pid).children()
            except psutil.NoSuchProcess:
                children = []
            if victim != "process":
                agent.kill()
            for child in children if victim != "agent" else ():
                child.kill()
            if victim != "process":
                agent.join()

    def _change_machines(self, rng: random.Random, *, restart: bool = False) -> None:
        """Have one to three machines, by what comes or by the end of all."""
        if restart:
            self._kill("all", rng)
        there = len(self._alive())
        if not there:
            # Whoever met before is gone.
            self._open_meeting()
        self._add_machines(rng.randint(max(1, there), MAX_MACHINES) - there)

    def _items(self, without: Collection[int] = ()) -> list[dict]:
        """What processes have begun to train on, but those with these numbers, in order of time."""
        paths = [path for path in self.folder.glob("items-*.jsonl") if int(path.stem.partition("-")[2]) not in without]
        lines = [line for path in paths for line in path.read_text().split("\n")[:-1]]
        return sorted((json.loads(line) for line in lines), key=lambda line: line["time"])

    def _first_new_step(self, before: Collection[int]) -> int | None:
        """The first step that other processes than those of before have begun, once it is done."""
        begun = self._items(without=before)
        if not begun:
            return None
        path, first = self.run / "metrics.jsonl", min(line["step"] for line in begun)
        # Of processes that begin where others had come further, metrics.jsonl loses the lines behind.
        return first if path.exists() and self._steps() >= first and path.stat().st_mtime > begun[0]["time"] else None

    def finish(self) -> None:
        """Let the run come to its end, and check it."""
        self._wait(lambda: False)
        self._check_finished()

    def _check_finished(self) -> None:
        """Check a run that has come to its end, and clear it away."""
        assert (self.run / "evaluation.json").exists(), (self.folder / "log.txt").read_text()[-5000:]
        metrics = [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        assert metrics == [*range(1, self.num_steps + 1)], f"metrics.jsonl has {metrics}"
        assert list_checkpoints(self.run)[-1][0] == self.num_steps
        assert not list(self.run.glob(f"*{PARTIAL}")), "what killed processes left is still there"
        trained: dict[int, list[str]] = {}
        items = self._items()
        self.sizes = []
        for step in metrics:
            # The last time that the step was taken is the one that counts.
            lines = [line for line in items if line["step"] == step]
            last = lines[-lines[-1]["size"] :]
            assert sorted(line["rank"] for line in last) == [*range(lines[-1]["size"])], last
            trained[step] = [one for line in last for one in line["ids"]]
            self.sizes.append(lines[-1]["size"])
        in_order = [one for step in metrics for one in trained[step]]
        for start in range(0, len(in_order) - len(self.ids) + 1, len(self.ids)):
            assert sorted(in_order[start : start + len(self.ids)]) == self.ids, f"the epoch of step {start} is not whole"
        self.runs_finished += 1
        for path in [self.run, *self.folder.glob("items-*"), *self.folder.glob("phase-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._agents = []
        self._open_meeting()

    def close(self) -> None:
        """End what still runs."""
        if self._alive():
            self._kill("all", random.Random(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    log = {"runs": [], "kills": []}
    if given.output.exists():
        log = {name: held for name, held in json.loads(given.output.read_text(encoding="utf-8")).items() if name in log}
    with tempfile.TemporaryDirectory() as folder:
        runs = ElasticRuns(Path(folder), given.steps)
        try:
            while True:
                finished = runs.runs_finished
                is_last = len(log["kills"]) >= given.kills
                if is_last:
                    runs.finish()
                else:
                    log["kills"].append(runs.kill_once(random.Random(f"{given.seed} {len(log['kills'])}")))
                    print(log["kills"][-1], flush=True)
                if runs.runs_finished > finished:
                    log["runs"].append({"steps": given.steps, "processes_by_step": runs.sizes})
                write(given, log, runs)
                if is_last:
                    break
        finally:
            runs.close()


def write(given: argparse.Namespace, log: dict, runs: ElasticRuns) -> None:
    command = (
        f"python tests/faults/kill_elastic.py --kills {given.kills} --steps {given.steps} --seed {given.seed} --output FILE"
    )
    seconds = [kill["seconds_to_first_new_step"] for kill in log["kills"]]
    report = provenance() | {
        "command": command,
        "train": "python -m tars_fast.train " + " ".join(runs.settings).replace(str(runs.folder), "DATA"),
        "kills_made": len(log["kills"]),
        "kills_by_moment": {moment: sum(kill["moment"] == moment for kill in log["kills"]) for moment in MOMENTS},
        "kills_by_victim": {victim: sum(kill["killed"] == victim for kill in log["kills"]) for victim in VICTIMS},
        "runs_finished_with_every_step_and_every_item_once_an_epoch": len(log["runs"]),
        "most_steps_lost": max(kill["steps_done"] - kill["newest_checkpoint"] for kill in log["kills"]),
        "seconds_to_first_new_step": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
    }
    write_atomically(given.output, json.dumps(report | log, indent=1) + "\n")


if __name__ == "__main__":
    main()
