"""The Wan VAE (2.1: 8 × 8 × 4, 2.2: 16 × 16 × 4), as diffusers streams it: one latent frame a call.

The stock loop hands each call what the causal convolutions keep from the frames before. Here
those caches are inputs and outputs, so one engine serves a video of any length in the memory of
four frames, and diffusers' own loop, tiling and slicing stay in charge. The first frame, which has
no past, is another graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import OtherKind
from overcrank.models import _streaming
from overcrank.models._common import patched, scaled_norm
from overcrank.models.base import Call, Component, Config, LatentOf, Sizes, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

NORMS = {"WanRMS_norm": scaled_norm}
TIME_CONV = "time"  # a cache of the temporal up- or downsampling
Cache = tuple[str, int, int, int]
"""(kind, channels, frames, scale): the scale is of the tensor's sides to the coarsest ones."""


def components(vae: Config, latent: LatentOf) -> tuple[Component, ...]:
    """Decoder and encoder, each for the first and for the following frames."""
    parts = (_component(vae, latent, part, first) for part in ("decoder", "encoder") for first in (True, False))
    return tuple(parts)


def _dims(vae: Config, part: str) -> list[int]:
    base = (vae.get("decoder_base_dim") or vae["base_dim"]) if part == "decoder" else vae["base_dim"]
    mult = list(vae["dim_mult"])
    order = [mult[-1], *reversed(mult)] if part == "decoder" else [1, *mult]
    return [base * m for m in order]


def _caches(vae: Config, part: str) -> list[Cache]:
    """What one pass keeps, in its order: AutoencoderKLWan's WanDecoder3d and WanEncoder3d."""
    return list(_decoder_caches(vae) if part == "decoder" else _encoder_caches(vae))


def _decoder_caches(vae: Config) -> Iterator[Cache]:
    dims, scale = _dims(vae, "decoder"), 1
    doubles = list(reversed(vae["temperal_downsample"]))
    yield "conv", vae["z_dim"], 2, scale
    yield from (("conv", dims[0], 2, scale),) * 4  # two resnets around the attention
    for i, (into, out) in enumerate(itertools.pairwise(dims)):
        if i and not vae["is_residual"]:
            into //= 2  # the upsampling before it halved the channels
        last = i == len(dims) - 2
        yield "conv", into, 2, scale
        yield from (("conv", out, 2, scale),) * (2 * vae["num_res_blocks"] + 1)
        if not last and doubles[i]:
            yield TIME_CONV, out, 2, scale
        scale *= 1 if last else 2
    yield "conv", dims[-1], 2, scale


def _encoder_caches(vae: Config) -> Iterator[Cache]:
    dims, scale = _dims(vae, "encoder"), 2 ** (len(vae["dim_mult"]) - 1)
    yield "conv", vae["in_channels"], 2, scale
    for i, (into, out) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        yield "conv", into, 2, scale
        yield from (("conv", out, 2, scale),) * (2 * vae["num_res_blocks"] - 1)
        scale //= 1 if last else 2
        if not last and vae["temperal_downsample"][i]:
            yield TIME_CONV, out, 1, scale
    yield from (("conv", dims[-1], 2, scale),) * 4
    yield "conv", dims[-1], 2, scale


def _component(vae: Config, latent: LatentOf, part: str, first: bool) -> Component:
    caches = _caches(vae, part)
    decodes = part == "decoder"
    coarse = 2 ** (len(vae["dim_mult"]) - 1)  # of the sides the module sees; a patch of the 2.2 VAE lies outside
    sides = sorted({c[3] for c in caches} | {1 if decodes else coarse})

    def sizes(shape: VideoShape) -> Sizes:
        _, height, width = latent(shape)
        return _streaming.scaled(height, width, sides)

    side = 1 if decodes else coarse
    frames = 1 if decodes or first else 2 ** sum(vae["temperal_downsample"])
    channels = vae["z_dim"] if decodes else vae["in_channels"]
    x = TensorSpec("x", (1, channels, frames, _streaming.axis("height", side), _streaming.axis("width", side)))
    out = (1, vae["out_channels"] if decodes else 2 * vae["z_dim"], "out_frames", "out_height", "out_width")
    left = caches
    if first:  # one frame came in; a temporal upsampling keeps nothing of it
        left = [(kind, c, 1, s) for kind, c, _, s in caches if not (decodes and kind == TIME_CONV)]
    cached = () if first else _streaming.inputs("cache", [c[1:] for c in caches])
    return Component(
        name=f"vae_{part}_first" if first else f"vae_{part}",
        cls="AutoencoderKLWan",
        subfolder="vae",
        attribute=part,
        config=vae,
        inputs=(x, *cached),
        outputs=(TensorSpec("out", out), *_streaming.outputs("kept", [c[1:] for c in left])),
        forward=partial(_first if first else _next, count=_counted(vae, part)),
        adapt=partial(_adapt, first=first, caches=tuple(caches), side=side),
        returns=partial(_returns, caches=tuple(caches), first=first, decodes=decodes),
        sample=partial(_sample, x=x, caches=cached, count=_counted(vae, part)),
        sizes=sizes,
        trace_sizes=_streaming.scaled(3, 4, sides),
        affine_axes=_streaming.affine(sides),
    )


