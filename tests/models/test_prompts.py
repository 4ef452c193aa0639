"""System prompt, prompt template and answer format: what prompts then say, what is refused, what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tars_fast.config import TrainConfig
from tars_fast.evaluate import EvaluateConfig
from tars_fast.models.preset import PAPER, THINK_PROMPT, Preset
from tars_fast.models.prompt_settings import PLAIN, read_answer_format, read_prompt_template
from tars_fast.models.prompts import PromptTemplateError, load_prompt_format
from tars_fast.models.registry import PRESETS, find_preset
from tars_fast.types import THINK, Modality, Question, UserError

QUESTION = Question("q", "Which is red?\nA. grass\nB. blood", "B", ("A", "B"))


def prompts_of(**settings):
    preset = PRESETS["pocket"].with_settings(EvaluateConfig(**settings))
    return load_prompt_format(preset, preset.source)


@pytest.fixture
def template(tmp_path):
    def write(text: str):
        path = tmp_path / "turn.jinja"
        path.write_text(text)
        return path

    return write


def test_a_template_holds_the_question_written_or_spoken(template):
    usual = prompts_of()
    ours = prompts_of(
        prompt_template=template(
            "Listen: {{ question }}{% for one in options %}; {{ loop.index }} {{ one }}{% endfor %}. {{ modality }}\n"
        )
    )
    assert f"Listen: {QUESTION.text}; 1 grass; 2 blood. text" in ours.render(QUESTION, Modality.TEXT)
    for modality in Modality:
        around = "Listen: ", f"; 1 grass; 2 blood. {modality}"
        assert ours.render(QUESTION, modality).replace(around[0], "").replace(around[1], "") == usual.render(QUESTION, modality)
    # What is asked about a recording stands behind it, after what a transcript says of it in the written prompt.
    heard = dataclasses.replace(QUESTION, about_audio=True, transcript="(a bark)")
    before, behind = ours.render(heard, Modality.SPEECH).split(ours.audio_token)
    assert "Listen: " in before
    assert f"{QUESTION.text}; 1 grass" in behind
    assert f"Listen: (a bark)\n{QUESTION.text}; 1 grass" in ours.render(heard, Modality.TEXT)


def test_the_system_prompt_may_name_the_answer_format(tmp_path):
    usual = prompts_of().render(QUESTION, Modality.TEXT)
    assert prompts_of(answer_format="think").render(QUESTION, Modality.TEXT) == usual
    own = prompts_of(system_prompt="Be short. {answer_format}").render(QUESTION, Modality.TEXT)
    assert own == usual.replace("Think, then answer.", f"Be short. {THINK.instruction}")
    plain = prompts_of(answer_format="plain").render(QUESTION, Modality.TEXT)
    assert plain == usual.replace("Think, then answer.", f"You are a helpful assistant. {PLAIN.instruction}")
    assert "Think" not in prompts_of(system_prompt="").render(QUESTION, Modality.TEXT)
    # Back to the format of the paper from a checkpoint of another one.
    trained = dataclasses.replace(PRESETS["pocket"], answers=PLAIN, system_prompt="Plainly.")
    assert trained.with_settings(EvaluateConfig(answer_format="think")).system_prompt == THINK_PROMPT
    assert trained.with_settings(EvaluateConfig()) == trained


def test_a_checkpoint_keeps_them(tmp_path, template):
    path = tmp_path / "equals.toml"
    path.write_text("instruction = 'End with = and the answer.'\nanswer = '= *(?P<answer>\\w+)'\n")
    config = TrainConfig(
        prompt_template=template("Q: {{ question }}"), answer_format=str(path), system_prompt="{answer_format}"
    )
    preset = config.as_preset(PAPER)
    preset.save(tmp_path)
    template("changed {{ question }}")
    assert find_preset(str(tmp_path)) == dataclasses.replace(preset, source=str(tmp_path))
    assert (preset.question_template, preset.answers.name) == ("Q: {{ question }}", str(path))
    # A checkpoint of an earlier version names neither.
    values = json.loads((tmp_path / "preset.json").read_text())
    del values["question_template"], values["answers"]
    (tmp_path / "preset.json").write_text(json.dumps(values))
    earlier = Preset.read(tmp_path, "")
    assert (earlier.question_template, earlier.answers) == ("", THINK)
    run = config.resolve(PAPER, output_dir=tmp_path, tokens_per_micro_batch=1)
    assert (run.system_prompt, run.answer_format) == ("{answer_format}", str(path))
    assert TrainConfig().resolve(PAPER, output_dir=tmp_path, tokens_per_micro_batch=1).system_prompt is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ question", "line 1: unexpected end of template"),
        ("{{ question }} {{ 1" + 5000 * "0" + " }}", "Exceeds the limit"),
        ("{{ question }} {{ optons }}", "uses 'optons', which is none of question, options,"),
        ("{{ options }}", "leaves the question out; write {{ question }} where it stands"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_once(template, text, said):
    with pytest.raises(UserError) as raised:
        read_prompt_template(template(text))
    assert said in str(raised.value)
    assert str(raised.value).startswith("--prompt-template ")
    assert "\n" not in str(raised.value)


def test_a_template_that_fails_on_one_item_stops_the_command_with_its_name(template, questions):
    path = template("{% if id == 'bad' %}{{ 1 / 0 }}{% endif %}{{ question }}{% if category %}{{ question }}{% endif %}")
    ours = prompts_of(prompt_template=path)
    good = questions[0]
    assert len(ours.prompt_sizes([good], 8)) == 1
    for bad, said in (
        (dataclasses.replace(good, id="bad"), r"fails on item 'bad' \(ZeroDivisionError: division by zero\); correct it"),
        (dataclasses.replace(good, category="c"), r"holds the question of item '.*' 2 times in the written prompt"),
    ):
        with pytest.raises(PromptTemplateError, match=said):
            ours.prompt_sizes([good, bad], 8)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("brief", None, "neither think nor plain nor a file"),
        ("none.yaml", None, "cannot be read (No such file or directory); name a text file"),
        ("a.yaml", "[1", "is no YAML"),
        ("a.toml", "answer", "is no TOML"),
        ("a.yaml", "- x", "holds no entries by name"),
        ("a.yaml", "instruction: x", "'answer' must be a text"),
        ("a.yaml", "instruction: x\nanswer: 3", "'answer' must be a text"),
        ("a.yaml", "instruction: x\nanswer: (?P<answer>x)\nwhol: x", "'whol' is none of instruction, answer, whole"),
        ("a.yaml", "instruction: x\nanswer: (x", "'answer' is no regular expression (missing ), unterminated"),
        ("a.yaml", "instruction: x\nanswer: (x)", "has no group named answer; write (?P<answer>...)"),
    ],
)
def test_answer_formats_that_cannot_be_used_are_refused_at_once(tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_answer_format(str(path))
    assert said in str(raised.value)
    assert str(raised.value).startswith("--answer-format ")
    assert "\n" not in str(raised.value)
