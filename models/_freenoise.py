"""FreeNoise (arXiv:2310.15169): AnimateDiff's motion modules over windows of frames, for videos longer than they know.

diffusers runs each window after the other and adds up what it weighs. Here the windows are one
batch, and the weighted sum is a matrix, so one engine serves any number of frames.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import OtherKind, ShapeError
from overcrank.models._common import PerOwnerCache, forwards
from overcrank.models.base import Call, Component, Sizes, TensorSpec, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

LENGTH, STRIDE = 16, 4  # frames of a window, and from one window to the next: diffusers' defaults
BLOCK = "FreeNoiseTransformerBlock"
_tables = PerOwnerCache()


def windowed(base: Component) -> Component:
    """`denoiser_windows`: the UNet with text for each frame whose motion modules see windows; built on request."""
    more = (
        TensorSpec("windows", ("windows", LENGTH), "int64"),
        TensorSpec("mix", ("frames", "windows_x16"), "float32"),
    )

    def sizes(shape: VideoShape) -> Sizes:
        frames = max(shape.frames, LENGTH)
        count = 1 + -(-(frames - LENGTH) // STRIDE)
        return {**base.sizes(replace(shape, frames=frames)), "windows": count, "windows_x16": LENGTH * count}

    return replace(
        base,
        name="denoiser_windows",
        default=False,
        variations=(BLOCK,),
        inputs=(*base.inputs, *more),
        forward=partial(_traced, plain=base.forward),
        adapt=partial(_adapt, plain=base.adapt),
        sample=partial(_sample, plain=base.sample),
        sizes=sizes,
        trace_sizes={**base.trace_sizes, "frames": 3, "windows": 5, "windows_x16": 5 * LENGTH},
        bounds={"frames": (2, 4096)},
        affine_axes={**base.affine_axes, "windows_x16": ("windows", LENGTH, 0)},
    )


def unwindowed(plain: Component) -> Component:
    """The denoiser that sees all frames at once, which refuses the calls of one that sees windows."""

    def adapt(module: nn.Module, call: Call) -> dict[str, Any]:
        if is_on(module):
            raise OtherKind("FreeNoise is on")
        inputs: dict[str, Any] = plain.adapt(module, call)
        return inputs

    return replace(plain, adapt=adapt)


def is_on(module: nn.Module) -> bool:
    return any(type(m).__name__ == BLOCK for m in module.modules())


# ── what is traced ───────────────────────────────────────────────────────────────────


def _traced(module: nn.Module, *inputs: T, plain: Any) -> T:
    *usual, windows, mix = inputs
    with forwards(_motion_blocks(module), _block, windows, mix):
        out: T = plain(module, *usual)
    return out


def _motion_blocks(module: nn.Module) -> list[Any]:
    motion: list[Any] = [m for m in module.modules() if type(m).__name__ == "AnimateDiffTransformer3D"]
    return [block for m in motion for block in m.transformer_blocks]


def _block(block: Any, windows: T, mix: T, hidden_states: T, **unused: Any) -> T:
    """FreeNoiseTransformerBlock.forward: hidden_states [pixels, frames, C]."""
    pixels = hidden_states.shape[0]
    x = hidden_states[:, windows].flatten(0, 1)  # [pixels · windows, LENGTH, C]
    x = x + block.attn1(block.pos_embed(block.norm1(x)))
    x = x + block.attn2(block.pos_embed(block.norm2(x)))
    summed = mix.to(x.dtype) @ x.unflatten(0, (pixels, -1)).flatten(1, 2)
    out: T = summed + block.ff(block.norm3(summed))
    return out


# ── from a diffusers call to named inputs ────────────────────────────────────────────


def _adapt(module: nn.Module, call: Call, *, plain: Any) -> dict[str, Any]:
    """Raises ShapeError when FreeNoise is off, or its windows are not of LENGTH frames."""
    block: Any = next((m for m in module.modules() if type(m).__name__ == BLOCK), None)
    if block is None:
        raise OtherKind("FreeNoise is off")
    inputs: dict[str, Any] = plain(module, call)
    if block.context_length != LENGTH:
        raise ShapeError(f"FreeNoise's windows are of {block.context_length} frames, and the engine's of {LENGTH}")
    frames = inputs["sample"].shape[2]
    key = (frames, block.context_stride, block.weighting_scheme, inputs["sample"].device)
    windows, mix = _tables.get(module, key, lambda: _windows_of(block, frames, inputs["sample"].device))
    return inputs | {"windows": windows, "mix": mix}


def _windows_of(block: Any, frames: int, device: Any) -> tuple[T, T]:
    """Frame indices [windows, LENGTH], and the weights [frames, windows · LENGTH] by which diffusers sums them."""
    import torch

    starts = [start for start, _ in block._get_frame_indices(frames)]
    weights = torch.tensor(block._get_frame_weights(LENGTH, block.weighting_scheme), dtype=torch.float32)
    left = frames - (starts[-1] + LENGTH)
    mix, total = torch.zeros(len(starts) + bool(left), LENGTH, frames), torch.zeros(frames)
    for i, start in enumerate(starts):
        mix[i, range(LENGTH), range(start, start + LENGTH)] = weights
        total[start : start + LENGTH] += weights
    if left:  # a last window, of which only the frames that no other has count
        starts.append(frames - LENGTH)
        mix[-1, range(LENGTH - left, LENGTH), range(frames - left, frames)] = weights[-left:]
        total[-left:] += weights[-left]  # as diffusers does: the same for all of them
    windows = torch.tensor(starts)[:, None] + torch.arange(LENGTH)
    return windows.to(device), (mix / total).flatten(0, 1).T.contiguous().to(device)


def _sample(module: nn.Module, sizes: Sizes, generator: Any, *, plain: Any) -> dict[str, Any]:
    """A call of the module with FreeNoise, which is switched on in it."""
    from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

    unet: Any = module
    mixin: Any = AnimateDiffFreeNoiseMixin()
    mixin.device, mixin.dtype = unet.device, unet.dtype
    mixin._free_noise_context_length, mixin._free_noise_context_stride = LENGTH, STRIDE
    mixin._free_noise_weighting_scheme = "pyramid"
    for block in [*unet.down_blocks, *unet.up_blocks, unet.mid_block]:
        if hasattr(block, "motion_modules"):
            mixin._enable_free_noise_in_block(block)
    call: dict[str, Any] = plain(module, sizes, generator)
    return call
