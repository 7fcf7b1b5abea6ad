"""A layer's weight and range → the tensors its quantized form reads. Works on any device, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError, present
from overcrank.export.quantization.attention import packed_factors
from overcrank.export.quantization.formats import BLOCK, NUMBERS
from overcrank.export.quantization.recipe import ATTENTION, ActivationRange, LayerFormat
from overcrank.export.quantization.rotation import rotated

if TYPE_CHECKING:
    from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1 by their three low bits; the fourth is the sign."""


def packed_tensors(
    name: str, form: LayerFormat, weight: Callable[[str], Tensor], ranges: Mapping[str, ActivationRange], compute: str
) -> dict[str, Tensor]:
    """Role → tensor of a linear layer, whose weight is asked for by name, or of an attention, which has none."""
    if form.kind == ATTENTION:
        return packed_factors(name, ranges, compute)
    return packed_layer(name, weight(name), form, ranges.get(name), compute)


def packed_layer(
    name: str, weight: Tensor, form: LayerFormat, activation_range: ActivationRange | None, compute: str
) -> dict[str, Tensor]:
    """Role → tensor as `Packed` declares them; weight [N, K] in any float type.

    The factor before is rounded to `compute` ("float16" or "bfloat16") first, and the weight
    absorbs what the rounding lost; the one behind is in fp32. Raises CheckpointError for a weight that is not finite.
    """
    import torch

    number, dtype = NUMBERS[form.format], getattr(torch, compute)
    reach = number.reach
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise CheckpointError(f"{name}.weight has values that are not finite; the checkpoint is damaged.")
    if form.rotation:  # as the graph rotates what it multiplies
        wide = rotated(wide, form.rotation)
    before = _before(wide, form, activation_range, reach).to(dtype)
    tensors: dict[str, Tensor] = {"before": before[None, None]}
    wide = wide / before.float()
    if form.activations == "dynamic":
        wide = wide / reach  # a token's own factor is its largest value alone
    behind = wide.abs().amax(1).clamp_min(torch.finfo(torch.float16).tiny) / reach
    tensors["behind"] = behind[None, None]
    scaled = wide / (behind * number.step)[:, None]
    if form.format == "nvfp4":
        tensors["weight"], tensors["block_scale"] = _fp4(scaled)
    elif form.format == "int8":
        tensors["weight"] = scaled.round().to(torch.int8)[None]
    else:
        tensors["weight"] = scaled.to(torch.float8_e4m3fn)[None]
    if form.activations == "16bit":
        tensors["weight"] = tensors["weight"].transpose(1, 2).contiguous()
    return tensors


def _before(weight: Tensor, form: LayerFormat, activation_range: ActivationRange | None, reach: float) -> Tensor:
    """The factor of each input channel [K]: one over its smoothing, and over the range if that is static."""
    import torch

    factor = torch.ones(weight.shape[1], device=weight.device)
    if activation_range is not None and activation_range.smoothing is not None:
        factor = factor / torch.tensor(activation_range.smoothing, device=weight.device)
    if form.activations == "static":
        factor = factor * (reach / present(activation_range, "the range of a layer").amax)
    return factor


def _fp4(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → two E2M1 in a byte [1, N, K / 2], the first in its low half, and scales [1, N, K / 16]."""
    import torch

    blocks = scaled.unflatten(1, (-1, BLOCK))
    scale = (blocks.abs().amax(2) / FP4[-1]).to(torch.float8_e4m3fn)
    codes = _fp4_codes(blocks / scale.float().clamp_min(2.0**-9)[..., None]).flatten(1)
    return (codes[:, 0::2] | codes[:, 1::2] << 4)[None], scale[None]


def _fp4_codes(values: Tensor) -> Tensor:
    """The nearest E2M1 of each value, as uint8."""
    import torch

    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(FP4)], device=values.device)
    return (torch.bucketize(values.abs(), middles) | (values < 0).long() << 3).to(torch.uint8)


def fp4_values(values: Tensor) -> Tensor:
    """Each value rounded to the nearest E2M1, as fp32."""
    return fp4_decoded(_fp4_codes(values))


def fp4_decoded(codes: Tensor) -> Tensor:
    """Codes of E2M1, uint8, as fp32."""
    import torch

    wide = codes.long()
    out: Tensor = torch.tensor(FP4, device=codes.device)[wide & 7] * (1 - 2 * (wide >> 3))
    return out


def unpacked_fp4(packed: Tensor, block_scale: Tensor) -> Tensor:
    """What `_fp4` made, as fp32 [1, N, K], for what has no type of four bits."""
    import torch

    values = fp4_decoded(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2))
    wide: Tensor = (values.unflatten(2, (-1, BLOCK)) * block_scale.float()[..., None]).flatten(2)
    return wide
