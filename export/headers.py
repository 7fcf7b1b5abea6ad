"""What a checkpoint's files hold, read from their headers alone: names, types, shapes and places of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.errors import CheckpointError, ModelError
from overcrank.models._hub_files import NAMES, weight_names
from overcrank.models.hub import read_json

BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "BOOL": 8},
    **{f"{sign}{size}": size for sign in "IU" for size in (8, 16, 32, 64)},
}
"""safetensors' name of a type → bits of a value."""
LARGEST = 100_000_000  # bytes of a header that safetensors reads
_STEM = rf"(?:{'|'.join(dict.fromkeys(stem for stem, _ in NAMES))})"
_TWIN = re.compile(rf"{_STEM}\.(?:(?P<kind>\w+)\.safetensors.*|safetensors\.index\.(?P<older>\w+)\.json)")


@dataclass(frozen=True)
class Entry:
    """A tensor: its type, its shape, and its bytes, `start` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


def twin_of(names: Iterable[str]) -> str:
    """The kind ("fp16") of weight files among a folder's `names` where no plain ones lie beside them, else ""."""
    here = set(names)
    if weight_names(here, "", lambda name: {"weight_map": {}}):
        return ""
    return next((m["kind"] or m["older"] for m in map(_TWIN.fullmatch, sorted(here)) if m), "")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component folder; a twin such as .fp16 if it lies there alone.

    Raises CheckpointError for none, an index that cannot be read or names a file of another folder, or one that is
    missing or truncated.
    """
    here = {file.name for file in folder.glob("*")}
    safe = {name for name in here if not name.endswith((".bin", ".bin.index.json"))}
    try:
        chosen = weight_names(safe, twin_of(safe), lambda name: read_json(folder / name))
    except ModelError as error:
        raise CheckpointError(f"{folder}: {str(error).rstrip('.')}; download it again.") from error
    files = tuple(folder / name for name in chosen if not name.endswith(".json"))
    if not files:
        raise CheckpointError(
            f"{folder} has no {NAMES[0][0]}.safetensors, whose weights are needed here; download the whole checkpoint."
        )
    for file in files:
        read_header(file)
    return files


def tensors_in(files: Iterable[Path]) -> dict[str, Entry]:
    """Name → place of every tensor in these files; raises CheckpointError for one that is not whole."""
    tensors: dict[str, Entry] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def read_header(file: Path) -> dict[str, Entry]:
    """safetensors: 8 bytes of header length, a JSON header, then exactly the bytes it lists.

    Raises CheckpointError for a file that is missing, cut off, or something else.
    """
    if not file.is_file():
        gone = f" (a link to {file.readlink()}, which is not there)" if file.is_symlink() else ""
        raise CheckpointError(f"{file} is missing{gone}; download the checkpoint again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        content = stream.read(length) if length <= min(size - 8, LARGEST) else b""
    if first == b"version ":
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder.")
    try:
        if size < 8 or not content:
            raise ValueError("it is empty" if not size else "the header is cut off")
        header = json.loads(content)
        entries = {n: _entry(file, n, e, 8 + length) for n, e in header.items() if n != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again.") from error
    _require_filled(file, entries, 8 + length, size)
    return entries


def _entry(file: Path, name: str, entry: Any, base: int) -> Entry:
    """One line of the header; raises ValueError for what safetensors would not take either."""
    dtype, shape, place = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor '{name}' is of the unknown type {dtype!r}")
    for numbers in (shape, place):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor '{name}' has the shape {shape!r} at {place!r}")
    if len(place) != 2 or (place[1] - place[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"tensor '{name}' has the shape {shape!r} at {place!r}")
    return Entry(file, dtype, tuple(shape), base + place[0], base + place[1])


def _require_filled(file: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Every byte after the header is one tensor's."""
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{file} is truncated: tensor '{name}' ends at byte {entry.end:,} of {size:,}; download it again."
            )
        if entry.start != at:
            raise CheckpointError(f"{file} is not a whole safetensors file (tensor '{name}' overlaps or leaves a gap).")
        at = entry.end
    if at != size:
        raise CheckpointError(f"{file} is not a whole safetensors file (bytes that are no tensor's follow).")


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the content of the files, in order."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
