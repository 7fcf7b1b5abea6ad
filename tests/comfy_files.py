"""Checkpoint files as they are published: original key names, layers quantized by comfy-kitchen or by gguf.

Beside each file stands what comfy-kitchen's eager backend makes of it, the reference of what overcrank multiplies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import comfy_kitchen
import gguf
import numpy as np
import torch
from comfy_kitchen.backends.eager import quantization as eager
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.original_names import Original

PREFIX = "model.diffusion_model."
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Layer:
    """A layer's tensors in a file, and what they are to comfy-kitchen."""

    tensors: Mapping[str, Tensor]
    """"weight", "weight_scale" … → tensor."""
    about: Mapping[str, Any]
    """What its `comfy_quant` says; empty for a layer without one."""
    values: Tensor
    """fp32 [N, K], by comfy-kitchen or gguf."""
    rounded: Callable[[Tensor], Tensor] | None = None
    """What a quantized product multiplies of tokens [M, K]; None where the product is in 16 bit."""
    group: int = 0
    """Inputs that ConvRot rotates together."""

    def product(self, x: Tensor, rows: slice, narrow: bool) -> Tensor:
        """Tokens times some rows of the weight; `narrow`: products in 16 bit are of weights in bf16."""
        tokens = x.flatten(0, -2)
        if self.rounded is int8_tokens:
            stored, scale = self.tensors["weight"][rows], self.tensors["weight_scale"]
            scale = scale if scale.numel() == 1 else scale[rows]
            out = comfy_kitchen.int8_linear(tokens, stored, scale, None, torch.float32, bool(self.group), self.group)
        else:
            weight = self.values[rows].bfloat16().float() if narrow and not self.rounded else self.values[rows]
            out = linear(self.rounded(tokens) if self.rounded else tokens, weight)
        return out.unflatten(0, x.shape[:-1])


def _largest(tokens: Tensor) -> Tensor:
    return tokens.abs().amax(-1, keepdim=True).clamp_min(1e-12)


def fp8_tokens(tokens: Tensor) -> Tensor:
    scale = _largest(tokens) / 448
    return eager.dequantize_per_tensor_fp8(eager.quantize_per_tensor_fp8(tokens, scale), scale, torch.float32)


def int8_tokens(tokens: Tensor) -> Tensor:
    return comfy_kitchen.dequantize_int8_simple(*comfy_kitchen.quantize_int8_rowwise(tokens))


def fp4_tokens(tokens: Tensor) -> Tensor:
    scale = _largest(tokens) / (448 * 6)
    codes, blocks = eager.quantize_nvfp4(tokens, scale)
    return eager.dequantize_nvfp4(codes, scale, blocks, torch.float32)


# ── formats ──────────────────────────────────────────────────────────────────────────


def _fp8(weight: Tensor, dtype: torch.dtype = E4M3, rows: bool = False) -> Layer:
    amax = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
    scale = amax / torch.finfo(dtype).max
    stored = eager.quantize_per_tensor_fp8(weight, scale, dtype)
    values = eager.dequantize_per_tensor_fp8(stored, scale, torch.float32)
    about = {"format": str(dtype).removeprefix("torch.")}
    return Layer({"weight": stored, "weight_scale": scale}, about, values, fp8_tokens if dtype == E4M3 else None)


def _fp8_of_old(weight: Tensor) -> Layer:
    """Without a word on it beside the layer; the file has a marker."""
    layer = _fp8(weight)
    tensors = {"weight": layer.tensors["weight"], "scale_weight": layer.tensors["weight_scale"][None]}
    return Layer(tensors | {"scale_input": torch.ones(1)}, {}, layer.values, fp8_tokens)


def _unscaled(weight: Tensor, dtype: torch.dtype) -> Layer:
    stored = weight.to(dtype)
    return Layer({"weight": stored}, {}, stored.float(), fp8_tokens if dtype == E4M3 else None)


