"""Walk the CUDA path where there is no GPU, and check every launch: `python bench/dry_walk.py`.

On a GPU that is not there (`fake_gpu.py`) run every public operation of `tars_kernels` and its backward pass, packed attention,
and one training step of Qwen2-Audio-7B with LoRA, its audio tower included. Every launch of a Triton kernel is compiled ahead
of time for sm_90 with exactly the signature that it would have, and left out. Exit status 1 where

- a grid is empty or larger than CUDA allows, or a program needs more shared memory than there is;
- the address of an argument is no multiple of its element's size;
- an argument with more than 2^31 elements is read or written at 32-bit offsets, or a 64-bit offset is a 32-bit product;
- an operation reads from the GPU on the host;
- a line of the files that choose and launch what runs on CUDA was not executed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import tars_kernels
import torch
import train_step
import triton
from compile_kernels import Head, OfflineDriver, compiled_launches, launch_everything, two_parts
from engine import make_prompts, randomise, write_checkpoint
from fake_gpu import FakeGpu, fake_gpu
from tars_kernels import backend
from torch import Tensor, nn
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tars_fast.models import flash_attention
from tars_fast.models.key_values import PromptKeyValues
from tars_fast.models.packed_attention import PackedGroups, packed_attention
from tars_fast.models.prompts import load_prompt_format
from tars_fast.models.registry import PRESETS
from tars_fast.models.speech_model import SpeechModel, make_trainable

ROOT = Path(__file__).parents[1]
WALKED = ("kernels/tars_kernels/*.py", "tars_fast/models/packed_attention.py", "tars_fast/models/flash_attention.py")
"""Files every line of whose CUDA branches must run."""
NOT_WALKED = ("reference.py", "token_loss.py", "softmax.py", "operations.py", "__init__.py", "vocabulary_parallel.py")
"""The specification and what it calls, which run without a GPU, and what only imports; what needs several processes."""
NOT_ON_CUDA = (
    r"not runs_kernels|device\.type == '(cpu|meta)'|_shows_values|is_compiling|detect_fake_mode"
    # Autograd's questions about a gradient that nobody wants.
    r"|(upstream|slopes) is None( and|$)"
)
"""Conditions of what does not run on a GPU, or only while a graph is traced."""
WALKED_BY_TESTS = r"_flash_attention_[23]|.*_outputs"
"""Functions that need packages which are not installed (tests/models/test_packed_attention.py has stand-ins for them), or run
while a graph is traced."""
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_BYTES = 227 * 1024
"""Of a program on Hopper."""
MAX_32_BIT = 2**31 - 1
NOT_OPERATIONS = {"use_reference"}
"""Public names of `tars_kernels` that compute nothing, beside its modules and its types of settings and results."""


@dataclass
class Launches:
    """What was launched, and what is wrong with it."""

    counts: Counter[str] = field(default_factory=Counter)
    """Launches by kernel."""
    largest_grid: Counter[str] = field(default_factory=Counter)
    """Programs by kernel."""
    largest_argument: Counter[str] = field(default_factory=Counter)
    """Elements by kernel."""
    not_on_16_bytes: set[str] = field(default_factory=set)
    """Arguments, by kernel and name, whose address forbids wide loads in some launch."""
    problems: set[str] = field(default_factory=set)

    def check(self, name: str, grid: Sequence[int], pointers: dict[str, Tensor], kernel: Any = None) -> None:
        """Count a launch.

        Args:
            pointers: its tensors by the names of the kernel's arguments.
            kernel: what the JIT compiled for it; None where nothing is compiled, and less can be checked.
        """
        self.counts[name] += 1
        self.largest_grid[name] = max(self.largest_grid[name], grid[0])
        for size, limit in zip(grid, MAX_GRID, strict=False):
            if not 1 <= size <= limit:
                self.problems.add(f"{name}: a grid of {tuple(grid)}; CUDA takes 1 to {MAX_GRID}")
        narrow: set[str] = set()
        if kernel is not None:
            if kernel.metadata.shared > MAX_SHARED_BYTES:
                self.problems.add(f"{name}: {kernel.metadata.shared} bytes of shared memory; there are {MAX_SHARED_BYTES}")
            narrow, multiplies = narrow_offsets(kernel.asm["ttir"])
            if multiplies:
                self.problems.add(f"{name}: a 64-bit offset is a 32-bit product")
            for origin in narrow & {"int_to_ptr", "unknown"}:
                self.problems.add(f"{name}: 32-bit offsets from an address ({origin})")
        for argument, tensor in pointers.items():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.largest_argument[name] = max(self.largest_argument[name], extent)
            if tensor.data_ptr() % tensor.element_size():
                self.problems.add(f"{name}: {argument} does not begin at a multiple of its element's size")
            if tensor.data_ptr() % 16:
                self.not_on_16_bytes.add(f"{name} {argument}")
            if extent > MAX_32_BIT and argument in narrow:
                self.problems.add(f"{name}: {argument} has {extent:,} elements, and 32-bit offsets")


def narrow_offsets(code: str) -> tuple[set[str], bool]:
    """What in a kernel's Triton code may overflow 32 bits.

    Returns:
        the pointers to which a 32-bit offset is added first (arguments; `int_to_ptr` for addresses that were loaded; `unknown`
        for one whose origin is not seen); whether a 64-bit number is made from the 32-bit product of two that are not known
        before the launch.
    """
    narrow: set[str] = set()
    # Where each pointer comes from; None: from within what a 64-bit offset may have been added to.
    pointers: dict[str, str | None] = {name: name for name in re.findall(r"%(\w+): !tt\.ptr", code)}
    constants: set[str] = set()
    products: set[str] = set()
    multiplies = False
    for line in code.splitlines():
        found = re.match(r"\s*%(\w+) = ([\w.]+) (.*?)(?: loc\(.*)?$", line)
        if not found:
            continue
        name, operation, rest = found.groups()
        operands = re.findall(r"%(\w+)", rest.partition(" : ")[0])
        if operation == "arith.constant":
            constants.add(name)
        elif operation == "tt.int_to_ptr":
            pointers[name] = "int_to_ptr"
        elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast") and operands[0] in pointers:
            pointers[name] = pointers[operands[0]]
        elif operation == "tt.addptr":
            origin = pointers.get(operands[0], "unknown")
            pointers[name] = None
            if origin is not None and re.search(r"\bi32$|xi32>$", rest):
                narrow.add(origin)
        elif operation == "arith.muli" and re.search(r"\bi32$|xi32>$", rest) and not constants & set(operands):
            products.add(name)
        elif operation == "arith.extsi" and operands[0] in products:
            multiplies = True
    return narrow, multiplies


@contextmanager
def checked_launches(launches: Launches, *, compiles: bool = True) -> Iterator[None]:
    """Inside the block every launch is checked, by default compiled too, and left out."""
    with compiled_launches({}) if compiles else nullcontext():

        def check(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=warmup, **kwargs) if compiles else None
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            launches.check(self.__name__, grid(given) if callable(grid) else grid, tensors, kernel)
            return kernel

        compile_only = JITFunction.run
        with patch.object(JITFunction, "run", check):
            yield


def operations() -> dict[str, Callable[..., Any]]:
    """Every public operation by its name in `tars_kernels`."""
    public = {name: getattr(tars_kernels, name) for name in set(tars_kernels.__all__) - NOT_OPERATIONS}
    return {
        name: value
        for name, value in public.items()
        if callable(value) and not dataclasses.is_dataclass(value) and not hasattr(value, "_fields")
    }


@contextmanager
def counted_operations(called: Counter[str]) -> Iterator[None]:
    """Counts the calls of every public operation, as `tars_kernels.NAME`."""
    original = operations()

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called[name] += 1
            return original[name](*args, **kwargs)

        return call

    for name in original:
        setattr(tars_kernels, name, counting(name))
    try:
        yield
    finally:
        for name, operation in original.items():
            setattr(tars_kernels, name, operation)


def walk_operations() -> None:
    """Every operation at the shapes of Qwen2-Audio-7B, and at a vocabulary that is short."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        launch_everything(Head(dtype, 4096, 156032, 4096, 8), 1.0, 0.1, thorough=dtype is torch.bfloat16)
    # Logits and probabilities of more than 2^31 elements.
    launch_everything(Head(torch.bfloat16, 16384, 156032, 4096, 64), 1.0, 0.1, thorough=False)
    small = Head(torch.float32, 77, 1100, 123, 3)
    launch_everything(small, 1.0, 0.1, thorough=False)
    walk_options(small)


