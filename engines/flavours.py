"""TensorRT flavours: which are installed, and which version, without importing them."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from overcrank.engines.targets import FLAVOUR_TITLES
from overcrank.errors import TargetError

DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def flavour_version(flavour: str) -> str | None:
    """Exact version of an installed flavour, or None; also of one that only another overcrank knows."""
    try:
        return metadata.version(DISTRIBUTIONS[flavour])
    except (KeyError, metadata.PackageNotFoundError):
        return None


def require_flavour(flavour: str) -> str:
    """Version of `flavour`; raises TargetError naming the install command if it is absent."""
    version = flavour_version(flavour)
    if version is None:
        extra = "overcrank[tensorrt]" if flavour == "tensorrt" else "tensorrt-rtx"
        raise TargetError(f"{FLAVOUR_TITLES[flavour]} is not installed; pip install '{extra}' adds it.")
    return version


def load_flavour(flavour: str) -> Any:
    """The Python module of a flavour; both have the same builder API."""
    require_flavour(flavour)
    try:
        return importlib.import_module(flavour)
    except Exception as error:
        raise TargetError(f"{FLAVOUR_TITLES[flavour]} is installed but does not load: {error}") from error
