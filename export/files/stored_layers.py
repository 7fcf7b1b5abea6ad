"""What the linear layers of a weight file hold: their number formats, their scales, and their values.

ComfyUI's quantized files (a `comfy_quant` tensor beside each layer, or `_quantization_metadata` in the header), the
older scaled fp8 (`scale_weight`), fp8 without scales, and GGUF's blocks. A tensor that nobody here understands is an
error that names it: to pass over a scale is a noisy picture with nothing said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from overcrank.errors import CheckpointError
from overcrank.export.files.weight_file import Stored, WeightFile
from overcrank.export.quantization.recipe import ROTATIONS

PLAIN = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
FP8 = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
ROLES = {
    "weight_scale": "scale", "scale_weight": "scale", "weight_scale_2": "scale_2", "input_scale": "input_scale",
    "scale_input": "input_scale", "pre_quant_scale": "pre_quant_scale",
}  # fmt: skip
"""Last part of a tensor's name beside a layer's weight → what it is."""
MARKERS = ("scaled_fp8", "comfy_quant")
VOCABULARIES = ("spiece_model", "tekken_model", "tokenizer_json")
"""What ComfyUI's text encoders have of their tokenizer, as bytes."""
COMFY = {
    "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
    "int8_tensorwise": "int8",
}  # fmt: skip
"""ComfyUI's names of formats, of those that are read here."""
BLOCKS = {"nvfp4": 16, "mxfp8": 32}
"""Inputs that share a scale."""


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer whose weight [N, K] is quantized in the file."""

    name: str
    format: str
    """fp8_e4m3, fp8_e5m2, int8, nvfp4, mxfp8, or a GGUF block format such as Q4_K."""
    shape: tuple[int, int]
    scales: Mapping[str, str] = field(default_factory=dict)
    """scale, scale_2, input_scale or pre_quant_scale → the tensor's name."""
    rotation: int = 0
    """Inputs in a group that a Hadamard matrix rotates before the layer (ConvRot, arXiv:2512.03673); 0 for none."""


def stored_layers(file: WeightFile, holes: bool = False) -> dict[str, StoredLayer]:
    """Layer's name → what it holds, of the layers that are quantized; every other tensor is plain.

    `holes`: the file has but its header (_remote_file.py), and types and scales say what is missing of the rest.

    Raises CheckpointError for a format that is unknown, a scale that belongs to no layer, is missing, or has another
    shape than its layer needs.
    """
    said = _said(file, holes)
    scales: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        layer, _, last = name.rpartition(".")
        if last in ROLES:
            scales.setdefault(layer, {})[ROLES[last]] = name
    layers = {}
    for name, stored in file.tensors.items():
        layer, _, last = name.rpartition(".")
        about = said.get(layer, {}) if last == "weight" else {}
        if (stored.dtype in PLAIN and not about) or name in VOCABULARIES or _is_cast(stored, last, layer in scales):
            continue
        if last == "weight":
            layers[layer] = _layer(file, layer, stored, about, scales.pop(layer, {}))
        elif last not in ROLES and last not in MARKERS and stored.dtype in (*FP8, "int8", "uint8"):
            raise CheckpointError(f"{file.path}: tensor '{name}' is {stored.dtype}, which only layers' weights are.")
    for layer, roles in scales.items():
        raise CheckpointError(
            f"{file.path}: tensor '{next(iter(roles.values()))}' is a scale, and '{layer}.weight' is not quantized."
        )
    for layer in said.keys() - layers.keys():
        raise CheckpointError(f"{file.path}: '{layer}' is said to be quantized, and has no weight in it.")
    return layers


def _is_cast(stored: Stored, last: str, scaled: bool) -> bool:
    """Whether a tensor was merely cast to fp8, as whole files without scales are: a bias, a norm, a convolution."""
    return stored.dtype in FP8 and not scaled and last not in ROLES and (last != "weight" or len(stored.shape) != 2)


def _said(file: WeightFile, holes: bool) -> dict[str, dict[str, Any]]:
    """Layer → what the file says of it in JSON."""
    table: dict[str, dict[str, Any]] = {}
    if text := file.metadata.get("_quantization_metadata"):
        table |= _json(file, "_quantization_metadata", text).get("layers", {})
    for name in file.tensors:
        layer, _, last = name.rpartition(".")
        if last == "comfy_quant":
            content = bytes(file.read(name).numpy())
            if any(content) or not holes:
                table[layer] = _json(file, name, content.decode("utf-8", "replace"))
    return table


