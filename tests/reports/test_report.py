"""The page of a run: what it shows, that nothing foreign runs, nothing is fetched, it stays small, and a browser can use it."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from pages import HOSTILE, Elements, check_nothing_foreign, check_plays, on_a_phone

from tars_fast.data.items import VALIDATION_DATA, load_questions
from tars_fast.evaluation.figures import OVERALL, change_since, overall, report
from tars_fast.evaluation.results import Answered, Evaluated, ItemResult, Transcribed
from tars_fast.evaluation.scorers import Reading
from tars_fast.reports import run_page, sample, sections
from tars_fast.reports.page import REPORT, Section, Table, write_page
from tars_fast.reports.run_page import Compared, write_report
from tars_fast.reports.sample import first_divergence, sample_items
from tars_fast.support.files import PARTIAL
from tars_fast.types import Question


def answered(completion: str, correct: bool) -> Answered:
    return Answered(
        completion, False, {"strict": Reading("one", False, correct), "letter": Reading("one", False, correct)}, 0.5
    )


def result(question: Question, speech: bool, completion: str = "it is two", heard: Transcribed | None = None) -> ItemResult:
    items = (answered(completion, speech), answered("it is one", True))
    return ItemResult.of("mine", question, Evaluated(*items, 0.9, (0.8, 0.9), heard), None)


def trained(folder: Path, before: list[ItemResult], after: list[ItemResult], model: str = "pocket") -> Path:
    """What train leaves in its folder."""
    for when, results in (("before", before), ("after", after)):
        (folder / f"predictions_{when}.jsonl").write_text("".join(one.to_line() for one in results))
    evaluation = {"before": report(before, 1.0), "after": report(after, 1.0), "change": change_since(after, before)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.json").write_text(json.dumps({"model": model, "num_steps": 3}))
    names = [name for curves in sections._OVER_STEPS.values() for name in curves.values()]
    lines = [json.dumps({"step": step} | dict.fromkeys(names, step / 10)) + "\n" for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def written(folder: Path, questions, **more) -> str:
    write_report(folder, {"mine": questions}, **more)
    assert not (folder / (REPORT + PARTIAL)).exists()
    return (folder / REPORT).read_text(encoding="utf-8")


@pytest.fixture
def spoken() -> list[Question]:
    return load_questions(VALIDATION_DATA)[:12]


@pytest.fixture
def run(tmp_path, spoken) -> Path:
    """Half of the spoken answers right before, three of four after; none became wrong."""
    before = [result(question, number % 2 == 0) for number, question in enumerate(spoken)]
    return trained(tmp_path, before, [result(question, number % 4 != 1) for number, question in enumerate(spoken)])


def test_shows_the_run(run, spoken):
    page = written(run, spoken)
    text = Elements(page).words
    assert "pocket, trained" in text
    # 6 and 9 of 12.
    assert re.search(r"speech, greedy % 50\.0 \[\d+, \d+\] 75\.0 \[\d+, \d+\] \+25\.0 \[", text)
    assert re.search(r"MRR, fixed % 50\.0 \[\d+, \d+\] 75\.0", text)
    assert "3 items became right, 0 wrong" in text
    assert "they part at word 3" in text
    assert page.count("it is</span><mark> two</mark>") == 24
    assert page.count("it is</span><mark> one</mark>") == 24
    assert "similarity of words 0.90" in text
    assert "similarity of states, mean over layers 0.85" in text
    alternatives = [image["alt"] for image in Elements(page).all("img")]
    assert len(alternatives) == 2 + len(sections._OVER_STEPS)
    assert all(image["src"].startswith("data:image/svg+xml") for image in Elements(page).all("img"))
    # Every outcome can be chosen, and says how often it is there.
    outcomes = [item["data-outcome"] for item in Elements(page).all("details") if "data-outcome" in item]
    changes = [item["data-change"] for item in Elements(page).all("details") if "data-change" in item]
    assert (outcomes.count("both right"), outcomes.count("speech wrong, text right")) == (9, 3)
    assert (changes.count("became right"), changes.count("stayed wrong"), changes.count("stayed right")) == (3, 3, 6)


def test_recordings_are_inside_as_they_were_written(run, spoken):
    players = Elements(written(run, spoken)).all("audio")
    contents = {base64.b64decode(player["src"].removeprefix("data:audio/ogg;base64,")) for player in players}
    assert contents == {question.audio.read_bytes() for question in spoken}


def test_the_same_run_gives_the_same_bytes(run, spoken):
    assert written(run, spoken) == written(run, spoken)


def write_hostile_samples(folder: Path) -> None:
    sampled = {"completion": HOSTILE, "truncated": True, "reward": 1.0, "rewards": {HOSTILE: 1.0}}
    line = {"step": 1, "id": HOSTILE, "question": HOSTILE, "answer": HOSTILE, "speech": sampled, "text": sampled}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")


def test_nothing_foreign_runs_and_nothing_is_fetched(tmp_path):
    """Every text that is not ours, hostile."""
    question = Question(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), category=HOSTILE, transcript=HOSTILE)
    one = result(question, False, HOSTILE, Transcribed(HOSTILE, HOSTILE, 0.5))
    failed = ItemResult.of("mine", Question("2", "?", "x", ("x",), category="c"), None, HOSTILE)
    folder = trained(tmp_path, [one, failed], [one, failed], model=HOSTILE)
    write_hostile_samples(folder)
    more = Section(HOSTILE, [HOSTILE], [Table((HOSTILE,), [(HOSTILE, HOSTILE)])])
    page = written(folder, [question], sections=[more])
    elements = check_nothing_foreign(page)
    assert elements.text.count("<script>alert(1)</script>") > 10
    assert "{{ 7 * 7 }}" in elements.text


def test_no_address_in_the_file(run, spoken):
    assert not re.search(r"https?:|//\w+\.", written(run, spoken).replace("data:image/svg+xml", ""))


@pytest.mark.slow
def test_stays_small(tmp_path, spoken, monkeypatch):
    """Many items, long recordings, long completions."""
    noise = np.random.default_rng(0).standard_normal(20 * 16_000) * 0.1
    soundfile.write(tmp_path / "long.wav", noise, 16_000)
    soundfile.write(tmp_path / "huge.wav", np.tile(noise, 6), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(200_000))
    names = ("long", "long", "huge", "broken", "missing")
    questions = [Question(str(n), "?", "x", ("x",), tmp_path / f"{names[n % 5]}.wav") for n in range(300)]
    results = [result(question, True, "word " * 50_000) for question in questions]
    folder = trained(tmp_path, results, results)
    monkeypatch.setattr(sample, "MOST_AUDIO_BYTES", 600_000)
    page = written(folder, questions)
    elements = Elements(page)
    text = elements.words
    assert f"{sample.MOST_ITEMS} of 300 items" in text
    players = elements.all("audio")
    assert players
    assert all(player["src"].startswith("data:audio/mpeg") for player in players)
    assert sum(len(player["src"]) for player in players) < 600_000 * 4 / 3 + 100
    assert text.count("encoded again for this page") == len(players)
    assert "recording left out, so that the page stays small" in text
    assert "recording could not be read: " in text
    wave, rate = soundfile.read(_as_file(tmp_path / "embedded.mp3", players[0]["src"]))
    assert rate == 16_000
    assert len(wave) / rate == pytest.approx(20, abs=0.2)
    assert len(page) < 600_000 * 4 / 3 + sample.MOST_ITEMS * 4 * (sample._MOST_CHARACTERS + 1000) + 200_000


def _as_file(path: Path, source: str) -> Path:
    path.write_bytes(base64.b64decode(source.partition(",")[2]))
    return path


def test_evaluations_and_what_they_are_compared_with(tmp_path, spoken):
    heard = Transcribed("what is ate plus too", "what is eight plus two", 0.4)
    results = [result(question, True, heard=heard) for question in spoken]
    earlier = [result(question, False) for question in spoken]
    (tmp_path / "predictions.jsonl").write_text("".join(one.to_line() for one in results))
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {"model": "m", "data": {"mine": "there"}}}))
    figures = {"mine": report(results, 1.0), OVERALL: overall(results, 1.0)}
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    text = Elements(written(tmp_path, spoken)).words
    assert "m, evaluated" in text
    assert "heard: what is ate plus too (40 % of the words wrong)" in text
    assert "Mean over the data" not in text
    figures["mine"]["change"] = change_since(results, earlier)
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    before = {"mine": report(earlier, 1.0), OVERALL: overall(earlier, 1.0)}
    text = Elements(written(tmp_path, spoken, compared=Compared(earlier, before))).words
    assert "12 items became right, 0 wrong" in text
    assert re.search(r"speech, greedy % 0\.0 \[0, 0\] 100\.0 \[100, 100\] \+100\.0", text)


def test_samples_of_training_stand_beside_each_other(tmp_path, spoken):
    """Of a long run the first and the last step and some between; a run without written completions has spoken ones alone."""
    sampled = {"completion": "it is two", "truncated": False, "rewards": {"accuracy": 1.0}, "reward": 1.5, "advantage": 0.5}
    other = sampled | {"completion": "it is one", "truncated": True, "rewards": {}, "reward": 0.0}
    common = {"id": spoken[0].id, "question": "What?", "answer": ""}
    lines = [common | {"step": step, "speech": sampled, "text": other if step < 30 else None} for step in range(1, 31)]
    (section,) = sample.training_samples(lines, spoken)
    steps = [item.outcome for item in section.items]
    assert (len(steps), steps[0], steps[-1]) == (sample.MOST_SAMPLED_STEPS, "step 1", "step 30")
    first, last = section.items[0].evaluations[0], section.items[-1].evaluations[0]
    assert (first.speech.correct, first.text.correct, first.text.note) == (True, None, "cut off")
    assert first.divergence == "they part at word 3"
    assert first.rewards["R, speech"] == 1.5
    assert (last.text, last.divergence) == (None, "")
    assert section.items[0].audio is not None
    write_page(tmp_path / REPORT, "training", [section])
    elements = Elements((tmp_path / REPORT).read_text())
    assert len(elements.all("details")) == sample.MOST_SAMPLED_STEPS
    assert elements.words.count("✓ right") == sample.MOST_SAMPLED_STEPS
    assert "✗ wrong" not in elements.words


def test_sections_of_others_find_their_place(run, spoken):
    page = written(run, spoken, sections=[Section("Arms", ["of an ablation"])])
    assert "Arms of an ablation" in Elements(page).words


def test_what_was_misheard_comes_first(spoken):
    """Every outcome heard rightly and not; what went wrong in the ear stands on top, whatever was drawn first."""
    right, wrong = (Transcribed("what", "what", errors) for errors in (0.0, 0.2))
    results = [result(question, n % 3 == 0, heard=(right, wrong)[n % 2]) for n, question in enumerate(spoken)]
    shown = sample_items({"this model": results}, {"mine": spoken})
    found = [(item.outcome, item.recognition) for item in shown.items]
    wrongly, rightly = "speech wrong, text right", "both right"
    places = [(wrongly, "misheard"), (wrongly, "heard right"), (rightly, "misheard"), (rightly, "heard right")]
    assert found == [place for place, count in zip(places, (4, 4, 2, 2), strict=True) for _ in range(count)]
    assert sum("“misheard”" in note for note in shown.notes) == 1
    plain = sample_items({"this model": [result(question, True) for question in spoken]}, {"mine": spoken})
    assert {item.recognition for item in plain.items} == {""}
    assert not plain.notes


def test_what_is_not_known_is_left_out(run, spoken):
    """nan where a figure does not exist: a dash, a gap in the curve, or nothing."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["reward/behaviour"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run / "predictions_after.jsonl"
    known, unknown = (
        f'"behaviour_similarity": {words}, "layer_cosine": [{states}]'
        for words, states in (("0.9", "0.8, 0.9"), ("NaN", "NaN, NaN"))
    )
    path.write_text(path.read_text().replace(known, unknown))
    elements = Elements(written(run, spoken))
    assert "R_beh - 0.300" in elements.words
    assert elements.words.count("similarity of words 0.90") == len(spoken)
    assert elements.words.count("similarity of states") == len(spoken)
    assert not re.search(r"\b(nan|None|null)\b", elements.text)


