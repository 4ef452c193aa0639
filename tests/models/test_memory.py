"""The memory plan against what is counted: parameters and buffers of real modules, known sizes, and what it advises."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PretrainedConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2Model,
    Qwen3OmniMoeTextConfig,
    Qwen3OmniMoeThinkerTextModel,
)

from tars_fast import plan as plan_command
from tars_fast import train as train_command
from tars_fast.config import TrainConfig
from tars_fast.models.adapters import adapter_weights, add_adapter, save_adapter
from tars_fast.models.architecture import Architecture
from tars_fast.models.families import qwen2_audio
from tars_fast.models.memory import describe, largest_share, limits, plan_memory, remedies
from tars_fast.models.packed_attention import PackedGroups, use_packed_attention
from tars_fast.models.registry import PRESETS, architecture_of
from tars_fast.support.text import GB

PAPER = TrainConfig(objective="tars").workload(PRESETS["qwen2-audio-7b"], PRESETS["qwen2-audio-7b"].architecture, "vllm", 2)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", ["pocket", "7b", "grouped"])
def test_parameters_are_counted_exactly(shape):
    """Against transformers' own module, built without memory."""
    folder = PRESETS["pocket"].source
    config = Qwen2AudioConfig.from_pretrained(folder)
    if shape == "7b":
        config = Qwen2AudioConfig()
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 156032, "num_hidden_layers": 32}
        for name, value in (sizes | {"num_attention_heads": 32, "num_key_value_heads": 32}).items():
            setattr(config.text_config, name, value)
        config.text_config.layer_types = ["full_attention"] * 32
        config.text_config.max_position_embeddings = 8192
    if shape == "grouped":
        config.text_config.num_key_value_heads = 1
    with init_empty_weights(include_buffers=False):
        module = Qwen2AudioForConditionalGeneration(config)
    architecture = qwen2_audio.FAMILY.architecture(config)
    if shape == "7b":
        assert architecture == PRESETS["qwen2-audio-7b"].architecture
    assert architecture.num_text_parameters() == count(module.model.language_model) + count(module.lm_head)
    assert architecture.num_other_parameters == count(module.model.audio_tower) + count(module.model.multi_modal_projector)
    if shape == "pocket":
        assert architecture_of(PRESETS["pocket"]) == architecture


def test_lora_and_optimiser_are_counted_exactly(make_model):
    model = make_model(lora_rank=4)
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    for parameter in model.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp_avg")]
    config = TrainConfig(lora_rank=4)
    preset = config.as_preset(PRESETS["pocket"])
    workload = config.workload(preset, architecture_of(preset), "transformers", 4)
    assert workload.num_trained == sum(parameter.numel() for parameter in model.trainable_parameters())
    assert workload.adapters == sum(parameter.nbytes for parameter in model.trainable_parameters())
    assert workload.optimiser == sum(value.nbytes for value in moments)
    assert workload.weights + workload.adapters == sum(parameter.nbytes for parameter in model.module.parameters())


def test_a_tower_in_training_is_counted(make_model, monkeypatch, capsys):
    model = make_model(freeze_audio=False)
    config = TrainConfig(freeze_audio=False)
    preset = config.as_preset(PRESETS["pocket"])
    workload = config.workload(preset, architecture_of(preset), "transformers", 4)
    constants = [model.module.get_submodule(name) for name in model.family.frozen_parts]
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    assert workload.num_trained == trained + sum(map(count, constants))
    assert workload.optimiser == 8 * workload.num_trained
    assert workload.gradients == 4 * workload.num_trained
    frozen = dataclasses.replace(workload, trains_audio=False)
    assert workload.resident["reference weights"] == frozen.resident["reference weights"] > 0
    others = architecture_of(preset).num_other_parameters
    of_eight, frozen_of_eight = (dataclasses.replace(one, num_processes=8) for one in (workload, frozen))
    assert of_eight.num_stepped - frozen_of_eight.num_stepped == -(-others // 8)
    # At 7B: ten bytes for each of 642 M, and what would make room.
    full = ("--lora-rank", "0", "--objective", "tars", "--gpu-memory", "180")
    peaks = []
    for flags in ((), ("--no-freeze-audio",)):
        status, output = run_plan(monkeypatch, capsys, *full, *flags)
        assert status == 0
        assert ("what the tower keeps for its backward pass comes on top" in output) == bool(flags)
        (peak,) = re.findall(r"^peak.* ([\d.]+)$", output, re.MULTILINE)
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] == pytest.approx(10 * 0.6422, abs=0.02)
    plan = plan_memory(dataclasses.replace(PAPER, lora_rank=0, trains_audio=True), 80 * GB)
    assert remedies(plan)[0].startswith("--freeze-audio --lora-rank 8: peak")


def peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes that `run` holds at once, of PyTorch's allocator on the CPU, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def backward_peak(decoder: torch.nn.Module, num_tokens: int) -> int:
    """Bytes at the height of a forward and backward pass through a decoder of one layer, which is checkpointed."""
    use_packed_attention(decoder)
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    decoder.eval().layers[0].training = True
    # Many short groups, so that attention masks, which a GPU has not, are small.
    groups = PackedGroups((32,) * (num_tokens // 64), ((16, 16),) * (num_tokens // 64), torch.device("cpu"))
    groups.masks(torch.bfloat16)
    positions = torch.arange(num_tokens)[None]

    def run() -> None:
        inputs = torch.randn(1, num_tokens, decoder.config.hidden_size, dtype=torch.bfloat16).requires_grad_()
        mask = inputs.new_zeros(1, 1, 1, 1)
        states = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False, groups=groups)
        states.last_hidden_state.backward(torch.ones_like(inputs))

    # Gradients of weights, which the plan counts by themselves, stay from the first time.
    run()
    return peak_bytes(run)


def one_layer(text: PretrainedConfig, model_class: type, targets: Collection[str]) -> torch.nn.Module:
    """A decoder of one random layer, with adapters on `targets`, or trained in full."""
    decoder = model_class._from_config(text, dtype=torch.bfloat16)
    decoder.requires_grad_(not targets)
    if targets:
        add_adapter(decoder, LoraConfig(r=8, target_modules=list(targets)))
    return decoder


DENSE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 4, "num_key_value_heads": 4}
"""Sizes in the proportion of those of Qwen2-Audio-7B."""


@pytest.mark.parametrize("given", ["attention", "all-linear", "full"])
def test_activations_of_a_layer_are_those_that_are_planned(given):
    text = Qwen2Config(**DENSE, num_hidden_layers=1, vocab_size=64)
    architecture = dataclasses.replace(PAPER.architecture, num_layers=1, num_heads=4, num_key_value_heads=4, hidden_size=512)
    architecture = dataclasses.replace(architecture, intermediate_size=1376)
    targets = () if given == "full" else architecture.find_lora_targets(given)
    measured = backward_peak(one_layer(text, Qwen2Model, targets), 1024)
    if given == "full":
        # The weights' own gradients, of which the largest are there once more until they are added up.
        measured -= 2 * 2 * 512 * 1376
    assert measured == pytest.approx(planned_activations(architecture, targets, 1024), rel=0.1)


def planned_activations(architecture: Architecture, targets: tuple[str, ...], num_tokens: int) -> int:
    workload = dataclasses.replace(PAPER, architecture=architecture, lora_targets=targets, lora_rank=8 * bool(targets))
    return dataclasses.replace(workload, group_size=2, max_new_tokens=1, longest_prompt=1).activations(num_tokens)


