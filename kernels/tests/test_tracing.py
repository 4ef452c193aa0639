"""Operations inside of what traces them: torch.compile without a break, export, fake tensors, autocast, inference mode."""

from __future__ import annotations

import inspect

import pytest
import tars_kernels
import torch
from test_package import OPERATIONS, arguments
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def positional(name: str) -> list[str]:
    parameters = inspect.signature(getattr(tars_kernels, name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def result_of(name: str):
    """The operation as a function of its positional arguments that returns the tensor to differentiate."""
    operation = getattr(tars_kernels, name)

    def function(*inputs):
        result = operation(*inputs)
        return result.loss if "loss" in name else result

    return function


def inputs_of(name: str, device) -> list[torch.Tensor]:
    values = arguments(device)
    return [values[key].requires_grad_(values[key].is_floating_point() and key != "weight") for key in positional(name)]


def with_gradients(function, inputs) -> list[torch.Tensor]:
    leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
    result = function(*leaves)
    result.square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_into_one_graph(device, name, kernels):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(result_of(name), fullgraph=True, backend=counter)
    inputs = inputs_of(name, device)
    with tars_kernels.use_reference(not kernels):
        for found, expected in zip(with_gradients(compiled, inputs), with_gradients(result_of(name), inputs), strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_runs_without_data(name, device):
    """Fake tensors may say that they are on a GPU that is not there; autograd then stops a build of torch without CUDA."""
    differentiable = device == "cpu" or torch.cuda.is_available()
    known = inputs_of(name, torch.device("cpu"))
    expected = result_of(name)(*known)
    with FakeTensorMode(), torch.set_grad_enabled(differentiable):
        inputs = [torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device) for value in known]
        for leaf, value in zip(inputs, known, strict=True):
            leaf.requires_grad_(value.requires_grad)
        result = result_of(name)(*inputs)
        assert result.device.type == device
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        if differentiable:
            result.sum().backward()
            assert inputs[0].grad.shape == inputs[0].shape


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_exports(device, name, kernels):
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return result_of(name)(*inputs)

    inputs = tuple(value.detach() for value in inputs_of(name, device))
    with tars_kernels.use_reference(not kernels):
        exported = torch.export.export(Model(), inputs)
        torch.testing.assert_close(exported.module()(*inputs), result_of(name)(*inputs))
    assert kernels == any("tars_kernels" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("name", OPERATIONS)
def test_runs_in_inference_mode(device, name):
    inputs = inputs_of(name, device)
    with torch.inference_mode():
        found = result_of(name)(*inputs)
    assert torch.equal(found, result_of(name)(*inputs))


class Recorder(TorchDispatchMode):
    """Arguments of the first call of each operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple[object, ...]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "tars_kernels":
            self.calls.setdefault(operator.name().partition("::")[2], (operator, args))
        return operator(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls(device) -> dict[str, tuple[object, ...]]:
    """Of every operator, with those of gradients."""
    recorder = Recorder()
    with recorder:
        for name in OPERATIONS:
            with_gradients(result_of(name), inputs_of(name, device))
        values = arguments(device)
        head = [values["hidden"], values["weight"].requires_grad_(), values["targets"]]
        with_gradients(tars_kernels.linear_logprob, head)
        coupled = {"loss_type": "gspo", "cu_seqlens": values["cu_seqlens"], "entropy_coef": 0.1}
        tars_kernels.policy_loss(*inputs_of("policy_loss", device), **coupled).loss.backward()
        pooler = tars_kernels.LayerPooler([torch.nn.Identity()], torch.nn.Identity(), differentiable=True)
        with pooler.pooling(values["cu_seqlens"]):
            pooler._modules[0](values["hidden"].requires_grad_())
        pooler.pooled.sum().backward()
    return recorder.calls


def check_operator(operator, inputs, *checks: str) -> None:
    plain = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
    torch.library.opcheck(operator, plain, test_utils=checks)
    # Of policy_loss one output is the gradient, which its backward pass scales in place where nothing is traced.
    overwrites = operator.name() == "tars_kernels::policy_loss" and "test_aot_dispatch_dynamic" in checks
    if "gradient" not in operator.name() and not overwrites:
        leaves = tree_map_only(torch.Tensor, lambda value: value.requires_grad_(value.is_floating_point()), plain)
        torch.library.opcheck(operator, leaves, test_utils=checks)


OPERATORS = [name[14:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tars_kernels::")]


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operator_keeps_to_its_contract(calls, name):
    """It returns nothing that it was given, has its gradient where autograd looks for it, and says what it returns."""
    check_operator(*calls[name], "test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operator_is_the_same_under_torch_compile(calls, name):
    check_operator(*calls[name], "test_aot_dispatch_dynamic")


def test_another_length_compiles_nothing_again(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tars_kernels.linear_logprob, fullgraph=True, backend=counter, dynamic=True)
    values = arguments(device)
    counts = []
    for num_tokens in (6, 5, 4):
        hidden, targets = (values[name][:num_tokens].clone() for name in ("hidden", "targets"))
        compiled(hidden.requires_grad_(), values["weight"], targets).sum().backward()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
