"""Faster video diffusion: TensorRT engines for any card, built on any machine.

`load(model)` gives a diffusers pipeline with engines under it, `accelerate(pipe)` puts
them under one you have. Both import PyTorch when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["__version__", "accelerate", "load"]

if TYPE_CHECKING:
    from overcrank.runtime.pipeline.accelerate import accelerate
    from overcrank.runtime.pipeline.load import load


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "load"):
        from importlib import import_module

        return getattr(import_module(f"overcrank.runtime.pipeline.{name}"), name)
    raise AttributeError(f"module 'overcrank' has no attribute '{name}'")
