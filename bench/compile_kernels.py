"""Compile every kernel for GPUs that are not there, and hold it to limits: `python bench/compile_kernels.py`.

The public operations and their gradients run on a GPU that is not there (`fake_gpu.py`) at the shapes of Qwen2-Audio-7B; every
launch is compiled exactly as the JIT would compile it, and then left out. A table gives registers, spills, shared memory and
exponentials per element. Exit status 1 when a kernel spills more than `MAX_SPILLED_BYTES`, needs more than `MAX_REGISTERS`,
takes more than `MAX_EXPONENTIALS` an element of a long row, or is compiled a second time for another length, count, temperature
or coefficient.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import tars_kernels
import torch
import triton
from fake_gpu import fake_gpu
from tars_kernels import backend, distillation, rows, vocabulary_parallel
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 128
"""At 512 threads a program, more would leave a multiprocessor without room for it."""
MAX_SPILLED_BYTES = 32
"""Of a thread. One release of ptxas spills where the next does not: with Triton 3.8 five of 501 variants spill 16 or 32 bytes,
three of them outside of every loop, with 3.9 none does. They stay in L1, beside the 64 bytes that a thread reads at once."""
MAX_EXPONENTIALS = {1: 1.25, 2: 1.5}
"""By rows that a program reads at once: exponentials an element in the costliest loop over long rows, its own and a part of its
lane's rescaling. Capped logits take one more, for their tanh."""
LONG_ROW_LANES = rows.tile(156032)["LANES"]
assert distillation.tile(156032)["LANES"] == LONG_ROW_LANES
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OTHER_SIZES = ((1, 1, 0.7, 0.2), (77, 3, 1.3, 1), (16384, 64, 2, 0.03))
"""Tokens, sequences, temperature, coefficient that must not lead to another compilation."""
UNEVEN_VOCABULARIES = (50257, 151655)
"""No multiples of 8, so that rows of their logits begin anywhere."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OfflineDriver:
    """What the JIT asks of a driver before it launches; the device's number is its architecture."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Address:
    """A tensor as the JIT sees it: an element type and how its first element is aligned."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size() % 16

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return 0


@dataclass
class Compiled:
    """One compiled kernel."""

    kernel: str
    architecture: int
    variant: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    exponentials_per_element: float | None
    """In the costliest loop; None for kernels that do not sweep over long rows."""
    threads: int
    rows_at_once: int
    vocabulary: int | None
    """Of rows of logits, where it is not the model's 156,032."""
    instructions: int
    """Of the whole kernel."""
    wide_loads: int
    """Instructions that load 16 bytes a thread."""
    narrow_loads: int
    """Those that load less, among them the bounded ends of rows."""
    evicted_loads: int
    """Those that say how long the cache is to keep what they read."""

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.architecture} ({self.variant})"


@contextmanager
def compiled_launches(found: dict[tuple, Compiled]) -> Iterator[None]:
    """Inside the block every launch is compiled, measured once, recorded in `found`, and not run."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        args = [Address(value) if isinstance(value, Tensor) else value for value in args]
        named = {name: Address(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        key = (driver.active.architecture, self.__name__, kernel.hash)
        if key not in found:
            found[key] = measure(self, kernel, args, named)
        return kernel

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def measure(function: JITFunction, kernel: object, args: list[object], named: dict[str, object]) -> Compiled:
    """Registers, spills and exponentials, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    threads = 32 * kernel.metadata.num_warps
    constants = dict(zip(function.arg_names, args, strict=False)) | named
    exponentials = None
    rows_at_once = 2 if "teacher_logits" in constants else 1
    if "ROWS" in constants and constants["LANES"] == LONG_ROW_LANES:
        elements = rows_at_once * constants["ROWS"] * constants["LANES"] / threads
        exponentials = round(max(count_in_loops(code, "MUFU.EX2"), default=0) / elements, 2)
    flags = [name for name, value in constants.items() if value is True]
    types = {str(value.dtype).removeprefix("torch.") for value in constants.values() if isinstance(value, Address)}
    types |= {{"bf16": "bfloat16", "fp16": "float16"}.get(str(value)) for value in constants.values()}
    halves = sorted(types & {"bfloat16", "float16"}) or ["float32"]
    loads = re.findall(r"\bLDG\.E[.\w]*", code)
    wide = sum(".128" in load for load in loads)
    vocabulary = constants.get("V")
    return Compiled(
        function.__name__, driver.active.architecture, " ".join(halves + flags), registers,
        stack + local, kernel.metadata.shared, exponentials, threads, rows_at_once,
        vocabulary if vocabulary in UNEVEN_VOCABULARIES else None,
        len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE)), wide, len(loads) - wide,
        sum("EF" in load.split(".") or "EL" in load.split(".") for load in loads),
    )  # fmt: skip


def count_in_loops(code: str, pattern: str) -> list[int]:
    """How many instructions like `pattern` one turn of each loop takes: between a label and a later jump back to it."""
    labels: dict[str, int] = {}
    seen = 0
    loops = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = seen
        seen += re.search(pattern, line) is not None
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and jump.group(1) in labels:
            loops.append(seen - labels[jump.group(1)])
    return loops


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


