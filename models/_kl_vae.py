"""Image VAEs run frame by frame (Stable Diffusion's), and their temporal decoder (Stable Video Diffusion's)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models._common import PerOwnerCache, random_call, tensors_named
from overcrank.models.base import Call, Component, Config, Sizes, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

SD: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def stride(vae: Config) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def components(vae: Config, chunk: int) -> tuple[Component, ...]:
    """Decoder of up to `chunk` frames at a time, and encoder of one."""
    x, sizes = _latents(vae, chunk)
    decoder = Component(
        name="vae_decoder",
        cls="AutoencoderKL",
        subfolder="vae",
        attribute="decoder",
        config=vae,
        inputs=(x,),
        outputs=(TensorSpec("image", ("frames", vae["out_channels"], "out_height", "out_width")),),
        forward=_plain,
        adapt=partial(tensors_named, names=("sample",)),
        sample=partial(random_call, specs=(x,)),
        sizes=sizes,
        trace_sizes={"frames": 3, "height": 5, "width": 6},
        bounds={"frames": (2, 63)},  # of 64 and more, torch.export makes another case; no pipeline decodes as many
        free_axes={"frames": 1},
    )
    return decoder, encoder(vae, "AutoencoderKL")


def temporal_components(vae: Config, chunk: int) -> tuple[Component, ...]:
    """Stable Video Diffusion's: the decoder mixes the frames it is given together."""
    x, sizes = _latents(vae, chunk)
    decoder = Component(
        name="vae_decoder",
        cls="AutoencoderKLTemporalDecoder",
        subfolder="vae",
        attribute="decoder",
        config=vae,
        inputs=(x,),
        outputs=(TensorSpec("image", ("frames", vae["out_channels"], "out_height", "out_width")),),
        forward=_temporal,
        adapt=_adapt_temporal,
        sample=partial(_sample_temporal, x=x),
        sizes=sizes,
        trace_sizes={"frames": 3, "height": 5, "width": 6},
        bounds={"frames": (2, 63)},  # of 64 and more, torch.export makes another case; no pipeline decodes as many
        free_axes={"frames": 1},
    )
    return decoder, encoder(vae, "AutoencoderKLTemporalDecoder")


def _latents(vae: Config, chunk: int) -> tuple[TensorSpec, Any]:
    side = stride(vae)

    def sizes(shape: VideoShape) -> Sizes:
        return {"frames": min(chunk, shape.frames), "height": shape.height // side, "width": shape.width // side}

    return TensorSpec("sample", ("frames", vae["latent_channels"], "height", "width")), sizes


def encoder(vae: Config, cls: str) -> Component:
    side = stride(vae)
    x = TensorSpec("sample", (1, vae["in_channels"], "height", "width"))
    return Component(
        name="vae_encoder",
        cls=cls,
        subfolder="vae",
        attribute="encoder",
        config=vae,
        inputs=(x,),
        outputs=(TensorSpec("moments", (1, 2 * vae["latent_channels"], "out_height", "out_width")),),
        forward=_plain,
        adapt=partial(tensors_named, names=("sample",)),
        sample=partial(random_call, specs=(x,)),
        sizes=lambda shape: {"height": shape.height, "width": shape.width},
        trace_sizes={"height": 5 * side, "width": 6 * side},
        affine_axes={"height": ("height_k", side, 0), "width": ("width_k", side, 0)},
    )


def _plain(module: nn.Module, sample: T) -> T:
    out: T = module(sample)
    return out


def _temporal(module: nn.Module, sample: T) -> T:
    frames = sample.shape[0]
    out: T = module(sample, sample.new_zeros(1, frames), num_frames=frames)
    return out


def _adapt_temporal(module: nn.Module, call: Call) -> dict[str, Any]:
    sample: T = call["sample"]
    num_frames = call.get("num_frames", 1)
    _frames_are_video(call)
    if num_frames != sample.shape[0]:
        raise ShapeError(f"this call decodes {sample.shape[0] // max(1, num_frames)} videos at once; one at a time")
    return {"sample": sample}


_still = PerOwnerCache()


def _frames_are_video(call: Call) -> None:
    """Raise ShapeError for frames that are marked as pictures of their own; the graph mixes all of them."""
    marks = call.get("image_only_indicator")
    if marks is not None and _still.get(marks, marks._version, lambda: bool(marks.any())):
        raise ShapeError("this call decodes pictures, not a video")


def _sample_temporal(module: nn.Module, sizes: Sizes, generator: Any, *, x: TensorSpec) -> dict[str, Any]:
    import torch

    frames = sizes["frames"]
    sample = torch.randn(x.shape(sizes), generator=generator)
    return {"sample": sample, "image_only_indicator": torch.zeros(1, frames), "num_frames": frames}
