"""What every operation keeps to: it launches kernels, refuses what it cannot do, and looks like its reference."""

from __future__ import annotations

import importlib.resources
import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import tars_kernels
import torch
import triton
import triton.language as tl
from tars_kernels import Distillation, LayerPooler, Objective, reference
from tars_kernels.divergence import DistillationSettings
from tars_kernels.objective import ObjectiveSettings
from torch import nn

OPERATIONS = [
    "layer_similarity", "linear_cka", "linear_distillation_loss", "linear_logprob", "linear_policy_loss", "policy_loss",
    "pool_sequences", "pooled_similarity", "token_policy_loss", "token_similarity",
]  # fmt: skip


def arguments(device, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden": normal(6, 16),
        "teacher_hidden": normal(6, 16),
        "weight": normal(100, 16),
        "logits": normal(6, 100),
        "targets": torch.arange(6, device=device),
        "logprobs": -normal(6).abs(),
        "advantages": normal(6).float(),
        "hidden_states": normal(2, 6, 16),
        "cu_seqlens": torch.tensor([0, 2, 6], device=device),
        "pairs": torch.tensor([[0, 1]], device=device),
        "states": normal(6, 16),
        "pooled": normal(2, 3, 16),
        "x_layers": normal(2, 6, 16),
        "y_layers": normal(2, 6, 16),
    }


