"""VAEs that take a whole video, or a whole tile of one, in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from overcrank.models._common import random_call, tensors_named
from overcrank.models.base import Component, Config, LatentOf, Sizes, TensorSpec, VideoShape

SizesOf = Callable[[VideoShape], Sizes]


def whole(latent: LatentOf) -> tuple[SizesOf, SizesOf]:
    """`sizes` of a VAE that takes the video in one call; `latent` gives latent frames, height and width."""
    return (
        lambda shape: dict(zip(("frames", "height", "width"), latent(shape), strict=True)),
        lambda shape: {"frames": shape.frames, "height": shape.height, "width": shape.width},
    )


def components(
    vae: Config,
    cls: str,
    forward: Callable[..., Any],
    *,
    sizes: tuple[SizesOf, SizesOf],
    strides: tuple[int, int],
    moments: int = 2,
    shortest: int | None = None,
) -> tuple[Component, Component]:
    """Decoder and encoder; `sizes` give frames, height and width of one call of each, in latents and in pixels.

    `strides` is the (spatial, temporal) compression, `moments` what the encoder gives for each latent channel,
    `shortest` the fewest latent frames the decoder is traced for.
    """
    side, temporal = strides
    common: dict[str, Any] = {"cls": cls, "subfolder": "vae", "config": vae, "forward": forward}
    common["adapt"] = partial(tensors_named, names=("hidden_states",))
    z, x = (
        TensorSpec("hidden_states", (1, vae[channels], "frames", "height", "width"))
        for channels in ("latent_channels", "in_channels")
    )
    out = ("out_frames", "out_height", "out_width")
    decoder = Component(
        name="vae_decoder",
        attribute="decoder",
        inputs=(z,),
        outputs=(TensorSpec("sample", (1, vae["out_channels"], *out)),),
        sample=partial(random_call, specs=(z,)),
        sizes=sizes[0],
        trace_sizes={"frames": 3, "height": 3, "width": 4},
        bounds={"frames": (shortest, None)} if shortest else {},
        **common,
    )
    encoder = Component(
        name="vae_encoder",
        attribute="encoder",
        inputs=(x,),
        outputs=(TensorSpec("latent", (1, moments * vae["latent_channels"], *out)),),
        sample=partial(random_call, specs=(x,)),
        sizes=sizes[1],
        trace_sizes={"frames": 2 * temporal + 1, "height": 3 * side, "width": 4 * side},
        affine_axes={
            "frames": ("frames_k", temporal, 1),
            "height": ("height_k", side, 0),
            "width": ("width_k", side, 0),
        },
        **common,
    )
    return decoder, encoder
