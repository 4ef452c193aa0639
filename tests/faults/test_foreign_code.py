"""Checkpoints and data come from strangers: none of their code runs, and what may not run ends in one line."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tars_fast.data.items import read_items
from tars_fast.learning.rewards.behaviour import load_text_similarity
from tars_fast.models import templates
from tars_fast.models.checkpoint import load_trainer_state
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS, find_preset
from tars_fast.models.speech_model import load_module
from tars_fast.models.templates import TemplateError, render_template
from tars_fast.types import Modality, UserError

PACKAGE = Path(__file__).parents[2] / "tars_fast"
POCKET = Path(PRESETS["pocket"].source)
CPU = torch.device("cpu")

REFUSES_BY_ITSELF = {"PeftConfig"}
"""Classes whose `from_pretrained` reads JSON and knows no code."""
LOADERS = {"pipeline", "SentenceTransformer", "LLM"}


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """(place, what is called, its keywords as they are written) of every call in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {word.arg or "**": getattr(word.value, "value", None) for word in node.keywords}
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", ast.unparse(node.func), given))
    return found


def test_no_call_trusts_what_it_loads():
    """All that could run code of a checkpoint or of data, by name: `from_pretrained`, the loaders, pickles, eval."""
    seen = set()
    for place, name, given in calls():
        owner, _, last = name.rpartition(".")
        if (last == "from_pretrained" and owner not in REFUSES_BY_ITSELF) or last in LOADERS:
            assert given.get("trust_remote_code") is False, f"{place}: {name}"
            seen.add(last)
        if name == "torch.load":
            assert given.get("weights_only") is True, f"{place}: {name}"
            seen.add(name)
        assert given.get("trust_remote_code") in (None, False), f"{place}: {name}"
        assert not given.get("allow_pickle"), f"{place}: {name}"
        assert last not in ("eval", "exec", "from_string") or owner, f"{place}: {name}"
    assert seen == {"from_pretrained", "torch.load", *LOADERS}
    imported = {
        name.name.partition(".")[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    # Of pickle only what it raises is named.
    assert not imported & {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name for _, name, _ in calls() if name.startswith("pickle.")}
    assert not any("from pickle import load" in path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(POCKET, tmp_path / "checkpoint")


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """The file that foreign code would make; whoever asks whether to run it is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    return tmp_path / "ran"


@pytest.mark.parametrize(
    ("name", "type_", "auto", "refused"),
    [
        ("processor_config.json", "feature_extractor_type", "AutoFeatureExtractor", "asks for code of its own, which is never"),
        # A processor is not asked for.
        ("processor_config.json", "processor_class", "AutoProcessor", None),
        ("tokenizer_config.json", "tokenizer_class", "AutoTokenizer", None),
        ("config.json", "model_type", "AutoConfig", "a Evil checkpoint; supported are"),
    ],
)
def test_code_of_a_checkpoint_is_refused_without_a_question(name, type_, auto, refused, checkpoint, ran):
    (checkpoint / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n")
    described = json.loads((checkpoint / name).read_text())
    wanted = "evil.Evil" if auto != "AutoTokenizer" else ["evil.Evil", "evil.Evil"]
    parts = [described, *(part for part in described.values() if isinstance(part, dict) and type_ in part)]
    for part in parts:
        part[type_] = "Evil"
        part["auto_map"] = {auto: wanted}
    (checkpoint / name).write_text(json.dumps(described))
    with pytest.raises(UserError) if refused else nullcontext() as refusal:
        prompts = load_prompt_format(find_preset(str(checkpoint)), str(checkpoint))
        load_module(prompts, str(checkpoint), CPU, torch.float32)
    assert not refused or re.search(refused, str(refusal.value)), refusal.value
    assert not ran.exists()


def test_pickles_are_not_read(checkpoint, ran):
    (checkpoint / "model.safetensors").unlink()
    torch.save(Touch(ran), checkpoint / "pytorch_model.bin")
    prompts = load_prompt_format(find_preset(str(checkpoint)), str(checkpoint))
    with pytest.raises(UserError, match=r"--model .*: cannot be loaded") as refusal:
        load_module(prompts, str(checkpoint), CPU, torch.float32)
    assert "\n" not in str(refusal.value)
    torch.save(Touch(ran), checkpoint / "trainer_state.pt")
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_trainer_state(checkpoint, [])
    assert not ran.exists()


def test_an_embedder_that_asks_for_code_is_refused(tmp_path, ran):
    """A checkpoint's preset.json may name it."""
    folder = tmp_path / "embedder"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]))
    (folder / "config_sentence_transformers.json").write_text("{}")
    with pytest.raises(UserError, match=r"--behaviour-model .*: asks for code of its own \(evil.Evil\), which is never run"):
        load_text_similarity(str(folder), CPU)
    for damaged in ("[3]", "[{}]", "x", "[[]]"):
        (folder / "modules.json").write_text(damaged)
        with pytest.raises(UserError, match=r"--behaviour-model .*: cannot be loaded \("):
            load_text_similarity(str(folder), CPU)
    assert not ran.exists()


