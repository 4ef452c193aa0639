"""The analysis against other code's figures, identical prompts, probes of known effect, each architecture; the command."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import re
import shutil
import sys
import tracemalloc
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from checkpoints import MAKERS
from items import first_items
from pages import HOSTILE, Elements, check_nothing_foreign, check_plays, on_a_phone
from safetensors.torch import load_file, save_file

from tars_fast import analyse
from tars_fast.analysis import alignment
from tars_fast.analysis import drift as analysis
from tars_fast.analysis.alignment import compare_layers, content_span, warp
from tars_fast.analysis.drift import Analysis, AnalysisSettings, _chain, _compare, change_since, first_divergence
from tars_fast.analysis.paths import METRICS, PathIntervention, Target, compare_tokens, critical_tokens
from tars_fast.analysis.probes import Calibration, Moments, repeated
from tars_fast.analysis.row import KINDS
from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.data.items import BUNDLED, HELD_OUT_DATA, VALIDATION_DATA, load_questions
from tars_fast.data.splits import choose_by_id
from tars_fast.evaluation.answering import EvaluationSettings, Evaluator
from tars_fast.evaluation.scorers import read_strictly
from tars_fast.learning.rewards.behaviour import HashedNgrams
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_module
from tars_fast.reports.analysis_page import Analysed, draw_analysis, item_results, write_analysis
from tars_fast.reports.page import REPORT
from tars_fast.reports.plots import CKA_PLOT, DRIFT_PLOT
from tars_fast.reports.tables import print_analysis
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.cli import FAILED, MISUSED
from tars_fast.support.console import PlainConsole
from tars_fast.types import Completion, Modality, Question, UserError

SETTINGS = AnalysisSettings(max_new_tokens=40, base_layer=2, other_base_layers=(1, 2), seed=0)
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def items() -> list[Question]:
    return load_questions(VALIDATION_DATA)[:6]


def analysed(model, items, calibrations=(), settings=SETTINGS, interventions=()) -> tuple[Analysis, list[dict]]:
    made = Analysis(model, TransformersEngine(model, 32), settings, calibrations, interventions)
    return made, [record for start in range(0, len(items), 4) for record in made.add(items[start : start + 4])]


def test_drift_is_what_the_evaluation_says(model, items):
    made, records = analysed(model, items)
    how = EvaluationSettings(max_new_tokens=40, num_samples=0, temperature=1.0, seed=0)
    others = Evaluator(model, TransformersEngine(model, 32), HashedNgrams(), how).evaluate(items, "d", lambda _: None)
    for record, other in zip(records, others, strict=True):
        answers = other.evaluated
        assert (record["speech"], record["text"]) == (answers.speech.completion, answers.text.completion)
        assert record["own_pooled"] == pytest.approx(answers.layer_cosine, abs=1e-5)
        assert record["speech_accuracy"] == answers.speech.readings["strict"].correct
    assert {record["speech_accuracy"] for record in records} == {0.0, 1.0}, "both kinds of items are there"
    means = made.report()
    assert means["num_items"] == 6
    for kind in KINDS:
        for what in ("pooled", "tokens"):
            expected = np.mean([record[f"{kind}_{what}"] for record in records], axis=0)
            assert means["drift"][kind][what] == pytest.approx(expected)
    for record in records:
        if record["same_completion"]:
            assert record["own_tokens"] == pytest.approx(record["forced_tokens"], abs=1e-6)


def states_of(model, prompt, completion) -> list[torch.Tensor]:
    """Layers 1 to L of a completion's tokens, by transformers alone."""
    token_ids = torch.tensor([prompt.token_ids + completion.token_ids])
    inputs = model.embed_tokens(token_ids, [prompt], [0])
    states = model.language_model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False).hidden_states
    return [layer[0, len(prompt.token_ids) :] for layer in states[1:]]


def check_forced_drift(model, items, settings) -> None:
    made, _ = analysed(model, items, settings=settings)
    engine = TransformersEngine(model, 32)
    prompts = {modality: model.encode_prompts(items, modality) for modality in Modality}
    greedy = Sampling(num_completions=1, max_new_tokens=settings.max_new_tokens, temperature=0.0, seed=0)
    written = engine.generate(prompts[Modality.TEXT], range(len(items)), greedy)
    expected = {"pooled": [], "tokens": [], "along": []}
    for number, completion in enumerate(written):
        layers = [states_of(model, prompts[modality][number], completion) for modality in Modality]
        cosines = torch.stack([torch.cosine_similarity(x, y, dim=-1) for x, y in zip(*layers, strict=True)])
        stretch = torch.arange(cosines.shape[1]) * 10 // cosines.shape[1]
        means = [torch.stack([layer.mean(0) for layer in side]) for side in layers]
        expected["pooled"].append(torch.cosine_similarity(*means, dim=-1))
        expected["tokens"].append(cosines.mean(1))
        expected["along"].append(torch.stack([cosines[:, stretch == place].mean(1) for place in range(10)], dim=1))
    drift = made.report()["drift"]["forced"]
    for name, values in expected.items():
        np.testing.assert_allclose(drift[name], torch.stack(values).mean(0).numpy(), atol=1e-4, err_msg=name)


@torch.no_grad()
def test_token_by_token_under_both_prompts_as_transformers_has_it(model, items):
    check_forced_drift(model, items, SETTINGS)


def write_items(folder, *seconds: float) -> None:
    """Noise of these lengths."""
    lines = []
    for number, length in enumerate(seconds):
        wave = 0.1 * np.random.default_rng(number).standard_normal(round(length * SAMPLE_RATE))
        soundfile.write(folder / f"{number}.wav", wave, SAMPLE_RATE, subtype="FLOAT")
        item = {"id": str(number), "question": f"What is {number} plus one?", "options": ["one", "two"], "answer": "A"}
        lines.append(json.dumps(item | {"audio": f"{number}.wav"}) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))