def walk_options(head: Head) -> None:
    """What chooses other lines of the host's code than `launch_everything` does."""
    number = torch.empty((), device="cuda")
    packed = {"cu_seqlens": head.cu_seqlens, "advantage_level": "sequence", "old_logprobs": head.vectors["old_logprobs"]}
    for objective in (
        packed | {"num_tokens": number},
        packed | {"loss_type": "grpo", "num_sequences": 8},
        packed | {"loss_type": "gspo"},
        packed | {"loss_type": "dr_grpo", "constant": number},
    ):
        # In place of what is no leaf.
        tars_kernels.policy_loss(head.logits + 0, head.targets, head.advantages, inplace=True, **objective).loss.backward()
    padded = torch.empty(len(head.advantages), 64, device="cuda")
    for advantages in (padded, head.advantages):
        vectors = tars_kernels.from_padded(
            padded.bool(), logprobs=padded.clone().requires_grad_(), advantages=advantages, ref_logprobs=head.advantages
        )
        tars_kernels.token_policy_loss(**vectors, kl_coef=0.1).loss.backward()
    tars_kernels.token_policy_loss(
        head.ref_logprobs, head.vectors["old_logprobs"], entropy=head.ref_logprobs.clone().requires_grad_(), entropy_coef=0.1
    ).loss.backward()
    bias = head.bias.clone().requires_grad_()
    tars_kernels.policy_loss(head.logits, head.targets, head.vectors["old_logprobs"], bias=bias).loss.backward()
    trainable = head.weight.clone().requires_grad_()
    logprobs, entropy = tars_kernels.linear_logprob(head.hidden, trainable, head.targets, bias=bias, return_entropy=True)
    (logprobs - entropy).sum().backward()
    streams = head.hidden, head.teacher_hidden
    tars_kernels.linear_distillation_loss(
        *streams, trainable, bias=bias, teacher_weight=head.weight, num_tokens=number, token_weights=head.ref_logprobs
    ).loss.backward()
    tars_kernels.linear_distillation_loss(
        *streams, head.weight, cu_seqlens=head.cu_seqlens, decay=2.0, normalise="sequence"
    ).loss.backward()
    for divergence in ("forward_kl", "jsd"):
        with two_parts() as group:
            tars_kernels.linear_distillation_loss(
                *streams, trainable, bias=bias, teacher_weight=head.weight, divergence=divergence, group=group
            ).loss.backward()
    with two_parts() as group:
        tars_kernels.linear_policy_loss(
            head.hidden, trainable, head.targets, head.vectors["old_logprobs"], softcap=30.0, z_coef=0.1, group=group
        ).loss.backward()
    with tars_kernels.use_reference(False):
        tars_kernels.linear_logprob(head.hidden.detach(), head.weight, head.targets)

    stack = torch.stack(head.states).detach().requires_grad_()
    weights = torch.empty(3, device="cuda")
    for centre in (head.centre, head.centre[0]):
        tars_kernels.layer_similarity(stack, head.cu_seqlens, head.pairs, weights=weights, centre=centre).sum().backward()
    # A layer twice, no sequences, no tokens.
    tars_kernels.layer_similarity(head.states, head.cu_seqlens, head.pairs, layers=[0, 2, 2]).sum().backward()
    for states, boundaries in ((head.hidden, head.cu_seqlens[:1]), (head.hidden[:0], head.cu_seqlens)):
        tars_kernels.pool_sequences(states, boundaries, pooling="last").sum().backward()
    tars_kernels.pool_sequences(head.hidden, head.cu_seqlens, positions=head.targets).sum().backward()
    tars_kernels.pooled_similarity(stack[:, :3], head.pairs).sum().backward()
    tars_kernels.token_similarity([state.detach() for state in head.states], head.states).sum().backward()
    for uses_states in (True, False):
        module = nn.Identity()
        pooler = tars_kernels.LayerPooler([module], module, differentiable=True)
        with pooler.pooling(head.cu_seqlens):
            states = module(head.hidden)
        (states if uses_states else pooler.pooled).sum().backward()


