"""Views of an engine's fused memory: rows, padding, ties and what breaks them, on plain torch modules instead of an engine."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tars_fast.models.families.qwen import FUSED
from tars_fast.models.weights import SharingError, WeightMapping, assert_shared, engine_place, share_weights

NAMES = (
    WeightMapping("model.", "model.", fused=FUSED),
    WeightMapping("lm_head", "lm_head"),
)


class Layer(nn.Module):
    """One linear layer, inside a wrapper as an adapter would be."""

    def __init__(self, rows: int, columns: int, bias: bool = False):
        super().__init__()
        self.base_layer = nn.Linear(columns, rows, bias=bias)


def fused_engine(config: Qwen2Config) -> nn.Module:
    """The parameters of a Qwen2 decoder as an engine holds them: stacked, wrapped, the vocabulary padded to 64."""
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    engine = nn.Module()
    engine.model = nn.Module()
    engine.model.embed_tokens = nn.Embedding(128, hidden)
    engine.model.norm = nn.LayerNorm(hidden, bias=False)
    engine.model.layers = nn.ModuleList()
    for _ in range(config.num_hidden_layers):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = Layer(hidden + 2 * keys, hidden, bias=True)
        layer.self_attn.o_proj = Layer(hidden, hidden)
        layer.mlp.gate_up_proj, layer.mlp.down_proj = Layer(2 * inner, hidden), Layer(hidden, inner)
        layer.input_layernorm = nn.LayerNorm(hidden, bias=False)
        layer.post_attention_layernorm = nn.LayerNorm(hidden, bias=False)
        engine.model.layers.append(layer)
    engine.lm_head = nn.Linear(hidden, 128, bias=False)
    if config.tie_word_embeddings:
        engine.lm_head.weight = engine.model.embed_tokens.weight
    return engine


def build(tied: bool = False) -> tuple[Qwen2ForCausalLM, nn.Module]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    with init_empty_weights(include_buffers=False):
        module = Qwen2ForCausalLM(config)
    return module, fused_engine(config)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_view_and_an_update_needs_no_copy(tied):
    module, engine = build(tied)
    share_weights(module, engine, NAMES)
    assert_shared(module, engine, NAMES)
    held = {parameter.untyped_storage().data_ptr() for parameter in engine.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in module.parameters()} == held
    attention, fused = module.model.layers[1].self_attn, engine.model.layers[1].self_attn.qkv_proj.base_layer
    for leaf in ("weight", "bias"):
        parts = [getattr(getattr(attention, name), leaf) for name in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(torch.cat(parts), getattr(fused, leaf))
    assert len(module.lm_head.weight) == 100

    module.requires_grad_(True)
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    module(torch.arange(20)[None]).logits.logsumexp(-1).sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    for name, value in engine.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} has not seen the update"
    assert torch.equal(engine.model.embed_tokens.weight[100:], before["model.embed_tokens.weight"][100:]), "padding stays"


def test_a_tied_head_is_one_parameter():
    """Two parameters on one memory would be updated twice a step."""
    for tied, expected in ((True, 1), (False, 2)):
        module, engine = build(tied)
        share_weights(module, engine, NAMES)
        assert len({id(module.lm_head.weight), id(module.model.embed_tokens.weight)}) == expected


def test_the_first_copy_is_named():
    module, engine = build()
    share_weights(module, engine, NAMES)
    projection = module.model.layers[1].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    with pytest.raises(
        SharingError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: trainer and rollout engine no longer share"
    ):
        assert_shared(module, engine, NAMES)


@pytest.mark.parametrize("how", ["assign", "dtype", "engine", "resize"])
def test_what_breaks_sharing(how):
    module, engine = build()
    share_weights(module, engine, NAMES)
    if how == "assign":
        module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    elif how == "dtype":
        module.to(torch.bfloat16)
    elif how == "engine":
        engine.model.norm.weight = nn.Parameter(engine.model.norm.weight.detach().clone())
    else:
        module.resize_token_embeddings(90)
    with pytest.raises(SharingError):
        assert_shared(module, engine, NAMES)


def test_loading_in_place_keeps_sharing():
    module, engine = build()
    share_weights(module, engine, NAMES)
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    assert_shared(module, engine, NAMES)


def test_engines_that_do_not_fit():
    module, engine = build()
    engine.model.layers[0].mlp.gate_up_proj = Layer(64, 32)
    with pytest.raises(SharingError, match=r"up_proj\.weight: \(48, 32\), but \(64, 32\)"):
        share_weights(module, engine, NAMES)
    module, engine = build()
    del engine.model.norm
    with pytest.raises(SharingError, match=r"model\.norm\.weight: the engine has no"):
        share_weights(module, engine, NAMES)
    with pytest.raises(KeyError, match="nothing is known"):
        engine_place("vision_tower.conv", NAMES)
