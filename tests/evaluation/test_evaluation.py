"""Evaluation figures against hand-made per-item results, and errors that must not turn into wrong answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tars_fast.data.transcription import normalised, word_error_rate
from tars_fast.evaluation.answering import TRANSCRIBE, EvaluationSettings, Evaluator, layer_cosines, slice_data
from tars_fast.evaluation.figures import change_since, overall, overall_change, report, text_reference
from tars_fast.evaluation.results import (
    Answered,
    Evaluated,
    ItemResult,
    Transcribed,
    check_same_items,
    read_predictions,
)
from tars_fast.evaluation.scorers import SCORERS, Reading, Scorer
from tars_fast.learning.rewards.answers import extract_answer
from tars_fast.learning.rewards.behaviour import HashedNgrams
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.types import Modality, Question, UserError

SETTINGS = EvaluationSettings(max_new_tokens=40, num_samples=0, temperature=1.0, seed=0)


def answered(correct: bool, extracted: str | None = "A", sampled: float | None = None) -> Answered:
    reading = Reading(extracted, False, bool(correct))
    return Answered("", False, {"strict": reading, "letter": reading}, sampled)


def items(speech, text, unparsed=None, data="d", category=None, sampled=None) -> list[ItemResult]:
    """Results whose spoken and written answers are right or wrong as listed; `unparsed` counts unreadable ones."""
    results = []
    for number, (heard, read) in enumerate(zip(speech, text, strict=True)):
        missing = 0 if unparsed is None else unparsed[number]
        spoken = answered(heard, None if missing else "A", None if sampled is None else sampled[number])
        written = answered(read, None if missing == 2 else "A", None if sampled is None else 1.0)
        evaluated = Evaluated(spoken, written, 0.5, (0.25, 0.75), None)
        results.append(ItemResult(data, f"i{number}", category[number] if category else "", "?", "A", evaluated, None))
    return results


def failing(results, numbers) -> list[ItemResult]:
    return [
        dataclasses.replace(result, evaluated=None, failed="gone") if number in numbers else result
        for number, result in enumerate(results)
    ]


def test_report_divides_by_the_fixed_reference():
    after = items([1, 1, 0, 1], [1, 1, 0, 0], [0, 2, 0, 1])
    made = report(after, 1.0)
    assert made["speech_accuracy"] == 0.75
    assert made["text_accuracy"] == 0.5
    assert made["mrr"] == 75.0
    assert made["mrr_same_model"] == 150.0
    assert made["unparsed"] == 3
    assert (made["speech_unparsed"], made["text_unparsed"]) == (0.5, 0.25)
    assert made["layer_cosine"] == [0.25, 0.75]
    assert made["layer_cosine_ci95"] == [[0.25, 0.25], [0.75, 0.75]]
    assert made["behaviour_similarity_ci95"] == [0.5, 0.5]
    assert made["scorers"]["strict"]["speech_accuracy"] == 0.75
    assert made["scorers"]["letter"]["text_unparsed"] == 0.25
    assert made["scorers"]["voicebench"] == {"num_items": 0}


def test_a_reference_by_item_is_paired():
    """An interval around 100 % has no width where speech is right just where the reference is."""
    made = report(items([1, 0, 1, 0], [1, 1, 1, 1]), text_reference(items([0] * 4, [1, 0, 1, 0])))
    assert made["mrr"] == 100.0
    assert made["mrr_ci95"] is None, "some resamples have no correct item"
    twenty = items([1, 0] * 10, [1] * 20)
    assert report(twenty, text_reference(items([0] * 20, [1, 0] * 10)))["mrr_ci95"] == pytest.approx([100.0, 100.0])
    # What the reference could not evaluate it cannot be divided by; the other figures keep it.
    made = report(items([1, 0, 1, 1], [1] * 4), text_reference(failing(items([0] * 4, [1, 1, 0, 0]), {0})))
    assert made["mrr"] == pytest.approx(200.0)
    assert made["speech_accuracy"] == 0.75


def test_failed_items_are_counted_apart_from_wrong_ones():
    made = report(failing(items([1, 0, 1, 0], [1, 1, 1, 1]), {1, 3}), 1.0)
    assert (made["num_items"], made["num_failed"]) == (2, 2)
    assert made["speech_accuracy"] == 1.0
    assert made["failed"] == {"i1": "gone", "i3": "gone"}
    nothing = report(failing(items([1, 0], [1, 1]), {0, 1}), 1.0)
    assert (nothing["num_items"], nothing["num_failed"]) == (0, 2)
    assert "speech_accuracy" not in nothing


def test_accuracy_by_category():
    results = failing(items([1, 0, 1, 0], [1, 1, 0, 1], category=["law", "law", "art", "art"]), {3})
    categories = report(results, 1.0)["categories"]
    assert list(categories) == ["art", "law"]
    assert [categories[name]["speech_accuracy"] for name in categories] == [1.0, 0.5]
    assert [categories[name]["text_accuracy"] for name in categories] == [0.0, 1.0]
    assert [categories[name]["num_failed"] for name in categories] == [1, 0]
    assert "categories" not in report(items([1], [1]), 1.0)


def test_data_sets_count_the_same_whatever_their_size():
    small, large = items([1, 1], [1, 1], data="small"), items([0] * 50 + [1] * 50, [1] * 100, data="large")
    together = overall([*small, *large], 1.0)
    assert together["speech_accuracy"] == 0.75
    assert together["mrr"] == 75.0
    assert (together["num_items"], together["num_failed"]) == (102, 0)
    # Only the large one varies: half its standard error of 5 points.
    low, high = together["speech_accuracy_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)
    alone = overall(large, 1.0)
    assert alone["speech_accuracy_ci95"] == report(large, 1.0)["speech_accuracy_ci95"]


def test_change_is_paired_by_item():
    """The same items gained from before to after: the paired interval excludes 0 where unpaired ones would overlap."""
    before, after = items([0] * 10 + [1] * 30, [1] * 40), items([0] * 2 + [1] * 38, [1] * 40)
    change = change_since(after, before)
    assert change["speech_accuracy"] == pytest.approx(0.2)
    assert change["speech_accuracy_ci95"][0] > 0
    assert change["text_accuracy_ci95"] == [0.0, 0.0]
    assert (change["speech_accuracy_gained"], change["speech_accuracy_lost"]) == (8, 0)
    assert change["speech_accuracy_mcnemar_p"] == pytest.approx(2 / 2**8)
    assert change["text_accuracy_mcnemar_p"] == 1.0
    # Order is nothing, ids are everything.
    assert change_since(after[::-1], before)["speech_accuracy"] == change["speech_accuracy"]
    fewer = change_since(failing(after, {2, 3}), failing(before, {39}))
    assert fewer["num_items"] == 37
    assert fewer["speech_accuracy_gained"] == 6
    assert overall_change(after, before)["speech_accuracy_ci95"] == pytest.approx(change["speech_accuracy_ci95"])


def test_another_evaluation_must_be_of_the_same_items():
    data = {"d": [Question(f"i{number}", "?", "A", ("A", "B")) for number in range(4)]}
    check_same_items(data, items([1] * 4, [1] * 4), "--compare X")
    others = [*items([1] * 3, [1] * 3)[1:], *items([1], [1], data="e")]
    others[0] = dataclasses.replace(others[0], answer="B")
    with pytest.raises(UserError, match=r"^--compare X: .* 2 of these 4 are not in it, 1 of its are not here, 1 ask or answer"):
        check_same_items(data, others, "--compare X")


def test_round_trip_through_a_line(tmp_path):
    transcribed = Transcribed("a b", "a c", 0.5)
    results = items([1, 0], [1, 1], sampled=[0.5, 1.0])
    results[0] = dataclasses.replace(results[0], evaluated=dataclasses.replace(results[0].evaluated, transcribed=transcribed))
    results = [*failing(results, {1}), *items([0], [1], data="zwei\u2028 ü\ud800")]
    (tmp_path / "predictions.jsonl").write_text("".join(result.to_line() for result in results) + results[0].to_line()[:-9])
    assert read_predictions(tmp_path, "") == results, "without the half line at the end"
    assert read_predictions(tmp_path / "evaluation.json", "") == results
    (tmp_path / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="not the predictions of an evaluation by this version"):
        read_predictions(tmp_path, "--compare")


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


def test_a_failing_item_is_reported_and_no_wrong_answer(model, questions):
    """Defect 15: neither an empty answer nor silence, and the other items as if it had not been there."""
    engine = TransformersEngine(model, 16)
    broken = [*questions[:2], dataclasses.replace(questions[2], audio=Path("no-such-recording.wav")), questions[3]]
    done = []
    results = Evaluator(model, engine, HashedNgrams(), SETTINGS).evaluate(broken, "d", done.append)
    assert [result.id for result in results] == [question.id for question in broken]
    assert [result.failed is None for result in results] == [True, True, False, True]
    assert "no-such-recording" in results[2].failed
    assert results[2].evaluated is None
    alone = Evaluator(model, engine, HashedNgrams(), SETTINGS).evaluate([*questions[:2], questions[3]], "d", done.append)
    assert alone == [results[0], results[1], results[3]]
    assert done == [4, 3]
    assert all(r.failed for r in Evaluator(model, engine, HashedNgrams(), SETTINGS).evaluate(broken[2:3], "d", done.append))


class Unlucky(HashedNgrams):
    """A text embedder that fails on one text, alone or among others; without an error by giving NaN for it."""

    def __init__(self, text: str, error: Exception | None = None):
        super().__init__()
        self.text, self.error = text, error

    def similarity(self, left, right):
        unlucky = torch.tensor([self.text in pair for pair in zip(left, right, strict=True)])
        if self.error is not None and unlucky.any():
            raise self.error
        return super().similarity(left, right).masked_fill(unlucky, torch.nan)


def test_a_completion_that_something_fails_on_is_one_failed_item(model, questions, monkeypatch):
    """Whatever a scorer or the text embedder raises; the other items are as they were."""
    engine = TransformersEngine(model, 16)
    settings = dataclasses.replace(SETTINGS, num_samples=2)
    before = Evaluator(model, engine, HashedNgrams(), settings).evaluate(questions, "d", lambda _: None)
    said = before[1].evaluated.speech.completion
    unlucky = {result.id for result in before if said in (result.evaluated.speech.completion, result.evaluated.text.completion)}

    def check(results, reason):
        assert [result.id for result in results] == [question.id for question in questions]
        for result, whole in zip(results, before, strict=True):
            assert result == whole or (result.id in unlucky and result.evaluated is None and reason in result.failed)
        assert {result.id for result in results if result.failed} == unlucky != {question.id for question in questions}

    embedder = Unlucky(said, KeyError("token"))
    check(Evaluator(model, engine, embedder, settings).evaluate(questions, "d", lambda _: None), "KeyError('token')")
    check(Evaluator(model, engine, Unlucky(said), settings).evaluate(questions, "d", lambda _: None), "nan for ")
    embedder = Unlucky(said, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(model, engine, embedder, settings).evaluate(questions, "d", lambda _: None)

    strict = SCORERS["strict"].read
    scorer = Scorer(lambda completion, question: [][0] if completion == said else strict(completion, question))
    monkeypatch.setitem(SCORERS, "strict", scorer)
    check(Evaluator(model, engine, HashedNgrams(), settings).evaluate(questions, "d", lambda _: None), "scorer 'strict' raised")


def test_readings_and_samples_are_those_of_the_completions(model, questions):
    settings = dataclasses.replace(SETTINGS, num_samples=2)
    results = Evaluator(model, TransformersEngine(model, 16), HashedNgrams(), settings).evaluate(questions, "d", lambda _: None)
    for result, question in zip(results, questions, strict=True):
        for part in (result.evaluated.speech, result.evaluated.text):
            assert part.readings["strict"].extracted == extract_answer(part.completion, question.choices)
            assert part.readings["strict"].correct == (part.readings["strict"].extracted == question.answer)
            assert part.sampled_accuracy in (0.0, 0.5, 1.0)
    assert len({result.evaluated.text.completion for result in results}) > 1


@pytest.mark.parametrize(
    ("num_items", "sizes"), [(10, [10]), (70, [32, 32, 6]), (500, 7 * [63] + [59]), (3000, 23 * [128] + [56])]
)
def test_small_data_sets_give_eight_processes_work(num_items, sizes):
    slices = slice_data("d", range(num_items))
    assert [len(part.questions) for part in slices] == sizes
    assert [number for part in slices for number in part.questions] == list(range(num_items))
    assert all((part.data, part.start) == ("d", part.questions[0]) for part in slices)


def test_slices_change_nothing_but_the_seeds_of_their_samples(model, questions, monkeypatch):
    engine = TransformersEngine(model, 16)
    whole = Evaluator(model, engine, HashedNgrams(), SETTINGS).evaluate(questions, "d", lambda _: None)
    monkeypatch.setattr("tars_fast.evaluation.answering.ITEMS_AT_ONCE", 4)
    parts = Evaluator(model, engine, HashedNgrams(), SETTINGS).evaluate(questions, "d", lambda _: None)
    for one, other in zip(whole, parts, strict=True):
        assert one.evaluated.speech == other.evaluated.speech
        assert one.evaluated.layer_cosine == pytest.approx(other.evaluated.layer_cosine, abs=1e-5)


def test_transcription_hears_the_recording_under_its_own_instruction(model, questions):
    """The recording first, then the instruction, in the processor's own template; what comes of it is compared."""
    heard = [dataclasses.replace(question, transcript=question.text) for question in questions[:3]]
    (prompt,) = model.encode_prompts(heard[:1], Modality.SPEECH, TRANSCRIBE)
    (usual,) = model.encode_prompts(heard[:1], Modality.SPEECH)
    assert all(torch.equal(*clips) for clips in zip(prompt.audio_clips, usual.audio_clips, strict=True))
    rendered = model.prompts.render(heard[0], Modality.SPEECH, instruction=TRANSCRIBE)
    assert rendered.index("<|AUDIO|>") < rendered.index(TRANSCRIBE)
    assert "helpful assistant" in rendered
    assert model.prompts.preset.system_prompt not in rendered
    settings = dataclasses.replace(SETTINGS, transcribe=True, max_new_tokens=8)
    engine = TransformersEngine(model, 8)
    results = Evaluator(model, engine, HashedNgrams(), settings).evaluate(heard, "d", lambda _: None)
    prompts = model.encode_prompts(heard, Modality.SPEECH, TRANSCRIBE)
    completions = engine.generate(prompts, range(3), Sampling(1, 8, 0.0, 0))
    for result, completion, question in zip(results, completions, heard, strict=True):
        transcribed = result.evaluated.transcribed
        assert (transcribed.transcription, transcribed.transcript) == (completion.text, question.text)
        assert transcribed.word_error_rate == word_error_rate(question.text, completion.text) > 0
    pairs = [[getattr(r.evaluated.transcribed, side) for r in results] for side in ("transcript", "transcription")]
    said, heard = ([normalised(text) for text in side] for side in pairs)
    assert report(results, 1.0)["word_error_rate"] == pytest.approx(jiwer.wer(said, heard)), "of all words together"


