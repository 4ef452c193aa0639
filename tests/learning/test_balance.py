"""Several processes share a step by tokens, and who samples or trains on a question changes no result."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_workers import TORCHRUN

from tars_fast.learning.balance import TOLERANCE, balancing_moves, even_shares
from tars_fast.learning.metrics import heartbeat_metrics

COUNTS = st.integers(1, 2000)


@given(st.lists(COUNTS, max_size=40), st.integers(1, 9))
def test_shares_are_even_in_number_and_hold_everything_once(tokens, num_shares):
    shares = even_shares(tokens, num_shares)
    assert sorted(place for share in shares for place in share) == [*range(len(tokens))]
    assert all(share == sorted(share) for share in shares)
    numbers = [len(share) for share in shares]
    assert max(numbers) - min(numbers) <= 1
    # No share has more than another by more than one question, the longest.
    full = [sum(tokens[place] for place in share) for share in shares if len(share) == max(numbers)]
    assert max(full) - min(full) <= max(tokens, default=0)


def test_shares_go_by_tokens():
    tokens = [100, 100, 100, 100, 10, 10, 10, 10]
    shares = even_shares(tokens, 4)
    assert [sum(tokens[place] for place in share) for share in shares] == [110] * 4
    assert even_shares(tokens, 1) == [[*range(8)]]


def loads_after(tokens: list[list[int]], moves) -> list[int]:
    loads = [sum(counts) for counts in tokens]
    for source, place, target in moves:
        loads[source] -= tokens[source][place]
        loads[target] += tokens[source][place]
    return loads


@settings(deadline=None)
@given(st.lists(st.lists(COUNTS, max_size=6), min_size=1, max_size=9))
def test_moves_leave_nobody_with_more_and_nobody_without(tokens):
    moves = balancing_moves(tokens)
    assert len({move[:2] for move in moves}) == len(moves), "a question moves once"
    assert all(move.source != move.target and move.place < len(tokens[move.source]) for move in moves)
    after = loads_after(tokens, moves)
    assert sum(after) == sum(map(sum, tokens))
    assert max(after) <= max(map(sum, tokens))
    assert all(load > 0 for load, counts in zip(after, tokens, strict=True) if counts)


@pytest.mark.parametrize(
    ("tokens", "moved", "largest"),
    [
        ([[300], [100]], 0, 300),  # Each has one.
        ([[100, 100], [101, 100]], 0, 201),  # Near enough.
        ([[100, 100, 100, 100], []], 2, 200),
        ([[300, 100], [20, 60]], 1, 300),
        ([[300, 100], [180, 20]], 1, 300),
        ([[100, 70], [50, 80]], 2, 150),  # A swap of 70 and 50.
        ([[500, 200], [60, 40], [70]], 1, 500),  # No other process could be done before it.
    ],
)
def test_as_few_questions_move_as_it_takes(tokens, moved, largest):
    moves = balancing_moves(tokens)
    assert len(moves) == moved
    assert max(loads_after(tokens, moves)) == largest


def test_many_processes_come_close_to_the_mean():
    random = torch.Generator().manual_seed(0)
    tokens = (torch.randn(64, 8, generator=random).mul(0.6).exp() * 3000).int().tolist()
    before = [sum(counts) for counts in tokens]
    moves = balancing_moves(tokens)
    mean = sum(before) / 64
    assert max(before) > 1.25 * mean
    assert max(loads_after(tokens, moves)) <= max((1 + TOLERANCE) * mean, *(max(counts) for counts in tokens))
    assert len(moves) < 100, "of 512"


def test_heartbeats_are_of_several_processes():
    seconds = [{"seconds/rollout": 1.0, "seconds/forward": 2.0}, {"seconds/rollout": 4.0}, {"seconds/rollout": 2.0}]
    assert heartbeat_metrics(seconds[:1]) == {}
    metrics = heartbeat_metrics([*seconds, {"seconds/rollout": 2.5, "beside/rollout": 1.0}])
    assert [metrics[f"heartbeat/rollout/{figure}"] for figure in ("min", "median", "max")] == [1.0, 2.25, 4.0]
    assert [metrics[f"heartbeat/forward/{figure}"] for figure in ("min", "median", "max")] == [0.0, 0.0, 2.0]
    assert metrics["heartbeat/beside/rollout/max"] == 1.0


REWARDS = """
import asyncio

def brief(inputs):
    return [1.0 / len(one.token_ids) for one in inputs]

async def slow(inputs):
    await asyncio.sleep(0.01)
    return [float(len(one.text) % 3) for one in inputs]
"""

BOTH_WAYS = """
import dataclasses, json, math, sys, torch
sys.path[:0] = {path!r}
from embedded import new_model
from tars_fast.config import TrainConfig
from tars_fast.data.items import TRAINING_DATA, load_questions
from tars_fast.learning import balance, batch
from tars_fast.learning.loader import RolloutLoader
from tars_fast.learning.metrics import completion_columns, completion_metrics
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.selection import Selection, outcomes_of
from tars_fast.learning.update import Learner
from tars_fast.learning.workers import join_workers
from tars_fast.models.registry import PRESETS
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.train import update_policy
from tars_fast.types import UserError

