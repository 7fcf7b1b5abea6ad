"""Files of quantized weights of any size that take no disk: names, shapes and scales, and holes for the values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from overcrank.export.module import abstract_module
from overcrank.models.base import Component

from tests.original_names import Original, Renames

ABOUT = {
    "fp8": {"format": "float8_e4m3fn"},
    "int8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}
TYPES = {"fp8": "F8_E4M3", "int8": "I8", "nvfp4": "U8", "mxfp8": "F8_E4M3"}
BLOCKS = {"nvfp4": (16, "F8_E4M3"), "mxfp8": (32, "U8")}
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}


class Entry(NamedTuple):
    """A tensor of the file; `content` is empty for a hole."""

    name: str
    kind: str
    shape: tuple[int, ...]
    content: bytes = b""


def write(path: Path, component: Component, renames: Renames, form: str) -> int:
    """A file of the component's network whose blocks are in `form`; returns the number of its parameters."""
    entries: dict[str, Any] = {}
    contents: list[tuple[int, bytes]] = []
    offset = parameters = 0
    for entry in _entries(component, renames, form):
        end = offset + SIZES[entry.kind] * prod(entry.shape)
        name = f"model.diffusion_model.{entry.name}"
        entries[name] = {"dtype": entry.kind, "shape": entry.shape, "data_offsets": [offset, end]}
        contents += [(offset, entry.content)] if entry.content else []
        if not name.endswith(("_scale", "_scale_2", "comfy_quant")):
            parameters += prod(entry.shape) * (2 if entry.kind == "U8" else 1)
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start, content in contents:
            stream.seek(8 + len(text) + start)
            stream.write(content)
        stream.truncate(8 + len(text) + offset)
    return parameters


def _entries(component: Component, renames: Renames, form: str) -> Iterator[Entry]:
    module = abstract_module(component, component.config, "bf16")
    original = Original(renames, {n: tuple(p.shape) for n, p in module.named_parameters()})
    for name, parts in original.each():
        shape = (sum(part.rows.stop - part.rows.start for part in parts), *original.shapes[parts[0].name][1:])
        layer = name.removesuffix(".weight")
        if not original.quantized(layer, shape):
            yield Entry(name, "BF16", shape)
            continue
        said = json.dumps(ABOUT[form]).encode()
        yield Entry(name, TYPES[form], (shape[0], shape[1] // 2 if form == "nvfp4" else shape[1]))
        yield Entry(f"{layer}.comfy_quant", "U8", (len(said),), said)
        yield from _scales(layer, form, shape)


def _scales(layer: str, form: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    rows, inner = shape
    if form in BLOCKS:
        length, kind = BLOCKS[form]
        yield Entry(f"{layer}.weight_scale", kind, (-(-rows // 128) * 128, -(-inner // length // 4) * 4))
    count = rows if form == "int8" else 1
    values = np.random.default_rng(rows).uniform(1e-4, 2e-4, count).astype(np.float32).tobytes()
    if form == "int8":
        yield Entry(f"{layer}.weight_scale", "F32", (rows, 1), values)
    elif form != "mxfp8":
        yield Entry(f"{layer}.weight_scale{'_2' * (form == 'nvfp4')}", "F32", (), values)
