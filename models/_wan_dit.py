"""The Wan transformer (Wan 2.1 and 2.2, VACE, SkyReels V2): what is traced, and a call as named inputs.

Tokens come as flat patches and leave as flat patches, so an engine has one dynamic axis.
The pipelines run one video at a time, guidance in two calls: batch is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.errors import OtherKind, ShapeError
from overcrank.models._common import (
    PerOwnerCache,
    attend,
    embedded,
    first_of_equal,
    forwards,
    from_patches,
    given,
    modulations,
    one_time,
    patches,
    rotated,
    shallow,
    state_of,
    token_sizes,
)
from overcrank.models.base import Call, Component, Config, LatentOf, Sizes, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

TEXT_LENGTH = 512  # beside a picture the stock cross attention tells its tokens from text by this number
IMAGE_TOKENS = 257  # of the CLIP image encoder


def component(
    cls: str, config: Config, latent: LatentOf, *, name: str = "denoiser", per_token: bool = False, **more: Any
) -> Component:
    """The transformer as a component; `latent(shape)` gives latent (frames, height, width).

    With `per_token` every token has its timestep. Without pictures the text may be shorter than usual.
    """
    patch = tuple(config["patch_size"])
    features = prod(patch)
    vace = tuple(config.get("vace_layers") or ())
    image = config.get("image_dim")
    images = IMAGE_TOKENS * (2 if config.get("pos_embed_seq_len") else 1)
    inputs = [
        TensorSpec("hidden_states", (1, "tokens", config["in_channels"] * features)),
        TensorSpec("encoder_hidden_states", (1, TEXT_LENGTH if image else "text", config["text_dim"])),
        TensorSpec("time", ("tokens" if per_token else 1, config["freq_dim"]), "float32"),
        TensorSpec("rope_cos", (1, "tokens", config["attention_head_dim"] // 2), "float32"),
        TensorSpec("rope_sin", (1, "tokens", config["attention_head_dim"] // 2), "float32"),
    ]
    if image:
        inputs.append(TensorSpec("encoder_hidden_states_image", (1, images, image)))
    if config.get("inject_sample_info"):
        inputs.append(TensorSpec("fps", (1,), "int64"))
    if vace:
        inputs.append(TensorSpec("control_hidden_states", (1, "tokens", config["vace_in_channels"] * features)))
        inputs.append(TensorSpec("control_hidden_states_scale", (len(vace),)))
    names = tuple(t.name for t in inputs)
    return Component(
        name=name,
        cls=cls,
        subfolder="transformer",
        config=config,
        **shallow(config, {} if vace else {"num_layers": "blocks"}),  # VACE's hints differ from block to block
        inputs=tuple(inputs),
        outputs=(TensorSpec("sample", (1, "tokens", config["out_channels"] * features)),),
        forward=partial(denoiser, names=names, per_token=per_token),
        adapt=partial(adapt, names=names, per_token=per_token),
        returns=partial(from_patches, patch=patch),
        sample=partial(sample, names=names, per_token=per_token),
        sizes=lambda shape: token_sizes(latent(shape), patch, text=TEXT_LENGTH),
        trace_sizes={"tokens": 24, "text": 12},
        free_axes={} if image else {"text": 1},
        **more,
    )


# ── what is traced ───────────────────────────────────────────────────────────────────


def denoiser(module: nn.Module, *inputs: T, names: tuple[str, ...], per_token: bool) -> T:
    """WanTransformer3DModel.forward on patches, with sinusoids and rotary tables given."""
    import torch

    m: Any = module
    tensors = dict(zip(names, inputs, strict=True))
    embed = m.condition_embedder
    x = embedded(m.patch_embedding, tensors["hidden_states"])
    text = tensors["encoder_hidden_states"]
    temb = embed.time_embedder(tensors["time"]).type_as(text)
    values = embed.time_proj(embed.act_fn(temb))
    if "fps" in tensors:
        values = values + m.fps_projection(m.fps_embedding(tensors["fps"]))
    modulation = values.float().unflatten(1, (6, -1)).transpose(0, 1).contiguous().split(1)  # 6 of [1, N, inner]
    text = embed.text_embedder(text)
    image = tensors.get("encoder_hidden_states_image")
    if image is not None:
        image = embed.image_embedder(image.reshape(-1, IMAGE_TOKENS, image.shape[-1]))
        if m.config.added_kv_proj_dim is None:  # without projections of its own it is read with the text
            text, image = torch.cat([image, text], dim=1), None
    rope = tuple(tensors[n][:, :, None, :, None] for n in ("rope_cos", "rope_sin"))
    context = (text, image, modulation, rope, per_token)
    hints = _hints(m, x, tensors, context)
    with forwards(list(m.blocks), _block):
        for i, block in enumerate(m.blocks):
            x = block(x, *context)
            if hints and i in m.config.vace_layers:
                x = x + next(hints)
    shift, scale = modulations(m.scale_shift_table[0], (temb[None],) * 2)
    out: T = m.proj_out((m.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
    return out


def _hints(m: Any, x: T, tensors: Mapping[str, T], context: Any) -> Iterator[T] | None:
    """What VACE's control branch adds after each of its layers."""
    if "control_hidden_states" not in tensors:
        return None
    control = embedded(m.vace_patch_embedding, tensors["control_hidden_states"])
    hints = []
    for block, weight in zip(m.vace_blocks, tensors["control_hidden_states_scale"].unbind(), strict=True):
        if block.proj_in is not None:
            control = block.proj_in(control) + x
        control = _block(block, control, *context)
        hints.append(block.proj_out(control) * weight)
    return iter(hints)