@pytest.mark.parametrize("num_tokens", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_activations_of_a_mixture_of_experts_are_those_that_are_planned(num_tokens):
    """A layer of Qwen3-Omni-30B, as wide as it is, with fewer experts: a token is there eight times all the same."""
    whole = PRESETS["qwen3-omni-30b"].architecture
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = Qwen3OmniMoeTextConfig(
        hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768,
        num_experts=8, num_experts_per_tok=8, num_hidden_layers=1, vocab_size=64, rope_parameters=rope,
    )  # fmt: skip
    targets = whole.find_lora_targets(None)
    decoder = one_layer(text, Qwen3OmniMoeThinkerTextModel, targets)
    decoder.set_experts_implementation("grouped_mm")
    planned = planned_activations(dataclasses.replace(whole, num_layers=1), targets, num_tokens)
    assert backward_peak(decoder, num_tokens) == pytest.approx(planned, rel=0.1)


def test_qwen2_audio_7b_has_its_known_size():
    """8.40 B parameters, 16.8 GB in bf16; 512 KiB of keys and values a token (32 layers x 32 heads x 128 x 2 x 2 bytes)."""
    assert PAPER.weights == pytest.approx(16.79 * GB, rel=1e-3)
    assert PAPER.kv_bytes_per_token == 512 * 1024
    plan = plan_memory(PAPER, 80 * GB)
    assert plan.fits
    assert plan.sequences_in_flight == 64
    assert max(plan.peaks, key=plan.peaks.get) == "rollout"


def test_the_target_of_24_gb():
    """A LoRA step of 8 completions of 512 new tokens with 10 s of audio: weights once, KV cache only while sampling."""
    workload = dataclasses.replace(PAPER, max_new_tokens=512, longest_prompt=400, rollout_batch_size=8, embedder_bytes=0)
    assert max(plan_memory(workload, 24 * GB).peaks.values()) < 24 * GB


def test_phases_hold_what_they_hold():
    plan = plan_memory(PAPER, 80 * GB)
    assert "KV cache" in plan.phases["rollout"]
    assert not any("KV cache" in parts for phase, parts in plan.phases.items() if phase != "rollout")
    assert all(parts["weights"] == PAPER.weights for parts in plan.phases.values()), "one copy in every phase"
    assert "gradients" not in plan.phases["rollout"]


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"max_new_tokens": 2048}, ("rollout", "forward and backward")),
        ({"given_micro_batch": 32_768}, ("forward and backward",)),
        ({"gradient_checkpointing": False}, ("forward and backward",)),
        ({"rollout_batch_size": 128}, ("rollout",)),
        ({"lora_rank": 0}, ("loading", "forward and backward", "optimiser")),
        ({"dtype_bytes": 4}, ("loading", "rollout", "forward and backward")),
    ],
)
def test_what_makes_a_phase_grow(change, grows):
    huge = 10_000 * GB
    before, after = plan_memory(PAPER, huge).peaks, plan_memory(dataclasses.replace(PAPER, **change), huge).peaks
    assert all(after[phase] > before[phase] for phase in grows)
    if change.keys() <= {"given_micro_batch", "gradient_checkpointing", "rollout_batch_size"}:
        assert all(after[phase] == before[phase] for phase in after if phase not in grows)


def test_kv_cache_takes_what_is_free_and_no_more_than_needed():
    roomy, tight = plan_memory(PAPER, 141 * GB), plan_memory(PAPER, 40 * GB)
    assert roomy.kv_cache == PAPER.kv_needed
    assert 0 < tight.kv_cache < PAPER.kv_needed
    assert tight.fits, "fewer completions in flight, more waves"
    assert tight.sequences_in_flight < 64
    assert tight.peaks["rollout"] <= 0.95 * 40 * GB
    assert plan_memory(dataclasses.replace(PAPER, given_kv_cache=5 * GB), 80 * GB).kv_cache == 5 * GB


