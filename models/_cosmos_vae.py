"""The Cosmos tokenizer CV8x8x8 (Predict1): Haar wavelets around a causal convolutional network."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.models._common import patched, random_call, tensors_named
from overcrank.models.base import Component, Config, Tensor, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

CLS = "AutoencoderKLCosmos"


def components(vae: Config, latent: Any) -> tuple[Component, ...]:
    """Decoder and encoder of whole videos; `latent(shape)` gives latent (frames, height, width)."""
    side, temporal = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
    common: dict[str, Any] = {"cls": CLS, "subfolder": "vae", "config": vae, "forward": _traced}
    common["adapt"] = partial(tensors_named, names=("hidden_states",))
    out = ("out_frames", "out_height", "out_width")
    z = Tensor("hidden_states", (1, vae["latent_channels"], "frames", "height", "width"))
    x = Tensor("hidden_states", (1, vae["in_channels"], "frames", "height", "width"))
    decoder = Component(
        name="vae_decoder",
        attribute="decoder",
        inputs=(z,),
        outputs=(Tensor("sample", (1, vae["out_channels"], *out)),),
        sample=partial(random_call, specs=(z,)),
        sizes=lambda shape: dict(zip(("frames", "height", "width"), latent(shape), strict=True)),
        trace_sizes={"frames": 3, "height": 3, "width": 4},
        **common,
    )

    def pixels(shape: VideoShape) -> dict[str, int]:
        return {"frames": shape.frames, "height": shape.height, "width": shape.width}

    encoder = Component(
        name="vae_encoder",
        attribute="encoder",
        inputs=(x,),
        outputs=(Tensor("latent", (1, vae["latent_channels"], *out)),),
        sample=partial(random_call, specs=(x,)),
        sizes=pixels,
        trace_sizes={"frames": 2 * temporal + 1, "height": 3 * side, "width": 4 * side},
        affine_axes={
            "frames": ("frames_k", temporal, 1),
            "height": ("height_k", side, 0),
            "width": ("width_k", side, 0),
        },
        **common,
    )
    return decoder, encoder


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
