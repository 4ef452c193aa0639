"""Kernel tests run on CUDA where there is some, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import os

import numpy
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Triton reads it at import.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)

import pytest  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def _rounding(convert):
    """Triton 3.9's interpreter cuts fp32 off where CUDA rounds to the nearest bf16, and so judges bf16 kernels wrongly."""

    def rounded(values, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(numpy.array(values)).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    return rounded


interpreter._convert_float = _rounding(interpreter._convert_float)


MANY_CASES, EVERY = 10, 10
INTERPRETED = {"test_distillation", "test_losses", "test_similarity"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted, where a case takes seconds, every tenth of a test's many slow cases runs; on a GPU, or named, all do."""
    if DEVICE.type == "cuda" or any("::" in argument for argument in config.args):
        return
    slow: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.stem in INTERPRETED and item.get_closest_marker("slow"):
            slow.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    left_out = {item for cases in slow.values() if len(cases) > MANY_CASES for place, item in enumerate(cases) if place % EVERY}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=[*left_out])


def pytest_report_header() -> str:
    return f"kernels run on {'CUDA' if DEVICE.type == 'cuda' else 'the CPU, interpreted'}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What an operation leaves unwritten shows up as NaN, or as a large number."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30) if tensor.dtype != torch.bool else tensor

    return poisoned
