"""How files come into being: whole or not at all; and how they go."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overcrank.errors import StoreError, UserError
from overcrank.owners import claimed, part_name

REMOVING = ".removing-"
MOST_BYTES, LONGEST_PATH = 255, 4000
"""Bytes of a name, in every usual file system, and of a whole path."""


def user_path(path: str | Path, what: str = "the path") -> Path:
    """A path as a user writes it, with `~` for a home; raises UserError for a name that no file system takes."""
    found = Path(os.path.expanduser(path))  # Path's own raises for a user that is not there
    for name, most in (*((part, MOST_BYTES) for part in found.parts), (str(found), LONGEST_PATH)):
        size = len(name.encode("utf-8", "surrogatepass"))
        if size > most:
            raise UserError(
                f"{what} has a name of {size} bytes, {name[:40]}…, and file systems take {most}; shorten it."
            )
    return found


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
def atomic_write(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary neighbour of `path`, there and empty, that is synced and renamed to it on success, else removed.

    `mode`: its permissions, whatever the umask; they hold before the first byte is written.
    """
    part = path.with_name(part_name(path.name))
    with write_errors(path):
        try:
            handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
            os.close(handle)
            if mode is not None:
                part.chmod(mode)
            with claimed(part):
                yield part
            with claimed(part):  # a writer may have put another file there
                commit(part, path)
        finally:
            part.unlink(missing_ok=True)


def commit(part: Path, path: Path) -> None:
    """Sync a file, or a folder with all that is in it, and only then give it the name `path`, which is synced too."""
    sync(part)
    part.replace(path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """A file's content, or a folder's with all below it, is on the disk when this returns."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(Path(folder) / name)
        sync_folder(Path(folder))
    if path.is_file():
        _sync(path)


def _sync(file: Path) -> None:
    with file.open("rb" if os.name == "posix" else "rb+") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_tree(path: Path) -> None:
    """Out of sight first, then deleted: a killed removal leaves no half folder, and can be run again."""
    if path.is_symlink():
        path.unlink()
        return
    gone = path
    if not path.name.startswith(REMOVING):
        gone = path.with_name(f"{REMOVING}{os.urandom(4).hex()}-{path.name.lstrip('.')[:200]}")
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # another process may delete the same
    if gone.exists():
        shutil.rmtree(gone)
