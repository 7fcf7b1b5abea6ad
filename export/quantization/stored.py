"""The values of quantized layers as files hold them, in PyTorch: the reference of what engines multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError
from overcrank.export.quantization.packing import fp4_decoded
from overcrank.models.stored_layers import BLOCKS, FP8, StoredLayer, block_formats
from overcrank.models.weight_file import WeightFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """A layer's weight out of a file, or some of its rows: what a module keeps of it."""

    format: str
    weight: Tensor
    """Bytes as they are in the file, uint8 [N, bytes of a row]."""
    scale: Tensor
    """fp32: [N] of fp8 and int8, [N, blocks of a row] of nvfp4 and mxfp8, [0] of GGUF, whose blocks hold theirs."""
    inner: int
    """K, the layer's inputs."""
    rotation: int = 0
    input_factor: Tensor | None = None
    """fp32 [K]: what the layer's inputs are multiplied with first (AWQ's pre_quant_scale)."""

    def rows(self, start: int, stop: int) -> Quantized:
        scale = self.scale if self.format in block_formats() else self.scale[start:stop]
        return replace(self, weight=self.weight[start:stop], scale=scale)

    def values(self) -> Tensor:
        """The weight in fp32 [N, K], rotated back where it was rotated: what to multiply plain inputs with."""
        import torch

        if self.format in FP8.values():
            name = next(name for name, form in FP8.items() if form == self.format)
            wide = self.weight.view(getattr(torch, name)).float() * self.scale[:, None]
        elif self.format == "int8":
            wide = self.weight.view(torch.int8).float() * self.scale[:, None]
        elif self.format == "mxfp8":
            wide = _blocks(self.weight.view(torch.float8_e4m3fn).float(), self.scale)
        elif self.format == "nvfp4":
            wide = _blocks(
                fp4_decoded(torch.stack([self.weight >> 4, self.weight & 15], dim=-1).flatten(1)), self.scale
            )
        else:
            import gguf

            kind = gguf.GGMLQuantizationType[self.format]
            raw = self.weight.cpu().numpy()
            wide = torch.from_numpy(gguf.dequantize(raw, kind)).reshape(-1, self.inner).to(self.weight.device)
        if self.rotation:
            wide = rotated(wide, self.rotation)
        return wide if self.input_factor is None else wide * self.input_factor


def read_layer(file: WeightFile, layer: StoredLayer) -> Quantized:
    """Raises CheckpointError for a scale that is not finite or not above zero."""
    import torch

    outputs, inner = layer.shape
    raw = file.read(f"{layer.name}.weight").view(torch.uint8).reshape(outputs, -1)
    read = {role: file.read(name) for role, name in layer.scales.items() if role != "input_scale"}
    if layer.format in BLOCKS:
        tiled = read["scale"].view(torch.uint8 if layer.format == "mxfp8" else torch.float8_e4m3fn)
        plain = unblocked(tiled, outputs, inner // BLOCKS[layer.format]).float()
        scale = 2.0 ** (plain - 127) if layer.format == "mxfp8" else plain * read["scale_2"].float()
        valid = torch.isfinite(scale) & (scale >= 0)  # a block of zeros has the scale 0
    elif layer.format in block_formats():
        scale = valid = torch.ones(0)
    else:
        scale = read["scale"].float().flatten().expand(outputs) if "scale" in read else torch.ones(outputs)
        valid = torch.isfinite(scale) & (scale > 0)
    if not bool(valid.all()):
        raise CheckpointError(f"{file.path}: the scale of '{layer.name}' has values that are none (NaN, 0 or below).")
    factor = read.get("pre_quant_scale")
    return Quantized(layer.format, raw, scale, inner, layer.rotation, None if factor is None else factor.float())


def joined(pieces: Sequence[Quantized]) -> Quantized:
    """Rows of several weights in one; of a single one nothing is copied. Raises CheckpointError if they differ in kind."""
    import torch

    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any((p.format, p.inner, p.rotation) != (first.format, first.inner, first.rotation) for p in pieces):
        raise CheckpointError("one layer is made of several in the file, which are in different formats")
    scale = first.scale if first.format in block_formats() else torch.cat([p.scale for p in pieces])
    return replace(first, weight=torch.cat([p.weight for p in pieces]), scale=scale)


def _blocks(values: Tensor, scale: Tensor) -> Tensor:
    scaled: Tensor = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return scaled


def rotated(values: Tensor, size: int) -> Tensor:
    """Each group of `size` values of the last axis times the Hadamard matrix; twice is nothing."""
    groups = values.unflatten(-1, (-1, size))
    turned: Tensor = (groups @ hadamard(size).to(values)).flatten(-2)
    return turned


def unblocked(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] out of cuBLAS' tiles of 128 × 4, which hold 32 rows of four each four rows apart."""
    tiles = tiled.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    plain: Tensor = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return plain[:rows, :columns]


def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix [size, size] of ConvRot, orthogonal and symmetric, fp32; `size`: a power of four."""
    import torch

    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / isqrt(size)
