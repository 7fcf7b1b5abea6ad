"""LTX-Video's latent upsampler: a video is encoded, its latents doubled in size, and decoded; nothing is denoised."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from overcrank.models._common import random_call, tensors_named
from overcrank.models.base import Component, Config, LatentOf, Sizes, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

CLASS = "LTXLatentUpsamplerModel"
PLACE = "pipelines.ltx.modeling_latent_upsampler"  # in diffusers
SCALE = 2
CONFIG: Config = {
    "in_channels": 128,
    "mid_channels": 512,
    "num_blocks_per_stage": 4,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
}


def components(config: Config, latent: LatentOf, encoder: Component) -> tuple[Component, Component]:
    """The upsampler, and the VAE's encoder for a video half as wide and high as the one that is made."""
    x = TensorSpec("hidden_states", (1, config["in_channels"], "frames", "height", "width"))

    def sizes(shape: VideoShape) -> Sizes:
        return dict(zip(("frames", "height", "width"), latent(halved(shape)), strict=True))

    upsampler = Component(
        name="latent_upsampler",
        cls=f"{PLACE}.{CLASS}",
        subfolder="latent_upsampler",
        config=config,
        inputs=(x,),
        outputs=(TensorSpec("sample", (1, config["in_channels"], "out_frames", "out_height", "out_width")),),
        forward=_traced,
        adapt=partial(tensors_named, names=("hidden_states",)),
        sample=partial(random_call, specs=(x,)),
        sizes=sizes,
        trace_sizes={"frames": 3, "height": 5, "width": 6},
    )
    return upsampler, replace(encoder, sizes=lambda shape: encoder.sizes(halved(shape)))


def halved(shape: VideoShape) -> VideoShape:
    """What the pipeline encodes, for the video asked for."""
    return replace(shape, height=shape.height // SCALE, width=shape.width // SCALE)


def _traced(module: nn.Module, hidden_states: T) -> T:
    out: T = module(hidden_states)
    return out
