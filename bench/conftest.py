"""The line that a benchmark run prints first: where it runs."""

from __future__ import annotations

import tars_fast  # noqa: F401  (before torch: threads.py)

# isort: split
import torch


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"benchmarks on {torch.cuda.get_device_name()}"
    return "benchmarks without a CUDA GPU: small shapes in plain PyTorch, no kernel is timed"
