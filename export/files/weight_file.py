"""A file of weights as it is: the tensors that its header lists, read one at a time from mapped memory.

safetensors (one file, or an index of several) and GGUF. Nothing is believed of a header that its bytes do not bear out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError
from overcrank.export.headers import read_header

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' types: PyTorch's names."""
PICKLES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. `dtype` is PyTorch's name, or GGUF's of a block format ("Q4_K")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


@dataclass(frozen=True)
class WeightFile:
    """The tensors of one checkpoint, by name, and what its header says of it."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor, mapped: [shape] in its own type; of a GGUF block format, its bytes [rows, bytes of a row]."""
        import numpy as np
        import torch

        stored = self.tensors[name]
        raw = np.memmap(stored.file, np.uint8, "c", offset=stored.offset, shape=(stored.bytes,))
        if not hasattr(torch, stored.dtype):
            return torch.from_numpy(raw).view(prod(stored.shape[:-1]), -1)
        tensor: Tensor = torch.from_numpy(raw).view(getattr(torch, stored.dtype)).reshape(stored.shape)
        return tensor

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file, or the shards of an index."""
        return tuple(sorted({stored.file for stored in self.tensors.values()})) or (self.path,)

    @cached_property
    def endings(self) -> frozenset[str]:
        """Last parts of tensors' names."""
        return frozenset(name.rpartition(".")[2] for name in self.tensors)

    @cached_property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.tensors.values())


def open_weights(path: Path) -> WeightFile:
    """Read the header of a .safetensors file, of an index of several, or of a .gguf file.

    Raises CheckpointError for a file that is none, is not whole, or has a header that contradicts itself.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which runs code when it is read; save it as safetensors "
            f"(safetensors.torch.save_file(torch.load(file, weights_only=True), new_file))."
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors or .gguf file.")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        return _gguf(path)
    tensors, metadata = _safetensors(path)
    return WeightFile(path, tensors, metadata)


def _safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    from safetensors import safe_open

    tensors = {}
    for name, entry in read_header(path).items():
        if entry.dtype not in TYPES:
            raise CheckpointError(f"{path}: tensor '{name}' is {entry.dtype}, which is not read here.")
        tensors[name] = Stored(name, TYPES[entry.dtype], entry.shape, path, entry.start, entry.end - entry.start)
    with safe_open(path, framework="numpy") as opened:
        return tensors, opened.metadata() or {}


def _sharded(index: Path) -> WeightFile:
    """Raises CheckpointError for a shard outside the index's folder, and for a tensor that is not where it says."""
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files; download it again.") from error
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name}, which is not a file beside it.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, which {index.name} names; download it again.")
        found, about = _safetensors(index.parent / name)
        tensors |= found
        metadata |= about
    for tensor, name in places.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(f"{index} says that {name} has tensor '{tensor}', which it has not.")
    return WeightFile(index, tensors, metadata)


def _gguf(path: Path) -> WeightFile:
    import gguf

    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # its reader raises whatever the bytes lead it to
        raise CheckpointError(f"{path} is not a whole GGUF file ({error}); download it again.") from error
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if tensor.data_offset + tensor.n_bytes > size:
            raise CheckpointError(f"{path} is truncated: tensor '{tensor.name}' ends beyond it; download it again.")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = Stored(
            tensor.name, plain.get(kind, kind), shape, path, int(tensor.data_offset), int(tensor.n_bytes)
        )
    return WeightFile(path, tensors, dict(_fields(reader)))


def _fields(reader: Any) -> Iterator[tuple[str, str]]:
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            yield name, str(field.contents())[:1000]
