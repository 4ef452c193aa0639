"""Rewards by import path: what a function gets, what it may return, what is said where it fails, and when it is called."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from items import first_items
from steps import rollout_of, update

from tars_fast.config import RewardName, RunConfig, TrainConfig, parse_reward
from tars_fast.data.items import HELD_OUT_DATA, TRAINING_DATA
from tars_fast.learning.advantages import advantages_of, with_group_means
from tars_fast.learning.metrics import completion_columns, completion_metrics
from tars_fast.learning.rewards.inputs import asks_for, reward_inputs
from tars_fast.learning.rewards.matching import NumericMatch, PatternMatch, exact_match
from tars_fast.learning.rewards.overlong import SoftOverlong
from tars_fast.learning.rewards.reward import AsyncCalls, Reward, RewardError, reward_values
from tars_fast.learning.rewards.total import RESERVED_NAMES, Rewards, load_own_rewards, total_reward
from tars_fast.learning.selection import check_selection
from tars_fast.train import train
from tars_fast.types import Completion, Modality, Question, UserError

SPEECH, TEXT = Modality.SPEECH, Modality.TEXT


def completion(text: str, modality: Modality = SPEECH, question: int = 0, *, tokens: int = 2) -> Completion:
    return Completion(question, modality, (5,) * tokens, (-0.5,) * tokens, text, truncated=False)


QUESTIONS = [Question("a", "One?", "one", ("one", "two")), Question("b", "Two?", "two", ("one", "two"))]
COMPLETIONS = [
    *(completion("said", question=0), completion("The answer is one.", TEXT, 0)),
    *(completion("more", question=1), completion("written", TEXT, 1)),
]
INPUTS = reward_inputs(COMPLETIONS, QUESTIONS, [1, None, None, None])


def values(function, inputs=INPUTS) -> list[float | None]:
    found = reward_values(Reward("mine", function), inputs).tolist()
    return [None if value != value else value for value in found]


def test_what_a_function_gets():
    spoken, written, *_ = INPUTS
    assert (spoken.text, spoken.modality, spoken.token_ids, spoken.logprobs) == ("said", "speech", (5, 5), (-0.5, -0.5))
    assert (spoken.question, spoken.options, spoken.answer) == (QUESTIONS[0], ("one", "two"), "one")
    assert spoken.others == [written]
    assert spoken.reference is written
    assert written.reference is None is INPUTS[2].reference
    # Of several questions, in any order.
    mixed = reward_inputs([COMPLETIONS[2], *COMPLETIONS[:2], COMPLETIONS[3]], QUESTIONS, [3, None, None, None])
    assert mixed[0].reference is mixed[3]
    assert mixed[1].others == [mixed[2]]


@pytest.mark.parametrize("given", [
    lambda inputs: [1, None, 0.5, True],
    lambda inputs: (np.True_, None, np.float32(0.5), torch.tensor(1.0)),
    lambda inputs: torch.tensor([1, 0, 0.5, 1]),
    lambda inputs: np.array([1, 0, 0.5, 1]),
])  # fmt: skip
def test_numbers_of_any_kind_are_taken(given):
    assert values(given) in ([1, None, 0.5, 1], [1, 0, 0.5, 1])


def raises_for_more(inputs):
    return [{"more": ValueError}.get(one.text, float)("1") if one.text != "more" else 1 / 0 for one in inputs]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda inputs: [1.0], "gave 1 values for 4 completions, the first of item 'a'; return a list with"),
        (lambda inputs: 1.0, "gave 1.0 for 4 completions"),
        (lambda inputs: "abcd", "gave 'abcd' for 4 completions"),
        (lambda inputs: (one for one in inputs), "gave <generator"),
        (lambda inputs: [0, 0, "1", 0], "is '1' for a completion of item 'b': 'more'; give a finite number, or None"),
        (lambda inputs: [0, float("nan"), 0, 0], "is nan for a completion of item 'a': 'The answer is one.'"),
        (lambda inputs: [0, 0, 0, -float("inf")], "is -inf for a completion of item 'b': 'written'"),
        (lambda inputs: [1e300] * 4, r"is 1e\+300 for a completion of item 'a'"),
        (lambda inputs: [10**400] * 4, r"is 1000\d+ for a completion of item 'a'"),
        (lambda inputs: [2 + 1j] * 4, r"is \(2\+1j\) for a completion of item 'a'"),
        (lambda inputs: [0, [], 0, 0], r"is \[\] for a completion of item 'a'"),
        (raises_for_more, r"raised ZeroDivisionError\('division by zero'\) for a completion of item 'b': 'more'"),
        (lambda inputs: {}[len(inputs) == 4 and 3], r"raised KeyError\(3\) for a completion|raised KeyError\(3\) for 4"),
        (lambda inputs: exit(3), r"raised SystemExit\(3\) for a completion of item 'a'"),
        (lambda inputs: [0] * (4 // (5 - len(inputs))), "gave 4 values|raised"),
    ],
)  # fmt: skip
def test_what_a_function_may_not_do(function, said):
    if said == "gave 4 values|raised":
        assert values(function) == [0] * 4
        return
    with pytest.raises(RewardError, match=f"reward 'mine' {said}" if "|" not in said else said) as failure:
        values(function)
    assert "\n" not in str(failure.value)


def test_a_function_that_fails_for_all_together_only():
    with pytest.raises(RewardError, match=r"reward 'mine' raised ValueError\('many'\) for 4 completions together"):
        values(lambda inputs: [0.0] if len(inputs) == 1 else (_ for _ in ()).throw(ValueError("many")))


@asks_for(reference=True)
def same_length(completions):
    return [float(len(one.text) == len(one.reference.text)) for one in completions]


def test_rewards_that_need_a_reference_are_asked_about_those_alone():
    assert values(same_length) == [0.0, None, 0.0, None]
    assert values(same_length, reward_inputs(COMPLETIONS, QUESTIONS)) == [0.0, None, 0.0, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine:brief", RewardName("mine:brief", 1.0)),
        ("a.b:brief=0.5", RewardName("a.b:brief", 0.5)),
        ("./x=y/mine.py:brief", RewardName("./x=y/mine.py:brief", 1.0)),
        ("./x=y/mine.py:brief=-2", RewardName("./x=y/mine.py:brief", -2.0)),
        ("judge=0", RewardName("judge", 0.0)),
        ("brief", "names no reward"),
        ("mine:", "names no reward"),
        (":brief", "names no reward"),
        ("mine:a b", "names no reward"),
        ("mine:brief=much", "'much' is no weight"),
        ("mine:brief=nan", "'nan' is no weight"),
        ("mine:brief=", "'' is no weight"),
    ],
)
def test_names_and_weights(text, expected):
    if isinstance(expected, RewardName):
        assert parse_reward(text) == expected
        assert expected.name in ("brief", "judge")
    else:
        with pytest.raises(UserError, match=rf"--reward {text}: {expected}"):
            TrainConfig(reward=(text,))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "opd", "reward": ("exact",)}, "--reward exact: --objective opd trains on no reward"),
        ({"objective": "tars", "reward": ("judge",)}, "--reward judge: needs --judge-url"),
        ({"objective": "tars", "reward": ("judge",), "judge_url": "localhost:8000"}, "--judge-url localhost:8000: is no"),
        ({"judge_url": "http://"}, "--judge-url http://: is no address; give one like http://localhost:8000/v1"),
        ({"judge_url": "http://x:port"}, "--judge-url http://x:port: is no address"),
        ({"judge_model": "x"}, "--judge-model x: has no effect without --judge-url; leave it out"),
        ({"judge_template": "x.jinja"}, "--judge-template x.jinja: has no effect without --judge-url"),
        ({"eval_every": 1, "keep_best": "text_judge"}, "--keep-best text_judge: has no effect without --judge-url"),
        ({"judge_url": "http://x", "tensor_parallel": 2}, "--tensor-parallel 2: not beside --judge-url"),
        ({"objective": "tars", "reward": ("pattern",)}, "--reward pattern: needs --reward-pattern"),
        (
            {"objective": "tars", "reward": ("pattern",), "reward_pattern": "("},
            r"--reward-pattern \(: is no regular expression",
        ),
        ({"numeric_tolerance": 0.1}, "--numeric-tolerance 0.1: has no effect without --reward numeric"),
        ({"overlong_tokens": 3}, "--overlong-tokens 3: has no effect without --reward overlong"),
        ({"reward_timeout": 3.0}, "--reward-timeout 3.0: has no effect without --reward or --judge-url"),
        ({"objective": "cord", "format_weight": 0.1}, "--format-weight 0.1: has no effect without a reward for answers"),
        ({"objective": "opd", "advantage": "rank"}, "--advantage rank: has no effect without a reward"),
        ({"objective": "grpo", "accuracy_weight": 0.0, "format_weight": 0.0}, "--accuracy-weight 0.0: no reward with a weight"),
        ({"accuracy_weight": -1.0}, "--accuracy-weight -1.0: must be 0 or greater"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**settings)


@pytest.mark.parametrize("objective", ["opd", "tars", "cord"])
def test_a_judge_may_watch_a_run_of_any_objective(objective):
    settings = TrainConfig(objective=objective, judge_url="http://x/v1", eval_every=1, keep_best="speech_judge")
    assert settings.needs_answers == (objective == "tars")


def own(config: RunConfig, tmp_path: Path, source: str, *names: str, **settings) -> RunConfig:
    """Settings with rewards of a file."""
    path = tmp_path / f"mine{abs(hash(source))}.py"
    path.write_text(source)
    return dataclasses.replace(config, reward=tuple(f"{path}:{name}" for name in names), **settings)


def test_what_cannot_be_loaded(config, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("value = 3\n")
    found = load_own_rewards(own(config, tmp_path, "from beside import value\ndef f(c): return [value] * len(c)\n", "f=0.5"))
    assert (found.rewards[0].name, found.rewards[0].weight, found.rewards[0].function([1, 2])) == ("f", 0.5, [3, 3])
    for source, reason in (
        ("import absent_module", "No module named 'absent_module'"),
        ("def f(: pass", "invalid syntax"),
        ("raise ValueError('no\\nsuch')", "no; give"),
        ("g = 1", "has no attribute 'f'"),
        ("f = 1", "f is int, no function"),
        ("import sys; sys.exit(1)", "1; give"),
    ):
        with pytest.raises(UserError, match=rf"--reward .*\.py:f: .*{reason}.*") as failure:
            load_own_rewards(own(config, tmp_path, source, "f"))
        assert "\n" not in str(failure.value)
    with pytest.raises(UserError, match=r"No such file"):
        load_own_rewards(dataclasses.replace(config, reward=("./no/such.py:f",)))
    for name in ("reward", "accuracy", "group"):
        with pytest.raises(UserError, match=f"'{name}' is the name of another metric; rename the function"):
            load_own_rewards(dataclasses.replace(config, reward=(f"mine:{name}",)))
    with pytest.raises(UserError, match="two rewards are called 'f'"):
        load_own_rewards(dataclasses.replace(config, reward=("one:f", "two:f")))
    with pytest.raises(UserError, match="--max-redraws 1: goes by right answers, which --accuracy-weight 0"):
        check_selection(dataclasses.replace(config, max_redraws=1, accuracy_weight=0.0), 4, QUESTIONS)
    with pytest.raises(UserError, match="--overlong-tokens 41: more than --max-new-tokens 40"):
        load_own_rewards(dataclasses.replace(config, reward=("overlong",), overlong_tokens=41))


def test_no_column_of_metrics_has_a_name_that_a_reward_may_take(model, questions, config):
    scored, _ = update(model, rollout_of(model, questions[:1], config), config)
    columns = completion_columns(scored)
    beginnings = {name.partition("/")[0] for name in completion_metrics([columns]) if "/" in name}
    assert columns.keys() | beginnings <= RESERVED_NAMES


def test_built_in_rules():
    open_ones = [
        Question("a", "?", answer_text=("The Nile", "Nile River")),
        Question("b", "?", answer_number=1200.0),
        Question("c", "?", rubric="be kind"),
    ]
    texts = ["The answer is the nile.", "The answer is Rhine.", "The answer is 1,212.", "The answer is 1,213.", "kind"]
    completions = [completion(f"<think>a</think> <answer>{text}</answer>", question=number)
                   for text, number in zip(texts, (0, 0, 1, 1, 2), strict=True)]  # fmt: skip
    inputs = reward_inputs(completions, open_ones)
    assert values(exact_match, inputs) == [1, 0, None, None, None]
    assert values(NumericMatch(0.01), inputs) == [None, None, 1, 0, None]
    assert values(NumericMatch(1e-6), inputs)[2] == 0
    # The answer set of the embedded task is number words.
    assert values(NumericMatch(1e-6), INPUTS[2:]) == [0, 0]
    said = reward_inputs([completion("The answer is two.", question=1)], QUESTIONS)
    assert values(NumericMatch(1e-6), said) == [1]
    assert values(PatternMatch(re.compile("^The .* one")), INPUTS[:2]) == [0, 1]
    lengths = reward_inputs([completion("", tokens=count) for count in (1, 80, 81, 90, 100)], QUESTIONS)
    assert values(SoftOverlong(100, 20), lengths) == pytest.approx([0, 0, -0.05, -0.5, -1])


@pytest.fixture
def calls():
    calls = AsyncCalls(concurrency=4, timeout=0.5)
    yield calls
    calls.close()


def test_async_functions_run_together_within_the_bound_and_in_order(calls):
    """The first ones take longest; results stand where their completions do."""
    running, most, begun = 0, 0, []

    async def slow_first(completions):
        nonlocal running, most
        begun.append(len(completions[0].token_ids))
        running += 1
        most = max(most, running)
        (one,) = completions
        await asyncio.sleep(0.2 / (1 + len(one.token_ids)))
        running -= 1
        return [len(one.token_ids) if one.modality == "speech" else None]

    inputs = reward_inputs([completion("", SPEECH if n % 3 else TEXT, tokens=n) for n in range(12)], QUESTIONS)
    late = calls.begin(Reward("mine", slow_first), inputs, [5, 3, *(n for n in range(12) if n not in (3, 5))])
    found = late.of([11, *range(12)]).tolist()
    assert [None if value != value else value for value in found] == [11, *(n if n % 3 else None for n in range(12))]
    assert most == 4
    assert begun[:4] == [5, 3, 0, 1]


async def hangs(completions):
    await asyncio.sleep(0 if completions[0].text == "said" else 60)
    return [0.0]


async def fails(completions):
    raise OSError("refused")


async def gives_two(completions):
    return [0.0, 1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (hangs, r"reward 'mine' took longer than --reward-timeout 0.5 s for a completion of item 'b': 'more'"),
        (fails, r"reward 'mine' raised OSError\('refused'\) for a completion of item 'b': 'more'"),
        (gives_two, r"reward 'mine' gave 2 values for 1 completions, the first of item 'b'"),
    ],
)
def test_async_functions_that_fail(calls, function, said):
    late = calls.begin(Reward("mine", function), INPUTS)
    with pytest.raises(RewardError, match=said):
        late.of([2])


async def blocks(completions):
    if completions[0].text == "more":
        time.sleep(2)
    await asyncio.sleep(60)


async def ignores_its_timeout(completions):
    for _ in range(20):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("function", [blocks, ignores_its_timeout])
def test_calls_that_cannot_be_cancelled_are_not_waited_for(function, monkeypatch):
    """The one that blocks the others is named, whichever of them is waited for."""
    monkeypatch.setattr("tars_fast.learning.rewards.reward._PATIENCE", 0.2)
    monkeypatch.setattr("tars_fast.learning.rewards.reward._INTERVAL", 0.05)
    calls = AsyncCalls(concurrency=2, timeout=0.1)
    late = calls.begin(Reward("mine", function), INPUTS, [2, 0, 1, 3])
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'mine' does not stop after --reward-timeout 0\.1 s for .* item 'b'"):
        late.of([0 if function is blocks else 2])
    calls.close()
    assert time.monotonic() - began < 1.5


def test_calls_that_wait_their_turn_have_their_timeout_before_them(monkeypatch):
    monkeypatch.setattr("tars_fast.learning.rewards.reward._PATIENCE", 0.1)
    monkeypatch.setattr("tars_fast.learning.rewards.reward._INTERVAL", 0.02)

    async def takes_most_of_it(completions):
        await asyncio.sleep(0.1)
        return [1.0]

    calls = AsyncCalls(concurrency=1, timeout=0.3)
    assert calls.begin(Reward("mine", takes_most_of_it), INPUTS * 2).of(range(8)).tolist() == [1.0] * 8
    calls.close()


@pytest.mark.parametrize("function", [hangs, blocks])
def test_calls_that_hang_do_not_keep_a_run_from_ending(function, monkeypatch):
    monkeypatch.setattr("tars_fast.learning.rewards.reward._PATIENCE", 0.2)
    calls = AsyncCalls(concurrency=2, timeout=600)
    calls.begin(Reward("mine", function), INPUTS)
    began = time.monotonic()
    calls.close()
    assert time.monotonic() - began < 1.5


MIXED = """
import asyncio
from tars_fast.learning.rewards.inputs import asks_for

