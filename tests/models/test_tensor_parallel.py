"""Weights in parts on several processes: what is cut where, and that two halves compute what the whole does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import MAKERS
from halves import run_halves
from torch import nn

from tars_fast.config import TrainConfig
from tars_fast.learning.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from tars_fast.models.architecture import sharding_refusal
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.tensor_parallel import TensorParallel
from tars_fast.types import UserError

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield TensorParallel(dist.group.WORLD, CPU)
    dist.destroy_process_group()


def test_parameters_are_cut_as_vllm_cuts_them(alone):
    prompts = load_prompt_format(PRESETS["pocket"], PRESETS["pocket"].source)
    # As the second of two, without the first.
    alone.rank, alone.size = 1, 2
    module = prompts.family.on_meta(prompts.config)
    whole = dict(module.named_parameters(remove_duplicate=False))
    shapes = {name: parameter.shape for name, parameter in whole.items()}
    alone.cut(module, prompts.family)
    layer = f"{prompts.family.language_model}.layers.0"
    cut = {"self_attn.q_proj.weight": 0, "self_attn.k_proj.weight": 0, "self_attn.q_proj.bias": 0, "mlp.up_proj.weight": 0}
    cut |= {"self_attn.o_proj.weight": 1, "mlp.down_proj.weight": 1}
    for name, dim in cut.items():
        parameter = module.get_parameter(f"{layer}.{name}")
        assert alone.placement(f"{layer}.{name}") == (dim, False)
        assert parameter.shape[dim] * 2 == shapes[f"{layer}.{name}"][dim]
        values = torch.arange(shapes[f"{layer}.{name}"].numel()).view(shapes[f"{layer}.{name}"])
        assert torch.equal(alone.part(f"{layer}.{name}", values), values.chunk(2, dim)[1])
    assert alone.placement(f"{layer}.input_layernorm.weight") == (None, False)
    for place, (matrix_a, matrix_b) in {
        "self_attn.q_proj": ((None, True), (0, False)),
        "mlp.down_proj": ((1, False), (None, True)),
    }.items():
        for adapter in (".default", ""):
            assert alone.placement(f"{layer}.{place}.lora_A{adapter}.weight") == matrix_a
            assert alone.placement(f"{layer}.{place}.lora_B{adapter}.weight") == matrix_b
        assert alone.placement(f"{layer}.{place}.base_layer.weight").dim == cut[f"{place}.weight"]


def test_parts_are_planned_with(alone):
    """All but norms is cut; what the memory plan counts is what is there."""
    preset = PRESETS["pocket"]
    prompts = load_prompt_format(preset, preset.source)
    alone.rank, alone.size = 1, 2
    module = prompts.family.on_meta(prompts.config)
    alone.cut(module, prompts.family)
    module.tie_weights()
    architecture = prompts.family.architecture(prompts.config)
    workload = TrainConfig(tensor_parallel=2).workload(preset, architecture, "vllm", 4)
    whole = TrainConfig().workload(preset, architecture, "vllm", 4)
    assert 4 * sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(workload.weights, rel=0.02)
    assert workload.kv_bytes_per_token * 2 == whole.kv_bytes_per_token
    assert workload.optimiser * 2 == pytest.approx(whole.optimiser, rel=1e-6)


def test_the_padding_of_a_vocabulary_has_no_probability(alone):
    """vLLM pads a vocabulary to a multiple of 64 and cuts it then; the last part ends in padding."""
    alone.rank, alone.size, alone._rows = 1, 2, 32
    assert alone.first_row == 32
    part = alone.part_of_bias(torch.arange(50.0))
    assert torch.equal(part[:18], torch.arange(32.0, 50.0))
    assert torch.equal(part[18:], torch.full((14,), -torch.inf))


def test_an_optimisers_state_is_cut_like_its_parameters(alone):
    alone.rank, alone.size = 1, 2
    alone._cuts = {"layer.o_proj": "rowwise"}
    parameters = {"layer.o_proj.weight": nn.Parameter(torch.zeros(2, 2)), "norm.weight": nn.Parameter(torch.zeros(4))}
    whole = {"layer.o_proj.weight": torch.arange(8.0).view(2, 4), "norm.weight": torch.arange(4.0)}
    saved = {f"{name}.{entry}": value for name, value in whole.items() for entry in ("exp_avg", "exp_avg_sq")}
    saved |= {f"{name}.step": torch.tensor(3.0) for name in whole}
    optimizer = make_optimizer(list(parameters.values()), 0.0, 0)
    load_optimizer_state(optimizer, parameters, saved, alone)
    held = optimizer_state(optimizer, parameters)
    assert torch.equal(held["layer.o_proj.weight.exp_avg"], whole["layer.o_proj.weight"][:, 2:])
    assert torch.equal(held["norm.weight.exp_avg_sq"], whole["norm.weight"])
    assert held["norm.weight.step"] == held["layer.o_proj.weight.step"] == 3
    with pytest.raises(ValueError, match=r"layer.o_proj.weight is of \(2, 4\), not \(2, 2\) weights"):
        load_optimizer_state(optimizer, parameters, saved)


@pytest.mark.parametrize(
    ("size", "changes", "said"),
    [
        (2, {}, None),
        (2, {"num_experts": 8}, "cannot be cut yet"),
        (2, {"fused_layers": True}, "cannot be cut yet"),
        (2, {"normed_attention": True}, "cannot be cut yet"),
        (7, {}, "4 key and value heads cannot be shared evenly; give a divisor of 4"),
        (8, {}, "28 attention heads"),
        (6, {"num_heads": 30, "num_key_value_heads": 6, "intermediate_size": 12, "vocabulary_size": 100}, "128 tokens of the"),
    ],
)
def test_what_cannot_be_cut_is_refused(size, changes, said):
    architecture = dataclasses.replace(PRESETS["qwen2.5-omni-7b"].architecture, **changes)
    reason = sharding_refusal(architecture, size)
    assert reason is None if said is None else said in reason


def test_as_many_processes_as_parts():
    with pytest.raises(UserError, match="--tensor-parallel 2: needs 2 processes, 1 started"):
        TensorParallel.of_all(2, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket", "voxtral"])
def test_two_halves_compute_what_the_whole_does(name, tmp_path):
    """Full fine-tuning and LoRA, with gradient checkpointing; the bundled model ties its head. Checkpoints are the same."""
    source = PRESETS["pocket"].source if name == "pocket" else MAKERS[name](tmp_path / "source")
    run_halves(Path(__file__).with_name("half_of_the_weights.py"), source, tmp_path / "run")