def test_rewards_of_the_run_by_modality(run, spoken):
    """One's own has a curve, R_rep and R_acc have theirs already; what never applies has no row."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("accuracy", "brief", "representation"):
            of_text = name != "representation"
            line |= {f"not_applicable/{name}/speech": 0.25, f"not_applicable/{name}/text": 0.0 if of_text else 1.0}
            line |= {f"deviation/{name}/{modality}": 0.5 for modality in ("speech", "text")[: 1 + of_text]}
        line |= {"brief/speech": line["step"], "brief/text": 7.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = Elements(written(run, spoken)).words
    assert "brief speech 2.000 2.000 0.500 0.500 0.250 0.250 brief text 7.000 7.000 0.500 0.500 0.000 0.000" in words
    assert "representation speech 0.200 0.200 0.500 0.500 0.250 0.250" in words
    assert "representation text" not in words
    assert written(run, spoken).count('alt="Reward ') == 1


def test_without_matplotlib_the_numbers_stay(run, spoken, monkeypatch):
    for module in (run_page, sections):
        monkeypatch.setattr(module, "can_plot", lambda: False)
    elements = Elements(written(run, spoken))
    assert not elements.all("img")
    assert "speech, greedy %" in elements.text
    assert "Cosine of pooled hidden states by layer, mine" in elements.text
    assert "1 0.800 [0.800, 0.800]" in elements.words


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ("a b c", "a b c", None),
        ("a  b\nc", "a b c", None),
        ("a b c", "a x c", 1),
        ("a b", "a b c", 2),
        ("", "a", 0),
        ("", "", None),
    ],
)
def test_first_divergence(one, other, place):
    assert first_divergence(one, other) == place
    assert first_divergence(other, one) == place


@pytest.mark.browser
def test_in_a_browser(run, spoken, browser):
    """On a phone: no errors, nothing fetched, a recording plays to its end, filters filter."""
    written(run, spoken)
    with on_a_phone(browser, run / REPORT) as page:
        assert page.inner_text("#count") == "12 of 12 items shown"
        items = page.locator("#items > details:visible")
        page.select_option("#outcome", "speech wrong, text right")
        assert page.inner_text("#count") == "3 of 12 items shown"
        assert items.count() == 3
        page.select_option("#outcome", "")
        page.select_option("#change", "became right")
        assert items.count() == 3
        page.select_option("#change", "")
        page.fill("#words", spoken[5].text.upper())
        assert items.count() == sum(spoken[5].text in question.text for question in spoken)
        page.fill("#words", "")
        check_plays(items.nth(0))
        assert items.nth(0).locator("mark").first.is_visible()


@pytest.mark.browser
def test_what_was_misheard_can_be_chosen_in_a_browser(tmp_path, spoken, browser):
    heard = [Transcribed("what is it", "what is it", float(number % 4 == 0)) for number in range(len(spoken))]
    results = [result(question, True, heard=one) for question, one in zip(spoken, heard, strict=True)]
    written(trained(tmp_path, results, results), spoken)
    with on_a_phone(browser, tmp_path / REPORT) as page:
        page.select_option("#heard", "misheard")
        assert page.inner_text("#count") == "3 of 12 items shown"
        items = page.locator("#items > details:visible")
        assert [item.locator("summary .tag").nth(1).inner_text() for item in items.all()] == ["misheard"] * 3


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser(tmp_path, browser):
    question = Question(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), category=HOSTILE)
    one = result(question, False, HOSTILE)
    folder = trained(tmp_path, [one], [one], model=HOSTILE)
    write_hostile_samples(folder)
    written(folder, [question])
    with on_a_phone(browser, tmp_path / REPORT) as page:
        for summary in page.locator(".items summary").all():
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert page.inner_text("#count") == "1 of 1 items shown"
