"""The Cosmos tokenizer CV8x8x8 (Predict1): Haar wavelets around a causal convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overcrank.models import _video_vae
from overcrank.models._common import patched
from overcrank.models.base import Component, Config, LatentOf

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

CLS = "AutoencoderKLCosmos"


def components(vae: Config, latent: LatentOf) -> tuple[Component, ...]:
    """Decoder and encoder of whole videos; `latent(shape)` gives latent (frames, height, width)."""
    strides = (vae["spatial_compression_ratio"], vae["temporal_compression_ratio"])
    sizes = _video_vae.whole(latent)
    return _video_vae.components(vae, CLS, _traced, sizes=sizes, strides=strides, moments=1)


def _traced(module: nn.Module, hidden_states: T) -> T:
    with patched(module, {"CosmosUnpatcher3d": _unpatched, "CosmosPatchEmbed3d": _patched}):
        out: T = module(hidden_states)
    return out


# The stock wavelets are grouped (transposed) convolutions, which the compiler has not in bf16.


def _unpatched(unpatcher: Any, x: T) -> T:
    """Inverse Haar transform: of eight bands, pairs along width, height and time become sums and differences."""
    import torch

    for _ in range(unpatcher.patch_size.bit_length() - 1):
        bands = list(x.chunk(8, dim=1))
        for axis in (4, 3, 2):
            pairs = zip(bands[::2], bands[1::2], strict=True)
            bands = [torch.stack((low + high, low - high), axis + 1).flatten(axis, axis + 1) for low, high in pairs]
        x = bands[0]
    return x[:, :, unpatcher.patch_size - 1 :]


def _patched(patcher: Any, x: T) -> T:
    """Haar transform of neighbouring frames, rows and columns; the first frame stands for a whole patch."""
    import torch

    x = torch.cat([x[:, :, :1].expand(-1, -1, patcher.patch_size - 1, -1, -1), x], dim=2)
    for _ in range(patcher.patch_size.bit_length() - 1):
        bands = [x]
        for axis in (2, 3, 4):
            halves = [band.unflatten(axis, (-1, 2)).unbind(axis + 1) for band in bands]
            bands = [band for a, b in halves for band in (a + b, a - b)]
        x = torch.cat(bands, dim=1) / 8
    return x
