"""Standard streams that never end a command: closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import atexit
import errno
import io
import os
import sys
from typing import Any, TextIO


class _Pipe(io.RawIOBase):
    """Writes to a file descriptor; what cannot be written is dropped, and the first reason kept."""

    def __init__(self, number: int) -> None:
        self.number, self.reason = number, ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while rest and not self.reason:
                rest = rest[os.write(self.number, rest) :]
        except OSError as error:
            self.reason = error.strerror or str(error)
        return size


def make_streams_safe() -> None:
    """Replace this process's own streams, once; those that a caller put in their place stay."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if os.name == "posix":  # a console of Windows is more than a file descriptor
            setattr(sys, name, _replaced(stream))


def _replaced(stream: io.TextIOWrapper) -> TextIO:
    pipe = _Pipe(stream.fileno())
    atexit.register(_say_what_was_lost, pipe)
    return io.TextIOWrapper(
        io.BufferedWriter(pipe), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
    )


def _say_what_was_lost(pipe: _Pipe) -> None:
    sys.stdout.flush()
    if pipe.number == 1 and pipe.reason and pipe.reason != os.strerror(errno.EPIPE):  # a reader that has enough
        sys.stderr.write(f"warning: not all of the output could be written: {pipe.reason}\n")
        sys.stderr.flush()