def test_the_engines_memory_is_free_while_states_are_compared(model, questions, monkeypatch):
    """`layer_cosines` is a trainer's forward pass: the KV cache must be gone by then, whatever the size of the data."""
    engine, order = TransformersEngine(model, 8), []
    monkeypatch.setattr(engine, "release_memory", lambda: order.append("released"))
    monkeypatch.setattr(model, "forward", lambda layout, forward=model.forward: order.append("forward") or forward(layout))
    settings = EvaluationSettings(max_new_tokens=8, num_samples=1, temperature=1.0, seed=0)
    Evaluator(model, engine, HashedNgrams(), settings).evaluate(questions[:3], "d", lambda _: None)
    assert order == ["released", "forward"]


def test_a_forward_pass_of_the_evaluation_is_bounded(model, questions, monkeypatch):
    """Few items at a time where prompts are long; the result is the same."""
    engine = TransformersEngine(model, 8)
    prompts = {modality: model.encode_prompts(questions, modality) for modality in Modality}
    greedy = Sampling(num_completions=1, max_new_tokens=8, temperature=0.0, seed=0)
    completions = {modality: engine.generate(prompts[modality], range(len(questions)), greedy) for modality in Modality}
    expected = layer_cosines(model, prompts, completions)
    sizes = []
    monkeypatch.setattr("tars_fast.evaluation.answering.EVALUATION_TOKENS", 400)
    monkeypatch.setattr(
        model, "forward", lambda layout, forward=model.forward: sizes.append(layout.token_ids.numel()) or forward(layout)
    )
    np.testing.assert_allclose(layer_cosines(model, prompts, completions), expected, atol=1e-5)
    assert len(sizes) > 1
    assert max(sizes) <= 400
