"""Which questions a step takes: by what earlier rollouts showed, the same in every process, and the same after a resumption."""

from __future__ import annotations

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from items import first_items
from steps import rollout_of

from tars_fast.config import TrainConfig
from tars_fast.data.items import TRAINING_DATA, VALIDATION_DATA
from tars_fast.learning import selection as selection_module
from tars_fast.learning.batch import Outcome, RolloutCollector, prepare_batch
from tars_fast.learning.rewards.total import Rewards
from tars_fast.learning.scored import ScoredRollout
from tars_fast.learning.selection import Selection, batch_of_step, check_selection, outcomes_of
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.timing import PhaseTimer
from tars_fast.train import command
from tars_fast.types import Modality, Question, UserError

QUESTIONS = [Question(str(number), "?", "1", ("1", "2")) for number in range(40)]
HARD = set(range(0, 40, 5))
"""Right in half of the spoken completions, and always from text; all others are right in both."""
SELECTED = ("gap", "disagreement", "kl")


def outcome_of(number: int) -> Outcome:
    is_hard = number in HARD
    return Outcome(str(number), 8, 80, 0.5 if is_hard else 1.0, 1.0, divergence=0.4 if is_hard else 0.01)


def walk(selection: Selection, steps: range) -> list[list[int]]:
    """The batches of these steps, each with what its questions showed."""
    batches = []
    for step in steps:
        selection.plan(step)
        batches.append(selection.batch(step))
        selection.record(step, [outcome_of(number) for number in dict.fromkeys(batches[-1])])
    return batches


@pytest.fixture
def config(config):
    return dataclasses.replace(config, questions_per_step=8)


def test_all_is_a_function_of_the_step(config):
    selection = Selection(QUESTIONS, config)
    assert walk(selection, range(7)) == [batch_of_step(40, 8, step, config.seed) for step in range(7)]
    assert selection.reserve(6) == []
    assert selection.extra() == {}
    assert walk(Selection(QUESTIONS, dataclasses.replace(config, select="gap", select_floor=1.0)), range(7)) == walk(
        Selection(QUESTIONS, config), range(7)
    ), "a floor of everything"


@pytest.mark.parametrize("select", SELECTED)
def test_hard_questions_are_drawn_more_often_and_the_others_still_come(config, select, tmp_path):
    selection = Selection(QUESTIONS, dataclasses.replace(config, select=select))
    batches = walk(selection, range(60))
    assert all(len(set(batch)) == 8 for batch in batches if len(set(batch[:2])) == 2), "without replacement"
    assert [batch[:2] for batch in batches] == [batch_of_step(40, 2, step, config.seed) for step in range(60)]
    counts = np.bincount(np.concatenate(batches), minlength=40)
    hard = counts[sorted(HARD)]
    others = np.delete(counts, sorted(HARD))
    # A fifth of the questions, which uniform draws would give 12 each.
    assert hard.mean() > 25
    assert others.mean() < 10
    assert others.min() >= 3, "the floor"
    assert selection.record(59, [outcome_of(0)])["selection/coverage"] == 1.0
    selection.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [line["num_drawn"] for line in lines[1:]] == counts.tolist()[1:]
    assert lines[5]["speech"] == 0.5


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_batch_knows_what_was_shown_two_steps_before(config, ahead):
    """Of two walks that differ in what one step showed; a step later with the rollout ahead."""
    config = dataclasses.replace(config, select="gap", rollout_ahead=ahead)
    plain, other = Selection(QUESTIONS, config), Selection(QUESTIONS, config)
    batches = [walk(one, range(4)) for one in (plain, other)]
    assert batches[0] == batches[1]
    other.record(3, [Outcome(str(number), 8, 80, 0.0, 1.0) for number in range(40)])
    later = range(4, 9)
    first_difference = next(
        step for step, one, two in zip(later, walk(plain, later), walk(other, later), strict=True) if one != two
    )
    assert first_difference == 3 + 2 + ahead


@pytest.mark.parametrize("select", ["all", *SELECTED])
def test_a_state_that_was_saved_draws_as_the_unbroken_one(config, select):
    config = dataclasses.replace(config, select=select, max_redraws=1)
    unbroken, resumed = Selection(QUESTIONS, config), Selection(QUESTIONS, config)
    walk(unbroken, range(9))
    file = io.BytesIO()
    torch.save(unbroken.extra(), file)
    file.seek(0)
    resumed.load_extra(torch.load(file, weights_only=True))
    assert walk(resumed, range(9, 30)) == walk(unbroken, range(9, 30))
    assert resumed.reserve(29) == unbroken.reserve(29)
    assert len(set(unbroken.reserve(29)) - set(unbroken.batch(29))) == 8


