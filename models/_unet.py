"""The convolutional video UNets (Stable Video Diffusion, AnimateDiff, ModelScope) as components."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models import _kl_vae
from overcrank.models._common import PerOwnerCache, forwards, given, one_time, patched
from overcrank.models._family import Family, Grid
from overcrank.models.base import Call, Component, Config, Sizes, TensorSpec, Variant, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

_same = PerOwnerCache()
DOWN = 8  # of the latents' sides, by three downsamplings


class UNetFamily(Family):
    """A family whose denoiser is a UNet over the latents of an image VAE."""

    def strides(self, variant: Variant) -> tuple[int, int]:
        return _kl_vae.stride(variant.configs["vae"]), 1

    def grid(self, variant: Variant) -> Grid:
        step = DOWN * self.strides(variant)[0]
        return {"height": (step, 0), "width": (step, 0), "frames": (1, 0)}


def component(
    cls: str, config: Config, more: tuple[TensorSpec, ...], *, frames_first: bool = False, stride: int = 8
) -> Component:
    """`more` are the inputs beside the latents and the timestep; `frames_first` latents are [B, F, C, H, W]."""
    channels = config["in_channels"]
    middle: tuple[int | str, ...] = ("frames", channels) if frames_first else (channels, "frames")
    out: tuple[int | str, ...] = ("frames", config["out_channels"])
    x = TensorSpec("sample", ("batch", *middle, "height", "width"))
    inputs = (x, TensorSpec("timestep", (1,), "float32"), *more)
    names = tuple(t.name for t in inputs)

    def sizes(shape: VideoShape) -> Sizes:
        height, width = shape.height // stride, shape.width // stride
        return {"batch": shape.batch, "frames": shape.frames, "height": height, "width": width}

    return Component(
        name="denoiser",
        cls=cls,
        subfolder="unet",
        config=config,
        inputs=inputs,
        outputs=(TensorSpec("out", ("batch", *(out if frames_first else out[::-1]), "height", "width")),),
        forward=partial(_traced, names=names),
        adapt=partial(_adapt, specs=inputs),
        returns=partial(_returns, cls=cls),
        sample=partial(_sample, specs=(x, *more)),
        sizes=sizes,
        trace_sizes={"batch": 2, "frames": 3, "height": 2 * DOWN, "width": 3 * DOWN},
        backed_size_oblivious=frames_first,  # the temporal transformer takes repeated rows apart again
        bounds={"frames": (2, config.get("motion_max_seq_length") or 128)},
        affine_axes={"height": ("height_k", DOWN, 0), "width": ("width_k", DOWN, 0)},
    )


def _traced(module: nn.Module, *inputs: T, names: tuple[str, ...]) -> T:
    of = dict(zip(names, inputs, strict=True))
    call: dict[str, Any] = {k: of[k] for k in ("sample", "timestep", "encoder_hidden_states")}
    if "added_time_ids" in of:
        call["added_time_ids"] = of["added_time_ids"]
    if "text_embeds" in of:
        call["added_cond_kwargs"] = {k: of[k] for k in ("text_embeds", "time_ids")}
    if _text_by_frame(module):
        text = of["encoder_hidden_states"]
        rows = text.flatten(0, 1) if text.ndim == 4 else text.repeat_interleave(of["sample"].shape[2], dim=0)
        call["encoder_hidden_states"] = rows
    with patched(module, {"TransformerSpatioTemporalModel": _spatio_temporal}), ExitStack() as stack:
        if "text_embeds" in of:  # joined with the embedded ids, which stay in fp32 without this
            added: Any = module
            stack.enter_context(forwards([added.add_time_proj], _cast, of["text_embeds"].dtype))
        out: T = module(**call, return_dict=False)[0]
    return out


def _cast(module: Any, dtype: Any, x: T) -> T:
    out: T = type(module).forward(module, x).to(dtype)
    return out


def _spatio_temporal(
    m: Any, hidden_states: T, encoder_hidden_states: T, image_only_indicator: T, return_dict: bool = True
) -> Any:
    """TransformerSpatioTemporalModel.forward; its reshapes of the context, which every frame shares, fix a length."""
    import torch

    (batch, frames), (_, _, height, width) = image_only_indicator.shape, hidden_states.shape
    context = encoder_hidden_states.unflatten(0, (batch, frames))[:, 0].repeat_interleave(height * width, dim=0)
    x = m.proj_in(m.norm(hidden_states).flatten(2).transpose(1, 2))
    index = torch.arange(frames, device=x.device).repeat(batch)
    position = m.time_pos_embed(m.time_proj(index).to(x.dtype))[:, None]
    for spatial, temporal in zip(m.transformer_blocks, m.temporal_transformer_blocks, strict=True):
        x = spatial(x, encoder_hidden_states=encoder_hidden_states)
        mixed = temporal(x + position, num_frames=frames, encoder_hidden_states=context)
        x = m.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
    out = m.proj_out(x).transpose(1, 2).unflatten(2, (height, width)) + hidden_states
    return (out,)


def _text_by_frame(module: Any) -> bool:
    """Whether the pipeline repeats the text for every frame before the call."""
    return type(module).__name__ == "UNetMotionModel"


def _adapt(module: nn.Module, call: Call, *, specs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """The engine's inputs for a call of the UNet (same arguments).

    Raises ShapeError for what only PyTorch runs: IP-Adapter, a prompt that changes from frame to frame where
    `specs` give text for each video.
    """
    sample: T = call["sample"]
    names = [t.name for t in specs]
    inputs: dict[str, Any] = {"timestep": one_time(call["timestep"], sample.device), "sample": sample}
    added: Mapping[str, Any] = call.get("added_cond_kwargs") or {}
    if more := set(added) - set(names):
        raise ShapeError(f"this call gives {', '.join(sorted(more))}, such as an IP-Adapter's")
    inputs |= given(added, *(n for n in ("text_embeds", "time_ids") if n in names))
    inputs |= given(call, *(n for n in names if n not in inputs))
    if _text_by_frame(module):
        text = inputs["encoder_hidden_states"].unflatten(0, (-1, sample.shape[2]))
        each = any(t.name == "encoder_hidden_states" and len(t.dims) == 4 for t in specs)
        inputs["encoder_hidden_states"] = text if each else _one_text(text, inputs["encoder_hidden_states"])
    return inputs


def _one_text(by_video: T, text: T) -> T:
    """[B, F, L, C] → [B, L, C]; `text` is the caller's own tensor, the same from step to step."""
    if not _same.get(text, text._version, lambda: bool((by_video == by_video[:, :1]).all())):
        raise ShapeError("the prompt changes from frame to frame")
    out: T = by_video[:, 0]
    return out


