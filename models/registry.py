"""Families found by file name, their variants, and what they share.

A family is a module of this package with `TITLE`, `VARIANTS`, `DEFAULT`, `DENOISER_CLASSES`,
`components(variant)`, `grid(variant)` and `latent(variant, shape)`; what else it may define for
rendering has its defaults in _common.py. Its file name is its name. Names with an underscore are
no families.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError
from overcrank.models.base import Component, Variant

PACKAGE = "overcrank.models"
NO_FAMILIES = (
    "base",
    "demo",
    "hub",
    "matching",
    "network",
    "presets",
    "registry",
    "identify",
    "single_file",
    "stored_layers",
    "weight_file",
)


@lru_cache
def families() -> tuple[str, ...]:
    names = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(sorted(n for n in names if n not in NO_FAMILIES and not n.startswith("_")))


def family(name: str) -> Any:
    """The family's module; a broken import inside it surfaces as itself."""
    return import_module(f"{PACKAGE}.{name}")


def hook(variant: Variant, name: str) -> Any:
    """A function of the variant's family, or what families share where it has none of its own."""
    from overcrank.models import _common

    return getattr(family(variant.family), name, None) or getattr(_common, name)


def components(variant: Variant, names: tuple[str, ...] = ()) -> tuple[Component, ...]:
    """The variant's components: the default ones, or the named ones in the family's order."""
    every: tuple[Component, ...] = family(variant.family).components(variant)
    known = [c.name for c in every]
    for name in names:
        if name not in known:
            raise ModelError(f"{variant.name} has no component '{name}'; it has {', '.join(known)}.")
    return tuple(c for c in every if (c.name in names if names else c.default))


def main_part(classes: Mapping[str, str]) -> str | None:
    """Of a checkpoint's or pipeline's parts, by their class, the one that a family is known by."""
    known = {cls for name in families() for cls in family(name).DENOISER_CLASSES}
    named = [part for part in ("transformer", "unet") if part in classes]  # named in errors, if of no family
    return next((part for part, cls in classes.items() if cls in known), named[0] if named else None)


@lru_cache
def published() -> Mapping[str, Variant]:
    """Every variant by its name."""
    return {v.name: v for name in families() for v in family(name).VARIANTS}