class Head:
    """Tensors of one shape for every operation; only T, N and P differ between two of the same model."""

    def __init__(self, dtype: torch.dtype, num_tokens: int, vocabulary: int, width: int, num_sequences: int):
        def floats(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = False) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=gradient)

        self.hidden = floats(num_tokens, width, dtype=dtype, gradient=True)
        self.teacher_hidden = floats(num_tokens, width, dtype=dtype)
        self.weight = floats(vocabulary, width, dtype=dtype)
        self.bias = floats(vocabulary)
        self.logits = floats(num_tokens, vocabulary, dtype=dtype, gradient=True)
        self.targets = torch.empty(num_tokens, dtype=torch.int64, device="cuda")
        self.mask = torch.empty(num_tokens, dtype=torch.bool, device="cuda")
        self.cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int64, device="cuda")
        self.advantages = floats(num_sequences)
        self.vectors = {name: floats(num_tokens) for name in ("old_logprobs", "rollout_logprobs")}
        self.ref_logprobs = floats(num_tokens)
        self.states = [floats(num_tokens, width, dtype=dtype, gradient=True) for _ in range(3)]
        self.centre = floats(2, 3, width)
        self.pairs = torch.empty(2 * num_sequences, 2, dtype=torch.int64, device="cuda")


@contextmanager
def two_parts() -> Iterator[object]:
    """A group of two processes, of which there is one: what the other would send is left as it was."""

    def nothing(*_: object, **__: object) -> None:
        pass

    with patch.multiple(
        vocabulary_parallel.dist, get_world_size=lambda _: 2, get_rank=lambda _: 0, all_gather=nothing, all_reduce=nothing
    ):
        yield object()


def launch_everything(head: Head, temperature: float, coefficient: float, *, thorough: bool) -> None:
    """Every public operation with its gradient; `thorough` adds the options that make other variants of the kernels."""
    packed = {
        "cu_seqlens": head.cu_seqlens, "advantage_level": "sequence", "mask": head.mask, **head.vectors,
        "importance_cap": 1 + coefficient,
    }  # fmt: skip
    kl = {"kl_coef": coefficient, "ref_logprobs": head.ref_logprobs}
    objectives: list[dict[str, object]] = [
        {},
        packed,
        packed | {"loss_type": "gspo"},
        packed | {"importance_level": "sequence"},
    ]
    if thorough:
        objectives += [
            packed | {"loss_type": "cispo", "clip_high": 4 + coefficient, "cispo_low": coefficient / 2},
            packed | {"loss_type": "sapo", "sapo_temperatures": (1, coefficient)},
            packed | {"loss": "dppo-tv", "clip_high": coefficient, "dual_clip": 3 + coefficient},
            packed | {"loss": "dppo-kl", "clip_high": coefficient},
            packed | {"loss": "reinforce", "importance_weights": head.ref_logprobs},
            packed | {"dual_clip": 3 + coefficient},
            packed | {"importance_mode": "mask", "importance_floor": coefficient / 2},
            *[packed | kl | {"kl_estimator": name} for name in ("k1", "k2", "k1+", "k3+")],
            packed | kl | {"kl_bias_correction": False},
            packed | kl | {"entropy_coef": coefficient},
            packed | kl | {"entropy_coef": coefficient, "loss_type": "gspo"},
            packed | kl | {"entropy_coef": coefficient, "top_entropy_quantile": 0.2 + coefficient / 2, "scale": coefficient},
            packed | kl | {"loss_type": "gspo", "ratio_level": "sequence-token", "off_policy_threshold": coefficient},
            packed | kl | {"loss_type": "vespo", "vespo_positive": (1, 1 + coefficient)},
            packed | kl | {"loss_type": "gmpo", "clip_low": coefficient / 2},
            packed | {"bias": head.bias},
        ]
    for objective in objectives:
        advantages = head.advantages if "cu_seqlens" in objective else head.vectors["old_logprobs"]
        options = {"temperature": temperature, **objective}
        for loss in (
            tars_kernels.policy_loss(head.logits, head.targets, advantages, **options),
            tars_kernels.linear_policy_loss(head.hidden, head.weight, head.targets, advantages, **options),
        ):
            loss.loss.backward()
        with torch.no_grad():
            tars_kernels.policy_loss(head.logits, head.targets, advantages, **options)
    tars_kernels.token_policy_loss(head.ref_logprobs.clone().requires_grad_(), head.advantages, **packed).loss.backward()
    trainable = head.weight.clone().requires_grad_()
    tars_kernels.linear_logprob(head.hidden, trainable, head.targets, temperature=temperature).sum().backward()
    for weight in (head.weight, trainable) if thorough else ():
        capped = tars_kernels.linear_logprob(
            head.hidden, weight, head.targets, temperature=temperature, mask=head.mask, ignore_index=-100,
            softcap=30.0 + coefficient, return_logsumexp=True,
        )  # fmt: skip
        sum(term.sum() for term in capped).backward()
    for divergence in ("reverse_kl", "forward_kl", "jsd") if thorough else ("reverse_kl",):
        for weight in (head.weight, trainable):
            tars_kernels.linear_distillation_loss(
                head.hidden, head.teacher_hidden, weight, divergence=divergence, beta=0.4 + coefficient / 4,
                temperature=temperature, bias=head.bias if thorough else None, cu_seqlens=head.cu_seqlens, mask=head.mask,
                top_tokens=20,
            ).loss.backward()  # fmt: skip
    with two_parts() as group:
        tars_kernels.linear_distillation_loss(
            head.hidden, head.teacher_hidden, head.weight, divergence="jsd", beta=0.4 + coefficient / 4,
            temperature=temperature, group=group,
        ).loss.backward()  # fmt: skip

    for pooling in ("mean", "last") if thorough else ("mean",):
        for centre in (None, head.centre) if thorough else (None,):
            similarity_PL = tars_kernels.layer_similarity(
                head.states, head.cu_seqlens, head.pairs, pooling=pooling, centre=centre
            )
            similarity_PL.sum().backward()
    pooler = tars_kernels.LayerPooler([nn.Identity(), nn.Identity()], nn.Identity(), differentiable=True)
    with pooler.pooling(head.cu_seqlens, positions=head.targets):
        states = pooler._modules[1](pooler._modules[0](head.hidden))
    (pooler.pooled.sum() + states.float().sum()).backward()
    tars_kernels.token_similarity(head.states, head.states[::-1]).sum().backward()
    tars_kernels.linear_cka(head.states, head.states[:2]).sum().backward()


