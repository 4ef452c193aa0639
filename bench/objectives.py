"""What each objective's update costs on the same completions: `python bench/objectives.py --json OUT`.

All that follows the rollout, objectives taking turns, by phase; TARS and GRPO train on spoken and written completions, `opd` on
the spoken half of them alone, which is what it samples. `--shape qwen2-audio-7b` (CUDA) has that model's shape with random
weights and made-up completions, `tiny` is a test of that path.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch
from train_step import Workload, cases_of, make_model, make_rollout, tokens_of

from tars_fast.config import RunConfig
from tars_fast.learning.advantages import group_indices
from tars_fast.learning.batch import Rollout
from tars_fast.learning.optimizer import make_optimizer
from tars_fast.learning.rewards.reward import completed
from tars_fast.learning.update import Learner
from tars_fast.models.speech_model import SpeechModel
from tars_fast.support.provenance import provenance
from tars_fast.support.text import GB
from tars_fast.train import update_policy
from tars_fast.types import Modality

ARMS: dict[str, dict[str, str]] = {
    "tars": {},
    "grpo": {"objective": "grpo"},
    "opd": {"objective": "opd", "text_anchor": "none"},
    "opd, moving teacher": {"objective": "opd", "text_anchor": "none", "teacher": "moving"},
    "opd, anchored": {"objective": "opd", "text_anchor": "kl"},
    "opd, as an advantage": {"objective": "opd", "text_anchor": "none", "distil_as": "advantage"},
    "tars+opd": {"objective": "tars+opd"},
}
CASES = {"pocket": "pocket", "tiny": "full", "qwen2-audio-7b": "10s-512"}


def spoken_half(rollout: Rollout) -> Rollout:
    """The rollout as it is without written completions."""
    rows = [row for row, completion in enumerate(rollout.completions) if completion.modality is Modality.SPEECH]
    completions = [rollout.completions[row] for row in rows]
    return dataclasses.replace(
        rollout,
        prompts=[rollout.prompts[row] for row in rows],
        completions=completions,
        completion_rewards={name: values_N[rows] for name, values_N in rollout.completion_rewards.items()},
        references=[None] * len(rows),
        late={"behaviour": completed(torch.zeros(len(rows)))},
        groups_N=group_indices([one.question for one in completions], [one.modality for one in completions]),
    )


def update_once(model: SpeechModel, config: RunConfig, rollout: Rollout) -> dict[str, float]:
    """Seconds by phase, the whole, and on CUDA the peak of memory above what was there, in GB."""
    optimizer = make_optimizer(model.trainable_parameters(), config.weight_decay, 0)
    learner = Learner(model, optimizer, config)
    on_cuda = model.device.type == "cuda"
    before = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with learner.timer.phase("update"):
        metrics = update_policy(learner, learner.begin_rollout(rollout))
    assert metrics["loss"] == metrics["loss"]
    peak = {"peak_gb": (torch.cuda.max_memory_allocated() - before) / GB} if on_cuda else {}
    optimizer.zero_grad(set_to_none=True)
    return learner.timer.take() | peak


def measure(workload: Workload, repeats: int) -> dict[str, dict[str, float]]:
    model = make_model(workload)
    rollout = make_rollout(model, workload)
    # Made-up completions: some are cut off as real ones are.
    spoken = spoken_half(rollout)
    config = dataclasses.replace(workload.config(), tokens_per_micro_batch=tokens_of(rollout, 2))
    configs = {name: dataclasses.replace(config, **settings) for name, settings in ARMS.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(repeats + 1):
        for name, own in configs.items():
            seconds = update_once(model, own, rollout if own.samples_text else spoken)
            # The first turn compiles and allocates.
            if turn:
                found[name].append(seconds)
    return {
        name: {key: round(statistics.median(turn[key] for turn in turns), 5) for key in turns[0]}
        for name, turns in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=CASES, default="pocket")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    objectives = measure(cases_of(arguments.shape)[CASES[arguments.shape]], arguments.repeats)
    baseline = objectives["tars"]["seconds/update"]
    for name, medians in objectives.items():
        phases = "  ".join(f"{key.removeprefix('seconds/')} {value:.3f}" for key, value in medians.items())
        print(f"{name:24} {medians['seconds/update'] / baseline:5.2f} x tars   {phases}")
    if arguments.json:
        command = f"python bench/objectives.py --shape {arguments.shape} --repeats {arguments.repeats} --json {arguments.json}"
        report = {**provenance(), "command": command, "shape": arguments.shape, "objectives": objectives}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
