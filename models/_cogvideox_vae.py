"""The CogVideoX VAE (8 × 8 × 4), as diffusers streams it: two latent frames a call, three in the first.

Group normalization takes its statistics from one call's frames, so only calls of the same frames give
the same video; the causal convolutions' caches are inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models import _streaming
from overcrank.models.base import Call, Component, Config, LatentOf, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

Cache = tuple[str, int, int, int]
"""(path in the nested cache of diffusers, channels, frames, scale)."""
FRAMES = {  # (part, kind of call) → frames that come in
    ("decoder", "first"): 3,
    ("decoder", ""): 2,
    ("encoder", "first"): 9,
    ("encoder", ""): 8,
    ("encoder", "image"): 1,
}


def components(vae: Config, latent: LatentOf) -> tuple[Component, ...]:
    """Decoder and encoder, for the first and the following frames; the encoder also for a picture."""
    return tuple(_component(vae, latent, part, kind) for part, kind in FRAMES)


def _caches(vae: Config, part: str) -> list[Cache]:
    return list(_decoder_caches(vae) if part == "decoder" else _encoder_caches(vae))


def _resnets(path: str, into: int, out: int, count: int, scale: int) -> Iterator[Cache]:
    for i in range(count):
        yield f"{path}/resnet_{i}/conv1", out if i else into, 2, scale
        yield f"{path}/resnet_{i}/conv2", out, 2, scale


def _decoder_caches(vae: Config) -> Iterator[Cache]:
    widths, scale = list(reversed(vae["block_out_channels"])), 1
    yield "conv_in", vae["latent_channels"], 2, scale
    yield from _resnets("mid_block", widths[0], widths[0], 2, scale)
    for i, out in enumerate(widths):
        yield from _resnets(f"up_block_{i}", widths[max(0, i - 1)], out, vae["layers_per_block"] + 1, scale)
        scale *= 1 if i == len(widths) - 1 else 2
    yield "conv_out", widths[-1], 2, scale


def _encoder_caches(vae: Config) -> Iterator[Cache]:
    widths = list(vae["block_out_channels"])
    scale = 2 ** (len(widths) - 1)
    yield "conv_in", vae["in_channels"], 2, scale
    for i, out in enumerate(widths):
        yield from _resnets(f"down_block_{i}", widths[max(0, i - 1)], out, vae["layers_per_block"], scale)
        scale //= 1 if i == len(widths) - 1 else 2
    yield from _resnets("mid_block", widths[-1], widths[-1], 2, scale)
    yield "conv_out", widths[-1], 2, scale


def _component(vae: Config, latent: LatentOf, part: str, kind: str) -> Component:
    decodes = part == "decoder"
    caches = _caches(vae, part)
    sides = sorted({c[3] for c in caches})
    side = 1 if decodes else sides[-1]
    channels = vae["latent_channels"] if decodes else vae["in_channels"]
    x = TensorSpec(
        "sample",
        (1, channels, FRAMES[part, kind], _streaming.axis("height", side), _streaming.axis("width", side)),
    )
    out = vae["out_channels"] if decodes else 2 * vae["latent_channels"]
    cached = () if kind else _streaming.inputs("cache", [c[1:] for c in caches])
    paths = tuple(c[0] for c in caches)

    def sizes(shape: VideoShape) -> dict[str, int]:
        _, height, width = latent(shape)
        return _streaming.scaled(height, width, sides)

    return Component(
        name=f"vae_{part}_{kind}" if kind else f"vae_{part}",
        cls="AutoencoderKLCogVideoX",
        subfolder="vae",
        attribute=part,
        config=vae,
        inputs=(x, *cached),
        outputs=(
            TensorSpec("out", (1, out, "out_frames", "out_height", "out_width")),
            *_streaming.outputs("kept", [c[1:] for c in caches]),
        ),
        forward=partial(_traced, paths=paths),
        adapt=partial(_adapt, paths=paths, frames=FRAMES[part, kind], cached=not kind),
        returns=partial(_returns, paths=paths),
        sample=partial(_sample, x=x, cached=cached, paths=paths),
        sizes=sizes,
        trace_sizes=_streaming.scaled(3, 4, sides),
        affine_axes=_streaming.affine(sides),
    )


def _nested(paths: tuple[str, ...], values: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in zip(paths, values, strict=True):
        *parents, last = path.split("/")
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = value
    return tree


def _flat(tree: Any, paths: tuple[str, ...]) -> list[T]:
    tensors = []
    for path in paths:
        at = tree
        for name in path.split("/"):
            at = at[name]
        tensors.append(at)
    return tensors


def _traced(module: nn.Module, sample: T, *caches: T, paths: tuple[str, ...]) -> tuple[T, ...]:
    out, tree = module(sample, conv_cache=_nested(paths, caches) if caches else None)
    return (out, *_flat(tree, paths))


def _adapt(module: nn.Module, call: Call, *, paths: tuple[str, ...], frames: int, cached: bool) -> dict[str, Any]:
    sample: T = call["sample"]
    conv_cache: dict[str, Any] | None = call.get("conv_cache")
    if cached != bool(conv_cache) or sample.shape[2] != frames:
        raise ShapeError(f"this call codes {sample.shape[2]} frames; engines take 8k+1 frames of video")
    inputs = {"sample": sample}
    if cached:
        inputs |= {f"cache_{i}": c for i, c in enumerate(_flat(conv_cache, paths))}
    return inputs


def _returns(outputs: Mapping[str, T], call: Mapping[str, Any], *, paths: tuple[str, ...]) -> Any:
    """Caches of 1 × 1 × 1 convolutions, which diffusers keeps too and never reads, are left out."""
    return outputs["out"], _nested(paths, [v for k, v in outputs.items() if k.startswith("kept_")])


def _sample(
    module: nn.Module,
    sizes: Any,
    generator: Any,
    *,
    x: TensorSpec,
    cached: tuple[TensorSpec, ...],
    paths: tuple[str, ...],
) -> dict[str, Any]:
    import torch

    call: dict[str, Any] = {"sample": torch.randn(x.shape(sizes), generator=generator)}
    if cached:
        caches = [torch.randn(c.shape(sizes), generator=generator) for c in cached]
        call["conv_cache"] = _nested(paths, caches)
    return call