def check(architecture: int, dtypes: Sequence[torch.dtype]) -> tuple[list[Compiled], list[str]]:
    """Compile everything for one architecture; returns the kernels, and what broke a limit."""
    # What triton 3.9 does anyway, with a warning that its next version will not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    driver.set_active(OfflineDriver(architecture))
    # Operators are nodes to what traces fake tensors, unless it is told to go through their launches.
    backend.walks_launches = True
    found: dict[tuple, Compiled] = {}
    problems = []
    with fake_gpu(divmod(architecture, 10)), compiled_launches(found):
        for dtype in dtypes:
            thorough = dtype is torch.bfloat16
            launch_everything(Head(dtype, 4096, 156032, 4096, 8), 1.0, 0.1, thorough=thorough)
            before = len(found)
            for num_tokens, num_sequences, temperature, coefficient in OTHER_SIZES:
                head = Head(dtype, num_tokens, 156032, 4096, num_sequences)
                launch_everything(head, temperature, coefficient, thorough=thorough)
            problems += [
                f"{kernel}: compiled again for another length, count, temperature or coefficient"
                for kernel in list(found.values())[before:]
            ]
        for vocabulary in UNEVEN_VOCABULARIES if torch.bfloat16 in dtypes else ():
            launch_everything(Head(torch.bfloat16, 4096, vocabulary, 4096, 8), 1.0, 0.1, thorough=False)
        # A vocabulary that is short and a width that is odd.
        launch_everything(Head(torch.float32, 77, 1100, 123, 3), 1.0, 0.1, thorough=False)
    for kernel in found.values():
        if kernel.spilled_bytes > MAX_SPILLED_BYTES:
            problems.append(f"{kernel}: spills {kernel.spilled_bytes} bytes")
        if kernel.registers > MAX_REGISTERS:
            problems.append(f"{kernel}: {kernel.registers} registers")
        capped = "HAS_SOFTCAP" in kernel.variant.split()
        if (kernel.exponentials_per_element or 0) > MAX_EXPONENTIALS[kernel.rows_at_once] + capped:
            problems.append(f"{kernel}: {kernel.exponentials_per_element} exponentials an element")
    return list(found.values()), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="bfloat16 on sm_90 only, beside a short vocabulary in float32")
    arguments = parser.parse_args()
    architectures, dtypes = ((90,), _DTYPES[:1]) if arguments.quick else (ARCHITECTURES, _DTYPES)
    # The same with a GPU as without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(check, architectures, [dtypes] * len(architectures)))
    kernels = sorted((kernel for found, _ in results for kernel in found), key=lambda row: (row.kernel, row.architecture))
    print(
        f"{'kernel':26} {'sm':>3} {'threads':>7} {'regs':>4} {'spill':>5} {'shared':>6} {'ex2/el':>6} {'instr':>6} {'wide':>4} "
        f"{'narrow':>6} {'evict':>5} {'V':>6}  variant"
    )
    for row in kernels:
        exponentials = "" if row.exponentials_per_element is None else f"{row.exponentials_per_element:.2f}"
        print(
            f"{row.kernel:26} {row.architecture:>3} {row.threads:>7} {row.registers:>4} {row.spilled_bytes:>5} "
            f"{row.shared_bytes:>6} {exponentials:>6} {row.instructions:>6} {row.wide_loads:>4} {row.narrow_loads:>6} "
            f"{row.evicted_loads:>5} {row.vocabulary or '':>6}  {row.variant}"
        )
    if arguments.json:
        table = {"triton": triton.__version__, "kernels": [asdict(row) for row in kernels]}
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(kernels)} kernels compiled with triton {triton.__version__}")
    problems = [problem for _, found in results for problem in found]
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