def call(name: str, values: dict[str, torch.Tensor], **changes):
    """Call an operation with what it needs of `values`, positionally, so that options stay free."""
    parameters = inspect.signature(getattr(tars_kernels, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    chosen = {place: changes.pop(place, values[place]) for place in positional}
    return getattr(tars_kernels, name)(*chosen.values(), **changes)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order."""
    import triton.runtime.interpreter as interpreter
    from triton.runtime.jit import JITFunction

    kind = JITFunction if torch.cuda.is_available() else interpreter.InterpretedFunction
    names: list[str] = []
    run = kind.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_and_gradient_launch_kernels(device, launches, name):
    values = arguments(device)
    for value in values.values():
        value.requires_grad_(value.is_floating_point() and value is not values["weight"])
    result = call(name, values)
    result = result.loss if hasattr(result, "loss") else result
    assert launches, "the operation ran without a kernel"
    before = len(launches)
    result.sum().backward()
    # The gradient of a loss of log-probabilities is there already, for one product with what comes from upstream.
    assert len(launches) > before or name == "token_policy_loss", "its gradient ran without a kernel"


@triton.jit
def _as_bfloat16(output, values, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(output + place, tl.load(values + place).to(tl.bfloat16))


def test_bfloat16_is_rounded_to_the_nearest(device):
    """Also by the interpreter, which as it comes cuts off: bf16 kernels would be judged by errors that CUDA does not make."""
    values = torch.cat([torch.tensor([0.9998, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.4e38, torch.inf]), torch.randn(122)])
    output = torch.zeros(128, dtype=torch.bfloat16, device=device)
    _as_bfloat16[(1,)](output, values.to(device), BLOCK=128)
    assert torch.equal(output.cpu(), values.bfloat16())


def test_pooler_and_its_gradient_launch_kernels(device, launches):
    pooler = LayerPooler([nn.Identity()], nn.Identity(), differentiable=True)
    with pooler.pooling(torch.tensor([0, 6], device=device)):
        pooler._modules[0](torch.randn(6, 16, device=device, requires_grad=True))
    assert launches
    before = len(launches)
    pooler.pooled.sum().backward()
    assert len(launches) > before


def test_the_reference_runs_no_kernels(device, launches):
    values = arguments(device)
    with tars_kernels.use_reference():
        inside = [call(name, values) for name in OPERATIONS]
    assert not launches
    outside = [call(name, values) for name in OPERATIONS]
    for one, other in zip(inside, outside, strict=True):
        for value, expected in (
            zip(vars(one).values(), vars(other).values(), strict=True) if hasattr(one, "loss") else [(one, other)]
        ):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_argument_may_be_a_keyword(device, implementation, name):
    values = arguments(device)
    parameters = inspect.signature(getattr(reference, name)).parameters
    chosen = {name: value for name, value in values.items() if name in parameters}
    getattr(implementation, name)(**chosen)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_and_reference_have_one_signature(name):
    ours, theirs = getattr(tars_kernels, name), getattr(reference, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__
    assert ours.__doc__ == theirs.__doc__
    assert "Raises:" in ours.__doc__
    assert name in tars_kernels.__all__


@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
def test_autocast_changes_nothing(device, implementation):
    """Products that are fp32 for a reason stay so inside a training loop's autocast."""
    values = arguments(device)
    results = []
    for enabled in (False, True):
        leaf = values["hidden"].clone().requires_grad_()
        head = values["weight"].clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            result = implementation.linear_policy_loss(leaf, head, values["targets"], values["advantages"])
            cka = implementation.linear_cka(values["x_layers"], values["y_layers"])
        result.loss.backward()
        results.append([result.loss, result.logprobs, cka, leaf.grad, head.grad])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("implementation", [tars_kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", ["linear_logprob", "linear_policy_loss", "linear_distillation_loss"])
def test_a_head_in_fp32_under_autocast(device, implementation, name):
    """States come out of it in bf16; products are then taken in fp32, and both gradients have the type of what they are of."""
    values = arguments(device)
    positional = [
        p.name for p in inspect.signature(getattr(reference, name)).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    results = []
    for autocast in (True, False):
        states = values["hidden"].bfloat16()
        leaf = (states if autocast else states.float()).requires_grad_()
        head = values["weight"].clone().requires_grad_()
        given = values | {"hidden": leaf, "weight": head, "teacher_hidden": states if autocast else states.float()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            result = getattr(implementation, name)(*(given[key] for key in positional))
        (result.loss if "loss" in name else result.sum()).backward()
        assert (leaf.grad.dtype, head.grad.dtype) == (leaf.dtype, head.dtype)
        results.append([result.loss if "loss" in name else result, leaf.grad.float(), head.grad])
    for cast, plain in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain, rtol=1e-2, atol=1e-4)
    assert torch.equal(results[0][0], results[1][0])


HEAD_LOSSES = ("policy_loss", "linear_policy_loss")
LOSSES = (*HEAD_LOSSES, "token_policy_loss")
DISTILLATION = "linear_distillation_loss"
HEADS = (*HEAD_LOSSES, "linear_logprob")
WRONG = [
    *[(name, {"temperature": value}, "temperature") for name in HEADS for value in (0.0, -1.0, float("nan"))],
    # A number is meant; it would have to be read.
    *[
        (name, {"temperature": lambda _: torch.tensor(0.7)}, r"temperature: a Tensor; pass the number, float\(")
        for name in HEADS
    ],
    *[(name, {"targets": lambda v: v["targets"][:3]}, "targets") for name in HEADS],
    *[(name, {"targets": lambda v: v["targets"].float()}, r"targets.*\.long") for name in HEADS],
    *[(name, {"bias": lambda v: v["hidden"][0]}, "bias") for name in HEADS],
    *[(name, {"advantages": lambda v: v["advantages"][:3]}, "advantages: 3") for name in LOSSES],
    *[(name, {"advantages": lambda v: v["advantages"][:2]}, "advantages: 2.*needs cu_seqlens") for name in LOSSES],
    *[(name, {"mask": lambda v: v["targets"][:3] > 0}, "mask") for name in LOSSES],
    *[(name, {"mask": lambda v: v["advantages"]}, "mask: dtype.*bool") for name in LOSSES],
    *[(name, {"mask": lambda _: [True] * 6}, "mask: a list") for name in LOSSES],
    *[(name, {"num_tokens": -5}, "num_tokens: -5") for name in LOSSES],
    *[(name, {"old_logprobs": lambda v: v["advantages"][:3]}, "old_logprobs") for name in LOSSES],
    *[(name, {"rollout_logprobs": lambda v: v["targets"]}, "rollout_logprobs.*int64") for name in LOSSES],
    *[(name, {"cu_seqlens": lambda v: v["cu_seqlens"] + 1}, "cu_seqlens.*rise from 0") for name in LOSSES],
    *[(name, {"loss_type": "ppo"}, "loss_type: 'ppo'.*gspo") for name in LOSSES],
    *[(name, {"loss_type": "grpo"}, "cu_seqlens: None; .*grpo") for name in LOSSES],
    *[(name, {"loss": "trpo"}, "loss: 'trpo'.*reinforce") for name in LOSSES],
    *[(name, {"dual_clip": 1.2}, "dual_clip: 1.2; must be at least 1.*1.28") for name in LOSSES],
    *[(name, {"loss": "sapo", "dual_clip": 3.0}, "dual_clip: 3.0; sapo") for name in LOSSES],
    *[
        (name, {"cu_seqlens": lambda v: v["targets"].new_tensor([0, 0, 2, 3, 4, 5, 6])}, "say advantage_level")
        for name in LOSSES
    ],
    *[(name, {"advantage_level": "sequence"}, "advantages: 6.*needs cu_seqlens") for name in LOSSES],
    *[(name, {"loss_type": "cispo"}, "clip_high") for name in LOSSES],
    *[(name, {"loss_type": "dr_grpo"}, "constant: None; .*dr_grpo") for name in LOSSES],
    *[(name, {"loss_type": "dapo", "constant": 5}, "constant: 5; .*dapo.* does not use it") for name in LOSSES],
    *[(name, {"num_tokens": lambda v: v["advantages"]}, "num_tokens") for name in LOSSES],
    *[(name, {"importance_mode": "drop"}, "importance_mode") for name in LOSSES],
    *[(name, {"importance_level": "batch"}, "importance_level") for name in LOSSES],
    *[(name, {"importance_cap": -1.0}, "importance_cap") for name in LOSSES],
    ("token_policy_loss", {"importance_floor": 3.0}, "importance_floor: 3.0; must be below importance_cap, 2.0"),
    ("token_policy_loss", {"num_sequences": 5}, "num_sequences: 5; .*does not count sequences"),
    ("token_policy_loss", {"scale": 0.0}, "scale: 0; must be above 0"),
    ("token_policy_loss", {"loss": "reinforce", "ratio_level": "sequence"}, "ratio_level: 'sequence'; reinforce"),
    ("token_policy_loss", {"loss": "gmpo"}, "ratio_level: 'token'; gmpo.*loss_type 'gmpo'"),
    ("token_policy_loss", {"loss_type": "vespo", "importance_level": "sequence"}, "importance_level: 'sequence'; vespo"),
    ("token_policy_loss", {"off_policy_threshold": 0.1}, "cu_seqlens: None; off_policy_threshold"),
    ("token_policy_loss", {"loss": "dppo-tv"}, "clip_high: None; dppo-tv"),
    ("token_policy_loss", {"loss": "cispo", "clip_high": 2.0, "cispo_low": 3.0}, "cispo_low: 3.0"),
    ("token_policy_loss", {"top_entropy_quantile": 0.0}, "top_entropy_quantile: 0.0"),
    ("token_policy_loss", {"top_entropy_quantile": 0.5}, "entropy: None; top_entropy_quantile 0.5"),
    ("token_policy_loss", {"entropy_coef": 0.1}, "entropy: None; entropy_coef 0.1"),
    ("token_policy_loss", {"sapo_temperatures": (0.0, 1.0)}, "sapo_temperatures"),
    ("token_policy_loss", {"logprobs": lambda v: v["hidden"]}, "logprobs: shape"),
    *[(name, {"clip_low": float("nan")}, "clip_low") for name in LOSSES],
    *[(name, {"clip_low": 1.5}, "clip_low: 1.5; must be below 1") for name in LOSSES],
    *[(name, {"kl_coef": 0.1}, "kl_coef.*ref_logprobs") for name in LOSSES],
    ("policy_loss", {"logits": lambda v: v["logits"].int()}, "logits.*int32"),
    ("policy_loss", {"logits": lambda v: v["logits"][None]}, "logits: shape"),
    ("policy_loss", {"logits": lambda v: v["logits"].T.contiguous().T}, r"logits: stride.*contiguous"),
    ("linear_logprob", {"weight": lambda v: v["weight"][:, :4]}, "weight: shape"),
    ("linear_logprob", {"weight": lambda v: v["weight"].bfloat16()}, "weight: dtype"),
    ("linear_logprob", {"weight": lambda v: v["weight"].T.contiguous().T}, r"weight: stride.*contiguous"),
    ("linear_policy_loss", {"hidden": lambda v: v["hidden"].double()}, "hidden: dtype"),
    ("linear_policy_loss", {"softcap": 0.0}, "softcap: 0.0"),
    ("linear_policy_loss", {"z_coef": -0.1}, "z_coef: -0.1"),
    (DISTILLATION, {"divergence": "kl"}, "divergence: 'kl'.*reverse_kl"),
    (DISTILLATION, {"beta": 0.0}, "beta: 0.0.*forward_kl"),
    (DISTILLATION, {"normalise": "batch"}, "normalise: 'batch'"),
    (DISTILLATION, {"normalise": "sequence", "num_tokens": 5}, "num_tokens: 5.*sequence"),
    (DISTILLATION, {"num_tokens": -1}, "num_tokens: -1"),
    (DISTILLATION, {"top_tokens": 2.5}, "top_tokens: 2.5"),
    (DISTILLATION, {"decay": -1.0}, "decay: -1.0"),
    (DISTILLATION, {"top_tokens": 20}, "cu_seqlens: None; top_tokens"),
    (DISTILLATION, {"decay": 2.0}, "cu_seqlens: None; decay"),
    (DISTILLATION, {"normalise": "sequence"}, "cu_seqlens: None; normalise"),
    (DISTILLATION, {"cu_seqlens": lambda v: v["cu_seqlens"] + 1}, "cu_seqlens.*rise from 0"),
    (DISTILLATION, {"temperature": 0.0}, "temperature"),
    (DISTILLATION, {"mask": lambda v: v["targets"][:3] > 0}, "mask: shape"),
    (DISTILLATION, {"token_weights": lambda v: v["hidden"]}, "token_weights: shape"),
    (DISTILLATION, {"bias": lambda v: v["hidden"][0]}, "bias"),
    (DISTILLATION, {"teacher_bias": lambda v: v["hidden"][0]}, "teacher_bias: shape"),
    (DISTILLATION, {"teacher_hidden": lambda v: v["hidden"][:3]}, "teacher_hidden: shape"),
    (DISTILLATION, {"teacher_hidden": lambda v: v["hidden"][:, :4]}, "teacher_weight: shape"),
    (DISTILLATION, {"teacher_weight": lambda v: v["weight"][:50]}, "teacher_weight: shape"),
    (DISTILLATION, {"teacher_weight": lambda v: v["weight"].bfloat16()}, "teacher_weight: dtype"),
    (DISTILLATION, {"weight": lambda v: v["weight"].T.contiguous().T}, r"weight: stride.*contiguous"),
    ("layer_similarity", {"hidden_states": lambda v: v["hidden_states"][0]}, "hidden_states: shape"),
    ("layer_similarity", {"hidden_states": lambda _: []}, "hidden_states: no layers"),
    ("layer_similarity", {"hidden_states": lambda v: [v["hidden"], v["weight"]]}, r"hidden_states\[1\]"),
    ("layer_similarity", {"hidden_states": lambda v: [v["hidden"].T.contiguous().T]}, r"hidden_states\[0\]: stride"),
    ("layer_similarity", {"layers": [2]}, "layers: 2"),
    ("layer_similarity", {"layers": []}, "layers: "),
    ("layer_similarity", {"layers": 1}, "layers: 1; pass a list"),
    ("layer_similarity", {"weights": lambda v: v["advantages"]}, "weights"),
    ("layer_similarity", {"pooling": "max"}, "pooling: 'max'"),
    ("layer_similarity", {"pairs": lambda v: v["pairs"] + 1}, "pairs"),
    ("layer_similarity", {"pairs": lambda v: v["pairs"][0]}, "pairs: shape"),
    ("layer_similarity", {"cu_seqlens": lambda v: v["cu_seqlens"].float()}, "cu_seqlens: dtype"),
    ("pooled_similarity", {"pairs": lambda v: v["pairs"].float()}, "pairs: dtype"),
    ("pooled_similarity", {"centre": lambda v: v["pooled"]}, r"centre: shape \(2, 3, 16\); must be \[2, 2, 16\]"),
    ("layer_similarity", {"centre": lambda v: v["hidden"]}, r"centre: shape \(6, 16\); must be \[2, 16\]"),
    ("pool_sequences", {"positions": lambda v: v["targets"] + 1}, "positions: holds numbers outside"),
    ("pool_sequences", {"positions": lambda v: v["pairs"]}, "positions: shape"),
    ("pool_sequences", {"positions": lambda v: v["targets"] > 1}, r"positions: dtype torch.bool.*nonzero"),
    ("pool_sequences", {"positions": lambda v: v["targets"] // 2}, "positions: holds a row twice"),
    ("pool_sequences", {"positions": lambda v: v["targets"].int()}, r"positions.*\.long"),
    ("token_similarity", {"y_layers": lambda v: v["y_layers"][:1]}, "y_layers: 1 layers"),
    ("token_similarity", {"layers": [-3]}, "layers: -3"),
    ("linear_cka", {"y_layers": lambda v: v["y_layers"][:, :4]}, "y_layers: 4 tokens"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:40]
)
def test_wrong_arguments_are_named(device, name, changes, message):
    values = arguments(device)
    changed = {key: change(values) if callable(change) else change for key, change in changes.items()}
    if device.type == "cuda" and ("rise" in message or "outside" in message or "twice" in message or message == "pairs"):
        pytest.skip("looking at values would stop the host")
    with pytest.raises(ValueError, match=message):
        call(name, values, **changed)


def test_settings_that_do_not_exist_are_named(device):
    values = arguments(device)
    for name in LOSSES:
        with pytest.raises(TypeError, match=r"unexpected keyword 'beta'.*kl_coef"):
            call(name, values, beta=0.1)
        with pytest.raises(TypeError, match="unexpected keyword 'clip_lo', is 'clip_low' meant"):
            call(name, values, clip_lo=0.1)
    with pytest.raises(TypeError, match=r"unexpected keyword 'kl_coef'.*divergence"):
        call(DISTILLATION, values, kl_coef=0.1)
    for name in (*HEAD_LOSSES, DISTILLATION):
        with pytest.raises(TypeError, match="unexpected keyword 'temprature', is 'temperature' meant"):
            call(name, values, temprature=0.7)


@pytest.mark.parametrize("outside", [-1, 100])
@pytest.mark.parametrize("name", HEADS)
def test_target_outside_the_vocabulary(device, name, outside):
    """Refused on the CPU; on CUDA, where looking would stop the host, NaN instead of memory that is not ours."""
    values = arguments(device)
    values["targets"][3] = outside
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"targets: {outside} at 3 .* vocabulary of 100"):
            call(name, values)
    else:
        result = call(name, values)
        logprobs = result if name == "linear_logprob" else result.logprobs
        assert torch.isnan(logprobs).tolist() == [place == 3 for place in range(6)]


@pytest.mark.parametrize("outside", [-1, 100, 2**40])
@pytest.mark.parametrize("settings", [{}, {"loss_type": "gspo", "entropy_coef": 0.1}], ids=str)
@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_nothing_is_touched_outside_of_memory(device, monkeypatch, name, settings, outside):
    """What CUDA does with such a target: its own row is NaN, its neighbours are as they would be without it."""
    monkeypatch.setitem(tars_kernels.policy_loss.__globals__, "check_targets", lambda *_: None)
    values = arguments(device)
    leaf = "logits" if name == "policy_loss" else "hidden"
    gradients = []
    for target in (7, outside):
        values["targets"][3] = target
        first = values[leaf].clone().requires_grad_()
        boundaries = torch.tensor([0, 3, 4, 6], device=device)
        result = call(name, values, **{leaf: first, "cu_seqlens": boundaries}, **settings)
        gradients.append(torch.autograd.grad(result.loss, first)[0])
    rows = [0, 1, 2, 4, 5]
    assert torch.equal(gradients[0][rows], gradients[1][rows])
    assert torch.isnan(result.logprobs).tolist() == [row == 3 for row in range(6)]


def test_a_head_with_an_adapter_is_refused(device):
    values = arguments(device)
    head = nn.Linear(16, 100, device=device)
    adapted = nn.Module()
    adapted.base_layer, adapted.lora_A = head, nn.ModuleDict()
    for name in ("linear_logprob", "linear_policy_loss", DISTILLATION):
        call(name, values, weight=head)
        with pytest.raises(ValueError, match=r"weight: Module with an adapter.*merge"):
            call(name, values, weight=adapted)
        with pytest.raises(ValueError, match="weight: Embedding"):
            call(name, values, weight=nn.Embedding(100, 16))
    with pytest.raises(ValueError, match=r"teacher_weight: Module with an adapter"):
        call(DISTILLATION, values, teacher_weight=adapted)


def test_tensors_on_two_devices_are_named(device):
    values = arguments(device)
    elsewhere = torch.zeros(6, dtype=torch.int64, device="meta")
    for name in HEADS:
        with pytest.raises(ValueError, match=r"targets: on meta.*\.to\("):
            call(name, values, targets=elsewhere)
    with pytest.raises(ValueError, match="pairs: on meta"):
        call("pooled_similarity", values, pairs=torch.zeros(1, 2, dtype=torch.int64, device="meta"))


def test_editors_and_help_know_the_settings_of_the_losses():
    """One definition: the keywords for type checkers are the fields of the settings, and so is what `help` lists."""
    for settings, keywords, names in (
        (Objective, ObjectiveSettings, LOSSES),
        (Distillation, DistillationSettings, (DISTILLATION,)),
    ):
        kinds = get_type_hints(settings)
        kinds.pop("beside")
        assert get_type_hints(keywords) == kinds
        assert keywords.__optional_keys__ == kinds.keys()
        for loss in (getattr(package, name) for package in (tars_kernels, reference) for name in names):
            parameters = inspect.signature(loss).parameters
            assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
            shown = {name: (parameters[name].default, parameters[name].annotation) for name in kinds}
            assert shown == {field.name: (field.default, kinds[field.name]) for field in fields(settings)}


def test_type_checkers_refuse_a_wrong_setting(tmp_path):
    pytest.importorskip("mypy")
    assert importlib.resources.files(tars_kernels).joinpath("py.typed").is_file()
    given = tmp_path / "given.py"
    given.write_text(
        "import torch\n"
        "from tars_kernels import policy_loss\n"
        "x = torch.zeros(1)\n"
        "policy_loss(x, x, x, clip_low=0.1, loss_type='gspo', mask=None, temperature=2.0)\n"
        "policy_loss(x, x, x, clip_lo=0.1)\n"
        "policy_loss(x, x, x, loss_type='ppo')\n"
    )
    # Nothing here depends on torch's own types, which take most of a minute to read.
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*,triton.*]\nfollow_imports = skip\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", given.name],
        env=os.environ | {"MYPYPATH": str(Path(tars_kernels.__file__).parents[1])},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    errors = [line.removeprefix(f"{given.name}:") for line in checked.stdout.splitlines() if ": error:" in line]
    assert [error.rpartition(": error:")[0].rpartition(":")[2] for error in errors] == ["5", "6"], (
        checked.stdout + checked.stderr
    )
    assert 'Unexpected keyword argument "clip_lo"' in errors[0]
    assert "loss_type" in errors[1]


def documented_bytes() -> dict[str, str]:
    """What docs/kernels.md says is kept for the backward pass, by operation."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    table = page[page.index("| operation | from, to |") :]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[: table.index("\n\n")].splitlines()[2:]]
    return {name.strip("`"): kept.split("`")[1] if "`" in kept else "" for name, _, _, kept, *_ in rows}


def test_the_page_of_operations_lists_all_of_them():
    assert sorted(documented_bytes()) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "linear_cka"])
def test_bytes_kept_for_the_backward_pass_are_those_documented(device, name):
    """Beside the inputs and a few numbers a token; the sizes are those of `arguments`."""
    values = arguments(device)
    for key, value in values.items():
        value.requires_grad_(value.is_floating_point() and key not in ("weight", "advantages"))
    given = {value.untyped_storage().data_ptr() for value in values.values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call(name, values)
    sizes = {"T": 6, "V": 100, "D": 16, "N": 3 if name == "pooled_similarity" else 2, "L": 2, "P": 1, "s": 4}
    expected = eval(documented_bytes()[name], sizes)
    found = sum(size for address, size in kept.items() if address not in given)
    assert 0 <= found - expected <= 8 * 4 * sizes["T"], (found, expected)
    del result
