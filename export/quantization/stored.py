"""The values of quantized layers as files hold them, in PyTorch: the reference of what engines multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError, present
from overcrank.export.files.stored_layers import BLOCKS, FP8, StoredLayer
from overcrank.export.files.weight_file import WeightFile
from overcrank.export.quantization.packing import fp4_decoded
from overcrank.export.quantization.rotation import rotated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """A layer's weight out of a file, or some of its rows: what a module keeps of it."""

    format: str
    weight: Tensor
    """Bytes as they are in the file, uint8 [N, bytes of a row]; of nvfp4 with the first value in the low half, as in
    ONNX and TensorRT."""
    scale: Tensor
    """fp32 [N], of the whole row."""
    inner: int
    """K, the layer's inputs."""
    block_scale: Tensor | None = None
    """Bytes [N, blocks of a row] of nvfp4 (E4M3) and mxfp8 (E8M0), out of their tiles."""
    rotation: int = 0
    input_factor: Tensor | None = None
    """fp32 [K]: what the layer's inputs are multiplied with first (AWQ's pre_quant_scale)."""

    def rows(self, start: int, stop: int) -> Quantized:
        blocks = None if self.block_scale is None else self.block_scale[start:stop]
        return replace(self, weight=self.weight[start:stop], scale=self.scale[start:stop], block_scale=blocks)

    def values(self) -> Tensor:
        """The weight in fp32 [N, K], rotated back where it was rotated: what to multiply plain inputs with."""
        import torch

        if self.format in FP8.values():
            name = next(name for name, form in FP8.items() if form == self.format)
            wide = self.weight.view(getattr(torch, name)).float()
        elif self.format == "int8":
            wide = self.weight.view(torch.int8).float()
        elif self.format in BLOCKS:
            wide = self._blocks()
        else:
            import gguf

            kind = gguf.GGMLQuantizationType[self.format]
            raw = self.weight.cpu().numpy()
            wide = torch.from_numpy(gguf.dequantize(raw, kind)).reshape(-1, self.inner).to(self.weight.device)
        if self.block_scale is None:
            wide = wide * self.scale[:, None]
        if self.rotation:
            wide = rotated(wide, self.rotation)
        return wide if self.input_factor is None else wide * self.input_factor

    def _blocks(self) -> Tensor:
        import torch

        stored = present(self.block_scale, "a block scale")
        if self.format == "mxfp8":
            values, scale = self.weight.view(torch.float8_e4m3fn).float(), 2.0 ** (stored.float() - 127)
        else:
            codes = torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(1)
            values, scale = fp4_decoded(codes), stored.view(torch.float8_e4m3fn).float()
        whole = scale * self.scale[:, None]  # the scales first, as others multiply
        scaled: Tensor = (values.unflatten(1, (scale.shape[1], -1)) * whole[..., None]).flatten(1)
        return scaled


def read_layer(file: WeightFile, layer: StoredLayer) -> Quantized:
    """Raises CheckpointError for a scale that is not finite or not above zero."""
    import torch

    outputs, inner = layer.shape
    raw = file.read(f"{layer.name}.weight").view(torch.uint8).reshape(outputs, -1)
    read = {role: file.read(name) for role, name in layer.scales.items() if role != "input_scale"}
    if layer.format == "nvfp4":
        raw = _halves_swapped(raw)  # which ComfyUI has the other way round
    blocks, whole = None, read.get("scale")
    if layer.format in BLOCKS:
        blocks = unblocked(read["scale"].view(torch.uint8), outputs, inner // BLOCKS[layer.format]).contiguous()
        whole = read.get("scale_2")
        # NaN of e8m0; NaN of e4m3 and what is below 0: a block of zeros has the scale 0, or -0
        wrong = blocks == 255 if layer.format == "mxfp8" else (blocks > 126) & (blocks != 128)
        if bool(wrong.any()):
            raise CheckpointError(
                f"{file.path}: '{layer.scales['scale']}' has values that are no scale (NaN or below 0)."
            )
    scale = torch.ones(outputs) if whole is None else whole.float().flatten().expand(outputs)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{file.path}: the scale of '{layer.name}' has values that are none (NaN, 0 or below).")
    factor = read.get("pre_quant_scale")
    return Quantized(
        layer.format, raw, scale, inner, blocks, layer.rotation, None if factor is None else factor.float()
    )


def _halves_swapped(raw: Tensor) -> Tensor:
    """Of each byte; a few rows at a time, as large temporaries would leave holes in memory between what is kept."""
    import torch

    swapped = torch.empty_like(raw)
    for rows, out in zip(raw.split(256), swapped.split(256), strict=True):
        torch.bitwise_or(rows >> 4, rows << 4, out=out)
    return swapped


def joined(pieces: Sequence[Quantized]) -> Quantized:
    """Rows of several weights in one, copied unless there is one; raises CheckpointError if they differ in kind."""
    import torch

    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any((p.format, p.inner, p.rotation) != (first.format, first.inner, first.rotation) for p in pieces):
        raise CheckpointError("one layer is made of several in the file, which are in different formats")
    blocks = [p.block_scale for p in pieces if p.block_scale is not None]
    return replace(
        first,
        weight=torch.cat([p.weight for p in pieces]),
        scale=torch.cat([p.scale for p in pieces]),
        block_scale=torch.cat(blocks) if blocks else None,
    )


def unblocked(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] out of cuBLAS' tiles of 128 × 4, which hold 32 rows of four each four rows apart."""
    tiles = tiled.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    plain: Tensor = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)
    return plain[:rows, :columns]
