"""What a checkpoint's files hold, read from their headers alone: names, types, shapes and places of tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.errors import CheckpointError, ModelError
from overcrank.models._hub_files import NAMES, weight_names
from overcrank.models.hub import read_json

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
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        gone = f" (a link to {file.readlink()}, which is not there)" if file.is_symlink() else ""
        raise CheckpointError(f"{file} is missing{gone}; download the checkpoint again.")
    try:
        with safe_open(file, framework="numpy"):  # which looks at the header, whole
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} {_flaw(file, error)}.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    base = 8 + length
    return {
        name: Entry(file, entry["dtype"], tuple(entry["shape"]), *(base + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _flaw(file: Path, error: Exception) -> str:
    """What is the matter with a file that safetensors does not read, and what to do."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            return "is a Git LFS pointer, not the weights; run `git lfs pull` in that folder"
        try:
            header = json.loads(stream.read(length) if length < size else b"")
            ends = {n: 8 + length + e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"}
            late = next((name for name, end in ends.items() if end > size), None)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            late = None
    if late is not None:
        return f"is truncated: tensor '{late}' ends at byte {ends[late]:,} of {size:,}; download it again"
    reason = "it is empty" if not size else str(error).rstrip(".")
    return f"is not a whole safetensors file ({reason}); download it again"


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the content of the files, in order."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
