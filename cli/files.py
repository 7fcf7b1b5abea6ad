"""What `overcrank inspect` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from overcrank.export.files.parts import AS_STORED
from overcrank.runtime.inspect import Inspection
from overcrank.units import human_bytes

WIDENED = "widened to 16 bit, or quantized anew by --precision"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def as_data(found: Inspection) -> dict[str, Any]:
    """As plain data, for programs."""
    networks = [{k: v for k, v in asdict(network).items() if k != "origins"} for network in found.networks]
    return {**asdict(found), "networks": networks, "precision": found.precision, "commands": found.commands()}


def lines(found: Inspection) -> list[str]:
    """A short report for people."""
    out = [f"{found.file}: {found.kind}, {human_bytes(found.bytes)}, {_count(found.parameters)} parameters"]
    for network in found.networks:
        if network.variants:
            out.append(f"network  {network.part} of {', '.join(network.variants)} ({network.cls})")
        else:
            out.append(f"network  {network.part}, a {network.cls} of other sizes than any published one")
    if found.kind == "checkpoint" and not found.networks:
        out.append("network  unknown: its tensors' names are of no model that overcrank has")
    for form, count in found.layers.items():
        served = f"multiplied as it is by {AS_STORED[form]} engines" if form in AS_STORED else WIDENED
        out.append(f"layers   {count} in {form}: {served}")
    if found.rotated:
        out.append(f"rotation ConvRot in groups of {', '.join(map(str, found.rotated))}")
    out.append(f"others   {', '.join(f'{count} in {form}' for form, count in found.others.items()) or 'none'}")
    return out + [f"next     {command}" for command in found.commands()]