balance.TOLERANCE = 0.0
prepare, find_moves = batch.prepare_speech, balance.balancing_moves

def run(workers, changes, questions):
    small = {{"objective": "tars", "questions_per_step": 5, "group_size": 4}}
    settings = TrainConfig(num_steps=1 + changes.get("rollout_ahead", 0), **(small | changes))
    config = settings.resolve(PRESETS["pocket"], output_dir={folder!r}, tokens_per_micro_batch=4096)
    torch.manual_seed(0)
    model = new_model(lora_rank=config.lora_rank, freeze_audio=config.freeze_audio)
    rewards, selection = Rewards(config), Selection(questions, config, [len(q.text) for q in questions])
    learner = Learner(model, torch.optim.SGD(model.trainable_parameters(), lr=0.0), config, workers, None, rewards)
    engine = TransformersEngine(model, config.rollout_batch_size, own_modules=bool(config.rollout_ahead))
    steps, shares = [], []
    with RolloutLoader(model, engine, rewards, selection, config, workers) as loader:
        for step in range(config.num_steps):
            loaded = loader.next_batch(step, learner.timer)
            scored = learner.begin_rollout(loaded.rollout, step)
            metrics = update_policy(learner, scored, loader.finish_sampling)
            own = None if scored is None else (completion_columns(scored), outcomes_of(scored))
            parts = [part for part in workers.gather(own) if part is not None]
            metrics |= completion_metrics([columns for columns, _ in parts])
            known = [one for _, outcomes in parts for one in outcomes]
            outcomes = sorted((one.id, one.num_completions, one.num_tokens, one.speech, one.text) for one in known)
            ids = [] if scored is None else sorted(question.id for question in scored.rollout.questions)
            shares.append(workers.gather(ids))
            gradient = torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters()])
            steps.append((metrics, outcomes, gradient))
    return steps, shares

with join_workers() as workers:
    questions = load_questions(TRAINING_DATA)[:16]
    found = {{}}
    for name, changes in json.loads({changes!r}).items():
        usable = changes.pop("usable", True)
        def as_told(model, questions):
            return prepare(model, questions) if usable or workers.is_first else [UserError("gone")] * len(questions)
        batch.prepare_speech = as_told
        found[name] = []
        for is_balanced in (False, True):
            balance.balancing_moves = find_moves if is_balanced else lambda tokens: []
            found[name].append(run(workers, changes, questions))
    torch.save(found, {result!r} + str(workers.rank))
"""

SETTINGS = {
    "full": {},
    "nothing usable": {"usable": False},
    "LoRA": {"lora_rank": 4},
    "ahead": {"rollout_ahead": 1},
    "redraws": {"max_redraws": 1},
    "own rewards": {"reward": ["REWARDS:brief=0.5", "REWARDS:slow=0.5"]},
    "distillation": {"objective": "opd"},
    "audio": {"freeze_audio": False},
    "centred": {"representation_centre": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("names", [["full", "nothing usable"], [*SETTINGS][2:]], ids=["some", "all others"])
def test_who_trains_on_a_question_changes_no_result(tmp_path, names):
    """Gradient, metrics and what is known of each question, with what is exchanged and without."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    changes = json.dumps({name: SETTINGS[name] for name in names}).replace("REWARDS", str(tmp_path / "rewards.py"))
    result, script = tmp_path / "result", tmp_path / "both.py"
    path = [str(Path(__file__).parents[1])]
    script.write_text(BOTH_WAYS.format(path=path, folder=str(tmp_path), changes=changes, result=str(result)))
    done = subprocess.run(
        [*TORCHRUN, str(script)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(f"{result}{rank}", weights_only=False)
        assert list(found) == names
        for name, ((plain, plain_shares), (balanced, balanced_shares)) in found.items():
            for shares, shares_2 in zip(plain_shares, balanced_shares, strict=True):
                assert sorted(chain(*shares)) == sorted(chain(*shares_2))
            assert plain_shares != balanced_shares, f"{name}: nothing was moved"
            for (metrics, outcomes, gradient), (metrics_2, outcomes_2, gradient_2) in zip(plain, balanced, strict=True):
                torch.testing.assert_close(gradient_2, gradient, rtol=1e-4, atol=1e-6)
                assert gradient.abs().max() > 1e-4
                assert metrics.keys() == metrics_2.keys()
                # It says which groups went through a backward pass, which goes by what else was in the micro-batch.
                for key in [key for key in metrics if not key.startswith("without_backward/")]:
                    value = metrics[key]
                    assert metrics_2[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
                assert outcomes_2 == outcomes
