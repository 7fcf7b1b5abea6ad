"""What a weight file holds, from its header: how its layers are stored, of which networks, and of which sort it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from overcrank.export.files.identify import Identified, identify
from overcrank.export.files.kinds import CHECKPOINT, LORA, kind_of
from overcrank.export.files.stored_layers import StoredLayer, stored_layers, weight_shapes
from overcrank.export.files.weight_file import WeightFile, open_weights


@dataclass(frozen=True)
class Contents:
    file: WeightFile
    kind: str
    """"checkpoint", "LoRA", or which encoder it is, in words."""
    layers: Mapping[str, StoredLayer]
    """Quantized layers by their names in the file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all that is a parameter."""
    networks: tuple[Identified, ...] = ()
    """Those that have engines, denoisers first."""

    @property
    def variants(self) -> list[str]:
        """Published variants that have every part which the file has; where none has, those of its first part."""
        by_part: dict[str, list[str]] = {}
        for network in self.networks:
            by_part.setdefault(network.part, []).extend(network.variants)
        first, *others = by_part.values() or [[]]
        return [name for name in first if all(name in names for names in others)] or first

    @property
    def encoder(self) -> bool:
        return self.kind not in (CHECKPOINT, LORA)


def contents_of(path: Path) -> Contents:
    """Raises CheckpointError for what is no weight file, or is not understood."""
    at = path.stat() if path.exists() else None
    return _contents(path, (at.st_size, at.st_mtime_ns) if at else None)


@lru_cache(maxsize=8)
def _contents(path: Path, state: tuple[int, int] | None) -> Contents:
    return read_contents(open_weights(path))


def read_contents(file: WeightFile, holes: bool = False) -> Contents:
    """`holes`: as for stored_layers."""
    kind = kind_of(file.tensors)
    if kind == LORA:
        return Contents(file, kind, {}, {name: stored.shape for name, stored in file.tensors.items()})
    layers = stored_layers(file, holes)
    shapes = weight_shapes(file, layers)
    return Contents(file, kind, layers, shapes, tuple(_one_a_part(identify(shapes), shapes)))


def _one_a_part(networks: list[Identified], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Identified]:
    """Of a part that is no published network of any class, the class with the nearest."""
    from overcrank.export.files.nearest import nearest

    for part in dict.fromkeys(network.part for network in networks):
        own = [network for network in networks if network.part == part]
        if own[0].variants or len(own) == 1:
            yield from own
        else:
            yield max(own, key=lambda network: nearest(network, shapes).share)