def walk_attention() -> None:
    """Packed attention of two groups, forward and backward, at the head sizes of both Qwen families."""
    device = torch.device("cuda")
    groups = PackedGroups((300, 80), ((512, 200, 1), (64, 512)), device)
    num_tokens = groups.num_prompt_tokens + sum(groups.group_lengths)
    for heads, key_heads, dtype in ((32, 32, torch.bfloat16), (28, 4, torch.float16), (28, 4, torch.float32)):
        states = [
            torch.empty(1, num_tokens, number, 128, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
            for number in (heads, key_heads, key_heads)
        ]
        module = nn.Module()
        module.num_key_value_groups = heads // key_heads
        output, _ = packed_attention(module, *states, None, scaling=0.1, groups=groups)
        assert output.shape == (1, num_tokens, heads, 128)
        output.float().sum().backward()
    packed_attention(module, *states, None, scaling=0.1)
    prompts = PromptKeyValues([num_tokens])
    next(prompts.passes(num_tokens))
    packed_attention(SimpleNamespace(layer_idx=0), *states, None, scaling=0.1, key_values=prompts)
    with patch.object(flash_attention, "find_spec", lambda _: True):
        assert "flash_attn_interface cannot be used" in flash_attention._fastest.__wrapped__((9, 0)).name


def walk_step(folder: Path, *, num_layers: int | None, audio_seconds: float) -> dict[str, int]:
    """Encode speech, forward passes, rewards, loss, backward pass and optimiser's step of Qwen2-Audio-7B with LoRA.

    Args:
        folder: empty; gets the configuration.
        num_layers: of the language model, None: all.

    Returns:
        sizes of the step.
    """
    workload = dataclasses.replace(
        train_step.QWEN2_AUDIO_7B, num_questions=2, audio_tokens=int(25 * audio_seconds), max_new_tokens=512
    )
    if num_layers is not None:
        workload = dataclasses.replace(workload, architecture=dataclasses.replace(workload.architecture, num_layers=num_layers))
    write_checkpoint(folder, PRESETS["qwen2-audio-7b"].architecture)
    prompts = load_prompt_format(PRESETS["pocket"], str(folder))
    prompts.config.text_config.num_hidden_layers = workload.architecture.num_layers
    with torch.device("cuda"):
        module = prompts.family.transformers_class()._from_config(
            prompts.config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    randomise(module)
    model = SpeechModel(module.requires_grad_(False).eval(), prompts)
    make_trainable(model, lora_rank=workload.lora_rank, lora_alpha=32.0, freeze_audio=True, gradient_checkpointing=True)
    assert model.attention == flash_attention.OF_TORCH.name
    make_prompts(model, audio_seconds)
    # The baseline's padded forward pass, which chooses rows by a mask, is not walked.
    with patch.object(train_step, "with_logprobs", lambda _model, rollout, _draw: rollout):
        bench = train_step.Bench(workload, model, train_step.make_up_rollout(model, workload))
    # What is read from the GPU is random.
    bench.config = dataclasses.replace(bench.config, max_logprob_diff=1e9)
    rewards_N, advantages_N = bench.step("ours", workload.group_size)
    assert len(rewards_N) == len(advantages_N) == workload.num_questions * workload.group_size
    bench.config = dataclasses.replace(bench.config, objective="tars+opd", text_anchor="kl")
    bench.step("ours", workload.group_size)
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.trainable_parameters()),
        "tokens": sum(len(completion.token_ids) for completion in bench.rollout.completions),
    }