def _int8(weight: Tensor, rows: bool) -> Layer:
    quantize = comfy_kitchen.quantize_int8_rowwise if rows else comfy_kitchen.quantize_int8_tensorwise
    stored, scale = quantize(weight)
    values = comfy_kitchen.dequantize_int8_simple(stored, scale)
    return Layer({"weight": stored, "weight_scale": scale}, {"format": "int8_tensorwise"}, values, int8_tokens)


def _convrot(weight: Tensor, group: int) -> Layer:
    stored, scale = eager.quantize_int8_convrot_weight(weight, group)
    values = eager.dequantize_int8_convrot_weight(stored, scale, group)
    about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    return Layer({"weight": stored, "weight_scale": scale}, about, values, int8_tokens, group)


def _nvfp4(weight: Tensor) -> Layer:
    scale = weight.abs().max() / (448 * 6)
    stored, blocks = comfy_kitchen.quantize_nvfp4(weight, scale)
    values = comfy_kitchen.dequantize_nvfp4(stored, scale, blocks, torch.float32)
    tensors = {"weight": stored, "weight_scale": blocks, "weight_scale_2": scale}
    return Layer(tensors, {"format": "nvfp4"}, values, fp4_tokens)


def _mxfp8(weight: Tensor) -> Layer:
    stored, blocks = comfy_kitchen.quantize_mxfp8(weight)
    values = comfy_kitchen.dequantize_mxfp8(stored, blocks, torch.float32)
    return Layer({"weight": stored, "weight_scale": blocks.view(torch.uint8)}, {"format": "mxfp8"}, values)