def test_data_run_no_code(tmp_path, ran):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    column = pa.field("question", pa.binary(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Touch(ran))
    })  # fmt: skip
    pq.write_table(pa.table({"question": [b"x"]}, schema=pa.schema([column])), folder / "train.parquet")
    assert [item.error is not None for item in read_items(str(folder))] == [True]
    assert not ran.exists()


BAD_TEMPLATES = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "undefined": ("{{ foo.bar }}", "UndefinedError: 'foo' is undefined"),
    "raise_exception": ("{{ raise_exception('no system role') }}", "no system role"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "constant": ("3", "it leaves the question out"),
    "emptied": ("", "it leaves the question out"),
    "twice": ("{{ messages[1].content }}<|AUDIO|><|AUDIO|>", "it holds a recording 2 times"),
    "long": ("{{ 'x' * 2000000 }}", "it makes a prompt of 2000000 characters"),
    "3 GB": ("{{ 'x' * 3000000000 }}", "it takes more than 2 GB of memory"),
    "tokens named as arguments": ("{{ messages }}", "multiple values"),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_template_that_fails_is_one_line(kind, checkpoint):
    template, reason = BAD_TEMPLATES[kind]
    (checkpoint / "chat_template.jinja").write_text(template)
    if kind == "tokens named as arguments":
        with pytest.raises(TemplateError, match=reason):
            render_template(template, [], {"conversations": "x"})
        return
    with pytest.raises(UserError, match=rf"--model .*: its chat template cannot be used \(.*{reason}") as refusal:
        load_prompt_format(find_preset(str(checkpoint)), str(checkpoint))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    pytest.param("{{ 7 ** (9 ** 9) }}", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_template_without_end_is_ended(template, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(TemplateError, match="it takes longer than 1 s"):
        render_template(template, [], {})
    assert time.monotonic() - began < 30
    assert render_template("{{ messages[0].content }}", [{"role": "user", "content": "\u2028é\n"}], {}) == "\u2028é\n"


def test_a_ctrl_c_leaves_no_answer_behind(monkeypatch):
    """An answer that nobody waited for would be the next prompt."""
    render_template("first", [], {})
    process = templates._worker.start()
    monkeypatch.setattr(process.stdout, "readline", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        render_template("second", [], {})
    assert render_template("third", [], {}) == "third"
    process.wait()


BY_NAME = {"default": "{{ messages[1].content if messages[1].content is string else '<|AUDIO|>' }}", "rag": "x"}


@pytest.mark.parametrize("template", [BY_NAME, {"rag": "x"}, ["x"], 3])
def test_templates_by_name_and_templates_that_are_none(template, checkpoint, monkeypatch):
    monkeypatch.setattr("transformers.ProcessorMixin.get_processor_dict", lambda *_: ({"chat_template": template}, {}))
    preset = find_preset(str(checkpoint))
    if template is BY_NAME:
        question = next(iter(read_items(str(PACKAGE / "assets/spoken-arithmetic/held_out.parquet")))).question
        assert load_prompt_format(preset, str(checkpoint)).render(question, Modality.TEXT) == question.text
        return
    with pytest.raises(UserError, match="brings no chat template"):
        load_prompt_format(preset, str(checkpoint))


DAMAGES = ("", "[]", "null", "3", '"x"', "{", '{"a": 1}', b"\xff\xfe\x00", None)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        pytest.param("config.json", (), marks=pytest.mark.slow),
        # Of the tokenizer's settings and these nothing is needed that is not elsewhere.
        ("generation_config.json", ('{"a": 1}', None)),
        ("tokenizer_config.json", ('{"a": 1}', None)),
        pytest.param("processor_config.json", (), marks=pytest.mark.slow),
        ("tokenizer.json", ()),
        pytest.param("model.safetensors", (), marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_one_line(name, whole, checkpoint):
    """Each file cut, emptied, of other contents, removed."""
    for content in DAMAGES:
        (checkpoint / name).unlink(missing_ok=True)
        if content is not None:
            (checkpoint / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with nullcontext() if content in whole else pytest.raises(UserError, match=r"^--model .*; copy .* again, whole$"):
            load_module(load_prompt_format(find_preset(str(checkpoint)), str(checkpoint)), str(checkpoint), CPU, torch.float32)


def test_a_tokenizer_without_what_prompts_need_is_named(checkpoint):
    tokenizer = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(tokenizer.replace("<|AUDIO|>", "<|SOUND|>"))
    config = (checkpoint / "tokenizer_config.json").read_text()
    (checkpoint / "tokenizer_config.json").write_text(config.replace("<|AUDIO|>", "<|SOUND|>"))
    prompts = load_prompt_format(PRESETS["pocket"], str(POCKET))
    with pytest.raises(UserError, match=r"its tokenizer has no <\|AUDIO\|>|holds a recording 0 times"):
        load_prompt_format(find_preset(str(checkpoint)), str(checkpoint))
    assert prompts.audio_token == "<|AUDIO|>"
