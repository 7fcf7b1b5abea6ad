"""Families found by file name, their variants, and what they share.

A family is a module of this package that makes a `FAMILY` (_family.py). Its file name is its name, with which its
variants' names begin. Names with an underscore are no families.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from overcrank.errors import ModelError
from overcrank.models._family import Family
from overcrank.models.base import Component, Variant

PACKAGE = "overcrank.models"
NO_FAMILIES = ("base", "demo", "hub", "matching", "network", "presets", "registry")


@lru_cache
def families() -> tuple[str, ...]:
    names = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(sorted(n for n in names if n not in NO_FAMILIES and not n.startswith("_")))


def family(name: str) -> Family:
    """The family of a file; a broken import inside it surfaces as itself."""
    own: Family = import_module(f"{PACKAGE}.{name}").FAMILY
    return own


def variant_named(name: str) -> Variant | None:
    """The published variant of this name; of families, only one whose name it begins with is imported."""
    owners = (owner for owner in families() if name.startswith(owner.replace("_", "-") + "-"))
    return next((v for owner in owners for v in family(owner).variants if v.name == name), None)


def components(variant: Variant, names: tuple[str, ...] = ()) -> tuple[Component, ...]:
    """The variant's components: the default ones, or the named ones in the family's order."""
    every = family(variant.family).components(variant)
    own_names = [c.name for c in every]
    for name in names:
        if name not in own_names:
            raise ModelError(f"{variant.name} has no component '{name}'; it has {', '.join(own_names)}.")
    return tuple(c for c in every if (c.name in names if names else c.default))


def main_part(classes: Mapping[str, str]) -> str | None:
    """Of a checkpoint's or pipeline's parts, by their class, the one that a family is known by."""
    denoisers = {cls for name in families() for cls in family(name).denoiser_classes}
    named = [part for part in ("transformer", "unet") if part in classes]  # named in errors, if of no family
    return next((part for part, cls in classes.items() if cls in denoisers), named[0] if named else None)


@lru_cache
def published() -> Mapping[str, Variant]:
    """Every variant by its name; imports all families."""
    return {v.name: v for name in families() for v in family(name).variants}
