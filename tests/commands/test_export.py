"""Exported checkpoints: the same model to rounding, in plain transformers and in vLLM, and a card that says whence it comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import BY_DECODER, MAKERS
from safetensors.torch import load_file, save_file
from steps import save_checkpoint

from tars_fast.data.items import HELD_OUT_DATA, load_questions
from tars_fast.export import ExportConfig, export
from tars_fast.models.adapters import has_adapter
from tars_fast.models.prompts import PLAIN_PROMPT
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import load_model, load_module, make_trainable
from tars_fast.reports.model_card import name_of
from tars_fast.rollout.engine import Sampling
from tars_fast.rollout.transformers_engine import TransformersEngine
from tars_fast.support.cli import FAILED
from tars_fast.support.locks import LOCK
from tars_fast.types import Completion, Modality, UserError

REPORT = {"num_items": 8, "speech_accuracy": 0.5, "speech_accuracy_ci95": [0.25, 0.75], "text_accuracy": 1.0}
REPORT |= {"text_accuracy_ci95": [1.0, 1.0], "mrr": 50.0, "mrr_ci95": None}


def save_run(folder: Path, model, steps: int = 3) -> Path:
    """A run's folder with one checkpoint of a model whose trained weights have moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    checkpoint = save_checkpoint(folder, steps, model, torch.optim.SGD(model.trainable_parameters()))
    settings = {
        "model": "pocket",
        "num_steps": 3,
        "learning_rate": 0.125,
        "output_dir": "/secret",
        "audio_cache_dir": "/secret",
    }
    settings["data_fingerprint"] = {"training": "abc123", "evaluation": "def456"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evaluation.json").write_text(json.dumps({"before": REPORT, "after": REPORT, "change": {"speech_accuracy": 0}}))
    return checkpoint


@pytest.fixture
def adapter(tmp_path, lora_model) -> Path:
    return save_run(tmp_path / "lora", lora_model)


@pytest.fixture
def full(tmp_path, model) -> Path:
    return save_run(tmp_path / "full", model)


def loaded(folder: Path):
    return load_model(find_preset(str(folder)), str(folder), torch.device("cpu"), torch.float32)


@torch.no_grad()
def logits(model, questions) -> torch.Tensor:
    """[T, V] over three given tokens behind each spoken and written prompt."""
    prompts = [prompt for modality in Modality for prompt in model.encode_prompts(questions, modality)]
    said = [Completion(0, prompt.modality, (5, 6, 7), (0.0,) * 3, "", False) for prompt in prompts]
    return model.head(model.forward(model.pack(prompts, said)))


def exported(checkpoint: Path, output_dir: Path, **changes) -> Path:
    assert export(ExportConfig(model=str(checkpoint), output_dir=output_dir, **changes)) == 0
    return output_dir


def test_merged_adapter_is_base_plus_adapter(adapter, questions, tmp_path):
    folder = exported(adapter, tmp_path / "merged")
    merged, apart = loaded(folder), loaded(adapter)
    assert not has_adapter(merged.module)
    base_model = loaded(Path(find_preset("pocket").source))
    expected, base = logits(apart, questions), logits(base_model, questions)
    assert (expected - base).abs().max() > 0.1, "the adapter does something"
    # Rounding of W x + s B A x against (W + s B A) x in float32, on logits of size 10.
    assert (logits(merged, questions) - expected).abs().max() < 1e-4
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "lora" in name]
    assert weights.keys() == {apart.family.published_name(name) for name in base_model.module.state_dict()}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in weights
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044, "others may read it"


def test_training_on_an_adapter_is_refused_with_the_command_that_makes_it_possible(adapter, tmp_path):
    settings = {"lora_rank": 4, "lora_alpha": 8.0, "freeze_audio": True, "gradient_checkpointing": False}
    with pytest.raises(UserError) as refused:
        make_trainable(loaded(adapter), **settings)
    command = f"python -m tars_fast.export --model {adapter} --output-dir MERGED, then train --model MERGED"
    assert str(refused.value).endswith(command)
    make_trainable(loaded(exported(adapter, tmp_path / "merged")), **settings)


