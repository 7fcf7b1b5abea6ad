"""TensorRT flavours: which are installed, in which version, and which driver they need, without importing them."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from overcrank.engines.cards import installed_cards
from overcrank.engines.refusals import OldDriver
from overcrank.engines.targets import FLAVOUR_TITLES, Target
from overcrank.errors import TargetError

DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
NEEDED_DRIVERS = {"tensorrt_rtx": {"tensorrt-rtx": "580"}, "tensorrt": {"tensorrt-cu13": "580", "tensorrt-cu12": "525"}}
"""Flavour → distribution that holds its library → the oldest driver for the CUDA it was made with: 13 or 12."""


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


def install_command(flavour: str, version: str) -> str:
    """The command that installs this very version; empty for a flavour that is not known here."""
    name = DISTRIBUTIONS.get(flavour)
    return f"pip install {shlex.quote(f'{name}=={version}')}" if name else ""


def load_flavour(flavour: str) -> Any:
    """The Python module of a flavour; both have the same builder API."""
    require_flavour(flavour)
    try:
        return importlib.import_module(flavour)
    except Exception as error:
        raise TargetError(f"{FLAVOUR_TITLES[flavour]} is installed but does not load: {error}") from error


def needed_driver(flavour: str) -> str:
    """The oldest NVIDIA driver that the installed library runs on; empty if that is not known."""
    for distribution, driver in NEEDED_DRIVERS.get(flavour, {}).items():
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return driver
    return ""


def too_old(flavour: str, driver: str) -> OldDriver | None:
    """Why this driver does not run the flavour; None if it does, or nobody can tell.

    `driver`: as nvidia-smi names it, such as "580.95.05".
    """
    needed, major = needed_driver(flavour), driver.partition(".")[0]
    if not needed or not major.isdigit() or int(major) >= int(needed):
        return None
    return OldDriver(driver, FLAVOUR_TITLES[flavour], flavour_version(flavour) or "", needed)


def driver_notes(flavour: str, targets: Iterable[Target]) -> list[str]:
    """What to know before engines are built for a card of this machine whose driver does not run them."""
    names = {name for target in targets for name in (target.name, *target.members)}
    try:
        drivers = {card.driver: card.name for card in installed_cards() if card.target in names}
    except TargetError:
        return []
    reasons = [(name, reason) for driver, name in drivers.items() if (reason := too_old(flavour, driver))]
    words = [(name, *reason.words()) for name, reason in reasons]
    return [f"{what}: the engines will not run on the {name} here; {fix}." for name, what, fix in words]
