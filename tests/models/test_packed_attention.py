"""Packed rows against plain transformers, one padded row for each completion, for every family of models."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import BY_DECODER, MAKERS
from tars_kernels import LayerPooler, linear_logprob
from torch import Tensor

from tars_fast.data.audio import SAMPLE_RATE
from tars_fast.models import flash_attention, packed_attention, speech_model
from tars_fast.models.flash_attention import OF_TORCH, AttentionResult, FlashAttention, QueryKeyValue, VarlenSequences
from tars_fast.models.packed_attention import PackedGroups, SharedPromptAttention
from tars_fast.models.registry import find_preset
from tars_fast.models.speech_model import SpeechModel, load_model, make_trainable
from tars_fast.types import Completion, Modality, Prompt, Question

TOLERANCE = 3e-5 if torch.cuda.is_available() else 2e-5
"""Products add up in another order for another number of rows, and on a CPU by where tensors lie: 1.3e-5 was seen on both."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name, make in MAKERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name])
    return folders


@pytest.fixture
def items(tmp_path) -> list[Question]:
    rng = np.random.default_rng(0)
    items = []
    for number, seconds in enumerate((1.0, 2.35)):
        path = tmp_path / f"{number}.wav"
        wave = 0.1 * rng.standard_normal(round(seconds * SAMPLE_RATE))
        pytest.importorskip("soundfile").write(path, wave, SAMPLE_RATE, subtype="FLOAT")
        items.append(Question(str(number), f"What is {number} plus one?" + " Say it." * number, "A", ("A", "B"), path))
    return items


