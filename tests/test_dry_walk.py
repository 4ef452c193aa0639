"""The CUDA path on a GPU that is not there: `bench/dry_walk.py`, and that it sees what it is there to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tars_fast.learning.batch import Outcome
from tars_fast.learning.selection import outcomes_of
from tars_fast.types import Completion, Modality

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@pytest.fixture
def dry_walk(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import dry_walk

    yield dry_walk
    # Their names are too common to be left importable for other tests.
    for name in ("dry_walk", "fake_gpu", "compile_kernels", "train_step", "baselines", "engine", "report"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_whole_walk(tmp_path):
    """Every launch compiled, every line of the CUDA branches run, a training step of Qwen2-Audio-7B in its full depth."""
    path = tmp_path / "walk.json"
    done = subprocess.run([sys.executable, BENCH / "dry_walk.py", "--json", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (found,) = json.loads(path.read_text()).values()
    assert found["problems"] == []
    assert found["step"]["parameters"] > 8e9
    assert max(found["largest_argument"].values()) > 2**31


def test_operations_and_attention_walk_without_compiling(dry_walk):
    launches = dry_walk.Launches()
    with dry_walk.operators_walked(launches, compiles=False) as gpu:

        def run():
            head = dry_walk.Head(torch.bfloat16, 4096, 156032, 4096, 8)
            dry_walk.launch_everything(head, 1.0, 0.1, thorough=True)
            dry_walk.walk_options(head)
            dry_walk.walk_attention()

        dry_walk.walk_kernels(launches, gpu, run)
    assert launches.problems == set()
    assert launches.counts["_loss_from_logits"]


def test_an_operation_without_a_case_is_a_problem(dry_walk):
    launches = dry_walk.Launches()
    with dry_walk.operators_walked(launches, compiles=False) as gpu:
        dry_walk.walk_kernels(launches, gpu, lambda: torch.ones(3, device="cuda").sum().item())
    assert "policy_loss: has no case" in launches.problems
    assert any("reads from the GPU on the host" in problem for problem in launches.problems)


@triton.jit(do_not_specialize=["V"])
def narrow(output, other, V):
    pid = tl.program_id(0)
    tl.store(output + pid * V, 0.0)
    tl.store(other + (pid * V).to(tl.int64), 0.0)


@triton.jit(do_not_specialize=["V"])
def wide(output, other, V):
    pid = tl.program_id(0).to(tl.int64)
    tl.store(output + pid * V + tl.arange(0, 16), 0.0)
    tl.store(other + tl.arange(0, 16), 0.0)


def test_what_a_launch_must_not_be(dry_walk, monkeypatch):
    """Offsets, grids and alignment that a GPU would get wrong, each in a launch of its own."""
    launches = dry_walk.Launches()
    monkeypatch.setattr(dry_walk.driver, "_active", dry_walk.OfflineDriver(90))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with dry_walk.operators_walked(launches, compiles=True):
        large, small = torch.empty(2**31, device="cuda"), torch.empty(64, device="cuda")

        def problems(kernel, *arguments, grid=(5,)):
            launches.problems.clear()
            kernel[grid](*arguments)
            return sorted(launches.problems)

        assert problems(wide, large, small, 10) == []
        assert problems(narrow, large, small, 10) == [
            "narrow: a 64-bit offset is a 32-bit product",
            "narrow: output has 2,147,483,648 elements, and 32-bit offsets",
        ]
        assert len(problems(narrow, small, small, 10)) == 1
        assert problems(wide, large, large, 10) == ["wide: other has 2,147,483,648 elements, and 32-bit offsets"]
        for grid in ((5, 65536), (0,)):
            assert problems(wide, large, small, 10, grid=grid) == [
                f"wide: a grid of {grid}; CUDA takes 1 to {dry_walk.MAX_GRID}"
            ]
        assert launches.not_on_16_bytes == set()
        assert problems(wide, large, small[1:], 10) == []
        assert launches.not_on_16_bytes == {"wide other"}


def test_a_fake_gpu_is_a_gpu_to_python_and_the_host_has_its_data(dry_walk):
    with dry_walk.fake_gpu((8, 0)) as gpu:
        weight = torch.ones(4, 3, device="cuda", requires_grad=True)
        (torch.arange(4.0).to(weight.device) @ weight).sum().backward()
        assert weight.grad.is_cuda
        assert weight.grad.device == torch.device("cuda", 0)
        assert weight[1:].data_ptr() - weight.data_ptr() == 12
        assert torch.arange(4)[torch.tensor([True, False, True, False])].tolist() == [0, 2]
        assert not gpu.host_reads
        assert weight.detach().cpu().shape == (4, 3)
        assert len(weight.detach()[:, 0].tolist()) == 4
        assert [read.partition(":")[0] for read in gpu.host_reads] == 2 * ["tests/test_dry_walk.py"]
        assert torch.cuda.get_device_capability() == (8, 0)
    assert not hasattr(torch.Tensor.is_cuda, "fget")


def test_what_a_rollout_showed_is_read_at_once(dry_walk):
    completions = [Completion(number // 2, Modality.SPEECH, (5, 6), (0.0, 0.0), "", truncated=False) for number in range(8)]
    rollout = SimpleNamespace(completions=completions, outcomes=[Outcome(str(number), 2, 4) for number in range(4)])
    with dry_walk.fake_gpu((8, 0)) as gpu:
        divergences = [torch.empty(0) if number == 6 else torch.full((2,), float(number), device="cuda") for number in range(8)]
        outcomes = outcomes_of(SimpleNamespace(rollout=rollout, divergences=divergences))
        assert len(gpu.host_reads) == 1
    # What is read is made up.
    assert all(outcome.divergence is not None for outcome in outcomes)
