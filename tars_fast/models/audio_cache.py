"""A cache of audio embeddings by a recording's content: a frozen tower encodes each recording once, also across runs."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from tars_fast.support.files import make_readable
from tars_fast.types import Recording, UserError

ClipEmbeddings = tuple[Tensor, ...]
"""Embeddings of one recording: [A, D] for each of its clips."""


class AudioCache:
    """Embeddings in host memory and, where a folder is given, on disk; what was not used for longest is dropped first.

    Several threads may use it, and several runs may share the folder.

    Args:
        max_bytes: of the embeddings in host memory.
        folder: where embeddings outlive the process; None keeps them in memory only.
        max_folder_bytes: of all files in `folder`.
        fingerprint: of the tower's weights and settings. It is part of the file names, so that another tower's embeddings are
            never taken.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None, max_folder_bytes: int = 0, fingerprint: str = ""):
        self._max_bytes = max_bytes
        self._folder = folder
        self._max_folder_bytes = max_folder_bytes
        self._fingerprint = fingerprint
        self._held: OrderedDict[str, ClipEmbeddings] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._digests: dict[tuple[Recording, tuple[int, int] | None], str] = {}
        if folder is not None:
            make_cache_folder(folder)
            self._folder_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def key(self, recording: Recording) -> str:
        """SHA-256 of the recording's bytes; a file whose size and time of change stay the same is read once a run.

        Raises:
            UserError: it cannot be read.
        """
        try:
            state = recording.stat() if isinstance(recording, Path) else None
            place = (recording, None if state is None else (state.st_mtime_ns, state.st_size))
            if place not in self._digests:
                self._digests[place] = hashlib.sha256(recording.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{recording}: cannot be read ({error.strerror})") from error
        return self._digests[place]

    def get(self, key: str) -> ClipEmbeddings | None:
        """The embeddings on the host, or None where they are neither in memory nor, whole, on disk."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        if self._folder is None or not (path := self._path(self._folder, key)).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                clips = tuple(file.get_tensor(str(number)) for number in range(len(file.keys())))
                written = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            # A file that is cut off or is none of the cache's: the caller computes the embeddings, and `put` replaces it.
            return None
        if written != _checksum(clips):
            return None
        with suppress(FileNotFoundError):
            os.utime(path)
        self._hold(key, clips)
        return clips

    def put(self, key: str, clips: ClipEmbeddings) -> None:
        """Move the clips of a recording to the host and keep them."""
        clips = tuple(clip.detach().cpu() for clip in clips)
        self._hold(key, clips)
        if self._folder is not None:
            # A full disk, or a folder that has gone, must not end the run: the embeddings are computed again.
            from safetensors import SafetensorError

            with suppress(OSError, SafetensorError):
                self._write(self._folder, key, clips)

    def _hold(self, key: str, clips: ClipEmbeddings) -> None:
        with self._lock:
            if key in self._held:
                self._num_bytes -= _num_bytes(self._held.pop(key))
            self._held[key] = clips
            self._num_bytes += _num_bytes(clips)
            while self._num_bytes > self._max_bytes:
                _, oldest = self._held.popitem(last=False)
                self._num_bytes -= _num_bytes(oldest)

    def _write(self, folder: Path, key: str, clips: ClipEmbeddings) -> None:
        from safetensors.torch import save_file

        path = self._path(folder, key)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        named = {str(number): clip.contiguous() for number, clip in enumerate(clips)}
        save_file(named, partial, metadata={"sha256": _checksum(clips)})
        make_readable(partial)
        partial.replace(path)
        self._folder_bytes += path.stat().st_size
        if self._folder_bytes > self._max_folder_bytes:
            states = [(path.stat(), path) for path in folder.glob("*.safetensors")]
            self._folder_bytes = sum(state.st_size for state, _ in states)
            # Down to nine tenths of the limit, so that the folder is not listed again for each new recording.
            for state, oldest in sorted(states, key=lambda entry: entry[0].st_mtime_ns):
                if self._folder_bytes <= 0.9 * self._max_folder_bytes:
                    break
                oldest.unlink(missing_ok=True)
                self._folder_bytes -= state.st_size

    def _path(self, folder: Path, key: str) -> Path:
        return folder / f"{self._fingerprint}-{key}.safetensors"


def make_cache_folder(folder: Path) -> None:
    """Make the folder of `--audio-cache-dir`. Raises UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--audio-cache-dir {folder}: cannot be made ({error.strerror}); name another") from error


def _num_bytes(clips: ClipEmbeddings) -> int:
    return sum(clip.nbytes for clip in clips)


def _checksum(clips: ClipEmbeddings) -> str:
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(f"{tuple(clip.shape)} {clip.dtype}".encode())
        digest.update(_bytes(clip))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, of any dtype."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(*modules: nn.Module) -> str:
    """A short hash of weights, bit for bit, with their dtype and kind of device: all that an embedding's bits depend on."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            digest.update(f"{name} {parameter.dtype} {parameter.device.type}".encode())
            digest.update(_bytes(parameter.detach().cpu()))
    return digest.hexdigest()[:16]