def tokens(completions):
    return [len(c.token_ids) if c.modality == "speech" else None for c in completions]

async def later(completions):
    await asyncio.sleep(0.001)
    return [c.token_ids[0] % 3 for c in completions]

@asks_for(layers="2-3")
def norm(completions):
    return [float(c.states.mul_(2).norm()) / 2 for c in completions]

@asks_for(reference=True, background=True)
def near(completions):
    return [float(c.text == c.reference.text) for c in completions]
"""


def test_rewards_of_every_kind_in_one_update(model, questions, config, tmp_path):
    """Known before the forward pass, beside it, and from its states: together they are R, and each has its figures."""
    config = own(config, tmp_path, MIXED, "tokens=0.1", "later=0.5", "norm=0.01", "near=0.25", tokens_per_micro_batch=200)
    plain = dataclasses.replace(config, reward=())
    rollout = rollout_of(model, questions[:3], config)
    scored, _ = update(model, rollout, config)
    before, _ = update(model, rollout_of(model, questions[:3], plain), plain)
    one = [float(c.token_ids[0] % 3) for c in rollout.completions]
    assert scored.terms["later"].tolist() == one
    speech_N = torch.tensor([c.modality is SPEECH for c in rollout.completions])
    tokens_N = torch.tensor([float(len(c.token_ids)) for c in rollout.completions])
    assert torch.equal(scored.terms["tokens"][speech_N], tokens_N[speech_N])
    assert scored.terms["tokens"][~speech_N].isnan().all()
    # Of the middle two layers, which R_rep of all layers does not disturb.
    assert scored.terms["norm"].isfinite().all()
    assert torch.equal(scored.terms["representation"].nan_to_num(), before.terms["representation"].nan_to_num())
    has_reference = torch.tensor([reference is not None for reference in rollout.references])
    assert torch.equal(scored.terms["near"] == 0, speech_N & (~has_reference | (scored.terms["near"] == 0)))
    total_N = before.rewards_N + 0.5 * torch.tensor(one) + 0.01 * scored.terms["norm"]
    total_N += 0.1 * scored.terms["tokens"].nan_to_num() + 0.25 * scored.terms["near"].nan_to_num()
    torch.testing.assert_close(scored.rewards_N, total_N)
    assert scored.trained_N.all()
    metrics = completion_metrics([completion_columns(scored)])
    assert metrics["tokens/speech"] == pytest.approx(tokens_N[speech_N].mean().item())
    assert metrics["not_applicable/tokens/speech"] == 0.0
    assert metrics["not_applicable/tokens/text"] == 1.0
    assert "tokens/text" not in metrics
    deviations = [tokens_N[rollout.groups_N == group].std(correction=0) for group in rollout.groups_N[speech_N].unique()]
    assert metrics["deviation/tokens/speech"] == pytest.approx(torch.stack(deviations).mean().item(), rel=1e-5)


def test_late_rewards_leave_groups_open_and_timing_changes_nothing(model, questions, config, tmp_path):
    """Whether an async reward is there before the forward pass or not: the same passes, the same bits."""
    source = "import asyncio\nasync def later(c):\n    await asyncio.sleep({})\n    return [len(c[0].token_ids)]\n"
    metrics = []
    for seconds in (0.0, 0.05):
        slow = own(config, tmp_path, source.format(seconds), "later", objective="grpo")
        rollout = rollout_of(model, questions[:2], slow)
        if not seconds:
            rollout.late["later"].of(range(16))
        scored, found = update(model, rollout, slow)
        assert all(scored.may_have_gradient)
        metrics.append(found | completion_metrics([completion_columns(scored)]))
    assert metrics[0] == metrics[1]


def test_a_term_that_does_not_apply_makes_no_difference():
    """Neither to the others of its group, nor to the completion itself."""
    nan = float("nan")
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    term = torch.tensor([1.0, 0.0, nan, nan, nan, nan])
    assert with_group_means(term, groups).tolist() == [1, 0, 0.5, 0.5, 0, 0]
    assert advantages_of(with_group_means(term, groups), groups, "centred").tolist() == [0.5, -0.5, 0, 0, 0, 0]
    terms = {"a": term, "b": torch.tensor([1.0, 1, 1, nan, nan, 2])}
    assert total_reward(terms, {"a": 1.0, "b": 2.0}).tolist()[:3] == [3, 2, 2]
    assert total_reward(terms, {"a": 1.0, "b": 2.0}).isnan().tolist() == [False, False, False, True, True, False]


def test_advantages_by_their_definitions():
    rewards, groups = torch.tensor([1.0, 0.0, 0.5, 0.5, 3.0, 3.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    own, same = rewards[:4], [0.0, 0.0]
    others = torch.stack([(own.sum() - one) / 3 for one in own])
    expected = {
        "centred": own - own.mean(),
        "standardised": (own - own.mean()) / own.std(correction=0),
        "leave-one-out": own - others,
        "rank": torch.tensor([0.5, -0.5, 0.0, 0.0]),
    }
    for kind, values_N in expected.items():
        torch.testing.assert_close(advantages_of(rewards, groups, kind), torch.cat([values_N, torch.tensor(same)]))
    assert advantages_of(torch.tensor([2.0]), torch.tensor([0]), "leave-one-out").tolist() == [0.0]


@pytest.mark.parametrize("kind", ["standardised", "leave-one-out", "rank"])
def test_advantages_and_what_is_centred_together_are_settings(model, questions, config, kind):
    config = dataclasses.replace(config, objective="grpo", advantage=kind, centre_within="question")
    rollout = rollout_of(model, questions[:2], config)
    # Spoken answers of the first question are wrong, written ones right; of the second all are.
    rollout.completion_rewards |= {"accuracy": torch.tensor([0.0] * 4 + [1.0] * 12), "format": torch.zeros(16)}
    scored, _ = update(model, rollout, config)
    expected = {"standardised": 1.0, "leave-one-out": 4 / 7, "rank": 2 / 7}[kind]
    torch.testing.assert_close(scored.advantages_N[:8], torch.tensor([-expected] * 4 + [expected] * 4))
    assert scored.trained_N.tolist() == [True] * 8 + [False] * 8
    metrics = completion_metrics([completion_columns(scored)])
    assert metrics["disagreeing/any"] == 0.5
    assert metrics["disagreeing/speech"] == metrics["disagreeing/text"] == 0.0
    apart, _ = update(model, rollout, dataclasses.replace(config, centre_within="question-and-modality"))
    assert not apart.advantages_N.any()


def test_the_list_of_rewards_follows_settings(config):
    def listed(**settings):
        rewards = Rewards(dataclasses.replace(config, **settings))
        return dict(rewards.weights), [one.name for one in rewards.late]

    assert listed() == (
        {"accuracy": 1, "format": 0.5, "representation": 1, "behaviour": 1}, ["behaviour", "representation"]
    )  # fmt: skip
    assert listed(objective="grpo", accuracy_weight=2.0, format_weight=0.0) == ({"accuracy": 2}, ["representation"])
    assert listed(objective="cord", reward=("exact=0.5",)) == ({"agreement": 1, "exact": 0.5}, ["representation"])
    assert listed(objective="opd") == ({"accuracy": 1, "format": 0.5}, [])
    assert not dataclasses.replace(config, reward=("exact",)).needs_answers
    assert dataclasses.replace(config, reward=("exact=0",)).needs_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("data")
    return SimpleNamespace(
        training=first_items(TRAINING_DATA, 12, folder / "training"),
        held_out=first_items(HELD_OUT_DATA, 4, folder / "held_out"),
    )


def run_config(data, tmp_path, source: str, name: str, **settings) -> TrainConfig:
    (tmp_path / "mine.py").write_text(source)
    small = {"num_steps": 2, "questions_per_step": 2, "group_size": 4, "eval_samples": 0, "save_every": 1, "device": "cpu"}
    small |= {"objective": "tars", "data": str(data.training), "eval_data": str(data.held_out), "output_dir": tmp_path / "run"}
    return TrainConfig(**small | settings, reward=(f"{tmp_path}/mine.py:{name}",))


def test_a_wrong_reward_is_told_before_anything_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tars_fast.learning.run.load_model_and_engine", lambda *_, **__: pytest.fail("the model is loaded"))
    source = "def f(completions):\n    return [1 / len(c.text) for c in completions]\n"
    with pytest.raises(
        UserError, match=r"reward 'f' raised ZeroDivisionError.* for a completion of item 'held_out-0000': ''; "
    ):
        train(run_config(data, tmp_path, source, "f"))


def test_a_reward_that_fails_in_training_keeps_the_last_checkpoint(data, tmp_path):
    """And with the reward mended the run goes on from there."""
    source = "calls = []\ndef f(completions):\n    calls.append(1)\n    return [0.5] * (len(completions) - (len(calls) > 2))\n"
    with pytest.raises(RewardError, match=r"reward 'f' gave 7 values for 8 completions"):
        train(run_config(data, tmp_path, source, "f"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_resumed_run_goes_on_bit_for_bit(data, tmp_path):
    """With calls that end in any order; what another reward would give is refused."""
    source = """
import asyncio, random
async def f(completions):
    await asyncio.sleep(random.SystemRandom().random() / 50)
    return [len(completions[0].text) / 40 if sum(completions[0].token_ids) % 2 else None]
"""
    config = run_config(data, tmp_path, source, "f=0.5", num_steps=3, keep_checkpoints=3, advantage="standardised")
    train(config)
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(again / name)
    with pytest.raises(UserError, match=r"the settings differ from those of the run .*reward .*f=0.5.* -> .*f=0.25"):
        train(
            run_config(data, tmp_path, source, "f=0.25", num_steps=3, output_dir=again, resume=True, advantage="standardised")
        )
    # Where the calls go and how many may is no part of what a run is.
    train(dataclasses.replace(config, output_dir=again, resume=True, reward_concurrency=3, reward_timeout=5.0))
    figures = [
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith("seconds/")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (run, again)
    ]
    assert figures[0] == figures[1]
    assert any(0 < line["not_applicable/f/speech"] < 1 for line in figures[0])
    assert (run / "predictions_after.jsonl").read_bytes() == (again / "predictions_after.jsonl").read_bytes()