@torch.no_grad()
def check_calibration_of_padded_prompts(model, items) -> None:
    """Prompts of several lengths in a batch, several samples of each, are changed where each is changed by itself."""
    calibration = Calibration(1)
    analysed(model, items, [calibration], AnalysisSettings(max_new_tokens=12, base_layer=1, other_base_layers=(), seed=0))
    heard = model.encode_prompts(items, Modality.SPEECH)
    numbers = range(len(items))
    drawn = Sampling(num_completions=2, max_new_tokens=12, temperature=1.0, seed=0)
    greedy = dataclasses.replace(drawn, num_completions=1, temperature=0.0)
    plain = TransformersEngine(model, 1).generate(heard, numbers, greedy)
    with calibration.applied(model):
        together, alone = (TransformersEngine(model, size).generate(heard, numbers, greedy) for size in (32, 1))
        sampled = TransformersEngine(model, 32).generate(heard, numbers, drawn)
        layout = model.pack([prompt for prompt in heard for _ in range(2)], sampled)
        logits = model.head(model.forward(layout)).float() + model.suppressed_bias
    logprobs = logits.log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]
    rollout = torch.tensor([value for one in sampled for value in one.rollout_logprobs])
    torch.testing.assert_close(logprobs, rollout, atol=1e-3, rtol=1e-3)
    firsts = np.array([[one.rollout_logprobs[0] for one in completions] for completions in (together, alone, plain)])
    np.testing.assert_allclose(firsts[0], firsts[1], atol=1e-4)
    assert (np.abs(firsts[1] - firsts[2]) > 1e-3).all()


@pytest.mark.parametrize("name", [pytest.param("qwen2-audio", marks=pytest.mark.slow), "qwen2.5-omni", "phi-4-multimodal"])
def test_each_architecture(name, tmp_path, monkeypatch, capsys):
    """Random weights of the genuine classes: drift is transformers' own, and the command with its probes goes through."""
    folder = MAKERS[name](tmp_path / "model")
    write_items(tmp_path, 1.0, 2.35, 0.4)
    prompts = load_prompt_format(find_preset(str(folder)), str(folder))
    model = SpeechModel(load_module(prompts, str(folder), torch.device("cpu"), torch.float32), prompts)
    settings = AnalysisSettings(max_new_tokens=12, base_layer=1, other_base_layers=(), seed=0)
    with torch.no_grad():
        check_forced_drift(model, load_questions(tmp_path / "items.jsonl"), settings)
    check_calibration_of_padded_prompts(model, load_questions(tmp_path / "items.jsonl"))
    flags = ("--model", folder, "--data", tmp_path / "items.jsonl", "--max-new-tokens", 12, "--calibrate", 0, 1, "--repeat", 2)
    flags += ("--angle-projection", 1, "--output-dir", tmp_path / "out")
    assert run(*flags, monkeypatch=monkeypatch, capsys=capsys) == (0, "")
    made = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert made["num_items"] == 3
    assert len(made["probes"]) == 4
    assert list(made["interventions"]) == ["plain", "angle_1_lowest_3", "angle_1_all"]


