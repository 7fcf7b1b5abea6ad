"""How files come into being: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
            sync(part)
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file's content, or a folder's with all below it, is on the disk when this returns."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_folder(path)
        return
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ── whose a temporary thing is ───────────────────────────────────────────────────────


@dataclass(frozen=True)
class Owner:
    """The process that a temporary file or folder belongs to; `token` is the part of its name that says so.

    A number of a process is given again, and means nothing on another machine or in another PID namespace.
    """

    pid: int
    start: int  # ticks of the machine's uptime, which no change of the clock moves
    boot: str  # of the machine, until it restarts
    host: str  # machine and PID namespace

    @property
    def token(self) -> str:
        return f"{self.pid}-{self.start}-{self.boot}-{self.host}"

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(pid, _start_of(pid) or 0, *_machine())

    @classmethod
    def of(cls, token: str) -> Owner | None:
        """None for text that is no token."""
        words = re.fullmatch(r"(\d{1,10})-(\d{1,20})-([0-9a-f]{6})-([0-9a-f]{6})", token)
        return cls(int(words[1]), int(words[2]), words[3], words[4]) if words else None

    def gone(self) -> bool:
        """Whether it is proven that the process is no more; false of other machines', of which nothing is known."""
        boot, host = _machine()
        if self.host != host:
            return False
        if self.boot != boot:
            return True
        import psutil

        start = _start_of(self.pid) if psutil.pid_exists(self.pid) else -1
        return start is not None and start != self.start


@cache
def _machine() -> tuple[str, str]:
    """This start of the machine, and the machine with its PID namespace."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    names = (
        boot.read_text() if boot.exists() else "",
        platform.node() + (os.readlink(space) if space.exists() else ""),
    )
    first, second = (hashlib.sha256(name.encode()).hexdigest()[:6] for name in names)
    return first, second


def _start_of(pid: int) -> int | None:
    """When a process started, -1 for one that has ended and is not waited for; None if that cannot be read."""
    if not Path("/proc/self/stat").exists():
        import psutil

        return int(psutil.Process(pid).create_time() * 100)
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(") ")[2].split()
        return -1 if state in "ZX" else int(numbers[18])
    except (OSError, ValueError, IndexError):
        return None