@pytest.mark.parametrize("family", BY_DECODER)
def test_adapters_of_every_family(family, questions, tmp_path):
    """Weights of a whole model's part, tied heads, an adapter that the base brings itself: all end in one plain model."""
    source = str(MAKERS[family](tmp_path / "base"))
    model = load_model(find_preset(source), source, torch.device("cpu"), torch.float32)
    family = model.prompts.family
    base = logits(model, questions)
    settings = {"lora_alpha": 32.0, "freeze_audio": True, "gradient_checkpointing": False}
    make_trainable(model, lora_rank=4, **settings)
    adapter = save_run(tmp_path / "run", model)
    expected = logits(loaded(adapter), questions)
    assert (expected - base).abs().max() > 0.1
    folder = exported(adapter, tmp_path / "merged")
    merged = loaded(folder)
    assert (logits(merged, questions) - expected).abs().max() < 1e-4
    check_plain(folder, source, merged)
    card = (exported(adapter, tmp_path / "adapter", adapter=True) / "README.md").read_text()
    assert ("Merge the base's own adapter first" in card) == bool(family.adapter_folder)
    assert f"`{family.adapter_folder}`" in card or not family.adapter_folder
    halved = exported(adapter, tmp_path / "bfloat16", dtype="bfloat16")
    names = dict(merged.module.named_parameters())
    module = load_module(merged.prompts, str(halved), torch.device("cpu"), torch.float32)
    assert all(torch.equal(value, names[name].bfloat16().float()) for name, value in module.named_parameters())


def check_plain(folder: Path, source: str, merged):
    """Plain transformers loads an export whole: what was trained as merged, what this package leaves out as in the base."""
    model_class = merged.prompts.family.transformers_class()
    module, found = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    # Parts of the whole model that the class has not; not every release of transformers knows them.
    assert all(name.startswith(merged.family.other_parts) for name in found["unexpected_keys"])
    assert not found["mismatched_keys"]
    parameters = dict(module.named_parameters())
    own = dict(merged.module.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in own.items())
    unused = tuple(f"{part}." for part in merged.prompts.family.unused_parts)
    rest = parameters.keys() - own.keys()
    assert all(name.startswith(unused) for name in rest)
    assert bool(rest) == bool(unused)
    original = load_file(Path(source) / "model.safetensors")
    assert all(torch.equal(parameters[name], original[merged.family.published_name(name)]) for name in rest)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_dtype_is_that_of_the_stored_weights(tmp_path, stored):
    """Whatever the configuration says; that of a whole model often says nothing."""
    source = MAKERS["qwen2.5-omni"](tmp_path / "base")
    weights = {name: value.to(getattr(torch, stored)) for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(without_dtype(config)))
    model = loaded(source)
    settings = {"lora_alpha": 32.0, "freeze_audio": True, "gradient_checkpointing": False}
    make_trainable(model, lora_rank=4, **settings)
    folder = exported(save_run(tmp_path / "run", model), tmp_path / "merged")
    assert {str(value.dtype) for value in load_file(folder / "model.safetensors").values()} == {f"torch.{stored}"}
    assert f"model in {stored}" in (folder / "README.md").read_text()


def without_dtype(config):
    if not isinstance(config, dict):
        return config
    return {name: without_dtype(value) for name, value in config.items() if name not in ("dtype", "torch_dtype")}


def test_export_loads_in_plain_transformers(adapter, tmp_path):
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    folder = exported(adapter, tmp_path / "merged")
    module, report = Qwen2AudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = loaded(folder).module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "system", "content": PLAIN_PROMPT}], tokenize=False)
    assert PLAIN_PROMPT in text
    assert module.generation_config.eos_token_id == loaded(adapter).prompts.generation_config.eos_token_id


def test_bfloat16_is_cast_once_after_the_merge(adapter, tmp_path):
    exact = load_file(exported(adapter, tmp_path / "float32") / "model.safetensors")
    folder = exported(adapter, tmp_path / "bfloat16", dtype="bfloat16")
    cast = load_file(folder / "model.safetensors")
    assert all(torch.equal(value.bfloat16(), cast[name]) for name, value in exact.items())
    config = json.loads((folder / "config.json").read_text())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    assert {part["dtype"] for part in parts if "dtype" in part} == {"bfloat16"}
    assert "model in bfloat16" in (folder / "README.md").read_text()


def test_full_checkpoint_is_written_as_it_is(full, tmp_path):
    written = load_file(exported(full, tmp_path / "out") / "model.safetensors")
    original = load_file(full / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in written.items())
    assert not (tmp_path / "out" / "trainer_state.pt").exists()