def test_long_recordings_are_encoded_as_the_setting_says(tmp_path, monkeypatch, capsys):
    folder = MAKERS["qwen2-audio"](tmp_path / "model")
    write_items(tmp_path, 1.0, 31.0)
    flags = ("--model", folder, "--data", tmp_path / "items.jsonl", "--max-new-tokens", 4, "--output-dir", tmp_path / "out")
    status, error = run(*flags, monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert "31.00 s" in error
    assert run(*flags, "--long-audio", "chunk", "--repeat", 2, monkeypatch=monkeypatch, capsys=capsys) == (0, "")
    made = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert made["num_items"] == made["probes"]["repeat_2"]["num_items"] == 2
    flags = (*flags[:-1], tmp_path / "other", "--long-audio", "truncate", "--compare", tmp_path / "out")
    status, error = run(*flags, monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert "long_audio chunk -> truncate" in error
    assert not (tmp_path / "other").exists()


def test_identical_prompts_give_one_everywhere(model, items, monkeypatch):
    def written(model, _engine, prepared, _limit):
        return model.encode_prompts(items[: len(prepared)], Modality.TEXT)

    monkeypatch.setattr(analysis, "encode_speech", written)
    monkeypatch.setattr(Analysis, "_places", lambda *_: (torch.arange(8, 20), torch.arange(8, 20)))
    interventions = [PathIntervention(kind, 1, number) for kind in ("angle", "length") for number in (3, None)]
    made, _ = analysed(model, items[:4], interventions=interventions)
    report = made.report()
    for name in METRICS:
        expected = 0.0 if "distance" in name and name != "monotonicity_distance" else 1.0
        np.testing.assert_allclose(report["paths"]["own"]["layers"][name], np.full(4, expected), atol=1e-5, err_msg=name)
    assert report["paths"]["mismatched"]["mean"]["path_cosine"] < 0.99
    accuracies = {figures["speech_accuracy"] for figures in report["interventions"].values()}
    assert (len(report["interventions"]), accuracies) == (5, {report["chain"]["speech_accuracy"]}), "nothing to change"
    for kind in KINDS:
        for name, shape in (("pooled", (4,)), ("tokens", (4,)), ("along", (4, 10))):
            np.testing.assert_allclose(report["drift"][kind][name], np.ones(shape), atol=1e-5)
    for name in ("cka", "debiased"):
        found = report["alignment"][name]
        np.testing.assert_allclose(np.diagonal(found["matrix"]), 1.0, atol=1e-5)
        assert found["best_text_layer"] == [1, 2, 3, 4]
        assert np.diagonal(found["mismatched"]).max() < 0.99
        assert np.diagonal(found["above_mismatched"]).min() > 0.01
    assert report["alignment"]["path_length"] == 12
    assert report["chain"]["same_completion"] == report["chain"]["same_answer"] == 1.0
    assert np.isnan(report["chain"]["first_divergence"]), "none of them parts"


@torch.no_grad()
def test_content_of_prompts_is_compared_with_the_same_item_and_with_the_one_before(model, items):
    """Prompts run alone through transformers; the words of the question, not the template around it."""
    made, _ = analysed(model, items)
    sides = []
    for item in items:
        speech, text = (model.encode_prompts([item], modality)[0] for modality in Modality)
        states = []
        for prompt in (speech, text):
            inputs = model.embed_tokens(torch.tensor([prompt.token_ids]), [prompt], [0])
            output = model.language_model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False)
            states.append(torch.stack(output.hidden_states[1:])[:, 0])
        start, end = content_span(text.token_ids, speech.token_ids)
        assert model.prompts.tokenizer.decode(text.token_ids[start:end]) == item.text
        is_audio = torch.tensor(speech.token_ids) == model.prompts.audio_token_id
        sides.append((states[0][:, is_audio], states[1][:, start:end]))

    def compared(speech, text, layer=2):
        x, y = warp(speech[layer - 1], text[layer - 1])
        return compare_layers(speech[:, x], text[:, y])

    own = [compared(speech, text) for speech, text in sides]
    other = [compared(speech, text) for (speech, _), (_, text) in zip(sides[1:], sides[:-1], strict=True)]
    alignment = made.report()["alignment"]
    for name, alignments in (("matrix", own), ("mismatched", other)):
        expected = np.mean([one.cka for one in alignments], axis=0)
        np.testing.assert_allclose(alignment["cka"][name], expected, atol=1e-4)
        sums = [np.mean([getattr(one, part) for one in alignments], axis=0) for part in ("hsic", "speech_hsic", "text_hsic")]
        expected = sums[0] / np.sqrt(sums[1][:, None] * sums[2])
        np.testing.assert_allclose(alignment["debiased"][name], expected, atol=1e-4)
    paths = made.report()["paths"]
    other = [(speech, text) for (speech, _), (_, text) in zip(sides[1:], sides[:-1], strict=True)]
    for kind, pairs in (("own", sides), ("mismatched", other)):
        expected = [compare_tokens(*states) for states in pairs]
        for name in METRICS:
            layers = np.mean([one[name] for one in expected], axis=0)
            # The path of a token that is as near to another one may go there.
            np.testing.assert_allclose(paths[kind]["layers"][name], layers, rtol=1e-4, atol=1e-2, err_msg=name)
            assert paths[kind]["mean"][name] == pytest.approx(np.mean(paths[kind]["layers"][name]))
    np.testing.assert_allclose(alignment["chance"], np.mean([one.chance for one in own], axis=0), atol=1e-4)
    by_first = np.mean([compared(speech, text, layer=1).cka for speech, text in sides], axis=0)
    np.testing.assert_allclose(made.other_means[1].rows("cka")[0], by_first, atol=1e-4)
    agreement = alignment["base_layers"]["1"]["cka"]
    assert agreement["correlation"] == pytest.approx(np.corrcoef(by_first.ravel(), np.ravel(alignment["cka"]["matrix"]))[0, 1])
    assert agreement["best_text_layer"] == (by_first.argmax(1) + 1).tolist()


def test_how_many_share_a_forward_pass_does_not_matter(model, items, monkeypatch):
    together, _ = analysed(model, items)
    monkeypatch.setattr(analysis, "TOKENS_PER_FORWARD", 1)
    alone, _ = analysed(model, items)
    for name, rows in together.resamples().items():
        np.testing.assert_allclose(alone.resamples()[name], rows, atol=2e-5, err_msg=name)
    same = together.report()["alignment"]["base_layers"]["2"]["debiased"]
    assert same["correlation"] == pytest.approx(1.0)
    assert same["same_best_layer"] == 1.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_items(model, items):
    model.set_audio_cache(0, None, 0)
    made = Analysis(model, TransformersEngine(model, 32), SETTINGS, [Calibration(1)], [PathIntervention("angle", 1, None)])

    def held() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return sum(one.numel() * one.element_size() for one in tensors)

    sizes = []
    for _ in range(4):
        made.add(items[:4])
        sizes.append((held(), made.means.num_bytes))
    assert sizes[1:] == [sizes[1]] * 3
    # A single item's states are more than what else may come and go.
    assert sizes[0][0] <= sizes[1][0] + 1000
    tracemalloc.start()
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    traced = []
    for _ in range(3):
        made.add(items[:2])
        gc.collect()
        traced.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces))
    tracemalloc.stop()
    assert traced[1:] == [traced[1]] * 2


def test_an_item_that_cannot_be_encoded_fails_alone(model, items, tmp_path):
    broken = dataclasses.replace(items[1], id="broken", audio=tmp_path / "gone.wav")
    made, records = analysed(model, [items[0], broken, items[2]])
    assert [record["id"] for record in records] == [items[0].id, items[2].id]
    assert list(made.failed) == ["broken"]
    assert "gone.wav: cannot be read" in made.failed["broken"]


def test_behaviour_along_the_chain():
    """Answers right and wrong, the same and not, and none at all."""
    question = Question("q", "Which one?", "one", ("one", "two", "six"))

    def item(spoken: str, written: str):
        completions = [
            Completion(0, modality, tuple(map(ord, text)), (), text, truncated=False)
            for modality, text in zip(Modality, (spoken, written), strict=True)
        ]
        return SimpleNamespace(prompts=SimpleNamespace(question=question), spoken=completions[0], written=completions[1])

    one, two, six = (f"The answer is {word}" for word in question.choices)
    items = [item(one, one), item(one, two), item(two, six), item("Well", "Hm"), item("Well", one)]
    chain = _chain(items)
    assert chain["speech_accuracy"].tolist() == [1, 1, 0, 0, 0]
    assert chain["text_accuracy"].tolist() == [1, 0, 0, 0, 1]
    assert chain["same_answer"].tolist() == [1, 0, 0, 0, 0], "two that give none do not agree"
    assert chain["same_completion"].tolist() == [1, 0, 0, 0, 0]
    assert chain["first_divergence"][1:].tolist() == [14, 14, 0, 0]
    assert (chain["speech_tokens"][3], chain["text_tokens"][3]) == (4, 2)


def test_cka_is_over_thinned_paths(monkeypatch):
    monkeypatch.setattr(alignment, "MOST_PAIRS", 8)
    speech, text = torch.randn(2, 2, 30, 6, generator=torch.Generator().manual_seed(0))
    made = _compare(speech, text, 1)
    x, y = warp(speech[0], text[0])
    chosen = torch.linspace(0, len(x) - 1, 8).round().long()
    np.testing.assert_allclose(made["cka"][0], compare_layers(speech[:, x[chosen]], text[:, y[chosen]]).cka, atol=1e-6)
    assert made["path_length"] == len(x) > 8


