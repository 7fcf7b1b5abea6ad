"""The quick tier's own rule: what is slow cannot be done in it (tests/quick.py)."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tensorrt_rtx
import torch

from tests.quick import TooSlow

pytestmark = pytest.mark.quick
SLOW: dict[str, Callable[[], Any]] = {
    "traces": lambda: torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)),
    "converts": lambda: torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)),
    "compiles": lambda: tensorrt_rtx.Builder(None),
    "loads": lambda: diffusers.LTXPipeline.from_pretrained("nowhere"),
    "starts a process": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "starts another Python": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
}


@pytest.mark.parametrize("what", SLOW)
def test_what_is_slow_is_refused(what: str) -> None:
    with pytest.raises(TooSlow, match=what):
        SLOW[what]()


def test_what_is_not_is_left() -> None:
    assert subprocess.run(["true"], check=False).returncode == 0


@pytest.mark.heavy
def test_outside_the_tier_nothing_is_refused() -> None:
    assert subprocess.run([sys.executable, "-c", ""], check=False).returncode == 0
    assert torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
