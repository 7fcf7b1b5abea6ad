"""Which published network a weight file holds, by the names and shapes of its tensors alone.

`networks.json` (made by bench/index_networks.py, which tests/test_files.py repeats) holds, for each class, the names of
its parameters with numbers left out, and a digest of names and shapes for each published network of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from overcrank.errors import CheckpointError
from overcrank.export.files.single_file import VAE_PREFIXES, Origins, origins, shape_of

TABLE = Path(__file__).parent / "networks.json"
_NUMBER = re.compile(r"\d+")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Identified:
    """A network in a file."""

    cls: str
    part: str
    """Of the pipeline: transformer, unet, vae or audio_vae."""
    variants: tuple[str, ...]
    """Published variants that have this very network; none where names are those of `cls`, and shapes are not."""
    nearest: str
    """A variant of `cls`."""
    origins: Origins


def identify(shapes: Shapes) -> list[Identified]:
    """Every network in a file whose parameters have these names and shapes, denoisers first."""
    networks = [network for cls, about in _table().items() if (network := _as(cls, about, shapes)) is not None]
    return sorted(networks, key=lambda network: network.part in VAE_PREFIXES)


def digest(shapes: Shapes) -> str:
    """Of a network's parameters and stored buffers."""
    lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def kinds(names: Iterable[str]) -> set[str]:
    """Names with their numbers left out."""
    return {_NUMBER.sub("#", name) for name in names}


def _as(cls: str, about: Mapping[str, Any], shapes: Shapes) -> Identified | None:
    """The network of class `cls` in the file; None where its names are another's."""
    few = {name: shape for name, shape in shapes.items() if all(n in ("0", "1", "2") for n in _NUMBER.findall(name))}
    try:
        names = kinds(_origins(cls, about, few))
        if not any(_alike(names, set(wanted)) for wanted in about["names"]):
            return None
        places = _origins(cls, about, shapes)
    except CheckpointError:
        return None
    given = {name: shape_of(rows, shapes) for name, rows in places.items()}
    variants = tuple(about["networks"].get(digest(given), ()))
    return Identified(cls, about["part"], variants, about["nearest"], places)


def _alike(names: set[str], wanted: set[str]) -> bool:
    """Whether most names are the class's, as some of a family have a few more or fewer."""
    return len(names & wanted) >= 0.8 * len(names | wanted)


def _origins(cls: str, about: Mapping[str, Any], shapes: Shapes) -> Origins:
    import diffusers

    return origins(getattr(diffusers, cls), shapes, (), about["part"])


@lru_cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table