def test_layers_that_are_chosen_by_depth():
    config = analyse.AnalyseConfig()
    assert analyse.choose_layers(config, 28) == (5, (7, 14, 21))
    assert analyse.choose_layers(config, 4) == (2, (1, 3))
    assert analyse.choose_layers(config, 1) == (1, ())


def test_first_divergence():
    assert np.isnan(first_divergence([1, 2, 3], [1, 2, 3])).all()
    assert first_divergence([1, 2, 3, 4], [1, 4, 3, 4]) == (1, 0.25)
    assert first_divergence([1, 2], [1, 2, 3]) == (2, 2 / 3)
    assert first_divergence([5, 1], [1]) == (0, 0.0)


def test_changes_are_paired_by_item(model, items):
    """The same analysis twice, one a tenth higher: a difference without width, though items vary."""
    made, _ = analysed(model, items)
    rows = made.resamples()
    change = change_since({name: values + 0.1 for name, values in rows.items()}, rows)
    assert change["own_pooled"] == pytest.approx([0.1] * NUM_LAYERS)
    np.testing.assert_allclose(change["own_pooled_ci95"], 0.1)
    low, high = np.array(made.report()["drift"]["own"]["pooled_ci95"]).T
    assert (high - low > 1e-3).all()


def test_moments_in_parts_are_those_of_the_whole():
    states = torch.randn(50, 7) * 3 + 1000
    moments = Moments()
    for part in states.split([1, 20, 29]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, states.double().mean(0))
    torch.testing.assert_close(moments.deviation, states.double().std(0, correction=0), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_calibration_of_embeddings_is_that_of_the_prompts_recordings(model, items):
    calibration = Calibration(0)
    analysed(model, items, [calibration])
    heard = model.encode_prompts(items, Modality.SPEECH)
    states = torch.cat([clip for prompt in heard for clip in prompt.audio_clips])
    text = calibration.moments[Modality.TEXT]
    torch.testing.assert_close(calibration.moments[Modality.SPEECH].mean, states.double().mean(0))
    torch.testing.assert_close(calibration(states).double().mean(0), text.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(calibration(states).double().std(0, correction=0), text.deviation, atol=1e-5, rtol=1e-4)
    changed = [
        dataclasses.replace(prompt, audio_clips=tuple(calibration(clip) for clip in prompt.audio_clips)) for prompt in heard
    ]
    engine = TransformersEngine(model, 32)
    greedy = Sampling(num_completions=1, max_new_tokens=40, temperature=0.0, seed=0)
    numbers = range(len(items))
    plain = engine.generate(heard, numbers, greedy)
    by_hand = engine.generate(changed, numbers, greedy)
    with calibration.applied(model):
        by_hooks = engine.generate(heard, numbers, greedy)
        written = engine.generate(model.encode_prompts(items, Modality.TEXT), numbers, greedy)
    assert by_hooks == by_hand
    assert by_hooks != plain
    assert engine.generate(heard, numbers, greedy) == plain, "nothing of it stays behind"
    assert written == engine.generate(model.encode_prompts(items, Modality.TEXT), numbers, greedy)


@torch.no_grad()
def test_calibration_of_a_layer_gives_speech_the_moments_of_text_there(model, items):
    calibration = Calibration(2)
    made, _ = analysed(model, items, [calibration])
    seen = Moments()
    places: list[torch.Tensor] = []

    def look(_module, inputs):
        seen.add(inputs[0][0, places[0]])

    with calibration.applied(model):
        hook = model.language_model.layers[2].register_forward_pre_hook(look)
        for prompt in model.encode_prompts(items, Modality.SPEECH):
            token_ids = torch.tensor([prompt.token_ids])
            places[:] = [(token_ids[0] == model.prompts.audio_token_id).nonzero()[:, 0]]
            inputs = model.embed_tokens(token_ids, [prompt], [0])
            model.language_model(inputs_embeds=inputs, use_cache=False)
        hook.remove()
    text = calibration.moments[Modality.TEXT]
    torch.testing.assert_close(seen.mean, text.mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen.deviation, text.deviation, atol=1e-4, rtol=1e-3)
    assert made.num_items == len(items)


@torch.no_grad()
def test_an_intervention_on_embeddings_is_that_on_the_prompts_recordings(model, items):
    """All prompts in one pass, each changed by its own words, as when the clips themselves are changed."""
    heard, written = (model.encode_prompts(items, modality) for modality in Modality)
    engine = TransformersEngine(model, 32)
    greedy = Sampling(num_completions=1, max_new_tokens=40, temperature=0.0, seed=0)
    numbers = range(len(items))
    plain = engine.generate(heard, numbers, greedy)
    for intervention in (PathIntervention("angle", 0, None), PathIntervention("length", 0, 3)):
        targets, changed = [], []
        for speech, text in zip(heard, written, strict=True):
            words = model.module.get_input_embeddings()(
                torch.tensor(text.token_ids)[slice(*content_span(text.token_ids, speech.token_ids))]
            )
            (clip,) = speech.audio_clips
            start = speech.token_ids.index(model.prompts.audio_token_id)
            targets.append((speech, intervention.target(clip, words, start + torch.arange(len(clip)))))
            places, found = (chosen[: intervention.num_tokens] for chosen in critical_tokens(clip, words))
            by_hand = clip.clone()
            by_hand[places] = intervention(clip[places], words[found])
            changed.append(dataclasses.replace(speech, audio_clips=(by_hand,)))
        by_hand = engine.generate(changed, numbers, greedy)
        with intervention.applied(model, targets):
            by_hooks = engine.generate([*heard, *written], [*numbers, *numbers], greedy)
        assert [one.text for one in by_hooks[: len(items)]] == [one.text for one in by_hand]
        assert by_hand != plain
        untouched = engine.generate(written, numbers, greedy)
        assert [one.text for one in by_hooks[len(items) :]] == [one.text for one in untouched]
        assert engine.generate(heard, numbers, greedy) == plain, "nothing of it stays behind"
        made, _ = analysed(model, items, interventions=[intervention])
        right = [read_strictly(one.text, item).correct for one, item in zip(by_hand, items, strict=True)]
        figures = made.report()["interventions"]
        assert figures[intervention.name]["speech_accuracy"] == np.mean(right)
        assert figures["plain"]["speech_accuracy"] == made.report()["chain"]["speech_accuracy"]


@torch.no_grad()
def test_an_intervention_on_a_layer_changes_its_input_there(model, items):
    """What layer 2 sees: audio tokens on the path with the direction of their words, every other state as it was."""
    intervention = PathIntervention("angle", 2, 3)
    heard = model.encode_prompts(items[:3], Modality.SPEECH)
    targets, seen = [], []
    for number, prompt in enumerate(heard):
        start = prompt.token_ids.index(model.prompts.audio_token_id)
        words = torch.randn(3, 128, generator=torch.Generator().manual_seed(number))
        targets.append((prompt, Target(start + torch.tensor([5, 1, 9]), words)))
    hooks = []

    def passes() -> torch.Tensor:
        hooks.append(model.language_model.layers[2].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])))
        TransformersEngine(model, 32).generate(heard, range(3), Sampling(1, 2, temperature=0.0, seed=0))
        hooks.pop().remove()
        return seen[0][0]

    plain = passes()
    seen.clear()
    with intervention.applied(model, targets):
        changed = passes()
    # The engine takes prompts by their length.
    order = sorted(range(3), key=lambda number: len(heard[number].token_ids))
    starts = np.cumsum([0] + [len(heard[number].token_ids) for number in order[:-1]])
    expected = plain.clone()
    for number, start in zip(order, starts, strict=True):
        places = int(start) + targets[number][1].places
        words = targets[number][1].words
        expected[places] = words * (plain[places].norm(dim=-1) / words.norm(dim=-1))[:, None]
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    assert (changed != plain).any(-1).sum() == 9