def test_an_item_that_cannot_be_used_comes_with_the_uniform_draws_alone(config):
    """Its recording has gone: without an estimate it would have the mean score of the others for ever."""
    config = dataclasses.replace(config, select="gap")
    selection, gone, drawn = Selection(QUESTIONS, config), 0, 0
    for step in range(80):
        selection.plan(step)
        uniform, others = selection.batch(step)[:2], selection.batch(step)[2:]
        drawn += gone in others
        selection.record(step, [outcome_of(number) for number in {*uniform, *others} - {gone}])
    assert drawn <= 2, "until it was seen to be gone"
    selection.record(79, [outcome_of(gone)])
    assert not selection._is_unusable[gone]


def test_scores_are_what_their_names_say(config):
    estimates = {
        "speech": np.array([0.0, 0.5, 1.0]),
        "text": np.array([1.0, 0.75, 0.5]),
        "divergence": np.array([-0.1, 0.2, np.nan]),
    }
    scores = {name: score(estimates, 4).tolist() for name, score in selection_module.SCORES.items()}
    # Of two spoken completions at accuracy 1/2, half of the pairs disagree.
    assert scores["gap"] == [1.0, 0.25, 0.5]
    assert scores["disagreement"] == [0.0, 0.5, 0.0]
    assert scores["kl"][:2] == [0.0, 0.2]


DAMAGED = {
    "fewer items": lambda state: state | {"num_drawn": [0] * 39},
    "no estimates": lambda state: {name: value for name, value in state.items() if name != "estimates"},
    "nothing": lambda state: None,
    "another item": lambda state: state | {"batches": {9: ([40], [])}},
    "another kind": lambda state: state | {"batches": {9: 3}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused(config, damage):
    selection = Selection(QUESTIONS, dataclasses.replace(config, select="gap"))
    walk(selection, range(3))
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        selection.load_extra({"selection": DAMAGED[damage](selection.extra()["selection"])})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"select": "gap", "objective": "tars"},
            "--select gap: a step of --questions-per-step 40 takes all 40 training items, .*lower it",
        ),
        ({"max_redraws": 2}, "--max-redraws 2: a step of --questions-per-step 40 takes all 40 training items"),
        (
            {"select": "kl", "objective": "tars"},
            "--select kl: --objective tars computes no divergence .*--select gap or disagreement",
        ),
        ({"select": "gap", "objective": "opd"}, "--select gap: --objective opd samples no written .*--select kl or disag"),
        ({"select": "disagreement", "questions_per_step": 8}, "--select disagreement: goes by right answers, and no .*kl"),
        ({"max_redraws": 1, "questions_per_step": 8}, "--max-redraws 1: goes by right answers, and no training item has one"),
        ({"select": "disagreement", "questions_per_step": 1}, "--select disagreement: of a step of --questions-per-step 1 "),
        ({"select": "disagreement", "questions_per_step": 4, "select_floor": 0.9}, "--select-floor 0.9 draws all uniformly"),
        ({"select_floor": 0.0}, "--select-floor 0.0: must be above 0"),
        ({"select_floor": 1.5}, "--select-floor 1.5: .*at most 1"),
        ({"max_redraws": -1}, "--max-redraws -1"),
        ({"select": "hard"}, "--select hard"),
    ],
)
def test_what_cannot_be_selected_is_refused_in_one_line(settings, line):
    without_answers = [dataclasses.replace(question, answer="", choices=()) for question in QUESTIONS]

    def check() -> None:
        config = TrainConfig(**settings)
        check_selection(config, config.questions_per_step or 40, without_answers if "answers" in line else QUESTIONS)

    with pytest.raises(UserError, match=line):
        check()


