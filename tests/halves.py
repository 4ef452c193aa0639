"""Two processes, as torchrun starts them, that hold half of a model's weights each."""

from __future__ import annotations

from pathlib import Path

from processes import run_two


def run_halves(script: Path, *arguments: object) -> list[str]:
    """Two processes of a script that prints that both are equal to the whole; returns what they say of it."""
    printed = run_two(script, *arguments, beside=("models",), environment={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    said = [line.removeprefix("equal") for line in printed.splitlines() if line.startswith("equal")]
    assert len(said) == 2, printed
    return said