def _counted(vae: Config, part: str) -> int:
    """Length of the list diffusers keeps caches in: one entry a causal convolution, shortcuts included."""
    return 2 * len(_caches(vae, part))


# ── what is traced ───────────────────────────────────────────────────────────────────


def _first(module: nn.Module, x: T, *, count: int) -> tuple[T, ...]:
    cache: list[Any] = [None] * count
    more = {"first_chunk": True} if hasattr(module, "up_blocks") else {}
    with patched(module, NORMS):
        out = module(x, feat_cache=cache, feat_idx=[0], **more)
    return (out, *(c for c in cache if c is not None and not isinstance(c, str)))


def _next(module: nn.Module, x: T, *caches: T, count: int) -> tuple[T, ...]:
    cache: list[Any] = [*caches, *[None] * (count - len(caches))]
    with patched(module, NORMS):
        out = module(x, feat_cache=cache, feat_idx=[0])
    return (out, *cache[: len(caches)])


# ── from a diffusers call to named inputs ────────────────────────────────────────────


def _adapt(module: nn.Module, call: Call, *, first: bool, caches: tuple[Cache, ...], side: int) -> dict[str, Any]:
    from torch.nn.functional import pad

    x: T = call["x"]
    feat_cache: list[Any] | None = call.get("feat_cache")
    call.ignored("feat_idx")  # where in the caches the first convolution looks
    if feat_cache is None:
        raise OtherKind("this call streams no frames")
    if first != (feat_cache[0] is None) or first != bool(call.get("first_chunk", first)):
        raise OtherKind("this call is for another frame")
    inputs = {"x": x}
    if first:
        return inputs
    for i, (_, channels, frames, scale) in enumerate(caches):
        cache = feat_cache[i]
        if isinstance(cache, str):  # diffusers' mark of a temporal upsampling that has seen one frame
            size = (1, channels, frames, x.shape[-2] * scale // side, x.shape[-1] * scale // side)
            cache = x.new_zeros(size)
        inputs[f"cache_{i}"] = pad(cache, (0, 0, 0, 0, frames - cache.shape[2], 0))
    return inputs


def _returns(
    outputs: Mapping[str, T], call: Mapping[str, Any], *, caches: tuple[Cache, ...], first: bool, decodes: bool
) -> T:
    """The caches go where the stock module leaves them: into the caller's list."""
    tensors = iter(v for k, v in outputs.items() if k.startswith("kept_"))
    for i, (kind, *_) in enumerate(caches):
        call["feat_cache"][i] = "Rep" if first and decodes and kind == TIME_CONV else next(tensors)
    call["feat_idx"][0] = len(caches)
    return outputs["out"]


def _sample(
    module: nn.Module, sizes: Sizes, generator: Any, *, x: TensorSpec, caches: tuple[TensorSpec, ...], count: int
) -> dict[str, Any]:
    import torch

    cache: list[Any] = [torch.randn(c.shape(sizes), generator=generator) for c in caches]
    cache += [None] * (count - len(cache))
    call = {"x": torch.randn(x.shape(sizes), generator=generator), "feat_cache": cache, "feat_idx": [0]}
    return call | ({"first_chunk": True} if not caches and hasattr(module, "up_blocks") else {})
