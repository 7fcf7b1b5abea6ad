"""The weight pack: quantized layers of a checkpoint as their graph inputs, written one layer at a time.

A safetensors file: "PART/INPUT" → tensor, and in its header what it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from overcrank.errors import CheckpointError, UserError
from overcrank.export.quantization.formats import Packed
from overcrank.export.quantization.packing import packed_tensors
from overcrank.export.quantization.recipe import ActivationRange, LayerFormat, unmeasured
from overcrank.options import option

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

VERSION = "1"
_TYPES = {
    "float8e4m3fn": ("F8_E4M3", 1),
    "int8": ("I8", 1),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float": ("F32", 4),
    "float4e2m1": ("U8", 1),  # two values in a byte
}


@dataclass(frozen=True)
class Part:
    """One module of a pipeline; `read` gives a layer's weight, `layout` is the recipe's digest."""

    name: str
    component: str
    layout: str
    compute: str
    formats: Mapping[str, LayerFormat]
    packed: tuple[Packed, ...]
    ranges: Mapping[str, ActivationRange]
    read: Callable[[str], Tensor]


def write_pack(
    stream: BinaryIO, parts: Sequence[Part], about: Mapping[str, str], progress: Callable[[str], None]
) -> None:
    """Write the file; one layer is in memory at a time. `progress` is told each layer's name.

    Raises UserError for a static layer without a range.
    """
    entries: dict[str, object] = {"__metadata__": {"overcrank_pack": VERSION, **about, **_layouts(parts)}}
    offset = 0
    for part in parts:
        for entry in part.packed:
            kind, size = _TYPES[entry.dtype]
            shape = _stored(entry)
            end = offset + size * _product(shape)
            entries[f"{part.name}/{entry.input}"] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
            offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    stream.write(len(header).to_bytes(8, "little") + header)
    for part in parts:
        _write_part(stream, part, progress)


def _write_part(stream: BinaryIO, part: Part, progress: Callable[[str], None]) -> None:
    import torch

    by_layer: dict[str, list[Packed]] = {}
    for entry in part.packed:
        by_layer.setdefault(entry.layer, []).append(entry)
    for layer, entries in by_layer.items():
        progress(layer)
        form = part.formats[layer]
        _require_ranges(part, layer, form)
        tensors = packed_tensors(layer, form, part.read, part.ranges, part.compute)
        for entry in entries:
            tensor = tensors[entry.role]
            if list(tensor.shape) != _stored(entry):
                raise CheckpointError(f"{layer}: its {entry.role} is {list(tensor.shape)}, not {_stored(entry)}.")
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def embed_pack(model: ir.Model, part: Part) -> None:
    """The part's packed inputs become initializers, made of the checkpoint as the model is saved.

    Raises UserError for a static layer without a range.
    """
    import onnx_ir as ir

    for layer, form in part.formats.items():
        _require_ranges(part, layer, form)

    @lru_cache(maxsize=1)
    def tensors(layer: str) -> dict[str, Tensor]:
        return packed_tensors(layer, part.formats[layer], part.read, part.ranges, part.compute)

    inputs = {v.name: v for v in model.graph.inputs}
    for entry in part.packed:
        value = inputs[entry.input]
        model.graph.inputs.remove(value)
        dtype = ir.DataType[entry.dtype.upper()]

        def read(entry: Packed = entry, dtype: ir.DataType = dtype) -> ir.TensorProtocol:
            import torch

            raw = tensors(entry.layer)[entry.role].contiguous().flatten().view(torch.uint8).numpy()
            if entry.dtype == "float4e2m1":
                return ir.PackedTensor(raw, dtype, shape=entry.shape, name=entry.input)
            return ir.Tensor(raw.view(dtype.numpy()).reshape(entry.shape), dtype, name=entry.input)

        value.const_value = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(entry.shape), name=entry.input)
        model.graph.register_initializer(value)


def _require_ranges(part: Part, layer: str, form: LayerFormat) -> None:
    if missing := unmeasured(layer, form, part.ranges):
        raise UserError(f"{missing} of {part.name} needs a range that no recipe gives; calibrate this model.")


def read_pack(file: Path, part: str, component: str, layout: str, compute: str) -> dict[str, Tensor]:
    """Graph input → tensor of a part, memory-mapped.

    Raises CheckpointError for a file that is no pack, or that was made for another recipe or
    16-bit type than the engine's, naming what differs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            _check(file, about, component, layout, compute)
            names = [name for name in opened.keys() if name.startswith(f"{part}/")]  # noqa: SIM118
            return {name.partition("/")[2]: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as a weight pack: {error}; pack it again.") from error


def require_loras(file: Path, merged: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where the pack's layers were made with other LoRAs than those merged into the pipeline.

    `merged`: what a sidecar says of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            packed = json.loads((opened.metadata() or {}).get("loras", "[]"))
    except (OSError, SafetensorError, ValueError):
        return  # read_pack says what is wrong with it
    if packed != [[x["sha256"], x["scale"], x["parts"]] for x in merged]:
        names = ", ".join(str(x["file"]) for x in merged) or "none"
        raise UserError(
            f"{option('pack', file)} was packed with other LoRAs than this render merges ({names}); pack it again with "
            f"them."
        )


def _check(file: Path, about: Mapping[str, str], component: str, layout: str, compute: str) -> None:
    if about.get("overcrank_pack") != VERSION:
        raise CheckpointError(f"{file} is no weight pack of version {VERSION}; make it with overcrank pack.")
    for field, value in ((f"layout.{component}", layout), (f"compute.{component}", compute)):
        if about.get(field) != value:
            raise CheckpointError(
                f"{file} does not match the engine: {field} is {about.get(field, 'missing')}, the engine's is "
                f"{value}; pack it again with the engine's recipe."
            )


def _layouts(parts: Sequence[Part]) -> dict[str, str]:
    layouts = {f"layout.{p.component}": p.layout for p in parts}
    return layouts | {f"compute.{p.component}": p.compute for p in parts}


def _stored(entry: Packed) -> list[int]:
    shape = list(entry.shape)
    return [*shape[:-1], shape[-1] // 2] if entry.dtype == "float4e2m1" else shape


def _product(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
