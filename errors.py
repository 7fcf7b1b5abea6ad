"""Every error a user can meet, as one tree.

OvercrankError            exit 1: something failed that the user could not have known
├── UserError             exit 2: the request itself is wrong; nothing was written
│   ├── ModelError        unknown model, not a diffusers folder, hub unreachable
│   ├── TargetError       unknown card, or a precision the card lacks
│   ├── ShapeError        a video shape the model cannot make
│   │   └── OtherKind     a call of the kind that another component of the module serves
│   ├── CheckpointError   weights that are truncated or of another architecture
│   ├── StoreError        a store or output folder that cannot be used
│   └── RequestError      a render request or job file that is not valid
├── ExportError           module → ONNX failed
├── CompileError          ONNX → engine failed
├── IntegrityError        a bundle's files do not match its manifest
│   └── OutdatedBundle    a bundle that another version of overcrank made
├── CalibrationError      a calibration run gave no ranges
├── BackendError          an engine cannot serve, and falling back was not allowed
├── RenderError           a render gave no video
├── BuildCancelled        the user pressed Ctrl-C
└── RenderCancelled       the user pressed Ctrl-C

CannotServe (engines/refusals.py) is none of them: it becomes a fallback to eager PyTorch.
"""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""What moves a terminal's cursor, ends a line, turns its direction, or is no character."""


def safe_text(text: object) -> str:
    """Text of others on one line: control characters are spelled out, so that no terminal obeys them."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


class OvercrankError(Exception):
    """Base of every error that is shown as one sentence; `exit_code` is the process's."""

    exit_code = 1


class UserError(OvercrankError):
    exit_code = 2


class ModelError(UserError):
    pass


class TargetError(UserError):
    pass


class ShapeError(UserError):
    pass


class OtherKind(ShapeError):
    pass


class CheckpointError(UserError):
    pass


class StoreError(UserError):
    pass


class RequestError(UserError):
    pass


class CalibrationError(OvercrankError):
    pass


class ExportError(OvercrankError):
    pass


class CompileError(OvercrankError):
    pass


class IntegrityError(OvercrankError):
    def __str__(self) -> str:
        """What others wrote is in it."""
        return safe_text(super().__str__())


class OutdatedBundle(IntegrityError):
    pass


class BackendError(OvercrankError):
    pass


class RenderError(OvercrankError):
    pass


class BuildCancelled(OvercrankError):
    exit_code = 130


class RenderCancelled(OvercrankError):
    exit_code = 130


def present(value: T | None, what: str) -> T:
    """What cannot be missing; raises OvercrankError, which names it, if it is."""
    if value is None:
        raise OvercrankError(f"{what} is missing; this is a fault of overcrank, please report it.")
    return value
