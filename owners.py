"""Who works on a temporary file, so that nobody else removes it: process, its start, PID namespace, boot and host.

On one kernel a lock (flock) tells whether the owner lives, from any PID namespace; of another machine nothing can be
told from here, and what is its own stays until somebody there, or its user by name, removes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TAG = re.compile(r"(?P<host>[A-Za-z0-9-]{1,24})~(?P<boot>[0-9a-f]{8})~(?P<space>\d+)~(?P<pid>\d+)~(?P<started>\d+)")
FIRST_SPACE = 0xEFFFFFFC
"""PID namespace of a machine itself, outside of all containers (Linux: PROC_PID_INIT_INO)."""
KEPT = 60
"""Letters of a file's name in that of its temporary neighbour, which must not outgrow what a name may have."""


class Owner(NamedTuple):
    """A process anywhere; `boot` is of its machine's kernel, `space` its PID namespace, `started` in clock ticks.

    `host` is the machine's name with some digits of its machine-id.
    """

    host: str
    boot: str
    space: int
    pid: int
    started: int

    def tag(self) -> str:
        return "~".join(map(str, self))

    def gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be told from here."""
        here = this_process()
        if self.boot == here.boot and self.space == here.space:
            return _started(self.pid) != self.started
        if self.boot != here.boot and self[0] == here[0] and self.space == here.space == FIRST_SPACE:
            return True  # this machine, before it was started again
        return None


def owner_in(text: str) -> Owner | None:
    """The owner whose tag is in a file's name, or in what is written beside a lock."""
    match = TAG.search(text)
    return Owner(match["host"], match["boot"], *(int(match[n]) for n in ("space", "pid", "started"))) if match else None


def owner_of(tag: str) -> Owner | None:
    """The owner whose tag this is, and nothing else."""
    return owner_in(tag) if TAG.fullmatch(tag) else None


def this_process() -> Owner:
    return Owner(*_machine(), os.getpid(), _started(os.getpid()) or 0)  # not cached: processes fork


def part_name(name: str) -> str:
    """A hidden name for what becomes `name`, which tells whose it is and is nobody else's."""
    kept = name.encode()[:KEPT].decode(errors="ignore")
    return f".{kept}.{this_process().tag()}~{os.urandom(3).hex()}.part"


@contextmanager
def claimed(part: Path) -> Iterator[None]:
    """Hold the lock that tells other PID namespaces that the owner of `part`, which exists, lives."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(part, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_abandoned(path: Path, text: str, gone_hosts: frozenset[str] = frozenset()) -> bool:
    """Whether it is proven that nobody works on `path` any more; `text` has its owner's tag.

    `gone_hosts`: machines of which the user says that they are gone.
    """
    owner = owner_in(text)
    if owner is None:
        return False
    gone = owner.gone()
    if gone is None and owner.boot == this_process().boot:
        gone = _unlocked(path)
    return owner.host in gone_hosts if gone is None else gone


def _unlocked(path: Path) -> bool | None:
    """Whether no process of this kernel holds its lock; None where there are no locks."""
    if os.name != "posix" or path.is_dir():
        return None
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None
    finally:
        os.close(handle)


@lru_cache
def _machine() -> tuple[str, str, int]:
    """Host, boot and PID namespace; where the system tells no boot, the host and its hardware stand for it."""
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:17] or "host"
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        machine = b""
    host = f"{name}-{hashlib.sha256(machine or os.urandom(8)).hexdigest()[:6]}"  # unknown: never taken for another
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        import uuid

        boot, space = f"{socket.gethostname()} {uuid.getnode()}", 0
    return host, hashlib.sha256(boot.encode()).hexdigest()[:8], space


def _started(pid: int) -> int | None:
    """When a process of this PID namespace began; None if there is none. Clock ticks since boot do not jump."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19])
    import psutil

    with suppress(psutil.Error):
        return int(psutil.Process(pid).create_time())
    return None