@pytest.mark.parametrize(("objective", "group_size"), [("tars", 4), ("opd", 8)])
def test_unanimous_questions_give_way_to_others(model, questions, config, objective, group_size):
    """What stays is as many as before, in the order drawn; those that gave way are counted, and known to the estimates."""
    config = dataclasses.replace(config, group_size=group_size, objective=objective)
    once = rollout_of(model, questions[:3], config)

    def disagrees(rollout, number):
        accuracy = rollout.completion_rewards["accuracy"]
        of_groups = [
            {
                accuracy[row].item()
                for row, one in enumerate(rollout.completions)
                if (one.question, one.modality) == (number, kind)
            }
            for kind in Modality
        ]
        return any(len(values) > 1 for values in of_groups)

    kept = [number for number in range(3) if disagrees(once, number)]
    assert 0 < len(kept) < 3, "else nothing would be shown"
    with ThreadPoolExecutor(2) as background:
        engine = TransformersEngine(model, config.rollout_batch_size)
        collector = RolloutCollector(model, engine, Rewards(config), dataclasses.replace(config, max_redraws=2), background)
        again, _ = collector.collect(prepare_batch(model, questions[:3]), 0, PhaseTimer(model.device), questions[3:])
    ids = [outcome.id for outcome in again.outcomes]
    assert [question.id for question in questions[:3] if questions.index(question) in kept] == ids[: len(kept)]
    assert sorted({one.question for one in again.completions}) == [0, 1, 2]
    assert len(again.completions) == len(again.prompts) == len(once.completions)
    by_id = {question.id: question for question in questions}
    assert again.written == model.encode_prompts([by_id[id] for id in ids[:3]], Modality.TEXT)
    assert again.groups_N.tolist() == once.groups_N.tolist()
    assert len(ids) == len(set(ids)) > 3
    assert sum(disagrees(again, number) for number in range(3)) >= len(kept)
    rows = [row for row, one in enumerate(again.completions) if one.question == 0]
    before = [one for one in once.completions if one.question == kept[0]]
    assert [again.completions[row].token_ids for row in rows] == [one.token_ids for one in before]
    for number, outcome in enumerate(again.outcomes[:3]):
        spoken = [row for row, one in enumerate(again.completions) if (one.question, one.modality) == (number, Modality.SPEECH)]
        assert outcome.speech == again.completion_rewards["accuracy"][spoken].mean()
    flags_N = torch.ones(len(again.completions), dtype=torch.bool)
    scored = ScoredRollout(again, Rewards(config), config, flags_N, flags_N)
    scored.divergences = [
        torch.full((2,), float(one.question)) if one.modality is Modality.SPEECH else torch.empty(0)
        for one in again.completions
    ]
    assert [outcome.divergence for outcome in outcomes_of(scored)] == [0.0, 1.0, 2.0] + [None] * (len(ids) - 3)


def test_a_question_without_an_answer_has_no_accuracy(model, questions, config):
    asked = [dataclasses.replace(questions[0], answer="", choices=()), questions[1]]
    outcomes = rollout_of(model, asked, config).outcomes
    assert (outcomes[0].speech, outcomes[0].text) == (None, None)
    assert None not in (outcomes[1].speech, outcomes[1].text)


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds/")} for line in lines]


def test_a_run_that_selects_resumes_bit_for_bit(tmp_path, capsys):
    config = TrainConfig(
        data=str(first_items(TRAINING_DATA, 12, tmp_path / "training")),
        eval_data=str(first_items(VALIDATION_DATA, 2, tmp_path / "evaluation")),
        output_dir=tmp_path / "run",
        objective="tars",
        select="gap",
        max_redraws=1,
        questions_per_step=2,
        group_size=4,
        num_steps=4,
        save_every=3,
        eval_samples=0,
        tokens_per_micro_batch=4096,
        device="cpu",
    )
    assert command(config) == 0
    run = config.output_dir
    unbroken, drawn = metrics_of(run), (run / "selection.jsonl").read_text()
    assert sum(json.loads(line)["num_drawn"] for line in drawn.splitlines()) == sum(
        one["sampled/questions"] for one in unbroken
    )
    assert any(one["sampled/questions"] > 2 for one in unbroken)
    assert all(one["sampled/completions"] == 4 * one["sampled/questions"] for one in unbroken)
    assert unbroken[-1]["selection/coverage"] > unbroken[0]["selection/coverage"]
    (run / "checkpoint-4").rename(tmp_path / "gone")
    resumed = dataclasses.replace(config, resume=True)
    assert command(resumed) == 0
    assert metrics_of(run) == unbroken
    assert (run / "selection.jsonl").read_text() == drawn

    with pytest.raises(UserError, match=r"the settings differ from those of the run \(select gap -> all\)"):
        command(dataclasses.replace(resumed, select="all"))
    state = torch.load(run / "checkpoint-4" / "trainer_state.pt", weights_only=True)
    del state["extra"]["selection"]
    torch.save(state, run / "checkpoint-4" / "trainer_state.pt")
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged \(trainer_state.pt: .*selection.*checkpoint-3 is whole"):
        command(resumed)
