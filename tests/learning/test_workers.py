"""Several processes train one policy: the gradient of all is that of one, and what they write is one run."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from items import first_items
from processes import TORCHRUN
from safetensors.torch import load_file
from steps import divided_rollout, update

from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA, VALIDATION_DATA
from tars_fast.learning import workers
from tars_fast.learning.metrics import completion_columns, completion_metrics
from tars_fast.types import TrainingError

ONE_STEP = """
import pickle, sys, torch
sys.path[:0] = {path!r}
from embedded import new_model
from tars_fast.learning.metrics import completion_columns, completion_metrics
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import join_workers
from tars_fast.train import update_policy

with join_workers() as workers:
    rollouts, config = pickle.load(open({given!r}, "rb"))
    model = new_model()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0)
    mine = rollouts[workers.rank]
    learner = Learner(model, optimizer, config, workers)
    scored = learner.begin_rollout(mine)
    metrics = update_policy(learner, scored)
    workers.check_same(model.trainable_parameters())
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters()])
    columns = workers.gather(mine and completion_columns(scored))
    metrics |= completion_metrics([part for part in columns if part is not None])
    torch.save((gradient, metrics), {result!r} + str(workers.rank))
    if workers.rank == 1:
        with torch.no_grad():
            next(iter(model.trainable_parameters())).view(-1)[0] += 1e-7
    try:
        workers.check_same(model.trainable_parameters())
        raise SystemExit("a difference was not seen")
    except Exception as error:
        assert "come apart" in str(error), error
"""


@pytest.mark.parametrize(
    ("second_is_usable", "objective"),
    [
        (True, {}),
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"objective": "tars+opd", "text_anchor": "kl"}, marks=pytest.mark.slow, id="distillation"),
    ],
)
def test_gradient_and_metrics_of_two_processes_are_those_of_one(
    make_model, questions, config, tmp_path, second_is_usable, objective
):
    """Shares of different sizes, whose token counts differ, so that means of means would be wrong; or one of them empty."""
    model = make_model()
    config = dataclasses.replace(config, **objective)
    shares = (questions[:4], questions[4:6])
    rollouts, whole = divided_rollout(model, shares, config)
    first = rollouts[0]
    assert first.num_tokens != rollouts[1].num_tokens
    if not second_is_usable:
        # Of older weights too, whose difference from the trainer's no process may take for an error.
        completions = [
            dataclasses.replace(one, rollout_logprobs=tuple(value - 0.1 for value in one.rollout_logprobs))
            for one in first.completions
        ]
        first = dataclasses.replace(first, completions=completions, staleness=1)
        rollouts, whole = [first, None], first
    scored, metrics = update(model, whole, config)
    expected = torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters()])
    metrics |= completion_metrics([completion_columns(scored)])

    given, result = tmp_path / "given.pickle", tmp_path / "result"
    given.write_bytes(pickle.dumps((rollouts, config)))
    script = tmp_path / "step.py"
    script.write_text(ONE_STEP.format(path=[str(Path(__file__).parents[1])], given=str(given), result=str(result)))
    subprocess.run([*TORCHRUN, str(script)], check=True, capture_output=True, text=True)
    for rank in range(2):
        gradient, told = torch.load(f"{result}{rank}")
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
        assert told.keys() == metrics.keys()
        for name, value in metrics.items():
            assert told[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_who_finds_nobody_says_so(monkeypatch):
    """As where torchrun gives the address of a process that is gone; it may start them once more then."""
    # Nothing listens at a port that was given up a moment ago.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in (environment | {"CUDA_VISIBLE_DEVICES": ""}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(workers, "_MEETING", 6.0)
    said = r"have not found each other in about 6 s \(.*\); start the same command again"
    started = time.monotonic()
    with pytest.raises(TrainingError, match=said), workers.join_workers():
        pass
    # Given all of it, torch takes 13 s at least.
    assert time.monotonic() - started < 12


SMALL_SLICES = """
import sys
from tars_fast.evaluation import answering as evaluation
from tars_fast import train

evaluation.ITEMS_AT_ONCE = 4
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    """Items to train on, items to evaluate on, and the training command with slices of four of them in its evaluation."""
    folder = tmp_path_factory.mktemp("items")
    first_items(TRAINING_DATA, 16, folder / "training")
    first_items(VALIDATION_DATA, 10, folder / "evaluation")
    first_items(HELD_OUT_DATA, 4, folder / "validation")
    (folder / "train.py").write_text(SMALL_SLICES)
    return folder