def _block(block: Any, x: T, text: T, image: T | None, temb: tuple[T, ...], rope: Any, per_token: bool) -> T:
    ada = modulations(block.scale_shift_table[0], temb)

    def gated(y: T, gate: int) -> Any:
        # A gate per token, summed first, is one more tensor that is made ahead for every block.
        if per_token:
            return y * block.scale_shift_table[0][gate] + y * temb[gate]
        return y * ada[gate]

    y = (block.norm1(x.float()) * (1 + ada[1]) + ada[0]).type_as(x)
    x = (x.float() + gated(_self_attention(block.attn1, y, rope), 2)).type_as(x)
    x = x + _cross_attention(block.attn2, block.norm2(x.float()).type_as(x), text, image)
    y = (block.norm3(x.float()) * (1 + ada[4]) + ada[3]).type_as(x)
    out: T = (x.float() + gated(block.ffn(y).float(), 5)).type_as(x)
    return out


def _self_attention(attn: Any, x: T, rope: Any) -> T:
    q, k = (norm(to(x)) for to, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))
    q, k = (rotated(t.unflatten(2, (attn.heads, -1)), *rope).flatten(2) for t in (q, k))
    out: T = attn.to_out[0](attend(q, k, attn.to_v(x), attn.heads))
    return out


def _cross_attention(attn: Any, x: T, text: T, image: T | None) -> T:
    """x attends to the text and, apart from that, to the image.

    Two attentions of one query crash the compiler (TensorRT for RTX 1.7.1), so the second one's query is half
    as large and its keys twice, which rounds nothing.
    """
    q = attn.norm_q(attn.to_q(x))
    y = attend(q, attn.norm_k(attn.to_k(text)), attn.to_v(text), attn.heads)
    if image is not None:
        y = y + attend(q * 0.5, attn.norm_added_k(attn.add_k_proj(image)) * 2, attn.add_v_proj(image), attn.heads)
    out: T = attn.to_out[0](y)
    return out


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables = PerOwnerCache()