def _returns(outputs: Mapping[str, T], call: Mapping[str, Any], *, cls: str) -> Any:
    if not call.get("return_dict", True):
        return (outputs["out"],)
    from diffusers.models.unets import unet_3d_condition, unet_motion_model, unet_spatio_temporal_condition

    classes = {
        "UNet3DConditionModel": unet_3d_condition.UNet3DConditionOutput,
        "UNetMotionModel": unet_motion_model.UNetMotionOutput,
        "UNetSpatioTemporalConditionModel": unet_spatio_temporal_condition.UNetSpatioTemporalConditionOutput,
    }
    return classes[cls](sample=outputs["out"])


def _sample(module: nn.Module, sizes: Sizes, generator: Any, *, specs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    import torch

    call: dict[str, Any] = {t.name: torch.randn(t.shape(sizes), generator=generator) for t in specs}
    if "text_embeds" in call:
        call["added_cond_kwargs"] = {n: call.pop(n) for n in ("text_embeds", "time_ids")}
    if _text_by_frame(module):
        text = call["encoder_hidden_states"]
        rows = text.flatten(0, 1) if text.ndim == 4 else text.repeat_interleave(sizes["frames"], dim=0)
        call["encoder_hidden_states"] = rows
    return call | {"timestep": torch.tensor(750.0), "return_dict": False}