def command(items: Path, run: Path, *flags: object) -> list[str]:
    settings = ("--data", items / "training", "--eval-data", items / "evaluation", "--output-dir", run, "--eval-samples", "0")
    return [str(part) for part in (items / "train.py", "--questions-per-step", "4", *settings, "--save-every", "2", *flags)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        # With --select each process must know what the other's share has shown, and have other questions in reserve; with
        # --keep-best both must know which step is the best.
        (
            "transformers",
            (
                "--objective",
                "tars",
                "--select",
                "gap",
                "--max-redraws",
                "1",
                "--eval-every",
                "1",
                "--keep-best",
                "text_accuracy",
            ),
        ),
        pytest.param("vllm", (), marks=pytest.mark.vllm),
    ],
)
def test_two_processes_make_one_run_which_resumes(items, tmp_path, engine, settings):
    run = tmp_path / "run"
    settings = (*settings, "--validation-data", str(items / "validation")) if settings else ()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for num_steps, more in ((4, []), (4, ["--resume"])):
        if more:
            # As if it had been stopped after two steps.
            (run / "evaluation.json").unlink()
            shutil.rmtree(run / "checkpoint-4")
            resumed_from = (run / "metrics.jsonl").read_text().splitlines()
        flags = ("--num-steps", num_steps, "--engine", engine, *settings, *more)
        done = subprocess.run([*TORCHRUN, *command(items, run, *flags)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("in 2 processes") == 1, "one of them speaks"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [*range(0 if settings else 1, 5)]
    earlier = [json.loads(line) for line in resumed_from]
    for one, two in zip(steps, earlier, strict=True):
        same = [name for name in one if not name.startswith(("seconds/", "heartbeat/"))]
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert max(step["logprob_diff_max"] for step in steps if step["step"]) < 1e-3
    for step in steps[-4:]:
        seconds = [step[f"heartbeat/rollout/{figure}"] for figure in ("min", "median", "max")]
        assert 0 < seconds[0] < seconds[1] < seconds[2]
        assert step["heartbeat/exchange/max"] > 0
    if settings:
        drawn = [json.loads(line)["num_drawn"] for line in (run / "selection.jsonl").read_text().splitlines()]
        assert sum(drawn) == sum(step["sampled/questions"] for step in steps if step["step"]) > 16
        assert all("validation/text_accuracy/low" in step for step in steps)
    predictions = [json.loads(line)["id"] for line in (run / "predictions_after.jsonl").read_text().splitlines()]
    assert predictions == [json.loads(line)["id"] for line in (items / "evaluation" / "items.jsonl").read_text().splitlines()]
    assert len(load_file(run / "checkpoint-4" / "model.safetensors")) > 10
    if engine == "transformers":
        alone = tmp_path / "alone"
        subprocess.run(
            [sys.executable, *command(items, alone, "--num-steps", 1)], check=True, capture_output=True, env=environment
        )
        before = [(folder / "predictions_before.jsonl").read_text() for folder in (run, alone)]
        assert before[0] == before[1], "who evaluates an item does not matter"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ([sys.executable], signal.SIGTERM, 130),
        (TORCHRUN, signal.SIGTERM, None),
        ([sys.executable], signal.SIGUSR1, 75),
        (TORCHRUN, signal.SIGUSR1, 0),
    ],
    ids=["alone-term", "torchrun-term", "alone-usr1", "torchrun-usr1"],
)
def test_signals_of_a_cluster_save_and_end_every_process(items, tmp_path, launcher, number, status):
    """SIGTERM torchrun passes on, and reports in its own way. SIGUSR1 goes to its processes, which it does not start again."""
    run = tmp_path / "run"
    started = subprocess.Popen(
        [*launcher, *command(items, run, "--num-steps", 500)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= 1):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()
        time.sleep(0.1)
    told = [psutil.Process(started.pid)]
    if launcher == TORCHRUN and number == signal.SIGUSR1:
        told = [one for one in told[0].children() if "RANK" in one.environ()]
        assert len(told) == 2
    for process in told:
        process.send_signal(number)
    _, stderr = started.communicate(timeout=120)
    assert started.returncode == status if status is not None else started.returncode != 0
    assert stderr.count("--resume") == 1
    assert list(run.glob("checkpoint-*"))


ONE_WAITS = """
import sys, time
from pathlib import Path
from tars_fast.learning.workers import join_workers, preempted_in_one_line

with preempted_in_one_line(), join_workers() as workers:
    Path(sys.argv[1], str(workers.rank)).touch()
    if workers.rank == 0:
        time.sleep(600)
    workers.gather(None)
"""


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_is_preempted_is_preempted_too(tmp_path):
    """Outside the steps, where both end at once; the signal comes to one of them a second later."""
    script = tmp_path / "one_waits.py"
    script.write_text(ONE_WAITS)
    started = subprocess.Popen([*TORCHRUN, str(script), str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not all((tmp_path / str(rank)).is_file() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = {one.environ().get("RANK"): one for one in psutil.Process(started.pid).children()}
    for rank in ("0", "1"):
        told[rank].send_signal(signal.SIGUSR1)
        time.sleep(1)
    _, stderr = started.communicate(timeout=120)
    assert started.returncode == 0, stderr
    assert stderr.count("stopped: SIGUSR1 wants the machine back") == 2


@pytest.mark.slow
def test_fewer_questions_than_processes_is_refused(items, tmp_path):
    flags = ("--num-steps", 1)
    arguments = [flag if flag != "4" else "1" for flag in command(items, tmp_path / "run", *flags)]
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: --questions-per-step 1: fewer than the 2 processes; raise it, or start fewer" in done.stderr
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import os, resource, sys
from tars_fast import train

if os.environ["RANK"] == "0":
    # Of the weights and the optimiser's state only a part can be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all_with_one_line(items, tmp_path):
    """The first save is written in the background; what goes wrong is told in the next step."""
    script = tmp_path / "train.py"
    script.write_text(FULL_DISK)
    arguments = command(items, tmp_path / "run", "--num-steps", 6)
    done = subprocess.run([*TORCHRUN, str(script), *arguments[1:]], capture_output=True, text=True)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, done.stderr[-3000:]
    assert lines[0] == lines[1]
    assert "checkpoint-2: cannot be written (File too large" in lines[0]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