def adapt(module: nn.Module, call: Call, *, names: tuple[str, ...], per_token: bool) -> dict[str, Any]:
    """The engine's inputs for a call of the transformer (same arguments).

    Raises ShapeError for timesteps of another kind than the engine takes, and for what only
    PyTorch runs: causal blocks (SkyReels V2), control of fewer frames than the video (VACE).
    """
    m: Any = module
    latents: T = call["hidden_states"]
    patch = tuple(m.config.patch_size)
    call.ignored("enable_diffusion_forcing")  # the timestep's shape says it
    if not getattr(m.config, "inject_sample_info", False):
        call.ignored("fps")
    if getattr(m.config, "num_frame_per_block", 1) > 1:
        raise ShapeError("this call attends causally in blocks of frames, which no engine does")
    tokens = patches(latents, patch)
    time = _times(call["timestep"], latents.shape[2] // patch[0], tokens.shape[1])
    if not per_token and len(time) != 1:
        raise OtherKind(f"this call gives each of {len(time)} tokens or frames its timestep")
    if per_token:
        time = time.expand(tokens.shape[1])
    key = (latents.shape[2:], latents.device, state_of(m.rope.buffers()))
    cos, sin = _tables.get(module, key, lambda: _rotary(m, latents))
    sinusoids = m.condition_embedder.timesteps_proj(time)
    inputs = {"hidden_states": tokens, "time": sinusoids.float(), "rope_cos": cos, "rope_sin": sin}
    if "fps" in names:
        inputs["fps"] = one_time(given(call, "fps")["fps"], latents.device).long()
    if "control_hidden_states" in names:
        control = patches(given(call, "control_hidden_states")["control_hidden_states"], patch)
        scale = call.get("control_hidden_states_scale")
        inputs["control_hidden_states"] = control
        inputs["control_hidden_states_scale"] = (
            control.new_ones(len(m.config.vace_layers)) if scale is None else scale.to(control.dtype)
        )
        if control.shape[1] != tokens.shape[1]:
            raise ShapeError("this call's control video is shorter than the video")
    inputs |= given(call, *(n for n in names if n not in inputs))
    if "encoder_hidden_states_image" in names:
        pictures: T = inputs["encoder_hidden_states_image"]  # one a video, or its first and last
        inputs["encoder_hidden_states_image"] = pictures.reshape(len(latents), -1, pictures.shape[-1])
    return inputs


def _times(timestep: T, frames: int, tokens: int) -> T:
    """[B], [B, S] or one for each latent frame [B, F], the same for all items → [1] or [S]."""
    if timestep.ndim != 2:
        return one_time(timestep, timestep.device)
    times = first_of_equal(timestep, "timesteps")[0]
    return times.repeat_interleave(tokens // frames) if frames > 1 and len(times) == frames else times


def _rotary(m: Any, latents: T) -> tuple[T, T]:
    """Tables [1, S, d / 2]; the stock ones hold each value twice."""
    tables = m.rope(latents[:1])
    if isinstance(tables, tuple):
        return tuple(t[0, :, 0, 0::2].float()[None].contiguous() for t in tables)  # type: ignore[return-value]
    turns = tables.reshape(1, -1, tables.shape[-1])
    return turns.real.float().contiguous(), turns.imag.float().contiguous()


def sample(
    module: nn.Module, sizes: Sizes, generator: Any, *, names: tuple[str, ...], per_token: bool
) -> dict[str, Any]:
    """A call as the pipelines make it."""
    import torch

    config: Any = module.config
    video = tuple(sizes[n] for n in ("frames", "height", "width"))

    def normal(*shape: int) -> T:
        return torch.randn(shape, generator=generator)

    call: dict[str, Any] = {
        "hidden_states": normal(1, config.in_channels, *video),
        "encoder_hidden_states": normal(1, TEXT_LENGTH if config.image_dim else sizes["text"], config.text_dim),
        "timestep": torch.tensor([750.0]),
        "return_dict": False,
    }
    if per_token:
        steps = sizes["frames"] if hasattr(config, "inject_sample_info") else sizes["tokens"]
        call["timestep"] = torch.where(torch.rand(1, steps, generator=generator) < 0.25, 0.0, 750.0)
        if hasattr(config, "inject_sample_info"):
            call["enable_diffusion_forcing"] = True
    if "encoder_hidden_states_image" in names:
        call["encoder_hidden_states_image"] = normal(
            2 if config.pos_embed_seq_len else 1, IMAGE_TOKENS, config.image_dim
        )
    if "fps" in names:
        call["fps"] = torch.tensor([1])
    if "control_hidden_states" in names:
        call["control_hidden_states"] = normal(1, config.vace_in_channels, *video)
        call["control_hidden_states_scale"] = torch.linspace(0.5, 1.0, len(config.vace_layers))
    return call
