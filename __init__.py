"""Faster video diffusion: TensorRT engines for any card, built on any machine.

`load(model)` gives a diffusers pipeline with engines under it, `accelerate(pipe)` puts them under one you have,
`build(model, gpu)` makes engines. What a name needs is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from overcrank.api import PullOptions, build, plan_report, pull, push, verify
    from overcrank.calibration.run import CalibrationOptions, calibrate
    from overcrank.engines.request import BuildOptions
    from overcrank.engines.store import Store
    from overcrank.errors import OvercrankError
    from overcrank.runtime.options import AccelerateOptions, LoadOptions, RenderOptions
    from overcrank.runtime.pipeline.accelerate import accelerate
    from overcrank.runtime.pipeline.load import load

__all__ = [
    "AccelerateOptions",
    "BuildOptions",
    "CalibrationOptions",
    "LoadOptions",
    "OvercrankError",
    "PullOptions",
    "RenderOptions",
    "Store",
    "__version__",
    "accelerate",
    "build",
    "calibrate",
    "load",
    "plan_report",
    "pull",
    "push",
    "verify",
]

_WHERE = {
    "api": ("PullOptions", "build", "plan_report", "pull", "push", "verify"),
    "calibration.run": ("CalibrationOptions", "calibrate"),
    "engines.request": ("BuildOptions",),
    "engines.store": ("Store",),
    "errors": ("OvercrankError",),
    "runtime.options": ("AccelerateOptions", "LoadOptions", "RenderOptions"),
    "runtime.pipeline.accelerate": ("accelerate",),
    "runtime.pipeline.load": ("load",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _WHERE.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"overcrank.{module}"), name)
            return value
    raise AttributeError(f"module 'overcrank' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