def test_bare_adapter(adapter, questions, tmp_path):
    folder = exported(adapter, tmp_path / "adapter", adapter=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(logits(loaded(folder), questions), logits(loaded(adapter), questions))
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_model_card(adapter, tmp_path):
    card = (exported(adapter, tmp_path / "merged") / "README.md").read_text()
    for text in ("base model `pocket`", "training: `abc123`", '"learning_rate": 0.125', "arXiv 2601.05543"):
        assert text in card
    assert "| after | 8 | 50.0 (25.0 to 75.0) | 100.0 (100.0 to 100.0) | 50.0 |" in card
    assert "/secret" not in card
    assert "| change |" not in card
    given = tmp_path / "evaluation.json"
    given.write_text(json.dumps({"mmsu": REPORT | {"num_items": 3074}, "overall": REPORT}))
    card = (exported(adapter, tmp_path / "other", evaluation=given) / "README.md").read_text()
    assert "| mmsu | 3074 |" in card
    assert "| after |" not in card


def test_an_export_is_published(adapter, tmp_path, hub, capsys):
    assert export(ExportConfig(str(adapter), tmp_path / "merged", push_to_hub="me/merged")) == 0
    ((name, message, files),) = hub.commits
    assert (name, message) == ("me/merged", "export of checkpoint-3")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir() if path.name != LOCK}
    assert b"# merged" in files["README.md"]
    assert "published as me/merged" in capsys.readouterr().out
    hub.refuses = "/commit/"
    assert export(ExportConfig(str(adapter), tmp_path / "again", push_to_hub="me/merged")) == FAILED
    assert (tmp_path / "again" / "model.safetensors").exists()
    hub.refuses = "/create"
    with pytest.raises(UserError, match="--push-to-hub me/other: cannot be written to"):
        export(ExportConfig(str(adapter), tmp_path / "third", push_to_hub="me/other"))
    assert not (tmp_path / "third").exists()


def test_base_models_are_named_as_others_find_them():
    assert name_of("qwen2-audio-7b") == name_of("Qwen/Qwen2-Audio-7B-Instruct") == "Qwen/Qwen2-Audio-7B-Instruct"
    assert name_of(find_preset("pocket").source) == "pocket"
    assert name_of("owner/name@main") == "owner/name@main"
    assert name_of(None) is None


def test_figures_of_a_run_are_not_those_of_an_earlier_checkpoint(model, tmp_path):
    earlier = save_run(tmp_path / "run", model, steps=2)
    card = (exported(earlier, tmp_path / "out") / "README.md").read_text()
    assert "## Evaluation" not in card
    assert "## Training" in card


def test_what_cannot_be_exported(adapter, full, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    halved = tmp_path / "halved"
    halved.mkdir()
    (halved / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (halved / "preset.json").write_text((adapter / "preset.json").read_text())
    for checkpoint, changes, message in (
        (adapter.parent, {}, r"the folder of a run; .*checkpoint-3"),
        (tmp_path / "absent", {}, "neither a preset"),
        (adapter, {"output_dir": tmp_path / "taken"}, "exists already; name another folder"),
        (adapter, {"output_dir": adapter}, "exists already"),
        (adapter, {"output_dir": tmp_path / "file" / "out"}, "cannot be made"),
        (adapter, {"adapter": True, "dtype": "bfloat16"}, "--dtype bfloat16: an adapter is written as it was trained"),
        (adapter, {"evaluation": tmp_path / "absent.json"}, "--evaluation .*absent.json: cannot be read"),
        (adapter, {"evaluation": tmp_path / "list.json"}, "not a JSON object"),
        (full, {"adapter": True}, "is a full checkpoint"),
        (halved, {}, "holds no adapter_model.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            exported(checkpoint, **({"output_dir": tmp_path / "out"} | changes))
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years of work"
    assert (adapter / "trainer_state.pt").exists()


def test_an_interrupted_export_leaves_no_folder(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("tars_fast.export.model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        exported(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    exported(adapter, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_serves_the_export(adapter, tmp_path):
    """The project's own engine loads the merged folder and answers as transformers does."""
    from tars_fast.models.prompts import load_prompt_format
    from tars_fast.rollout.vllm_engine import VllmEngine
    from tars_fast.rollout.vllm_internals import VllmSettings

    folder = exported(adapter, tmp_path / "merged")
    prompts = load_prompt_format(find_preset(str(folder)), str(folder))
    settings = VllmSettings(max_sequences=16, max_tokens=128, kv_cache_bytes=2**24, lora_rank=0, cuda_graphs=False)
    engine = VllmEngine(prompts, str(folder), torch.device("cpu"), torch.float32, settings)
    greedy = Sampling(num_completions=1, max_new_tokens=40, temperature=0.0, seed=0)
    items = load_questions(HELD_OUT_DATA)[:6]
    completions = {}
    for name, served in (("vllm", engine), ("transformers", TransformersEngine(loaded(adapter), 16))):
        model = engine.model if name == "vllm" else loaded(adapter)
        with torch.no_grad():
            encoded = [prompt for modality in Modality for prompt in model.encode_prompts(items, modality)]
        completions[name] = [completion.token_ids for completion in served.generate(encoded, range(12), greedy)]
    engine.close()
    assert completions["vllm"] == completions["transformers"]
