"""LTX-Video: what is traced of its modules, and how a diffusers call becomes named inputs.

The other half of ltx.py, which describes the family and calls these.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.errors import ShapeError
from overcrank.models._common import (
    PerOwnerCache,
    attend,
    first_of_equal,
    flat,
    forwards,
    given,
    modulations,
    one_time,
    patched,
    rotated,
)
from overcrank.models.base import Call, Config, Latents, Sizes, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn


def strides(vae: Config) -> tuple[int, int]:
    """(spatial, temporal) compression, patches included; a configuration without them leaves them to the class."""
    scaling = vae["spatio_temporal_scaling"]
    halved = 2 ** sum(scaling if isinstance(scaling, (list, tuple)) else (scaling,))
    return (
        int(vae.get("spatial_compression_ratio") or vae["patch_size"] * halved),
        int(vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halved),
    )


# ── what is traced ───────────────────────────────────────────────────────────────────


def denoiser(
    module: nn.Module,
    hidden_states: T,  # [B, S, C]
    encoder_hidden_states: T,  # [B, L, D]
    timestep: T,  # [1] for all tokens, or [B, S]
    encoder_attention_mask: T,  # [B, L], 1 keeps
    rope_cos: T,  # [1, S, inner / 2]
    rope_sin: T,
    *,
    per_token: bool,
) -> T:
    """LTXVideoTransformer3DModel.forward with the rotary tables given.

    Tokens stay flattened to [1, B·S, inner] outside attention: with a dynamic batch in
    between, the compiler fuses neither gates nor residuals with their neighbours.
    """
    m: Any = module
    batch, dtype = hidden_states.shape[0], hidden_states.dtype
    x = m.proj_in(flat(hidden_states))
    temb, embedded = m.time_embed(timestep.reshape(-1), hidden_dtype=dtype)
    modulation = temb.unflatten(1, (6, -1)).transpose(0, 1).contiguous().split(1)  # 6 of [1, N, inner]
    text = flat(m.caption_projection(encoder_hidden_states))
    bias = ((1 - encoder_attention_mask) * -10000.0)[:, None, None, :]
    rope = (rope_cos[..., None], rope_sin[..., None])
    with forwards(list(m.transformer_blocks), _block):
        for block in m.transformer_blocks:
            x = block(x, text, modulation, rope, bias, per_token)
    shift, scale = modulations(m.scale_shift_table, (embedded[None],) * 2)
    out: T = m.proj_out(m.norm_out(x) * (1 + scale) + shift)
    return out.reshape(batch, -1, out.shape[-1])


def _attention(attn: Any, x: T, context: T, rope: tuple[T, T] | None, bias: T) -> Any:
    """x [1, B·S, C] attends to context [1, B·L, D]; bias [B, 1, 1, L] carries the batch size."""
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
    q, k, v = (t.reshape(bias.shape[0], -1, t.shape[-1]) for t in (q, k, v))
    if rope is not None:
        q, k = rotated(q, *rope), rotated(k, *rope)
    return attn.to_out[0](flat(attend(q, k, v, attn.heads, None if rope else bias)))


def _block(block: Any, x: T, text: T, temb: tuple[T, ...], rope: tuple[T, T], bias: T, per_token: bool) -> T:
    def gated(y: T, gate: int) -> Any:
        # A gate per token, summed first, is one more tensor that is made ahead for every block.
        if per_token:
            return y * block.scale_shift_table[gate] + y * temb[gate]
        return y * ada[gate]

    ada = modulations(block.scale_shift_table, temb)
    y = block.norm1(x) * (1 + ada[1]) + ada[0]
    x = x + gated(_attention(block.attn1, y, y, rope, bias), 2)
    x = x + _attention(block.attn2, x, text, None, bias)
    y = block.norm2(x) * (1 + ada[4]) + ada[3]
    out: T = x + gated(block.ff(y), 5)
    return out


def vae_decoder(module: nn.Module, hidden_states: T, temb: T | None = None, *noise: T) -> T:
    return _coded(module, iter([plane for block in noise for plane in block.unbind(0)]), hidden_states, temb)


def vae_encoder(module: nn.Module, hidden_states: T) -> T:
    return _coded(module, iter(()), hidden_states)


def _coded(module: nn.Module, noise: Iterator[T], *inputs: T | None) -> T:
    with patched(module, {"LTXVideoCausalConv3d": _conv, "LTXVideoResnetBlock3d": partial(_resnet, noise=noise)}):
        out: T = module(*inputs)
    return out


def _conv(conv: Any, x: T) -> T:
    """LTXVideoCausalConv3d.forward with its frame repetition as one edge padding."""
    from torch.nn.functional import pad

    extra = conv.kernel_size[0] - 1
    before, after = (extra, 0) if conv.is_causal else (extra // 2, extra // 2)
    out: T = conv.conv(pad(x, (0, 0, 0, 0, before, after), mode="replicate") if extra else x)
    return out


def _resnet(block: Any, x: T, temb: T | None = None, generator: Any = None, *, noise: Iterator[T]) -> T:
    """LTXVideoResnetBlock3d.forward normalizing channels in place of moving them last and back,
    with injected noise read from `noise` (planes [H, W], two a block)."""
    shift1 = scale1 = shift2 = scale2 = None
    if block.scale_shift_table is not None and temb is not None:
        table = block.scale_shift_table[None, ..., None, None, None]
        shift1, scale1, shift2, scale2 = (temb.unflatten(1, (4, -1)) + table).unbind(dim=1)
    y = _norm_silu_conv(block, block.norm1, block.conv1, x, shift1, scale1)
    if block.per_channel_scale1 is not None:
        y = y + (next(noise)[None] * block.per_channel_scale1)[None, :, None]
    y = _norm_silu_conv(block, block.norm2, block.conv2, y, shift2, scale2)
    if block.per_channel_scale2 is not None:
        y = y + (next(noise)[None] * block.per_channel_scale2)[None, :, None]
    if block.norm3 is not None:
        x = block.norm3(x.movedim(1, -1)).movedim(-1, 1)
    out: T = y + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    return out


def _norm_silu_conv(block: Any, norm: Any, conv: Any, x: T, shift: T | None, scale: T | None) -> Any:
    variance = x.float().pow(2).mean(1, keepdim=True)
    y = (x * (variance + norm.eps).rsqrt()).to(x.dtype)
    if shift is not None and scale is not None:
        y = y * (1 + scale) + shift
    return conv(block.nonlinearity(y))


# ── from a diffusers call to named inputs ────────────────────────────────────────────


def adapt_denoiser(module: nn.Module, call: Call, *, per_token: bool) -> dict[str, T]:
    """The engine's inputs for a call of LTXVideoTransformer3DModel.

    Raises ShapeError for a timestep per token on an engine that takes one, and for items of a batch
    that differ in their timestep or coordinates.
    """
    hidden_states: T = call["hidden_states"]
    batch, tokens = hidden_states.shape[:2]
    cos, sin = _rotary(module, hidden_states, call)
    inputs = given(call, "encoder_hidden_states", "encoder_attention_mask")
    times = call["timestep"].reshape(batch, -1).float()
    if not per_token and times.shape[1] != 1:
        raise ShapeError(
            f"this call gives each of {times.shape[1]} tokens a timestep (image or video conditioning); "
            f"it needs the engine denoiser_conditioned: build-engine --components denoiser_conditioned"
        )
    shared = times.expand(batch, tokens).contiguous() if per_token else one_time(call["timestep"], hidden_states.device)
    inputs |= {"hidden_states": hidden_states, "timestep": shared, "rope_cos": cos, "rope_sin": sin}
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].to(hidden_states.dtype)
    return inputs


_tables = PerOwnerCache()


def _rotary(module: Any, x: T, call: Call) -> tuple[T, T]:
    """Rotary tables [1, S, inner / 2], kept from step to step: they depend on the video's shape only.

    The coordinates are kept with their tables, so that their identity stays theirs.
    """
    coords: T | None = call.get("video_coords")
    grid = tuple(call.get(n) for n in ("num_frames", "height", "width"))
    scale = call.get("rope_interpolation_scale")
    scale = tuple(map(float, scale)) if scale is not None else None
    key = (x.shape[1], x.device, *grid, scale, id(coords), None if coords is None else coords._version)

    def tables() -> tuple[Any, ...]:
        both = module.rope(x[:1], *grid, scale, None if coords is None else first_of_equal(coords, "coordinates"))
        return (*(t[..., 0::2].contiguous() for t in both), coords)  # the stock tables hold each value twice

    cos, sin, _ = _tables.get(module, key, tables)
    return cos, sin


def sample_denoiser(module: nn.Module, sizes: Sizes, generator: Any, *, per_token: bool) -> dict[str, Any]:
    """A call as the pipelines make it: padded text, and conditioned tokens if `per_token`."""
    import torch

    batch, tokens, text = sizes["batch"], sizes["tokens"], sizes["text"]
    config: Any = module.config
    fixed = torch.rand(batch, tokens, generator=generator) < 0.25
    keep = torch.arange(text).expand(batch, text) < max(1, text * 2 // 3)
    coords = torch.rand(1, 3, tokens, generator=generator) * torch.tensor([5.0, 512.0, 768.0])[:, None]
    return {
        "hidden_states": torch.randn(batch, tokens, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, config.caption_channels, generator=generator),
        "timestep": torch.where(fixed, 20.0, 750.0) if per_token else torch.tensor(750.0).expand(batch),
        "encoder_attention_mask": keep.float(),
        "video_coords": coords.expand(batch, -1, -1),
        "return_dict": False,
    }


def adapt_vae_decoder(module: nn.Module, call: Call, *, noise: tuple[TensorSpec, ...] = ()) -> dict[str, T]:
    """Noise planes are drawn here, one by one, exactly as the stock decoder would draw them."""
    import torch

    hidden_states: T = call["hidden_states"]
    height, width = hidden_states.shape[-2:]
    out = {"hidden_states": hidden_states} | ({} if call.get("temb") is None else {"temb": call["temb"]})
    for spec in noise:
        scale = int(str(spec.dims[1]).partition("_x")[2])
        size = (height * scale, width * scale)
        device, dtype = hidden_states.device, hidden_states.dtype
        planes = [torch.randn(size, device=device, dtype=dtype) for _ in range(int(spec.dims[0]))]
        out[spec.name] = torch.stack(planes)
    return out


def sample_vae_decoder(
    module: nn.Module, sizes: Sizes, generator: Any, *, channels: int, timed: bool
) -> dict[str, Any]:
    import torch

    shape = (1, channels, sizes["frames"], sizes["height"], sizes["width"])
    temb = {"temb": torch.tensor([0.05])} if timed else {}
    return {"hidden_states": torch.randn(shape, generator=generator)} | temb


def sample_vae_encoder(module: nn.Module, sizes: Sizes, generator: Any, *, channels: int) -> dict[str, Any]:
    import torch

    shape = (1, channels, sizes["frames"], sizes["height"], sizes["width"])
    return {"hidden_states": torch.rand(shape, generator=generator) * 2 - 1}


# ── around the denoising loop ────────────────────────────────────────────────────────


def preview(pipe: Any, latents: T, grid: Latents) -> T:
    """The middle latent frame decoded alone: latents [1, S, C] of `grid` → RGB [3, H, W] in [0, 1].

    Tokens of appended conditions come first and are left out.
    """
    import torch

    frames, height, width = grid
    config = pipe.transformer.config
    own = latents[:1, -frames * height * width :]
    video = pipe._unpack_latents(own, frames, height, width, config.patch_size, config.patch_size_t)
    vae = pipe.vae
    video = pipe._denormalize_latents(video, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    middle = video[:, :, frames // 2 : frames // 2 + 1].to(vae.dtype)
    timed = vae.config.timestep_conditioning
    timestep = torch.tensor([0.05], device=middle.device, dtype=middle.dtype) if timed else None
    image: T = vae.decode(middle, timestep, return_dict=False)[0]
    return (image[0, :, -1].float() / 2 + 0.5).clamp(0, 1)