def test_words_are_repeated_and_letters_of_options_are_not():
    question = Question("q", "Which one?\nA. a cat\nB. Bob", "A", ("A", "B"))
    assert repeated(question, 2).text == "Which Which one? one?\nA. a a cat cat\nB. Bob Bob"
    counted = Question("q", "one plus A is one.", "two", ("one", "two", "A"))
    assert repeated(counted, 2).text == "one one plus plus A A is is one. one."


def run(*flags: object, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["analyse", "--device", "cpu", *map(str, flags)])
    capsys.readouterr()
    return analyse.main(), capsys.readouterr().err


FLAGS = ("--model", "pocket", "--items", 12)


def noisy_checkpoints(run_dir: Path) -> Path:
    """A run's folder with checkpoints of the pocket model, each with more noise in its weights than the one before."""
    for step, scale in ((2, 0.1), (10, 0.4)):
        folder = shutil.copytree(find_preset("pocket").source, run_dir / f"checkpoint-{step}")
        weights = load_file(folder / "model.safetensors")
        for number, name in enumerate(sorted(weights)):
            generator = torch.Generator().manual_seed(number)
            spread = scale * weights[name].float().std(correction=0)
            weights[name] += (spread * torch.randn(weights[name].shape, generator=generator)).to(weights[name].dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return run_dir


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """An analysis with probes, and one that is compared with it and with checkpoints, by the command."""
    first, second = tmp_path_factory.mktemp("analyses") / "first", tmp_path_factory.mktemp("analyses") / "second"
    probes = ("--calibrate", 0, "--repeat", 3, "--angle-projection", 0, "--length-normalisation", 1, "--critical-tokens", 2)
    run_dir = noisy_checkpoints(tmp_path_factory.mktemp("run"))
    for flags in (
        (*probes, "--output-dir", first),
        ("--compare", first, "--checkpoints", run_dir, "--output-dir", second),
    ):
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
            patch.setattr(sys, "argv", ["analyse", "--device", "cpu", *map(str, (*FLAGS, *flags))])
            assert (analyse.main(), said.getvalue()) == (0, "")
    return first, second


def test_a_bundled_model_is_analysed_on_items_of_its_own_task():
    job = analyse.plan_job(analyse.AnalyseConfig(model="pocket-hard", items=2))
    assert job.source == str(BUNDLED["pocket-hard"] / "held_out.parquet")
    assert job.settings_written["source"] == "pocket-hard"


def test_the_command_before_and_after(folders, tmp_path, monkeypatch, capsys):
    first, second = shutil.copytree(folders[0], tmp_path / "first"), folders[1]
    flags = FLAGS
    files = {"analysis.json", "cka.png", "drift.png", "items.jsonl", "report.html", "resamples.npz"}
    assert {path.name for path in first.iterdir()} == files
    made = json.loads((first / "analysis.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    ids = [json.loads(line)["id"] for line in (first / "items.jsonl").read_text().splitlines()]
    assert ids == [question.id for question in choose_by_id(load_questions(HELD_OUT_DATA), 12)]
    assert made["num_items"] == 12
    assert made["settings"]["base_layer"] == 2
    assert made["settings"]["other_base_layers"] == [1, 3]
    assert list(made["probes"]) == ["plain", "calibrate_0", "repeat_3"]
    assert made["probes"]["calibrate_0"]["change"]["text_accuracy"] == 0.0, "written prompts hold no audio"
    assert made["probes"]["repeat_3"]["change"]["speech_accuracy"] == 0.0, "recordings stay what they are"
    plain = made["probes"]["plain"]
    for name, changed in (("calibrate_0", "speech_accuracy"), ("repeat_3", "text_accuracy")):
        assert made["probes"][name][changed] < plain[changed], "neither is anything that the model was trained on"
        assert made["probes"][name]["change"][changed] == pytest.approx(made["probes"][name][changed] - plain[changed])
    assert made["probes"]["plain"]["speech_accuracy"] == made["chain"]["speech_accuracy"]
    assert all(made["cost"].values())
    interventions = made["interventions"]
    names = [f"{kind}_{own}" for kind in ("angle_0", "length_1") for own in ("lowest_2", "all")]
    assert list(interventions) == ["plain", *names]
    for name in names:
        change = interventions[name]["speech_accuracy"] - interventions["plain"]["speech_accuracy"]
        assert interventions[name]["change"]["speech_accuracy"] == pytest.approx(change)
    assert made["chain"]["accuracy_gap"] == pytest.approx(made["chain"]["text_accuracy"] - made["chain"]["speech_accuracy"])
    change = json.loads((second / "analysis.json").read_text())["change"]
    assert change["own_pooled"] == pytest.approx([0.0] * NUM_LAYERS, abs=1e-6)
    assert np.shape(change["debiased_ci95"]) == (NUM_LAYERS, NUM_LAYERS, 2)

    lines = (first / "items.jsonl").read_text()
    (first / "items.jsonl").write_text(lines.replace("speech_truncated", "earlier"))
    earlier = run(*flags, "--compare", first, "--output-dir", tmp_path / "third", monkeypatch=monkeypatch, capsys=capsys)
    assert earlier[0] == MISUSED
    assert "no analysis of these items by this version (no 'speech_truncated')" in earlier[1]
    (first / "items.jsonl").write_text(lines)

    for more, fragment in (
        (("--seed", 1, "--compare", first), "seed 0 -> 1"),
        (("--items", 5, "--compare", first), "num_items 12 -> 5"),
        (("--base-layer", 3, "--compare", first), "base_layer 2 -> 3"),
        (("--max-new-tokens", 9, "--compare", first), "max_new_tokens 40 -> 9"),
        (("--data", VALIDATION_DATA, "--compare", first), "another analysis (other items"),
        (("--compare", tmp_path), "--compare"),
        (("--output-dir", first), "holds an analysis already"),
    ):
        status, error = run(*flags, "--output-dir", tmp_path / "third", *more, monkeypatch=monkeypatch, capsys=capsys)
        assert status == MISUSED
        assert fragment in error
        assert error.count("\n") == 1
        assert not (tmp_path / "third" / "analysis.json").exists()


def test_the_outcome_is_what_the_folder_holds(tmp_path):
    outcome = analyse.analyse(analyse.AnalyseConfig(items=4, output_dir=tmp_path / "out", device="cpu"))
    assert (outcome.output_dir, outcome.num_failed) == (tmp_path / "out", 0)
    assert outcome.analysis == json.loads((tmp_path / "out" / "analysis.json").read_text())


@pytest.fixture(scope="module")
def analysed_items() -> list[Question]:
    return choose_by_id(load_questions(HELD_OUT_DATA), 12)


def test_the_page_of_an_analysis_alone(folders):
    folder = folders[0]
    made = json.loads((folder / "analysis.json").read_text())
    page = (folder / REPORT).read_text()
    elements = check_nothing_foreign(page)
    assert "pocket, analysed" in elements.words
    cosine, (low, high) = made["drift"]["own"]["pooled"][2], made["drift"]["own"]["pooled_ci95"][2]
    assert f"3 {cosine:.3f} [{low:.3f}, {high:.3f}]" in elements.words
    accuracy, (low, high) = (made["chain"][name] for name in ("speech_accuracy", "speech_accuracy_ci95"))
    assert f"speech right, % {100 * accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]" in elements.words
    for number, row in enumerate(made["alignment"]["debiased"]["mismatched"], start=1):
        assert f"{number} {' '.join(f'{value:.2f}' for value in row)}" in elements.words
    change = made["probes"]["repeat_3"]["change"]["text_accuracy"]
    assert re.search(rf"repeat_3 .*{re.escape(f'{100 * change:+.1f}')}", elements.words)
    assert f"forward {made['cost']['forward_seconds_per_item']:.3f}" in elements.words
    assert "calibrate" in elements.words
    records = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert "12 of 12 items" in elements.words
    parted = [record for record in records if not record["same_completion"]]
    # Both completions of each that parts.
    assert page.count("<mark>") == 2 * len(parted) > 0
    assert len(elements.all("audio")) == 12
    assert "similarity of words" not in page
    assert not re.search(r"\b(nan|None|null|NaN)\b", elements.text)
    alternatives = [image["alt"] for image in elements.all("img")]
    # Drift, along the completion, CKA, best layers and bands, tokens.
    assert len(alternatives) == 2 + 4 + 4 + 4 + 3
    for name, figures in made["interventions"].items():
        accuracy, (low, high) = figures["speech_accuracy"], figures["speech_accuracy_ci95"]
        assert f"{name} {100 * accuracy:.1f} [{100 * low:.0f}, {100 * high:.0f}]" in elements.words
    score, (low, high) = (made["paths"]["own"]["mean"][name] for name in ("path_cosine", "path_cosine_ci95"))
    assert f"cosine along the path (APS) {score:.3f} [{low:.3f}, {high:.3f}]" in elements.words
    assert len(set(alternatives)) == len(alternatives)


def test_the_page_of_an_analysis_and_one_before(folders, analysed_items):
    first, second = folders
    elements = Elements((second / REPORT).read_text())
    assert len(elements.all("img")) == 4 + 4 + 8 + 4 + 6 + 1
    over = json.loads((second / "analysis.json").read_text())["checkpoints"]
    for name, figures in over["models"].items():
        assert f"{name} {100 * figures['speech_accuracy']:.1f} [" in elements.words
    r, (low, high) = (over["correlation"]["path_cosine"][name] for name in ("mean", "mean_ci95"))
    assert f"cosine along the path (APS) {r:+.2f} [{low:+.2f}, {high:+.2f}] {r * r:.2f}" in elements.words
    assert re.search(r"speech right, % (\S+ \[\d+, \d+\]) \1 \+0\.0 \[\+0, \+0\]", elements.words)
    assert "before: repeat_3" in elements.words
    changes = {item["data-change"] for item in elements.all("details") if "data-change" in item}
    assert changes == {"stayed right", "stayed wrong"}
    assert elements.words.count("similarity of states, mean over layers") == 24
    before = analyse.read_analysis(first)
    for result, record in zip(item_results(before, "d", analysed_items), before.records, strict=True):
        assert result.evaluated.speech.readings["strict"].correct == record["speech_accuracy"]
        assert result.evaluated.text.readings["strict"].correct == record["text_accuracy"]


def test_the_same_analysis_gives_the_same_page_and_pictures(folders, analysed_items, tmp_path):
    first, second = (analyse.read_analysis(folder) for folder in folders)
    write_analysis(tmp_path, second, first, "held_out", analysed_items)
    draw_analysis(tmp_path, second.figures, first.figures)
    for name in (REPORT, DRIFT_PLOT, CKA_PLOT):
        assert (tmp_path / name).read_bytes() == (folders[1] / name).read_bytes()


def test_without_matplotlib_an_analysis_keeps_its_numbers(folders, analysed_items, tmp_path, monkeypatch):
    for module in ("sections", "analysis_page"):
        monkeypatch.setattr(f"tars_fast.reports.{module}.can_plot", lambda: False)
    analysed = analyse.read_analysis(folders[0])
    draw_analysis(tmp_path, analysed.figures, None)
    write_analysis(tmp_path, analysed, None, "held_out", analysed_items)
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]
    bare, drawn = (Elements((folder / REPORT).read_text()) for folder in (tmp_path, folders[0]))
    assert not bare.all("img")
    assert bare.words == drawn.words


def test_figures_that_are_not_known_show_as_such(folders, analysed_items, tmp_path):
    """null wherever analysis.json may have it; an item that failed."""
    analysed = analyse.read_analysis(folders[0])
    figures = json.loads(json.dumps(analysed.figures))
    unknown = [None, None]
    figures["chain"] |= {"first_divergence": None, "first_divergence_ci95": unknown}
    figures["drift"]["own"]["along"][-1][3] = None
    figures["drift"]["own"]["along_ci95"][-1][3] = unknown
    figures["alignment"]["debiased"]["matrix"][0] = [None] * NUM_LAYERS
    figures["alignment"]["base_layers"]["1"]["cka"] |= {"correlation": None, "correlation_ci95": unknown}
    figures["alignment"]["cka"]["halves"]["correlation"] = [None] * 10
    failed = analysed.records[0]["id"]
    figures["failed"] = {failed: "cannot be heard"}
    records = [{**record, "own_pooled": [None] * NUM_LAYERS} for record in analysed.records[1:]]
    write_analysis(tmp_path, Analysed(figures, records), None, "held_out", analysed_items)
    elements = Elements((tmp_path / REPORT).read_text())
    assert not re.search(r"\b(nan|None|null|NaN)\b", elements.text)
    assert "first token that differs -" in elements.words
    assert "CKA, halves of the items -" in elements.words
    assert f"1 {' '.join('-' * NUM_LAYERS)} 2" in elements.words
    assert "could not be evaluated: cannot be heard" in elements.words
    assert "similarity of states" not in elements.words


@pytest.mark.browser
def test_nothing_foreign_runs_in_the_page_of_an_analysis(folders, analysed_items, tmp_path, browser):
    analysed = analyse.read_analysis(folders[0])
    questions = [dataclasses.replace(analysed_items[0], text=HOSTILE, category=HOSTILE, answer=HOSTILE)]
    named = {"model": HOSTILE, "source": HOSTILE}
    figures = {**analysed.figures, "settings": analysed.figures["settings"] | named, "failed": {HOSTILE: HOSTILE}}
    (record,) = (record for record in analysed.records if record["id"] == questions[0].id)
    records = [record | {"speech": HOSTILE, "text": f"the {HOSTILE}"}]
    questions.append(dataclasses.replace(questions[0], id=HOSTILE))
    write_analysis(tmp_path, Analysed(figures, records), None, HOSTILE, questions)
    elements = check_nothing_foreign((tmp_path / REPORT).read_text())
    assert elements.text.count("<script>alert(1)</script>") > 6
    with on_a_phone(browser, tmp_path / REPORT) as page:
        page.locator("#items summary").first.click()
        assert page.inner_text("#count") == "2 of 2 items shown"


@pytest.mark.browser
@pytest.mark.parametrize("which", [0, 1])
def test_the_page_of_an_analysis_in_a_browser(which, folders, browser):
    with on_a_phone(browser, folders[which] / REPORT) as page:
        assert page.inner_text("#count") == "12 of 12 items shown"
        items = page.locator("#items > details:visible")
        assert "speech wrong, text right" in items.first.inner_text()
        page.select_option("#outcome", "both right")
        assert 0 < items.count() < 12
        check_plays(items.first)
        for numbers in page.locator("section details summary", has_text="Numbers").all():
            numbers.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 375, "wider than a phone"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base-layer", "5"), "--base-layer 5: pocket has 4 layers; give 1 to 4"),
        (("--base-layer", "0"), "--base-layer 0: pocket has 4 layers; give 1 to 4"),
        (("--other-base-layers", "2", "9"), "--other-base-layers 9: pocket has 4 layers; give 1 to 4"),
        (("--calibrate", "4"), "--calibrate 4: pocket has 4 layers; give 0 to 3"),
        (("--angle-projection", "0", "4"), "--angle-projection 4: pocket has 4 layers; give 0 to 3"),
        (("--length-normalisation", "-1"), "--length-normalisation -1: pocket has 4 layers; give 0 to 3"),
        (("--critical-tokens", "0"), "--critical-tokens 0: must be greater than 0"),
        (("--checkpoints", "nowhere"), "--checkpoints nowhere: holds 0 checkpoints, and a correlation needs at least 2; name"),
        (("--repeat", "1"), "--repeat 1: must be at least 2"),
        (("--items", "0"), "--items 0: must be greater than 0"),
        (("--data", "nothing.jsonl"), "data nothing.jsonl"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    status, error = run(*flags, "--output-dir", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "name"), [("audio", "'audio'"), ("question", "'question'")])
def test_items_without_both_modalities_are_refused(missing, name, tmp_path, monkeypatch, capsys):
    items = first_items(VALIDATION_DATA, 1, tmp_path / "items") / "items.jsonl"
    line = json.loads(items.read_text())
    del line[missing]
    items.write_text(json.dumps(line) + "\n")
    flags = ("--data", items, "--output-dir", tmp_path / "out")
    status, error = run(*flags, monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert f"{name} missing or empty" in error
    assert error.count("\n") == 1


def test_a_failed_item_shows_in_the_status(tmp_path, monkeypatch, capsys):
    prepare = analysis.prepare_speech

    def first_is_gone(model, questions):
        return [UserError("gone"), *prepare(model, questions[1:])]

    monkeypatch.setattr(analysis, "prepare_speech", first_is_gone)
    status, error = run("--items", 3, "--output-dir", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
    assert (status, error) == (FAILED, "")
    made = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (made["num_items"], made["num_failed"]) == (2, 1)
    assert list(made["failed"].values()) == ["gone"]

    flags = ("--items", 3, "--compare", tmp_path / "out", "--output-dir")
    assert run(*flags, tmp_path / "same", monkeypatch=monkeypatch, capsys=capsys) == (FAILED, "")
    assert "change" in json.loads((tmp_path / "same" / "analysis.json").read_text())
    monkeypatch.setattr(analysis, "prepare_speech", prepare)
    status, error = run(*flags, tmp_path / "other", monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert "1 items failed in one of the two analyses alone" in error
    assert error.count("\n") == 1
    made = json.loads((tmp_path / "other" / "analysis.json").read_text())
    assert made["num_items"] == 3, "hours of work are not thrown away"
    assert "change" not in made


@pytest.mark.parametrize("break_it", ["no end", "nothing", "other depth", "no analysis"])
def test_what_cannot_be_compared_is_refused_first(break_it, folders, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folders[0], tmp_path / "before")
    rows, written = folder / "resamples.npz", folder / "analysis.json"
    if break_it == "no end":
        rows.write_bytes(rows.read_bytes()[:3000])
    elif break_it == "nothing":
        rows.write_bytes(b"")
    elif break_it == "other depth":
        made = json.loads(written.read_text())
        made["settings"]["num_layers"] = 28
        written.write_text(json.dumps(made))
    else:
        written.write_text("[]")
    flags = (*FLAGS, "--compare", folder, "--output-dir", tmp_path / "after")
    status, error = run(*flags, monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert error.startswith(f"error: --compare {folder}: ")
    assert ("num_layers 28 -> 4" in error) == (break_it == "other depth")
    assert error.count("\n") == 1
    assert not (tmp_path / "after").exists()


def test_what_is_not_known_is_a_dash(folders):
    """As of items whose states do not vary: no CKA, and no completion that differs."""
    made = json.loads((folders[1] / "analysis.json").read_text())
    unknown = [[None, None]] * NUM_LAYERS
    made["alignment"]["debiased"] |= {
        "matrix": [[None] * NUM_LAYERS] * NUM_LAYERS,
        "best_text_layer": [0] * NUM_LAYERS,
        "best_text_layer_ci95": unknown,
        "mean_band_width": None,
        "mean_band_width_ci95": [None, None],
        "mean_shift": None,
    }
    made["chain"] |= {"first_divergence_share": None, "first_divergence_share_ci95": [None, None]}
    made["change"] |= {"own_pooled": [None] * NUM_LAYERS, "own_pooled_ci95": unknown}
    console = PlainConsole(record=True, width=200, file=io.StringIO())
    print_analysis(console, made)
    said = console.export_text()
    assert "band of - layers, best text layer less speech layer - in the mean" in said
    assert "completions that differ are alike up to - %" in said
    assert "own completions: -, -, -, -" in said
    assert "nan" not in said.lower()
    assert "none" not in said.lower()


def test_a_model_to_compare_with_is_analysed_first(tmp_path, monkeypatch, capsys):
    """One command for before and after; what is done is not done again."""
    flags = ("--items", 3, "--compare", "pocket", "--repeat", 2, "--output-dir", tmp_path)
    assert run(*flags, monkeypatch=monkeypatch, capsys=capsys) == (0, "")
    made, before = (json.loads((folder / "analysis.json").read_text()) for folder in (tmp_path, tmp_path / "compared"))
    assert made["change"]["own_pooled"] == pytest.approx([0.0] * NUM_LAYERS, abs=1e-6)
    assert "probes" in made
    assert "probes" not in before
    assert (tmp_path / "compared" / "report.html").exists()

    (tmp_path / "analysis.json").unlink()
    written = (tmp_path / "compared" / "analysis.json").stat().st_mtime_ns
    assert run(*flags, monkeypatch=monkeypatch, capsys=capsys) == (0, "")
    assert (tmp_path / "compared" / "analysis.json").stat().st_mtime_ns == written
    # Of other items, so of no use here.
    (tmp_path / "analysis.json").unlink()
    status, error = run("--items", 2, *flags[2:], monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert "compared: holds an analysis already" in error


def test_checkpoints_are_correlated(folders):
    folder = folders[1]
    made = json.loads((folder / "analysis.json").read_text())["checkpoints"]
    assert list(made["models"]) == ["pocket", "checkpoint-2", "checkpoint-10"], "by steps"
    for name in ("checkpoint-2", "checkpoint-10"):
        own = json.loads((folder / name / "analysis.json").read_text())
        assert made["models"][name]["accuracy_gap"] == pytest.approx(own["chain"]["accuracy_gap"])
        assert made["models"][name]["path_cosine"] == pytest.approx(own["paths"]["own"]["mean"]["path_cosine"])
    gaps, scores = ([model[name] for model in made["models"].values()] for name in ("accuracy_gap", "path_cosine"))
    assert made["correlation"]["path_cosine"]["mean"] == pytest.approx(np.corrcoef(gaps, scores)[0, 1])


@pytest.mark.parametrize("fault", ["one", "another size", "no model"])
def test_checkpoints_that_cannot_be_correlated_are_refused_first(fault, tmp_path, monkeypatch, capsys):
    source = Path(find_preset("pocket").source)
    for step in (1, 2):
        shutil.copytree(source, tmp_path / f"checkpoint-{step}")
    config = tmp_path / "checkpoint-2" / "config.json"
    if fault == "one":
        shutil.rmtree(tmp_path / "checkpoint-1")
        message = f"--checkpoints {tmp_path}: holds 1 checkpoints, and a correlation needs at least 2; name the folder of a run"
    elif fault == "another size":
        config.write_text(config.read_text().replace('"intermediate_size": 384', '"intermediate_size": 256'))
        message = f"--checkpoints {tmp_path}: checkpoint-2 is no checkpoint of pocket; give the run's --model"
    else:
        config.unlink()
        message = f"--checkpoints {tmp_path}: checkpoint-2 cannot be analysed ("
    flags = ("--items", 2, "--checkpoints", tmp_path, "--output-dir", tmp_path / "out")
    status, error = run(*flags, monkeypatch=monkeypatch, capsys=capsys)
    assert status == MISUSED
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_neither_an_analysis_nor_a_model(tmp_path, monkeypatch, capsys):
    for given in ("nothing", tmp_path):
        status, error = run("--compare", given, "--output-dir", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
        assert status == MISUSED
        assert error.startswith(f"error: --compare {given}: neither an analysis nor a model to analyse (")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