@contextmanager
def operators_walked(launches: Launches, *, compiles: bool) -> Iterator[FakeGpu]:
    """A GPU of sm_90 that is not there, where every launch is checked."""
    # Operators are nodes to what traces fake tensors, unless they are told to go through their launches.
    walking = patch.object(backend, "walks_launches", True, create=True)
    with walking, fake_gpu((9, 0)) as gpu, checked_launches(launches, compiles=compiles):
        yield gpu


def walk_kernels(launches: Launches, gpu: FakeGpu, run: Callable[[], object]) -> Counter[str]:
    """Calls of every public operation in `run`; adds to the problems operations without a call, and reads by the host."""
    called: Counter[str] = Counter()
    with counted_operations(called):
        run()
    launches.problems |= {f"{name}: has no case" for name in operations().keys() - called.keys()}
    launches.problems |= {f"{place}: reads from the GPU on the host" for place in gpu.host_reads}
    gpu.host_reads.clear()
    return called


def walk(num_layers: int | None) -> dict[str, Any]:
    """Everything; returns what was found."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    driver.set_active(OfflineDriver(90))
    launches = Launches()
    with operators_walked(launches, compiles=True) as gpu:
        called = walk_kernels(launches, gpu, lambda: (walk_operations(), walk_attention()))
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            step = walk_step(Path(folder), num_layers=num_layers, audio_seconds=10)
    return {
        "operations": dict(called),
        "launches": launches.counts,
        "largest_grid": launches.largest_grid,
        "largest_argument": launches.largest_argument,
        "not_on_16_bytes": sorted(launches.not_on_16_bytes),
        "step": step | {"host_reads": Counter(gpu.host_reads)},
        "problems": sorted(launches.problems),
    }


def cannot_run(source: str) -> set[int]:
    """Lines of a file that are compiled instead of run, refuse arguments, or are not for a GPU."""
    lines: set[int] = set()

    def skip(statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            lines.update(range(statement.lineno, statement.end_lineno + 1))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "jit" in decorators or re.fullmatch(WALKED_BY_TESTS, node.name):
                skip(node.body)
        elif isinstance(node, ast.If):
            condition = ast.unparse(node.test)
            if isinstance(node.body[-1], ast.Raise) or re.search(NOT_ON_CUDA, condition):
                skip(node.body)
            elif condition.endswith("runs_kernels"):
                skip(node.orelse)
    return lines


def lines_not_run(data: Path) -> dict[str, tuple[int, list[int]]]:
    """For every walked file: how many lines its CUDA branches have, and which of them did not run."""
    from coverage import Coverage

    read = Coverage(data_file=data, config_file=False)
    read.load()
    found = {}
    for path in sorted(path for pattern in WALKED for path in ROOT.glob(pattern) if path.name not in NOT_WALKED):
        _, statements, _, missing, _ = read.analysis2(str(path))
        skipped = cannot_run(path.read_text())
        found[str(path.relative_to(ROOT))] = len(set(statements) - skipped), sorted(set(missing) - skipped)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="add what was found to this file, under the versions of PyTorch and Triton")
    parser.add_argument("--layers", type=int, help="layers of the language model in the training step; default: all 32")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        given.worker.write_text(json.dumps(walk(given.layers)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder, "coverage"), Path(folder, "result.json")
        # Without pyproject.toml's settings, which are those of the tests.
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={os.devnull}", f"--data-file={data}"]
        command += ["--include=" + ",".join(WALKED), __file__]
        layers = [] if given.layers is None else ["--layers", str(given.layers)]
        # The same with a GPU as without.
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*command, "--worker", str(result), *layers], cwd=ROOT, env=hidden, check=True)
        found, lines = json.loads(result.read_text()), lines_not_run(data)
    print(f"{'kernel':24} {'launches':>8} {'largest grid':>12} {'largest argument':>16}")
    for name, count in sorted(found["launches"].items()):
        print(f"{name:24} {count:>8} {found['largest_grid'][name]:>12,} {found['largest_argument'][name]:>16,}")
    for path, (number, missing) in lines.items():
        print(f"{path:48} {number - len(missing)} of {number} lines")
        if missing:
            found["problems"].append(f"{path}: lines {', '.join(map(str, missing))} did not run")
    print(f"training step: {found['step']}")
    if given.json:
        table = json.loads(given.json.read_text()) if given.json.exists() else {}
        found["lines"] = {path: number for path, (number, _) in lines.items()}
        table[f"torch {torch.__version__.partition('+')[0]}, triton {triton.__version__}"] = found
        given.json.write_text(json.dumps(table, indent=1) + "\n")
    for problem in found["problems"]:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
