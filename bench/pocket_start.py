"""How hard a bundled task is before training, and what labels reach: `python bench/pocket_start.py --output FILE`.

For validation and held-out items: accuracy from speech and from text, greedy and sampled; and of the sampled spoken groups how
many are all wrong, in how many of these the completions differ in right steps of their chains, and how many wrong chains are
answered right, by chance. The ceiling is supervised fine-tuning on the recordings of the training items, with the
recipe of the warm start: that part of the gap can be closed by what the recordings say.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch

from tars_fast import pocket
from tars_fast.data.arithmetic import TASKS, Problem
from tars_fast.data.audio import decode
from tars_fast.data.items import load_questions, or_bundled
from tars_fast.learning.rewards.total import completion_rewards
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, load_model
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.provenance import provenance
from tars_fast.types import Modality, Question

SAMPLES = 4


def percent(share: torch.Tensor) -> float:
    return round(100 * share.float().mean().item(), 1)


def problems_of(task: str) -> dict[str, Problem]:
    """By the text of the question."""
    splits = TASKS[task].split_problems()
    return {problem.question: problem for problem in (*splits.training, *splits.validation, *splits.held_out)}


@torch.no_grad()
def figures(model: SpeechModel, questions: list[Question], problems: dict[str, Problem]) -> dict[str, float]:
    """Accuracies in %, and for spoken groups of `SAMPLES` the shares of the module's docstring, in %."""
    found: dict[str, float] = {}
    engine = TransformersEngine(model, model.prompts.preset.rollout_batch_size)
    for modality in Modality:
        prompts = model.encode_prompts(questions, modality)
        for name, num_completions, temperature in (("greedy", 1, 0.0), ("sampled", SAMPLES, 1.0)):
            sampling = Sampling(num_completions, model.prompts.preset.max_new_tokens, temperature, seed=0)
            completions = engine.generate(prompts, range(len(questions)), sampling)
            right = completion_rewards(completions, questions)["accuracy"]
            found[f"{modality}_{name}"] = percent(right)
        if modality is Modality.SPEECH:
            expected = [problems[questions[completion.question].text].steps for completion in completions]
            steps = torch.tensor(
                [sum(step in c.text for step in chain) for c, chain in zip(completions, expected, strict=True)]
            )
            all_wrong = right.view(-1, SAMPLES).sum(1) == 0
            groups = steps.view(-1, SAMPLES)[all_wrong]
            found |= {
                "groups_all_wrong": percent(all_wrong),
                "all_wrong_groups_that_differ_in_right_steps": percent(groups.amax(1) > groups.amin(1)),
                "wrong_chains_answered_right": percent(right[steps < len(expected[0])]),
                "mean_right_steps": round(steps.float().mean().item(), 2),
            }
    return found


def fine_tune(model: SpeechModel, task: str, problems: dict[str, Problem], num_steps: int) -> None:
    """Train on the chains of the recorded training items, 16 recordings a step."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(PRESETS[task].source)
    questions = load_questions(or_bundled(task, "training"))
    waves = [decode(question.audio) for question in questions if question.audio is not None]
    speech = pocket.extract_features(processor, TASKS[task], [problems[question.text] for question in questions], waves)
    stage = pocket.ThinkingStage(num_steps, text_per_step=0, speech_per_step=16, seed=0)
    pocket.train_thinking(model.module, processor, speech, stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="pocket-hard")
    parser.add_argument("--steps", type=int, default=300, help="of supervised fine-tuning")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, preset, started = arguments.task, PRESETS[arguments.task], time.process_time()
    problems = problems_of(task)
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    parts = {part: load_questions(or_bundled(f"{task}@{part}", "held_out")) for part in ("validation", "held_out")}
    result: dict[str, Any] = provenance() | {"command": " ".join(["python", "bench/pocket_start.py", *sys.argv[1:]])}
    result |= {"task": task, "parameters": sum(parameter.numel() for parameter in model.module.parameters())}
    result["start"] = {part: figures(model, questions, problems) for part, questions in parts.items()}
    print(json.dumps(result["start"], indent=2), flush=True)
    fine_tune(model, task, problems, arguments.steps)
    result["supervised"] = {part: figures(model, questions, problems) for part, questions in parts.items()}
    result["cpu_seconds"] = round(time.process_time() - started)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["supervised"], indent=2))


if __name__ == "__main__":
    main()
