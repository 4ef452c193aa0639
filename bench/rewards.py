"""What rewards of one's own cost a step of the embedded model: `python bench/rewards.py --json OUT`.

`python`: whole steps, rollout and update, with and without three Python rewards, taking turns on the same questions. `judge`: a
judge that takes 200 ms an answer with 16 in flight, awaited before the forward pass (`waits`), and as training has it, beside
forward and backward passes (`overlaps`); seconds a phase, with those of `none` for comparison. The judge is a server of this
machine that sleeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch

from tars_fast.config import RunConfig, TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning.batch import Rollout, RolloutCollector, prepare_batch
from tars_fast.learning.optimizer import make_optimizer
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.update import Learner
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, choose_device, load_model, make_trainable
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.provenance import provenance
from tars_fast.support.timing import PhaseTimer
from tars_fast.train import update_policy

ROOT = Path(__file__).parents[1]
MINE = ROOT / "examples" / "rewards" / "mine.py"
SECONDS_AN_ANSWER = 0.2
IN_FLIGHT = 16


class Steps:
    """Steps of one arm, on the same questions and from the same weights each time."""

    def __init__(self, model: SpeechModel, config: RunConfig):
        self._model, self._config = model, config
        self._rewards = Rewards(config)
        self._engine = TransformersEngine(model, config.rollout_batch_size)
        self._batch = prepare_batch(model, load_questions(TRAINING_DATA)[: config.questions_per_step])

    def rollout(self, timer: PhaseTimer) -> Rollout:
        with ThreadPoolExecutor(2) as background:
            collector = RolloutCollector(self._model, self._engine, self._rewards, self._config, background)
            return collector.collect(self._batch, 0, timer)[0]

    def step(self, *, waits: bool = False) -> dict[str, float]:
        """Seconds by phase, those of the update and the whole."""
        # A learning rate of 0: each step samples the same completions.
        optimizer = make_optimizer(self._model.trainable_parameters(), 0.0, 0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        learner = Learner(self._model, optimizer, self._config, made_rewards=self._rewards)
        started = time.perf_counter()
        rollout = self.rollout(learner.timer)
        sampled = time.perf_counter()
        if waits:
            with learner.timer.phase("wait"):
                for values in rollout.late.values():
                    values.of(range(len(rollout.completions)))
        update_policy(learner, learner.begin_rollout(rollout))
        ended = time.perf_counter()
        return learner.timer.take() | {"seconds/after sampling": ended - sampled, "seconds/step": ended - started}

    def close(self) -> None:
        self._rewards.own.close()


def measure(arms: dict[str, tuple[Steps, bool]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """What each step took, arms taking turns, each first in as many turns as the others."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        names = list(arms)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            steps, waits = arms[name]
            seconds = steps.step(waits=waits)
            # The first turn allocates.
            if turn:
                found[name].append(seconds)
    for steps, _ in arms.values():
        steps.close()
    return found


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(step.get(name, 0.0) for step in steps), 5) for name in steps[0]}


def python_rewards(model: SpeechModel, config: RunConfig, repeats: int) -> dict[str, object]:
    own = (f"{MINE}:brief=0.1", f"{MINE}:shares_words=0.1", "pattern=0.1")
    arms = {
        "none": (Steps(model, config), False),
        "three": (Steps(model, dataclasses.replace(config, reward=own, reward_pattern=r"\banswer is\b")), False),
    }
    found = measure(arms, repeats)
    # What the turns share, other programs of the machine above all, is not in the difference of a turn.
    pairs = list(zip(found["none"], found["three"], strict=True))
    added = statistics.median(three["seconds/reward"] - none["seconds/reward"] for none, three in pairs)
    step = statistics.median(none["seconds/step"] for none in found["none"])
    ratio = statistics.median(three["seconds/step"] / none["seconds/step"] for none, three in pairs)
    return {
        "questions": config.questions_per_step,
        "completions": config.questions_per_step * config.group_size,
        **{name: medians(steps) for name, steps in found.items()},
        "added_seconds_reward": round(added, 5),
        "added_percent_of_step": round(100 * added / step, 3),
        "median_ratio_of_steps": round(ratio, 4),
    }


@contextmanager
def judge_server() -> Iterator[str]:
    """The address of a judge in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "tests" / "judge_server.py"
    process = subprocess.Popen([sys.executable, str(script), str(port), str(SECONDS_AN_ANSWER)])
    try:
        # Requests are sent again until it is there.
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def judge(model: SpeechModel, config: RunConfig, repeats: int) -> dict[str, object]:
    with judge_server() as url:
        judged = dataclasses.replace(
            config, reward=("judge=0.5",), judge_url=url, judge_model="a-judge", reward_concurrency=IN_FLIGHT
        )
        arms = {
            "none": (Steps(model, config), False),
            "waits": (Steps(model, judged), True),
            "overlaps": (Steps(model, judged), False),
        }
        found = measure(arms, repeats)
    return {
        "questions": config.questions_per_step,
        "answers": config.questions_per_step * config.group_size,
        "seconds_an_answer": SECONDS_AN_ANSWER,
        "in_flight": IN_FLIGHT,
        **{name: medians(steps) for name, steps in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    preset = PRESETS["pocket"]
    model = load_model(preset, preset.source, choose_device("auto", "auto", uses_lora=False)[0], torch.float32)
    make_trainable(model, lora_rank=0, lora_alpha=32.0, freeze_audio=True, gradient_checkpointing=False)
    config = TrainConfig(objective="tars").resolve(preset, output_dir=Path(), tokens_per_micro_batch=4096)
    report: dict[str, object] = {
        "python": python_rewards(model, config, arguments.repeats),
        "judge": judge(model, config, arguments.repeats),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        command = f"python bench/rewards.py --repeats {arguments.repeats} --json {arguments.json}"
        threads = {"threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps({**provenance(), "command": command, **threads, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