def test_what_fits_comes_with_how_far_it_does():
    plan = plan_memory(PAPER, 31 * GB)
    most = limits(plan)
    assert all(most[name] > getattr(PAPER, name) for name in most)
    for name, value in most.items():
        fits = [plan_memory(dataclasses.replace(PAPER, **{name: value + more}), 31 * GB).fits for more in (0, 2)]
        assert fits == [True, False], name
    assert limits(plan_memory(PAPER, 800 * GB))["max_new_tokens"] == 8192 - PAPER.longest_prompt, "what the model takes"
    assert f"a group of {most['group_size']} completions, {most['max_new_tokens']:,} new tokens" in describe(plan)


def test_a_mixture_of_experts_of_30b_trains_on_one_card_of_80_gb(monkeypatch, capsys):
    """At the paper's settings, all completions in flight; every expert is there once, and no adapters are."""
    status, output = run_plan(monkeypatch, capsys, "--model", "qwen3-omni-30b", "--gpu-memory", "80")
    assert status == 0
    assert re.search(r"^weights( +62\.36){5}$", output, re.MULTILINE)
    assert "82,464 tokens of 96 KiB; 64 of 64 completions in flight" in output
    status, output = run_plan(monkeypatch, capsys, "--model", "qwen3-omni-30b", "--gpu-memory", "64")
    assert status == 1
    assert "no setting: 63.85 GB stay at the least, 62.36 GB of them weights" in output
    status, output = run_plan(monkeypatch, capsys, "--model", "qwen3-omni-30b", "--lora-targets", "all-linear")
    assert status == 2
    assert "--lora-targets all-linear: the experts of this model" in output


