"""What a test of the quick tier may not do; the fixture of conftest.py holds each of them to it.

Forbidden is what costs seconds, at the place where every way to it passes: tracing a network, compiling an engine,
loading a pipeline, and another Python. So a test that became slow fails in the tier and says why, whatever the machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest


class TooSlow(BaseException):
    """A quick test did what is forbidden; no `except Exception` of the product takes it for an error of its own."""


@contextmanager
def kept_quick() -> Iterator[None]:
    """Inside, what is forbidden raises TooSlow."""
    import diffusers
    import tensorrt_rtx
    import torch

    places: list[tuple[Any, str, str]] = [
        (torch.export, "export", "traces a network"),
        (torch.onnx, "export", "converts a network"),
        (tensorrt_rtx, "Builder", "compiles an engine"),
        (diffusers.DiffusionPipeline, "from_pretrained", "loads a pipeline"),
        (BaseProcess, "start", "starts a process"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, what in places:
            patch.setattr(owner, name, _refusal(what))
        patch.setattr(subprocess.Popen, "__init__", _without_python(subprocess.Popen.__init__))
        yield


def _refusal(what: str) -> Callable[..., Any]:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise TooSlow(f"a quick test {what}; mark it heavy, or ask less of it")

    return refuse


def _without_python(own: Callable[..., None]) -> Callable[..., None]:
    """Of Popen: git and the like may run, which take milliseconds."""

    def start(self: Any, args: Any, *more: Any, **named: Any) -> None:
        program = args if isinstance(args, str | bytes | os.PathLike) else args[0]
        if os.path.basename(os.fsdecode(program)).startswith("python"):
            self.returncode, self._child_created = None, False  # as Popen's own __del__ reads them
            _refusal("starts another Python")()
        own(self, args, *more, **named)

    return start
