"""Evaluation figures against hand-made per-item results, and errors that must not turn into wrong answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tars_fast.evaluation import Evaluation, evaluate, layer_cosines
from tars_fast.rewards import HashedNgrams
from tars_fast.sampling import Sampling
from tars_fast.transformers_engine import TransformersEngine
from tars_fast.types import Modality, UserError


def items(speech, text, unparsed=None) -> Evaluation:
    count = len(speech)
    return Evaluation(
        speech_correct=np.array(speech, dtype=float),
        text_correct=np.array(text, dtype=float),
        num_unparsed=np.array(unparsed or [0] * count),
        behaviour_similarity=np.full(count, 0.5),
        layer_cosine=np.tile([0.25, 0.75], (count, 1)),
        speech_correct_sampled=None,
        text_correct_sampled=None,
        speech_texts=("",) * count,
        text_texts=("",) * count,
    )


def test_report_divides_by_the_fixed_reference():
    after = items([1, 1, 0, 1], [1, 1, 0, 0], [0, 2, 0, 1])
    report = after.report(np.array([1.0, 1, 1, 1]))
    assert report["speech_accuracy"] == 0.75
    assert report["text_accuracy"] == 0.5
    assert report["mrr"] == 75.0
    assert report["mrr_same_model"] == 150.0
    assert report["unparsed"] == 3
    assert report["layer_cosine"] == [0.25, 0.75]
    assert report["layer_cosine_ci95"] == [[0.25, 0.25], [0.75, 0.75]]
    assert report["behaviour_similarity_ci95"] == [0.5, 0.5]


def test_change_is_paired_by_item():
    """The same items gained from before to after: the paired interval excludes 0 where unpaired ones would overlap."""
    before, after = items([0] * 10 + [1] * 30, [1] * 40), items([0] * 2 + [1] * 38, [1] * 40)
    change = after.change_since(before)
    assert change["speech_accuracy"] == pytest.approx(0.2)
    assert change["speech_accuracy_ci95"][0] > 0
    assert change["text_accuracy_ci95"] == [0.0, 0.0]


def test_round_trip_through_json():
    import json

    greedy_only = items([1, 0], [1, 1])
    sampled = dataclasses.replace(
        greedy_only, speech_correct_sampled=np.array([0.5, 1.0]), text_correct_sampled=np.array([1.0, 1.0])
    )
    for original in (greedy_only, sampled):
        again = Evaluation.from_json(json.loads(json.dumps(original.to_json())))
        assert again.report(again.text_correct) == original.report(original.text_correct)


def test_layer_cosines_match_plain_transformers(model, questions):
    prompts = {modality: model.encode_prompts(questions, modality) for modality in Modality}
    engine = TransformersEngine(model, 16)
    completions = {
        modality: engine.generate(prompts[modality], range(len(questions)), Sampling(1, 40, 0.0, 0)) for modality in Modality
    }
    cosines = layer_cosines(model, prompts, completions)
    pooled = []
    for modality in Modality:
        prompt, completion = prompts[modality][2], completions[modality][2]
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        with torch.no_grad():
            output = model.module(inputs_embeds=model.embed_tokens(ids, [prompt], [0]), output_hidden_states=True)
        pooled.append(torch.stack([s[0, len(prompt.token_ids) :].mean(0) for s in output.hidden_states[1:]]))
    expected = F.cosine_similarity(*pooled, dim=-1)
    np.testing.assert_allclose(cosines[2], expected, atol=1e-5)


def test_a_failing_item_is_an_error_not_a_wrong_answer(model, questions):
    """Defect 15."""
    broken = [*questions[:2], dataclasses.replace(questions[2], audio=Path("no-such-recording.wav"))]
    with pytest.raises(UserError, match="no-such-recording"):
        evaluate(
            model, TransformersEngine(model, 16), HashedNgrams(), broken, max_new_tokens=40, num_samples=0, temperature=1.0,
            seed=0,
        )  # fmt: skip


def test_the_engines_memory_is_free_while_states_are_compared(model, questions, monkeypatch):
    """`layer_cosines` is a trainer's forward pass: the KV cache must be gone by then, whatever the size of the data."""
    engine, order = TransformersEngine(model, 8), []
    monkeypatch.setattr(engine, "release_memory", lambda: order.append("released"))
    monkeypatch.setattr(model, "forward", lambda layout, forward=model.forward: order.append("forward") or forward(layout))
    settings = {"max_new_tokens": 8, "num_samples": 1, "temperature": 1.0, "seed": 0}
    evaluate(model, engine, HashedNgrams(), questions[:3], **settings)
    assert order == ["released", "forward"]


def test_a_forward_pass_of_the_evaluation_is_bounded(model, questions, monkeypatch):
    """Few items at a time where prompts are long; the result is the same."""
    engine = TransformersEngine(model, 8)
    prompts = {modality: model.encode_prompts(questions, modality) for modality in Modality}
    greedy = Sampling(num_completions=1, max_new_tokens=8, temperature=0.0, seed=0)
    completions = {modality: engine.generate(prompts[modality], range(len(questions)), greedy) for modality in Modality}
    expected = layer_cosines(model, prompts, completions)
    sizes = []
    monkeypatch.setattr("tars_fast.evaluation.EVALUATION_TOKENS", 400)
    monkeypatch.setattr(
        model, "forward", lambda layout, forward=model.forward: sizes.append(layout.token_ids.numel()) or forward(layout)
    )
    np.testing.assert_allclose(layer_cosines(model, prompts, completions), expected, atol=1e-5)
    assert len(sizes) > 1
    assert max(sizes) <= 400