def test_full_fine_tuning_of_7b_over_eight_cards():
    """Weights whole, moments and gradients of the update an eighth, and one parameter at a time in float32."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 2 * 4096
    trained = 32 * layer + 4096 + 2 * 156_032 * 4096
    full = dataclasses.replace(PAPER, lora_rank=0, num_processes=8)
    plan = plan_memory(full, 80 * GB)
    backward, update = plan.phases["forward and backward"], plan.phases["optimiser"]
    # Whole parameters cannot be divided evenly.
    share = update["optimiser"] // 8
    assert trained / 8 <= share < 1.01 * trained / 8
    assert backward["gradients"] == 2 * trained
    assert update["gradients"] == 2 * share
    assert backward["gradient buckets"] == 32 * 2**20
    assert update["float32 update"] == 16 * 156_032 * 4096
    # Every gradient but its own to their owners, then the new weights likewise, in bfloat16.
    assert full.sent_bytes == pytest.approx(2 * 2 * trained * 7 / 8, abs=8)
    resident = PAPER.weights + 8 * share + PAPER.embedder_bytes + int(0.8 * GB) + int(0.6 * GB) + int(0.5 * GB)
    assert plan.peaks["loading"] == resident
    assert plan.peaks["optimiser"] == resident + 2 * share + 16 * 156_032 * 4096
    assert plan.peaks["forward and backward"] == resident + sum(
        (2 * trained, 32 * 2**20, full.activations(plan.micro_batch), full.logits(plan.micro_batch))
    )
    assert plan.fits
    assert "each of 8 processes updates at most 0.97 of 7.75 B weights and sends 27.14 GB an update" in describe(plan)
    # However many there are, one has to update the embedding.
    assert dataclasses.replace(full, num_processes=512).num_stepped == 156_032 * 4096
    # Adapters are small: every process updates all, and gradients are one bucket.
    lora = plan_memory(dataclasses.replace(PAPER, num_processes=8), 80 * GB).phases["optimiser"]
    assert lora["optimiser"] == PAPER.optimiser
    assert lora["gradient buckets"] == lora["gradients"] == PAPER.gradients


def test_parts_of_weights_beside_processes_with_questions_of_their_own():
    """What a process updates is its share of the parameters, of each of which it has a part."""
    full = dataclasses.replace(PAPER, lora_rank=0, num_processes=8)
    halves = dataclasses.replace(full, tensor_parallel=2)
    assert halves.num_trained == full.num_trained // 2
    assert halves.num_stepped == full.num_stepped // 2
    plan = plan_memory(dataclasses.replace(halves, num_processes=1), 80 * GB)
    assert plan.phases["optimiser"]["float32 update"] == 16 * 156_032 * 4096 // 2
    assert plan.phases["optimiser"]["gradients"] == plan.phases["forward and backward"]["gradients"]
    assert plan.phases["optimiser"]["gradient buckets"] == 0
    assert plan.phases["loading"]["NCCL buffers"] > 0


@pytest.mark.parametrize(("sizes", "num_processes", "largest"), [((5, 4, 3, 3), 2, 8), ((7, 1, 1), 2, 7), ((2, 2, 2), 1, 6)])
def test_shares_are_as_even_as_whole_parameters_allow(sizes, num_processes, largest):
    assert largest_share(sizes, num_processes) == largest


def test_what_does_not_fit_comes_with_what_would():
    full = dataclasses.replace(PAPER, lora_rank=0)
    plan = plan_memory(full, 80 * GB)
    assert not plan.fits
    advice = remedies(plan)
    assert advice[0].startswith("--lora-rank 8:")
    assert advice[0].endswith("fits")
    assert all(line.endswith("fits") for line in advice)
    wasteful = dataclasses.replace(PAPER, gradient_checkpointing=False, given_micro_batch=40_000)
    fitting = [line for line in remedies(plan_memory(wasteful, 80 * GB)) if line.endswith("fits")]
    assert any(line.startswith("--gradient-checkpointing") for line in fitting)
    assert any(line.startswith("torchrun --nproc-per-node 4:") for line in advice)
    excess = max(plan.peaks.values()) - 0.95 * 80 * GB
    assert f"does not fit in 80.00 GB, of which 95% are planned with; {excess / GB:.2f} GB too much" in describe(plan)


def test_settings_that_help_together_are_named_together():
    """24 GB with a large micro-batch: no single change is enough, and none of those named could stay away."""
    workload = dataclasses.replace(PAPER, given_micro_batch=40_000, gradient_checkpointing=False)
    (line,) = remedies(plan_memory(workload, 24 * GB))
    for flags in ("--tokens-per-micro-batch 1024", "--gradient-checkpointing True", "--max-new-tokens 256"):
        assert flags in line
    assert line.endswith("fits")
    assert "--rollout-batch-size" not in line


def test_too_small_a_gpu_is_reported():
    (line,) = remedies(plan_memory(dataclasses.replace(PAPER, engine="transformers"), 16 * GB))
    assert line.startswith("no setting: 17.83 GB stay at the least")
    assert "16.79 GB of them weights" in line
    (line,) = remedies(plan_memory(PAPER, 16 * GB))
    assert "torchrun --nproc-per-node 2, --tensor-parallel 2: peak" in line, "vLLM's weights can be cut"


@pytest.mark.parametrize("kv_cache", [100 * GB, GB // 10])
def test_a_wrong_cache_size_is_the_first_thing_to_change(kv_cache):
    plan = plan_memory(dataclasses.replace(PAPER, given_kv_cache=kv_cache), 80 * GB)
    assert not plan.fits
    assert remedies(plan)[0].startswith("without --kv-cache-gb (43.")


def test_transformers_runs_a_batch_whole():
    """It has no queue: what its cache needs must be there, where vLLM lets completions wait."""
    workload = dataclasses.replace(PAPER, engine="transformers")
    plan = plan_memory(workload, 40 * GB)
    assert plan.kv_cache == workload.kv_needed
    assert not plan.fits
    assert plan_memory(PAPER, 40 * GB).fits
    assert remedies(plan)[0].startswith("--rollout-batch-size 4: ")


def test_a_cpu_holds_no_cuda_context():
    on_cpu = plan_memory(dataclasses.replace(PAPER, on_gpu=False), 80 * GB)
    assert on_cpu.phases["loading"]["CUDA context"] == on_cpu.phases["loading"]["CUDA graphs"] == 0


def run_plan(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    status = plan_command.main()
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_plan_command_needs_no_network_and_says_whether_it_fits(monkeypatch, capsys):
    status, output = run_plan(monkeypatch, capsys, "--model", "qwen2-audio-7b", "--gpu-memory", "80")
    assert status == 0
    assert re.search(r"^weights( +16\.79){5}$", output, re.MULTILINE)
    assert "64 of 64 completions in flight" in output
    status, output = run_plan(monkeypatch, capsys, "--lora-rank", "0", "--gpu-memory", "80")
    assert status == 1
    assert "what would help:" in output
    for model, number in (("qwen2-audio-7b", 8), ("qwen2.5-omni-3b", 2)):
        flags = ("--model", model, "--lora-rank", "0", "--gpus", str(number))
        status, output = run_plan(monkeypatch, capsys, *flags)
        assert status == 0
        assert output.startswith(f"{model} on each of {number} GPUs of 80 GB\n")
    for flags, expected in (
        (("--max-new-tokens", "100000"), "more than the model's 8192"),
        (("--lora-rank", "600", "--engine", "vllm"), "a rank of at most 512"),
        (("--dtype", "float32", "--engine", "vllm"), "take no float32"),
        (("--model", "phi-4-multimodal", "--engine", "vllm"), "remote-code variant"),
    ):
        status, output = run_plan(monkeypatch, capsys, *flags)
        assert status == 2
        assert expected in output
    status, output = run_plan(monkeypatch, capsys, "--model", "phi-4-multimodal")
    assert status == 0
    assert "rollouts by transformers" in output
    status, output = run_plan(monkeypatch, capsys, "--gpu-memory", "-1")
    assert status == 2
    assert "--gpu-memory" in output


def test_plan_reads_a_checkpoint_folder(monkeypatch, capsys, model, tmp_path):
    model.module.save_pretrained(tmp_path)
    status, output = run_plan(monkeypatch, capsys, "--model", str(tmp_path), "--dtype", "float32", "--max-new-tokens", "99")
    assert status == 0
    weights = sum(parameter.nbytes for parameter in model.module.parameters()) / 1e6
    shown = float(re.search(r"^weights +([0-9.]+)", output, re.MULTILINE).group(1))
    assert shown == pytest.approx(weights, rel=0.01)


def test_plan_of_an_adapter_is_that_of_its_base(monkeypatch, capsys, make_model, tmp_path):
    module = make_model(lora_rank=4).module
    save_adapter(module, adapter_weights(module), tmp_path)
    (tmp_path / "preset.json").write_text((Path(PRESETS["pocket"].source) / "preset.json").read_text())
    status, output = run_plan(monkeypatch, capsys, "--model", str(tmp_path), "--lora-rank", "4", "--dtype", "float32")
    assert status == 0
    assert re.search(r"^weights +4\.7", output, re.MULTILINE)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": "somebody/elses"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    status, output = run_plan(monkeypatch, capsys, "--model", str(tmp_path))
    assert status == 2
    assert "--model somebody/elses: cannot be loaded" in output


def test_dry_run_prints_the_plan_and_loads_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tars_fast.learning.run.load_model_and_engine", lambda *_: pytest.fail("loaded weights"))
    monkeypatch.setattr(
        "sys.argv",
        ["train", "--model", "qwen2-audio-7b", "--dry-run", "--engine", "auto", "--output-dir", str(tmp_path / "run")],
    )
    status = train_command.main()
    output = capsys.readouterr().out
    assert status == (1 if "does not fit" in output else 0)
    assert "KV cache" in output
    assert "forward and backward" in output
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("sys.argv", [*train_command.sys.argv, "--kv-cache-gb", "3"])
    train_command.main()
    output = capsys.readouterr().out
    assert "KV cache: 3.00 GB" in output or "rollouts by transformers" in output, "only vLLM's cache has a size to set"


def test_dry_run_plans_for_what_torchrun_started_and_speaks_once(monkeypatch, capsys):
    """As many processes share the optimiser's state as there will be in the run."""
    started = {"WORLD_SIZE": "8", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train", "--model", "qwen2-audio-7b", "--lora-rank", "0", "--dry-run"])
    train_command.main()
    assert "each of 8 processes updates at most" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    train_command.main()
    assert not capsys.readouterr().out


def test_a_plan_for_weights_in_parts(monkeypatch, capsys):
    """Embedding, head and layers are halved, the audio tower, the projector and their norms are not."""
    weights = {}
    for parts in ("1", "2"):
        _, output = run_plan(monkeypatch, capsys, "--gpu-memory", "80", "--tensor-parallel", parts)
        assert ("each of 2 GPUs" in output and "each of 2 processes has a part" in output) is (parts == "2")
        weights[parts] = float(re.search(r"^weights +([\d.]+)", output, re.MULTILINE)[1])
    text = 2 * architecture_of(PRESETS["qwen2-audio-7b"]).num_text_parameters(padded=True) / GB
    assert weights["2"] == pytest.approx(weights["1"] - text / 2, abs=0.01)
    large = ("--model", "voxtral-small-24b", "--gpu-memory", "48")
    assert "torchrun --nproc-per-node 2, --tensor-parallel 2: peak" in run_plan(monkeypatch, capsys, *large)[1]
    full = ("--model", "qwen2.5-omni-7b", "--tensor-parallel", "2", "--lora-rank", "0", "--gpu-memory", "48")
    assert "torchrun" not in run_plan(monkeypatch, capsys, *full)[1], "all processes share one copy already"
    status, _ = run_plan(monkeypatch, capsys, "--tensor-parallel", "3")
    assert status == 2
    assert run_plan(monkeypatch, capsys, "--tensor-parallel", "2", "--engine", "transformers")[0] == 2
    assert run_plan(monkeypatch, capsys, "--tensor-parallel", "2", "--gpus", "4")[0] == 2


def test_a_checkpoints_preset_leaves_its_shape_to_the_config(tmp_path):
    PRESETS["qwen2-audio-7b"].save(tmp_path)
    assert "architecture" not in json.loads((tmp_path / "preset.json").read_text())


def test_a_micro_batch_takes_what_is_free():
    """Never more than keeps a GPU busy; what is given stays."""
    roomy, tight = (
        plan_memory(PAPER, 80 * GB),
        plan_memory(dataclasses.replace(PAPER, longest_prompt=300, max_new_tokens=200), 24 * GB),
    )
    assert roomy.micro_batch == 16_384
    assert 1024 < tight.micro_batch < 16_384
    assert tight.fits
    assert plan_memory(dataclasses.replace(PAPER, given_micro_batch=3000), 80 * GB).micro_batch == 3000
    assert plan_memory(dataclasses.replace(PAPER, on_gpu=False), 800 * GB).micro_batch == 4096
    assert "micro-batches of 16,384 tokens or one question of up to 9,992" in describe(roomy)


def test_sampling_ahead_needs_both_at_once():
    ahead = dataclasses.replace(PAPER, rollout_ahead=True)
    plan, usual = plan_memory(ahead, 80 * GB), plan_memory(PAPER, 80 * GB)
    assert plan.fits
    both = plan.phases["forward and backward"]
    assert both["KV cache"] == plan.kv_cache == usual.kv_cache
    assert sum(both.values()) > usual.peaks["forward and backward"] + plan.kv_cache
    smaller = plan_memory(ahead, 48 * GB)
    assert smaller.fits, "fewer completions in flight leave room for training"
    assert smaller.kv_cache < plan_memory(PAPER, 48 * GB).kv_cache
    assert remedies(plan_memory(ahead, 30 * GB))[0].startswith("--rollout-ahead 0")
