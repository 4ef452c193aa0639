"""Files and folders that appear and disappear whole or not at all, and one line where they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tars_fast.support.text import size
from tars_fast.types import TrainingError, UserError

PARTIAL = ".partial"
"""Behind the name of what is still being written."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class CannotWriteError(UserError):
    """A file or folder of the user's cannot be written."""


@contextmanager
def explain_cannot_write(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """For a block that writes `path`.

    Args:
        num_bytes: what it takes, where that is known.

    Raises:
        CannotWriteError: in the place of the error of the system, or of a library that passes it on, with what is free.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except Exception as error:
        number = _number_of(error)
        if number not in _FULL | _UNUSABLE:
            raise
        reason, remedy = os.strerror(number), "make it writable, or name another folder"
        if number in _FULL:
            needs = "" if num_bytes is None else f"needs {size(num_bytes)}, "
            reason, remedy = f"{reason}: {needs}{size(free_bytes(path))} are free", "make room and repeat the command"
        raise CannotWriteError(f"{path}: cannot be written ({reason}); {remedy}") from error


def _number_of(error: BaseException | None) -> int:
    """The system's number of what went wrong; torch hides its error behind one of its own, and Rust has it in the text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return 0


def free_bytes(path: Path) -> int:
    """Bytes that a file at `path`, which need not exist, could have."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def make_readable(*paths: Path) -> None:
    """Give files the mode that the user's umask asks for; safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


@contextmanager
def replaced_atomically(path: Path, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` at the end, or never where an exception comes first.

    Raises:
        CannotWriteError: see `explain_cannot_write`.
    """
    partial = path.with_name(path.name + PARTIAL)
    with explain_cannot_write(path, num_bytes):
        try:
            with partial.open("wb") as file:
                yield file
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one go; text becomes UTF-8. Raises CannotWriteError."""
    encoded = content.encode() if isinstance(content, str) else content
    with replaced_atomically(path, len(encoded)) as file:
        file.write(encoded)


def append(path: Path, text: str) -> None:
    """Append lines that are on disk when this returns; a kill leaves a last line without its end, a full disk none.

    Raises:
        CannotWriteError: see `explain_cannot_write`.
    """
    encoded = text.encode()
    with explain_cannot_write(path, len(encoded)), path.open("ab") as file:
        end = file.tell()
        try:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def partial_of(target: Path) -> Path:
    """The folder that has the contents of `target` until they are whole."""
    return target.with_name(target.name + PARTIAL)


def flush(paths: Iterable[Path]) -> None:
    """Have these files and folders on disk when this returns, with the mode that the user's umask asks for."""
    for path in paths:
        if path.suffix == ".safetensors":
            make_readable(path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete_folder(target: Path) -> None:
    """Give a folder whose contents are whole, and on disk, its name in the place of `partial_of`."""
    if target.exists():
        remove_folder(target)
    partial_of(target).rename(target)


@contextmanager
def atomic_folder(target: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `target` when the block has ended without error and all is on disk.

    Raises:
        CannotWriteError: see `explain_cannot_write`.
    """
    partial = partial_of(target)
    with explain_cannot_write(target, num_bytes):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            flush([*partial.rglob("*"), partial])
            complete_folder(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder that never stands under its name in part: a kill in between leaves it under another one."""
    doomed = path.with_name(f"{path.name}.deleted{PARTIAL}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_partial(folder: Path) -> None:
    """Delete what killed processes have left of files and folders they were writing or deleting in `folder`."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def listing(folder: Path, without: str = "") -> str:
    """Names of what a command has written into `folder`, in order, but those that begin with `without`."""
    hidden = (".", without) if without else (".",)
    return ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(hidden)))
