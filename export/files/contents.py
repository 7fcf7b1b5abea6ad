"""What a weight file holds, from its header: how its layers are stored, of which networks, and of which sort it is."""

from __future__ import annotations

from collections.abc import Mapping
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
    return Contents(file, kind, layers, shapes, tuple(identify(shapes)))