def prepared(folder: Path, *, lora_rank: int, gradient_checkpointing: bool) -> SpeechModel:
    preset = find_preset(str(folder))
    model = load_model(preset, preset.source, torch.device("cpu"), torch.float32)
    make_trainable(
        model,
        lora_rank=lora_rank,
        lora_alpha=32.0,
        freeze_audio=True,
        gradient_checkpointing=gradient_checkpointing,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if ".lora_B." in name:
            # At 0, where adapters start, half of their gradients would be 0 as well.
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def completions_of(
    model: SpeechModel, prompts: Sequence[Prompt], lengths: Sequence[int]
) -> tuple[list[Prompt], list[Completion]]:
    """As many random completions of each prompt as there are lengths."""
    rng = np.random.default_rng(2)
    pairs = []
    for prompt in prompts:
        for length in lengths:
            tokens = tuple(rng.integers(5, 200, length).tolist())
            pairs.append((prompt, Completion(0, prompt.modality, tokens, (0.0,) * length, "", truncated=False)))
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Within `TOLERANCE` of the largest entry, or of 1."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / max(1.0, expected.abs().max().item())
    assert error <= TOLERANCE, f"{what}: {error:.2e}"


def packed(model: SpeechModel, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """(log-probabilities of all tokens, pooled states [L, N, D]) as the trainer computes them."""
    layout = model.pack(prompts, completions)
    assert len(layout.token_ids) == sum(len(prompt.token_ids) for prompt in set(prompts)) + len(layout.targets), "no padding"
    pooler = LayerPooler(model.language_model.layers, model.language_model.norm, differentiable=torch.is_grad_enabled())
    with pooler.pooling(layout.cu_seqlens, positions=layout.positions):
        hidden = model.forward(layout)
    return linear_logprob(hidden, model.head, layout.targets), pooler.pooled


def padded(model: SpeechModel, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """The same by the model class of transformers: a row for each completion, padding, its own mask and positions."""
    rows = [prompt.token_ids + completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[model.prompts.pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    embeddings = model.module.get_input_embeddings()(ids).clone()
    for row, prompt in enumerate(prompts):
        if prompt.audio_clips:
            where = ids[row, : len(prompt.token_ids)] == model.prompts.audio_token_id
            embeddings[row, : len(prompt.token_ids)][where] = torch.cat(prompt.audio_clips)
    output = model.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, output_hidden_states=True)
    logprobs = model.head(output.last_hidden_state).log_softmax(-1)
    found, pooled = [], []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt.token_ids), len(prompt.token_ids) + len(completion.token_ids)
        found.append(logprobs[row, start - 1 : end - 1].gather(-1, ids[row, start:end, None])[:, 0])
        pooled.append(torch.stack([states[row, start:end].mean(0) for states in output.hidden_states[1:]]))
    return torch.cat(found), torch.stack(pooled, dim=1)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", BY_DECODER)
def test_equals_padded_unshared_computation(checkpoints, items, name, lora_rank, gradient_checkpointing):
    """Log-probabilities, pooled states and every gradient, of a loss that both take part in."""
    model = prepared(checkpoints[name], lora_rank=lora_rank, gradient_checkpointing=gradient_checkpointing)
    with torch.no_grad():
        distinct = [prompt for modality in Modality for prompt in model.encode_prompts(items, modality)]
    prompts, completions = completions_of(model, distinct, (7, 1, 12))
    generator = torch.Generator().manual_seed(3)
    num_tokens, depth, width = 20 * len(distinct), len(model.language_model.layers), model.language_model.norm.weight.shape[0]
    token_weights = torch.randn(num_tokens, generator=generator)
    state_weights = torch.randn(depth, len(prompts), width, generator=generator)
    seen = []
    for compute in (packed, padded):
        model.module.zero_grad()
        logprobs, pooled = compute(model, prompts, completions)
        ((logprobs * token_weights).mean() + (pooled * state_weights).mean()).backward()
        gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
        seen.append((logprobs.detach(), pooled.detach(), gradients))
    (logprobs, pooled, gradients), (expected_logprobs, expected_pooled, expected) = seen
    assert_close(logprobs, expected_logprobs, "log-probabilities")
    assert_close(pooled, expected_pooled, "pooled states")
    assert gradients.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for parameter, gradient in expected.items():
        assert_close(gradients[parameter], gradient, parameter)


@pytest.mark.parametrize("name", BY_DECODER)
@torch.no_grad()
def test_completions_do_not_see_each_other(checkpoints, items, name):
    """Changing one completion's tokens leaves every other one's log-probabilities and states bit for bit."""
    model = prepared(checkpoints[name], lora_rank=0, gradient_checkpointing=False)
    distinct = [prompt for modality in Modality for prompt in model.encode_prompts(items, modality)]
    prompts, completions = completions_of(model, distinct, (9, 6, 11))
    before, pooled_before = packed(model, prompts, completions)
    changed = 4
    tokens = tuple(token + 1 for token in completions[changed].token_ids)
    other = Completion(0, completions[changed].modality, tokens, (0.0,) * len(tokens), "", truncated=False)
    after, pooled_after = packed(model, prompts, [*completions[:changed], other, *completions[changed + 1 :]])
    lengths = [len(completion.token_ids) for completion in completions]
    same = [torch.equal(a, b) for a, b in zip(before.split(lengths), after.split(lengths), strict=True)]
    assert same == [index != changed for index in range(len(completions))]
    differs = (pooled_before != pooled_after).flatten(2).any(-1).any(0)
    assert differs.tolist() == [index == changed for index in range(len(completions))]


@pytest.mark.parametrize("name", BY_DECODER)
def test_positions_continue_from_the_prompt(checkpoints, items, name):
    """What the model class itself would number them by; on three axes for M-RoPE."""
    model = prepared(checkpoints[name], lora_rank=0, gradient_checkpointing=False)
    with torch.no_grad():
        (prompt,) = model.encode_prompts(items[1:], Modality.SPEECH)
    prompts, completions = completions_of(model, [prompt], (5, 8))
    layout = model.pack(prompts, completions)
    for index, completion in enumerate(completions):
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        expected = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if hasattr(model.module, "get_rope_index"):
            seconds = torch.tensor([len(clip) for clip in prompt.audio_clips])
            expected, _ = model.module.get_rope_index(ids, attention_mask=torch.ones_like(ids), audio_seqlens=4 * seconds)
        own = torch.cat(
            [
                layout.position_ids[: len(prompt.token_ids)],
                layout.position_ids[layout.positions][layout.cu_seqlens[index] : layout.cu_seqlens[index + 1]],
            ]
        )
        assert all(torch.equal(own, axis[0]) for axis in expected)


def varlen_attention(states, sequences, scale):
    """What FlashAttention computes, sequence by sequence, in the dtype of its input."""
    query, key, value = states
    outputs, log_sums = [], []
    repeats = query.shape[1] // key.shape[1]
    bounds = [ends.tolist() for ends in sequences.bounds]
    for q0, q1, k0, k1 in zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True):
        q = query[q0:q1].transpose(0, 1)
        k, v = (states[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for states in (key, value))
        scores = scale * q @ k.transpose(1, 2)
        if sequences.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        log_sums.append(scores.logsumexp(-1))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    assert sequences.longest == tuple(max(np.diff(ends)) for ends in bounds)
    return AttentionResult(torch.cat(outputs), torch.cat(log_sums, dim=1))


def varlen_gradients(gradient, states, result, sequences, scale):
    """FlashAttention's backward pass: probabilities from the log-sum-exp it is given, nothing from its own forward pass."""
    (query, key, value), (output, log_sums) = states, result
    repeats = query.shape[1] // key.shape[1]
    gradients = [torch.zeros_like(states) for states in (query, key, value)]
    bounds = [ends.tolist() for ends in sequences.bounds]
    for q0, q1, k0, k1 in zip(bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True):
        q, g, o = (states[q0:q1].transpose(0, 1) for states in (query, gradient, output))
        k, v = (states[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for states in (key, value))
        probabilities = (scale * q @ k.transpose(1, 2) - log_sums[:, q0:q1, None]).exp()
        if sequences.causal:
            probabilities = probabilities.tril()
        scores = probabilities * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        gradients[0][q0:q1] = (scores @ k).transpose(0, 1)
        for states, heads in ((gradients[1], scores.transpose(1, 2) @ q), (gradients[2], probabilities.transpose(1, 2) @ g)):
            states[k0:k1] = heads.transpose(0, 1).unflatten(1, (-1, repeats)).sum(2)
    return QueryKeyValue(*gradients)


PLAIN = FlashAttention("plain", varlen_attention, varlen_gradients)

# What packages declare that need not be installed: flash-attn from 2.7 on, FlashAttention 3 since it has operators.
FLASH_ATTENTION_3 = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, Tensor(v_new!)? v_new, Tensor? q_v, Tensor(out!)? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, "
    "int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, "
    "bool is_causal, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq, Tensor(dk!)? dk, "
    "Tensor(dv!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, float softmax_scale, bool is_causal, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
}
FLASH_ATTN_2 = {
    "_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None"
    ") -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_varlen_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) -> Tensor",
}


def plain_kernel(operator):
    """What an operator of these packages computes, from the arguments that its declaration names."""
    declared = operator.default._schema

    def run(*args, **kwargs):
        given = dict(zip((argument.name for argument in declared.arguments), args, strict=False)) | kwargs

        def take(*names):
            return next(given.pop(name) for name in names if name in given)

        states = QueryKeyValue(take("q", "query"), take("k", "key"), take("v", "value"))
        bounds = take("cu_seqlens_q", "cum_seq_q"), take("cu_seqlens_k", "cum_seq_k")
        longest = take("max_seqlen_q", "max_q"), take("max_seqlen_k", "max_k")
        sequences, scale = VarlenSequences(bounds, longest, take("causal", "is_causal")), take("softmax_scale", "scale")
        if "softmax_lse" in given or "logsumexp" in given:
            result = AttentionResult(take("out"), take("softmax_lse", "logsumexp"))
            assert result.log_sums.is_contiguous(), "kernels take its address alone"
            outputs = list(varlen_gradients(take("dout", "grad_out"), states, result, sequences, scale))
            if places := [given.pop(name) for name in ("dq", "dk", "dv") if name in given]:
                for place, gradient in zip(places, outputs, strict=True):
                    place.copy_(gradient)
                outputs = places if declared.returns[0].alias_info else []
            # States of dropout, which is off.
            given = {name: value for name, value in given.items() if name not in ("rng_state", "unused")}
        else:
            outputs = list(varlen_attention(states, sequences, scale))
            assert given.pop("num_splits", 1) == 1
        off = {name: value for name, value in given.items() if value is None or value == (-1 if "window" in name else 0)}
        assert off == given, f"{operator}: no stand-in for these"
        outputs += [states.query.new_empty(0) for _ in declared.returns[len(outputs) :]]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return run


@pytest.fixture(params=["PyTorch's FlashAttention", "flash-attn 2.8.3", "FlashAttention 3"])
def package(request, monkeypatch):
    """A package as its users find it, with plain PyTorch in the place of its kernels, and its operators declared as it does."""
    flash_attention._fastest.cache_clear()
    monkeypatch.setattr(flash_attention, "installed", lambda _: "2.8.3" if "2.8.3" in request.param else None)
    monkeypatch.setattr(flash_attention, "is_at_least", lambda *_: True)
    monkeypatch.setattr(flash_attention, "find_spec", lambda _: True if request.param == "FlashAttention 3" else None)
    modules = {
        name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with ExitStack() as scope:
        for namespace, operators in (("flash_attn", FLASH_ATTN_2), ("flash_attn_3", FLASH_ATTENTION_3)):
            library = scope.enter_context(torch.library._scoped_library(namespace, "DEF"))
            for name, signature in operators.items():
                library.define(name + signature)
                library.impl(name, plain_kernel(getattr(getattr(torch.ops, namespace), name)), "CPU")
                setattr(modules["flash_attn.flash_attn_interface"], name, getattr(getattr(torch.ops, namespace), name))
        library = scope.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            library.impl(name, plain_kernel(getattr(torch.ops.aten, name)), "CPU")
        flash = flash_attention._fastest((9, 0))
        assert flash.name == request.param
        yield flash
    flash_attention._fastest.cache_clear()


def test_the_merge_and_its_gradient(package):
    """In float64, against autograd through the masked softmax."""
    groups = PackedGroups((5, 3), ((4, 1), (2, 6, 3)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(24, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(24, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    owners = torch.tensor([0] * 5 + [1] * 3 + [0] * 5 + [1] * 11)
    numbers = torch.tensor([0] * 8 + [1] * 4 + [2] + [3] * 2 + [4] * 6 + [5] * 3)
    seen = (owners[:, None] == owners) & ((numbers == 0) | (numbers[:, None] == numbers)) & torch.ones(24, 24).tril().bool()
    keys, values = (states.repeat_interleave(2, 1) for states in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, keys) * 0.3
    expected = torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    got = SharedPromptAttention.apply(query, key, value, groups, 0.3, package)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weights = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for gradient, one in zip(torch.autograd.grad((got * weights).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(gradient, one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", BY_DECODER)
def test_the_path_for_cuda_computes_the_same(checkpoints, items, name, gradient_checkpointing, monkeypatch):
    model = prepared(checkpoints[name], lora_rank=4, gradient_checkpointing=gradient_checkpointing)
    with torch.no_grad():
        distinct = [prompt for modality in Modality for prompt in model.encode_prompts(items, modality)]
    prompts, completions = completions_of(model, distinct, (7, 1, 12))
    seen = []
    for flash in (None, PLAIN):
        for module in (packed_attention, speech_model):
            monkeypatch.setattr(module, "find_flash_attention", lambda *_, flash=flash: flash)
        assert model.attention == (flash.name if flash else "masked attention"), "said in the first line of a run"
        model.module.zero_grad()
        logprobs, pooled = packed(model, prompts, completions)
        (logprobs.mean() + pooled.square().mean()).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters()])
        seen.append((logprobs.detach(), pooled.detach(), gradients))
    for what, got, expected in zip(("log-probabilities", "pooled states", "gradient"), *seen, strict=True):
        assert_close(got, expected, what)


def test_the_package_is_chosen_by_gpu_and_by_what_is_installed(monkeypatch):
    """FlashAttention 3 on Hopper, else flash-attn 2, else PyTorch's own; one that is there and cannot be used is named."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    packages = types.SimpleNamespace(two=None, three=False)
    monkeypatch.setattr(flash_attention, "find_spec", lambda _: True if packages.three else None)
    monkeypatch.setattr(flash_attention, "installed", lambda _: packages.two)
    monkeypatch.setattr(flash_attention, "is_at_least", lambda _, version: packages.two > version)

    def chosen(capability=(9, 0), dtype=torch.bfloat16, head_size=128, two=None, three=False):
        packages.two, packages.three = two, three
        flash_attention._fastest.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        flash = flash_attention.find_flash_attention(torch.device("cuda"), dtype, head_size)
        assert flash is flash_attention.find_flash_attention(torch.device("cuda"), dtype, head_size), "chosen once"
        return flash and flash.name

    assert chosen() == "PyTorch's FlashAttention"
    assert chosen(two="2.6.3") == "PyTorch's FlashAttention, as flash-attn cannot be used (2.6.3 is older than 2.7)"
    broken = chosen(three=True)
    assert broken.startswith("PyTorch's FlashAttention, as flash_attn_interface cannot be used (")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = None
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    assert chosen(two="2.8.3") == "flash-attn 2.8.3"
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        for name, signature in FLASH_ATTENTION_3.items():
            library.define(name + signature)
        assert chosen(two="2.8.3", three=True) == "FlashAttention 3"
        assert chosen((8, 0), two="2.8.3", three=True) == "flash-attn 2.8.3"
        assert chosen((10, 0), three=True) == "PyTorch's FlashAttention"
    assert [chosen(dtype=torch.float32), chosen(head_size=260), chosen(head_size=100), chosen((7, 5))] == [None] * 4
    assert flash_attention.find_flash_attention(torch.device("cpu"), torch.bfloat16, 128) is None


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attn_takes_the_arguments_that_its_stand_in_declares():
    """Read from the installed package's source, which without a GPU may not be possible to import."""
    source = Path(find_spec("flash_attn").submodule_search_locations[0], "flash_attn_interface.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for name, signature in FLASH_ATTN_2.items():
        names = [argument.arg for argument in functions[name].args.args]
        declared = [argument.name for argument in torch._C.parse_schema(name + signature).arguments]
        assert names[: len(declared)] == declared
        assert len(names) - len(declared) <= len(functions[name].args.defaults), "what is not passed has a default"


@pytest.fixture(params=["_flash_attention_3", "_flash_attention_2", "PyTorch's own"])
def on_gpu(request):
    """Each package that is installed."""
    if request.param == "PyTorch's own":
        return OF_TORCH
    if find_spec("flash_attn_interface" if request.param == "_flash_attention_3" else "flash_attn") is None:
        pytest.skip("not installed")
    return getattr(flash_attention, request.param)()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (8, 2, 128), (6, 2, 96)])
def test_flash_attention_in_whole(on_gpu, dtype, heads, key_heads, size, monkeypatch):
    """Both calls, their merge and its backward pass, on states as a model's layers lay them out, against float64."""
    groups = PackedGroups((130, 17), ((64, 1, 200), (33, 90)), torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    states = [
        torch.randn(1, 147 + 388, number, size, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
        for number in (heads, key_heads, key_heads)
    ]
    seen = []
    for flash in (on_gpu, PLAIN):
        monkeypatch.setattr(packed_attention, "find_flash_attention", lambda *_, flash=flash: flash)
        given = [(one.double() if flash is PLAIN else one.clone()).requires_grad_() for one in states]
        output, _ = packed_attention.packed_attention(None, *given, None, scaling=0.1, groups=groups)
        assert output.shape == (1, 147 + 388, heads, size)
        (output.double() * torch.linspace(-1, 1, size, device="cuda")).sum().backward()
        seen.append([output.double(), *(one.grad.double() for one in given)])
    for one, two in zip(*seen, strict=True):
        assert (one - two).norm() < 0.02 * two.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (8, 2, 128), (6, 2, 96)])
def test_flash_attention_itself(on_gpu, dtype, heads, key_heads, size):
    """The kernels, against the two functions above that stand for them on a CPU."""
    groups = PackedGroups((130, 17), ((64, 1, 200), (33, 90)), torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (147 + 388, heads, size)
    query = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
    key, value = (torch.randn(shape[0], key_heads, size, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    gradient = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
    split = groups.num_prompt_tokens
    for sequences, rows, keys in (
        (groups.within_sequences, slice(None), slice(None)),
        (groups.to_prompts, slice(split, None), slice(split)),
    ):
        given = QueryKeyValue(query[rows], key[keys], value[keys])
        exact = QueryKeyValue(*(states.double() for states in given))
        result = on_gpu.forward(given, sequences, 0.1)
        expected = varlen_attention(exact, sequences, 0.1)
        torch.testing.assert_close(result.output.double(), expected.output, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(result.log_sums.double(), expected.log_sums, atol=1e-3, rtol=1e-3)
        found = on_gpu.backward(gradient[rows], given, result, sequences, 0.1)
        wanted = varlen_gradients(gradient[rows].double(), exact, expected, sequences, 0.1)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), two, atol=5e-2, rtol=5e-2)
