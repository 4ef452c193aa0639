"""Kernel tests run on CUDA where there is some, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Triton reads it at import.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)

import pytest  # noqa: E402


def pytest_report_header() -> str:
    return f"kernels run on {'CUDA' if DEVICE.type == 'cuda' else 'the CPU, interpreted'}"


@pytest.fixture
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