K_BLOCKS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Formats that gguf reads and does not write: where in a block of 256 values its fp16 scales are."""
GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_BLOCKS)


def _gguf(weight: Tensor, kind: str) -> Layer:
    form = gguf.GGMLQuantizationType[kind]
    if kind in K_BLOCKS:
        raw = _random_blocks(weight, form)
    else:
        raw = gguf.quantize(weight.numpy(), form)
    values = torch.from_numpy(np.array(gguf.dequantize(raw, form))).reshape(weight.shape)
    return Layer({"weight": torch.from_numpy(raw)}, {"gguf": form}, values)


def _random_blocks(weight: Tensor, form: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of a weight as large as this one, of random bits but for their scales."""
    generator = np.random.default_rng(weight.numel())
    length, size = gguf.GGML_QUANT_SIZES[form]
    blocks = generator.integers(0, 256, (weight.numel() // length, size), np.uint8)
    for at in K_BLOCKS[form.name]:
        blocks[:, at : at + 2] = generator.uniform(0.5, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    raw: np.ndarray = blocks.reshape(len(weight), -1)
    ratio = float(weight.std()) / float(gguf.dequantize(raw, form).std())
    for at in K_BLOCKS[form.name]:
        scale = blocks[:, at : at + 2].copy().view(np.float16) * np.float16(ratio)
        blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw


FORMATS: dict[str, Callable[[Tensor], Layer]] = {
    "fp8": _fp8,
    "fp8-old": _fp8_of_old,
    "fp8-rows": lambda w: _fp8(w, rows=True),
    "fp8-e5m2": lambda w: _fp8(w, E5M2),
    "fp8-unscaled": lambda w: _unscaled(w, E4M3),
    "fp8-e5m2-unscaled": lambda w: _unscaled(w, E5M2),
    "int8": lambda w: _int8(w, rows=False),
    "int8-rows": lambda w: _int8(w, rows=True),
    "convrot-256": lambda w: _convrot(w, 256),
    "convrot-64": lambda w: _convrot(w, 64),
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
}
FORMATS |= {kind: lambda w, kind=kind: _gguf(w, kind) for kind in GGUF}  # type: ignore[misc]
MIXTURE = ("fp8", "int8-rows", "", "nvfp4", "mxfp8", "convrot-64", "fp8-e5m2")
"""Format of one layer after the other; "" is bf16."""
WHOLE = {**{name: (name,) for name in FORMATS}, "mixed": MIXTURE}
"""Kind of file → formats of its layers, in turn."""


# ── files ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Written:
    """A file, and its layers by their original names."""

    path: Path
    layers: Mapping[str, Layer]
    plain: Mapping[str, Tensor]
    original: Original

    @property
    def in_16_bit(self) -> bool:
        """Whether no engine multiplies its layers as they are."""
        return all(layer.rounded is None for layer in self.layers.values())

    def fill(self, module: nn.Module) -> None:
        """Give a module the values of the file's unquantized tensors."""
        own = dict(module.named_parameters())
        for name, tensor in self.plain.items():
            for part in self.original.parts(name):
                own[part.name].data[part.rows] = tensor[part.within].float()

    def reference(self, module: nn.Module) -> nn.Module:
        """`module` with the file's values, its quantized layers multiplied by comfy-kitchen."""
        self.fill(module)
        for name, layer in self.layers.items():
            for part in self.original.parts(f"{name}.weight"):
                replaced: Any = module.get_submodule(part.name.removesuffix(".weight"))
                multiplied = Multiplied(layer, part.within, replaced.bias, narrow=not self.in_16_bit)
                module.set_submodule(part.name.removesuffix(".weight"), multiplied)
        return module

    def values(self) -> dict[str, Tensor]:
        """Layer of the diffusers class → what its weight is, in fp32."""
        return {
            part.name.removesuffix(".weight"): layer.values[part.within]
            for name, layer in self.layers.items()
            for part in self.original.parts(f"{name}.weight")
        }


class Multiplied(nn.Module):
    """In the place of an nn.Linear, by comfy-kitchen."""

    def __init__(self, layer: Layer, rows: slice, bias: Tensor | None, narrow: bool) -> None:
        super().__init__()
        self.layer, self.rows, self.bias, self.narrow = layer, rows, bias, narrow
        self.weight = layer.values[rows]  # which some modules look at for its type

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer.product(x.float(), self.rows, self.narrow)
        return y if self.bias is None else y + self.bias


def write(path: Path, module: nn.Module, original: Original, kind: str, metadata: bool = False) -> Written:
    """The weights of a module's blocks in the `kind` of file, all else in bf16, by their original names.

    `metadata`: what is said of layers stands in the header, not in tensors beside them.
    """
    plain: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    formats = cycle(WHOLE[kind])
    for name, tensor in original.tensors(dict(module.named_parameters())).items():
        layer = name.removesuffix(".weight")
        if original.quantized(layer, tensor.shape) and (form := next(formats)):
            layers[layer] = FORMATS[form](tensor.float())
        else:
            plain[name] = tensor.bfloat16()
    written = Written(path, layers, plain, original)
    if kind in GGUF:
        _save_gguf(written)
    else:
        _save(written, kind, metadata)
    return written


def _save(written: Written, kind: str, metadata: bool) -> None:
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in written.plain.items()}
    for name, layer in written.layers.items():
        tensors |= {f"{PREFIX}{name}.{last}": tensor.contiguous() for last, tensor in layer.tensors.items()}
        if layer.about and not metadata:
            tensors[f"{PREFIX}{name}.comfy_quant"] = torch.tensor(
                list(json.dumps(layer.about).encode()), dtype=torch.uint8
            )
    if kind == "fp8-old":
        tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    said = {PREFIX + name: layer.about for name, layer in written.layers.items() if layer.about}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": said})} if metadata else None
    save_file(tensors, written.path, header)


def _save_gguf(written: Written) -> None:
    writer = gguf.GGUFWriter(written.path, "video")
    for name, tensor in written.plain.items():
        bits = gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
        narrow = tensor.dim() > 1
        kind = gguf.GGMLQuantizationType.BF16 if narrow else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, bits if narrow else tensor.float().numpy(), raw_dtype=kind)
    for name, layer in written.layers.items():
        writer.add_tensor(f"{name}.weight", layer.tensors["weight"].numpy(), raw_dtype=layer.about["gguf"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
