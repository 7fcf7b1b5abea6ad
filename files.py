"""How files come into being: whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overcrank.errors import StoreError


@contextmanager
def write_errors(path: Path, instead: str = "--store or --out") -> Iterator[None]:
    """An OSError while writing becomes one sentence about `path`; `instead` is the option that moves it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(f"The disk that holds {path} is full; free space or give {instead} elsewhere.") from error
        if error.errno == errno.EEXIST:
            raise StoreError(
                f"{path} cannot be a folder: a file of that name is in the way; give another {instead}."
            ) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"{path} cannot be written ({reason}); give a writable {instead}.") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that is synced and renamed to it on success, else removed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with write_errors(path):
        try:
            yield part
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
