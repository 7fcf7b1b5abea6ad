"""Which published network a weight file holds, by the names and shapes of its tensors alone.

`networks.json` (made by bench/index_networks.py, which tests/test_files.py repeats) holds, for each class, the names of
its parameters with numbers left out, and a digest of names and shapes for each published network of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from overcrank.errors import CheckpointError
from overcrank.export.files.single_file import VAE_PREFIXES, Origins, as_named, origins, shape_of

TABLE = Path(__file__).parent / "networks.json"
ALIKE = 0.8
"""The share of names from which on they are the class's: some of a family have a few more or fewer."""
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
    """Every network in a file whose parameters have these names and shapes, denoisers first.

    Of a part whose names are several classes', those of which it is a published network, else the likest, which may
    be several.
    """
    alike = [scored for cls, about in _table().items() if (scored := _as(cls, about, shapes)) is not None]
    networks: list[Identified] = []
    for part in dict.fromkeys(network.part for network, _ in alike):
        own = [(network, score) for network, score in alike if network.part == part]
        published = [network for network, _ in own if network.variants]
        best = max(score for _, score in own)
        networks += published or [network for network, score in own if score == best]
    return sorted(networks, key=lambda network: network.part in VAE_PREFIXES)


def networks_by_class() -> dict[str, list[tuple[str, ...]]]:
    """Class → the published variants of each of its networks."""
    return {cls: [tuple(names) for names in about["networks"].values()] for cls, about in _table().items()}


def digest(shapes: Shapes) -> str:
    """Of a network's parameters and stored buffers."""
    lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def kinds(names: Iterable[str]) -> set[str]:
    """Names with their numbers left out."""
    return {_NUMBER.sub("#", name) for name in names}


def _as(cls: str, about: Mapping[str, Any], shapes: Shapes) -> tuple[Identified, float] | None:
    """The network of class `cls` in the file, and how alike its names are; None where they are another's."""
    few = {name: shape for name, shape in shapes.items() if all(n in ("0", "1", "2") for n in _NUMBER.findall(name))}
    best, places = 0.0, None
    named: Callable[[Shapes], Origins]
    for named in (partial(as_named, part=about["part"]), partial(_origins, cls, about)):
        try:
            names = kinds(named(few))
            score = max(_likeness(names, set(wanted)) for wanted in about["names"])
            if score >= ALIKE and score > best:
                best, places = score, named(shapes)
        except CheckpointError:
            continue
    if places is None:
        return None
    given = {name: shape_of(rows, shapes) for name, rows in places.items()}
    variants = tuple(about["networks"].get(digest(given), ()))
    return Identified(cls, about["part"], variants, about["nearest"], places), best


def _likeness(names: set[str], wanted: set[str]) -> float:
    """The share of names that both have."""
    return len(names & wanted) / len(names | wanted)


def _origins(cls: str, about: Mapping[str, Any], shapes: Shapes) -> Origins:
    import diffusers

    return origins(getattr(diffusers, cls), shapes, (), about["part"])


@lru_cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table