def _json(file: WeightFile, where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.path}: {where} is no JSON table.")
    return value


def _layer(
    file: WeightFile, layer: str, stored: Stored, about: Mapping[str, Any], scales: dict[str, str]
) -> StoredLayer:
    form = _format(file, layer, stored, about)
    if len(stored.shape) != 2:
        raise CheckpointError(
            f"{file.path}: '{layer}' is in {form}, and its weight is {list(stored.shape)}, no matrix."
        )
    outputs, inner = stored.shape
    inner = inner * 2 if form == "nvfp4" else inner
    rotation = about.get("convrot_groupsize", 256) if about.get("convrot") else 0
    if rotation and (rotation not in ROTATIONS or inner % rotation):
        raise CheckpointError(f"{file.path}: '{layer}' is rotated in groups of {rotation}, which do not fit {inner}.")
    known = StoredLayer(layer, form, (outputs, inner), scales, rotation)
    scaled = form in FP8.values() and (about or "scaled_fp8" in file.endings)
    for role in (*_needed(known), *(["scale"] if scaled else [])):
        if role not in scales:
            raise CheckpointError(f"{file.path}: '{layer}' is in {form} and has no {role}; its values are unknown.")
    for role, name in scales.items():
        shapes = {**_needed(known), **_allowed(known)}.get(role)
        if shapes is None:
            raise CheckpointError(f"{file.path}: '{layer}' is in {form}, for which '{name}' is not understood.")
        if prod(file.tensors[name].shape) not in shapes:
            raise CheckpointError(
                f"{file.path}: '{name}' is {list(file.tensors[name].shape)}, which does not fit {outputs} × {inner}."
            )
    return known


def _format(file: WeightFile, layer: str, stored: Stored, about: Mapping[str, Any]) -> str:
    if about:
        form = COMFY.get(str(about.get("format")), "")
        expected = {"int8": ("int8",), "nvfp4": ("uint8",)}.get(form, tuple(t for t, f in FP8.items() if f == form))
        if form == "mxfp8":
            expected = ("float8_e4m3fn",)
        if not form or stored.dtype not in expected:
            raise CheckpointError(
                f"{file.path}: '{layer}' is in the format {about.get('format')!r} ({stored.dtype}), which is not read "
                f"here; {', '.join(COMFY)} are."
            )
        return form
    if stored.dtype in FP8:
        return FP8[stored.dtype]
    if stored.dtype == "int8":
        return "int8"
    if stored.dtype == "uint8" and f"{layer}.weight_scale_2" in file.tensors:
        return "nvfp4"
    if stored.file.suffix == ".gguf" and stored.dtype in block_formats():
        return stored.dtype
    raise CheckpointError(f"{file.path}: '{layer}' is stored as {stored.dtype}, and nothing says in which format.")


@cache
def block_formats() -> tuple[str, ...]:
    """GGUF's formats whose blocks are read here, by the gguf package."""
    from gguf.quants import _type_traits

    return tuple(kind.name for kind in _type_traits)


def _needed(layer: StoredLayer) -> dict[str, tuple[int, ...]]:
    """Role → how many values its tensor may have."""
    outputs, inner = layer.shape
    needed: dict[str, tuple[int, ...]] = {"scale": (1, outputs)} if layer.format == "int8" else {}
    if layer.format in BLOCKS:
        needed["scale"] = (-(-outputs // 128) * 128 * -(-(inner // BLOCKS[layer.format]) // 4) * 4,)
    if layer.format == "nvfp4":
        needed["scale_2"] = (1,)
    return needed


def _allowed(layer: StoredLayer) -> dict[str, tuple[int, ...]]:
    """As `_needed`, of tensors that may be missing."""
    outputs, inner = layer.shape
    own: dict[str, tuple[int, ...]] = {"scale": (1, outputs)} if layer.format in FP8.values() else {}
    return {**own, "input_scale": (1,), "pre_quant_scale": (inner,)}


def weight_shapes(file: WeightFile, layers: Mapping[str, StoredLayer]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that is a parameter; of quantized weights, as the layer multiplies them."""
    beside = {*VOCABULARIES, *(name for layer in layers.values() for name in layer.scales.values())}
    own = {n: s.shape for n, s in file.tensors.items() if n not in beside and n.rpartition(".")[2] not in MARKERS}
    return own | {f"{name}.weight": layer.shape for name, layer in layers.items()}
