"""What an adapter does at every step: nothing that would make a GPU wait, or copy a Python value to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from overcrank.export.module import random_module
from overcrank.models.base import Call
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.test_families import CASES, component_of

pytestmark = pytest.mark.quick

STALLS = ("_local_scalar_dense", "nonzero", "lift_fresh", "scalar_tensor", "is_nonzero", "equal", "unique", "item")
"""aten operators that read a value back, have a size that only the values tell, or bring one from Python."""
DENOISERS = [case for case in CASES if component_of(*case).subfolder in ("transformer", "unet")]


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_stalls() -> None:
    with Watch() as watch:
        float(torch.ones(1).sum())
        torch.tensor([1.0, 2.0])
    assert {"_local_scalar_dense", "lift_fresh"} <= set(watch.seen) & set(STALLS)


@pytest.mark.parametrize(("name", "which"), DENOISERS)
def test_a_step_after_the_first_stalls_nothing(name: str, which: str) -> None:
    component = component_of(name, which)
    module = random_module(component, component.config, "fp32")
    sizes = {**component.free_axes, **component.sizes(tiny.TINY[name].minimum)}
    call = component.sample(module, sizes, torch.Generator().manual_seed(0))
    first = next(iter(call))
    with torch.no_grad():
        component.adapt(module, Call(call))
        later = call | {first: call[first] + 1}  # other latents; what a job computes once is passed again
        with Watch() as watch:
            component.adapt(module, Call(later))
    assert sorted(set(watch.seen) & set(STALLS)) == []
