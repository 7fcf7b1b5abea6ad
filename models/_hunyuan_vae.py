"""The HunyuanVideo VAEs (13B: 8 × 8 × 4; 1.5: 16 × 16 × 4), decoded and encoded tile by tile.

Their middle attention looks at every pair of pixels of a tile, so memory grows with the fourth
power of its side: nobody runs them without diffusers' tiling. The engine serves one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from overcrank.models import _video_vae
from overcrank.models._common import patched, scaled_norm
from overcrank.models.base import Component, Config, LatentOf, Sizes, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

TILE = 256  # pixels: diffusers' tile_sample_min_height and width of both
TILE_FRAMES = 16  # tile_sample_min_num_frames; 1.5 has no tiles in time


def components(vae: Config, latent: LatentOf, cls: str = "AutoencoderKLHunyuanVideo") -> tuple[Component, ...]:
    """`latent(shape)` gives latent (frames, height, width)."""
    newer = cls.endswith("15")
    stride, temporal = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
    longest = 10**6 if newer else TILE_FRAMES // temporal + 1

    def latent_tile(shape: VideoShape) -> Sizes:
        frames, height, width = latent(shape)
        side = TILE // stride
        return {"frames": max(2, min(frames, longest)), "height": min(height, side), "width": min(width, side)}

    def tile(shape: VideoShape) -> Sizes:
        small = latent_tile(shape)
        frames = 1 if shape.frames == 1 else (small["frames"] - 1) * temporal + 1
        return {"frames": frames, "height": small["height"] * stride, "width": small["width"] * stride}

    return _video_vae.components(
        vae,
        cls,
        _traced,
        sizes=(latent_tile, tile),
        strides=(stride, temporal),
        shortest=3,  # two are no special case of the graph: compared in the tests
    )


def _traced(module: nn.Module, hidden_states: T) -> T:
    kinds = {"HunyuanVideoUpsampleCausal3D": _upsampled, "HunyuanVideo15RMS_norm": scaled_norm}
    with _masks_of_any_size(), patched(module, kinds):
        out: T = module(hidden_states)
    return out


def _upsampled(block: Any, x: T) -> T:
    """HunyuanVideoUpsampleCausal3D.forward with slices in place of a split, which becomes a sequence in ONNX."""
    import torch
    from torch.nn.functional import interpolate

    time, *sides = block.upsample_factor
    first = interpolate(x[:, :, 0], scale_factor=tuple(map(float, sides)), mode="nearest")[:, :, None]
    others = interpolate(x[:, :, 1:], scale_factor=(float(time), *map(float, sides)), mode="nearest")
    out: T = block.conv(torch.cat((first, others), dim=2))
    return out


@contextmanager
def _masks_of_any_size() -> Iterator[None]:
    """Stock masks are drawn in a loop or by a repetition, which fixes their size while tracing."""
    from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video, autoencoder_kl_hunyuanvideo15

    name = "prepare_causal_attention_mask"
    newer = autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock
    with patch.object(autoencoder_kl_hunyuan_video, name, _mask), patch.object(newer, name, staticmethod(_mask)):
        yield


def _mask(frames: int, pixels: int, dtype: Any, device: Any, batch_size: int | None = None) -> T:
    """[1, S, S]: a pixel sees its own frame and the ones before."""
    import torch

    frame = torch.arange(frames * pixels, device=device) // pixels
    mask = torch.where(frame[None] <= frame[:, None], 0.0, -float("inf")).to(dtype)
    return mask[None]
