"""LTX-Video (Lightricks): 2B and 13B text/image-to-video diffusion transformers.

Configurations are those of the published checkpoints, as diffusers' conversion of the
original files gives them. Spatial compression 32, temporal 8: one denoiser token is a
32x32x8 pixel box, so height and width are multiples of 32 and frames are 8k+1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from overcrank.models.base import Component, Config, Repeat, Sizes, Tensor, Variant, VideoShape

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

TITLE = "LTX-Video"
DEFAULT = "ltx-2b-0.9.5"
DENOISER_CLASS = "LTXVideoTransformer3DModel"
PIPELINES = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
TRACED_BLOCKS, TRACED_RESNETS = 3, 2  # depth of a traced chain (export/repeat.py)

# ── published checkpoints ────────────────────────────────────────────────────────────

_DIT_2B = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "attention_bias": True,
    "attention_out_bias": True,
}
_DIT_13B = _DIT_2B | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}

_VAE_090 = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": ("conv",) * 4,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1, 1, 1, 1),
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
}
_VAE_091 = _VAE_090 | {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
_VAE_095 = _VAE_091 | {
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_SHIFTED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_UNIFORM = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False}
_STOCHASTIC = _UNIFORM | {"stochastic_sampling": True}


def _variant(
    name: str, hub: str, dit: Config, vae: Config, scheduler: Config, guidance: float, steps: int, **more: Any
) -> Variant:
    conditions = vae is _VAE_095
    shapes = {"native": VideoShape(512, 768, 121), "maximum": VideoShape(768, 768, 161)}
    text = 256 if conditions else 128  # max_sequence_length of the pipelines
    return Variant(
        name=name,
        family="ltx",
        title=name.replace("ltx", TITLE).replace("-2b-", " 2B ").replace("-13b-", " 13B "),
        hub_id=hub.partition(":")[0],
        hub_file=hub.partition(":")[2],
        configs={"transformer": dit, "vae": vae, "scheduler": scheduler},
        minimum=VideoShape(256, 256, 1),
        fps=24,
        text_length=text,
        pipelines=PIPELINES if conditions else PIPELINES[:2],
        guidance=guidance,
        steps=steps,
        tasks=("text-to-video", "image-to-video") + (("conditioned",) if conditions else ()),
        **(shapes | more),
    )


_REPO = "Lightricks/LTX-Video"
_BIG: Mapping[str, Any] = {
    "native": VideoShape(704, 1216, 121),
    "maximum": VideoShape(1216, 1216, 161),
}
_091 = f"{_REPO}:ltx-video-2b-v0.9.1.safetensors"
_096 = f"{_REPO}:ltxv-2b-0.9.6-dev-04-25.safetensors"
_096D = f"{_REPO}:ltxv-2b-0.9.6-distilled-04-25.safetensors"
_098D = f"{_REPO}-0.9.8-13B-distilled"

VARIANTS: tuple[Variant, ...] = (
    _variant("ltx-2b-0.9.0", _REPO, _DIT_2B, _VAE_090, _SHIFTED, 3.0, 40),
    _variant("ltx-2b-0.9.1", _091, _DIT_2B, _VAE_091, _SHIFTED, 3.0, 40),
    _variant("ltx-2b-0.9.5", f"{_REPO}-0.9.5", _DIT_2B, _VAE_095, _UNIFORM, 3.0, 40),
    _variant("ltx-2b-0.9.6-dev", _096, _DIT_2B, _VAE_095, _UNIFORM, 3.0, 40),
    _variant("ltx-2b-0.9.6-distilled", _096D, _DIT_2B, _VAE_095, _STOCHASTIC, 1.0, 8),
    _variant("ltx-13b-0.9.7-dev", f"{_REPO}-0.9.7-dev", _DIT_13B, _VAE_095, _UNIFORM, 5.0, 30, **_BIG),
    _variant("ltx-13b-0.9.7-distilled", f"{_REPO}-0.9.7-distilled", _DIT_13B, _VAE_095, _UNIFORM, 1.0, 8, **_BIG),
    _variant("ltx-13b-0.9.8-distilled", _098D, _DIT_13B, _VAE_095, _UNIFORM, 1.0, 8, **_BIG),
)

# ── shapes ───────────────────────────────────────────────────────────────────────────


def strides(variant: Variant) -> tuple[int, int]:
    """(spatial, temporal) compression of the VAE, patches included."""
    vae = variant.configs["vae"]
    spatial = vae.get("spatial_compression_ratio")
    temporal = vae.get("temporal_compression_ratio")
    doublings = sum(vae["spatio_temporal_scaling"])
    return (
        int(spatial) if spatial else vae["patch_size"] * 2**doublings,
        int(temporal) if temporal else vae["patch_size_t"] * 2**doublings,
    )


def grid(variant: Variant) -> dict[str, tuple[int, int]]:
    """Valid sizes of each axis as (step, offset)."""
    spatial, temporal = strides(variant)
    return {"height": (spatial, 0), "width": (spatial, 0), "frames": (temporal, 1)}


def latent(variant: Variant, shape: VideoShape) -> tuple[int, int, int]:
    """Latent (frames, height, width) of a video shape."""
    spatial, temporal = strides(variant)
    return (shape.frames - 1) // temporal + 1, shape.height // spatial, shape.width // spatial


def components(variant: Variant) -> tuple[Component, ...]:
    """Text-to-video runs `denoiser`; image and video conditioning, with a timestep per token,
    `denoiser_conditioned`: same weights, another engine."""
    return (
        _denoiser(variant, per_token=False),
        _vae_decoder(variant),
        _vae_encoder(variant),
        _denoiser(variant, per_token=True),
    )


def _denoiser(variant: Variant, per_token: bool) -> Component:
    config = variant.configs["transformer"]
    inner = config["num_attention_heads"] * config["attention_head_dim"]

    def sizes(shape: VideoShape) -> Sizes:
        f, h, w = latent(variant, shape)
        return {"batch": shape.batch, "tokens": f * h * w, "text": variant.text_length}

    deep = config["num_layers"] > TRACED_BLOCKS
    return Component(
        name="denoiser_conditioned" if per_token else "denoiser",
        default=not per_token,
        cls=DENOISER_CLASS,
        subfolder="transformer",
        config=config,
        traced_config=config | {"num_layers": TRACED_BLOCKS} if deep else {},
        repeats=(Repeat("transformer_blocks", TRACED_BLOCKS, config["num_layers"]),) if deep else (),
        inputs=(
            Tensor("hidden_states", ("batch", "tokens", config["in_channels"])),
            Tensor("encoder_hidden_states", ("batch", "text", config["caption_channels"])),
            Tensor("timestep", ("batch", "tokens") if per_token else (1,), "float32"),
            Tensor("encoder_attention_mask", ("batch", "text")),
            Tensor("rope_cos", (1, "tokens", inner // 2), "float32"),
            Tensor("rope_sin", (1, "tokens", inner // 2), "float32"),
        ),
        outputs=(Tensor("sample", ("batch", "tokens", config["out_channels"])),),
        forward=partial(denoiser, per_token=per_token),
        adapt=partial(adapt_denoiser, per_token=per_token),
        sample=partial(sample_denoiser, per_token=per_token),
        sizes=sizes,
        trace_sizes={"batch": 2, "tokens": 24, "text": 16},
        free_axes={"text": 1},
    )


def _chains(layers: tuple[int, ...], paths: list[str]) -> tuple[tuple[int, ...], tuple[Repeat, ...]]:
    """Layer counts cut to what is traced, and the chains that were cut."""
    traced = TRACED_RESNETS
    cut = tuple(min(n, traced) for n in layers)
    return cut, tuple(Repeat(p, traced, n) for p, n in zip(paths, layers, strict=True) if n > traced)


def _noise_inputs(vae: Config) -> tuple[Tensor, ...]:
    """One input per up block that injects noise: two planes for each of its resnets (0.9.1)."""
    blocks = zip(
        reversed(vae["decoder_inject_noise"][:-1]),
        reversed(vae["decoder_layers_per_block"][:-1]),
        reversed(vae["decoder_spatio_temporal_scaling"]),
        strict=True,
    )
    inputs, scale = [], 1
    for i, (injects, layers, doubles) in enumerate(blocks):
        scale *= 2 if doubles else 1
        if injects:
            inputs.append(Tensor(f"noise_{i}", (2 * layers, f"height_x{scale}", f"width_x{scale}")))
    return tuple(inputs)


def _vae_decoder(variant: Variant) -> Component:
    vae = variant.configs["vae"]
    layers = tuple(vae["decoder_layers_per_block"])
    blocks = [f"up_blocks.{i}.resnets" for i in range(len(layers) - 1)]
    cut, repeats = _chains(layers, [*reversed(blocks), "mid_block.resnets"])
    noise = _noise_inputs(vae)
    if noise:  # every resnet reads its own plane of the noise, so the chain is not a repetition
        cut, repeats = layers, ()
    scales = sorted({int(str(t.dims[1]).partition("_x")[2]) for t in noise})
    temb = (Tensor("temb", (1,)),) if vae["timestep_conditioning"] else ()

    def sizes(shape: VideoShape) -> Sizes:
        f, h, w = latent(variant, shape)
        scaled = {f"height_x{s}": h * s for s in scales} | {f"width_x{s}": w * s for s in scales}
        return {"frames": f, "height": h, "width": w} | scaled

    spatial, temporal = strides(variant)
    return Component(
        name="vae_decoder",
        cls="AutoencoderKLLTXVideo",
        subfolder="vae",
        attribute="decoder",
        config=vae,
        traced_config=vae | {"decoder_layers_per_block": cut} if repeats else {},
        repeats=repeats,
        inputs=(
            Tensor("hidden_states", (1, vae["latent_channels"], "frames", "height", "width")),
            *temb,
            *noise,
        ),
        outputs=(Tensor("sample", (1, vae["out_channels"], "out_frames", "out_height", "out_width")),),
        forward=vae_decoder,
        adapt=partial(adapt_vae_decoder, noise=noise),
        sample=partial(sample_vae_decoder, channels=vae["latent_channels"], timed=bool(temb)),
        sizes=sizes,
        trace_sizes=sizes(VideoShape(3 * spatial, 4 * spatial, 2 * temporal + 1)),
        affine_axes={f"{axis}_x{s}": (axis, s, 0) for s in scales if s > 1 for axis in ("height", "width")},
    )


def _vae_encoder(variant: Variant) -> Component:
    vae = variant.configs["vae"]
    layers = tuple(vae["layers_per_block"])
    paths = [f"down_blocks.{i}.resnets" for i in range(len(layers) - 1)]
    cut, repeats = _chains(layers, [*paths, "mid_block.resnets"])
    spatial, temporal = strides(variant)
    return Component(
        name="vae_encoder",
        cls="AutoencoderKLLTXVideo",
        subfolder="vae",
        attribute="encoder",
        config=vae,
        traced_config=vae | {"layers_per_block": cut} if repeats else {},
        repeats=repeats,
        inputs=(Tensor("hidden_states", (1, vae["in_channels"], "frames", "height", "width")),),
        outputs=(Tensor("latent", (1, 2 * vae["latent_channels"], "out_frames", "out_height", "out_width")),),
        forward=vae_encoder,
        adapt=adapt_vae_encoder,
        sample=partial(sample_vae_encoder, channels=vae["in_channels"]),
        sizes=lambda shape: {"frames": shape.frames, "height": shape.height, "width": shape.width},
        trace_sizes={"frames": 2 * temporal + 1, "height": 3 * spatial, "width": 4 * spatial},
        affine_axes={
            "frames": ("frames_k", temporal, 1),
            "height": ("height_k", spatial, 0),
            "width": ("width_k", spatial, 0),
        },
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
    x = m.proj_in(_flat(hidden_states))
    temb, embedded = m.time_embed(timestep.reshape(-1), hidden_dtype=dtype)
    modulation = temb[None].chunk(6, dim=-1)
    text = _flat(m.caption_projection(encoder_hidden_states))
    bias = ((1 - encoder_attention_mask) * -10000.0)[:, None, None, :]
    rope = (rope_cos[..., None], rope_sin[..., None])
    with _forwards(list(m.transformer_blocks), _block):
        for block in m.transformer_blocks:
            x = block(x, text, modulation, rope, bias, per_token)
    shift, scale = _modulations(m.scale_shift_table, (embedded[None],) * 2)
    x = m.proj_out(m.norm_out(x) * (1 + scale) + shift)
    return x.reshape(batch, -1, x.shape[-1])


def _flat(x: T) -> T:
    """[B, S, C] → [1, B·S, C]."""
    return x.reshape(1, -1, x.shape[-1])


def _modulations(table: T, temb: tuple[T, ...]) -> list[T]:
    """adaLN values: [n, C] and n of [1, N, C] → n of [1, N, C], N being 1 or B·S.

    One sum per value, not one of [N, n·C]: with a timestep per token the compiler makes the
    latter for every block in advance and keeps them all.
    """
    rows = table.view(1, 1, -1).chunk(table.shape[0], dim=-1)
    return [row + value for row, value in zip(rows, temb, strict=True)]


def _rotate(x: T, cos: T, sin: T) -> T:
    """Rotary embedding on interleaved pairs, in fp32: x [B, S, inner], cos and sin [1, S, inner / 2, 1]."""
    import torch

    real, imag = x.unflatten(2, (-1, 2)).float().chunk(2, dim=-1)
    turned = torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)
    return turned.flatten(2).to(x.dtype)


def _attention(attn: Any, x: T, context: T, rope: tuple[T, T] | None, bias: T) -> Any:
    """x [1, B·S, C] attends to context [1, B·L, D]; bias [B, 1, 1, L] carries the batch size."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
    q, k, v = (t.reshape(bias.shape[0], -1, t.shape[-1]) for t in (q, k, v))
    if rope is not None:
        q, k = _rotate(q, *rope), _rotate(k, *rope)
    q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = sdpa(q, k, v, attn_mask=None if rope else bias)
    return attn.to_out[0](_flat(out.transpose(1, 2).flatten(2)))


def _block(block: Any, x: T, text: T, temb: tuple[T, ...], rope: tuple[T, T], bias: T, per_token: bool) -> T:
    def gated(y: T, gate: int) -> T:
        # A gate per token, summed first, is one more tensor that is made ahead for every block.
        if per_token:
            return y * block.scale_shift_table[gate] + y * temb[gate]
        return y * ada[gate]

    ada = _modulations(block.scale_shift_table, temb)
    y = block.norm1(x) * (1 + ada[1]) + ada[0]
    x = x + gated(_attention(block.attn1, y, y, rope, bias), 2)
    x = x + _attention(block.attn2, x, text, None, bias)
    y = block.norm2(x) * (1 + ada[4]) + ada[3]
    return x + gated(block.ff(y), 5)


@contextmanager
def _forwards(modules: list[Any], forward: Any, *more: Any) -> Iterator[None]:
    """Each module runs `forward(module, …)`, still as a module call: nodes know who made them."""
    for module in modules:
        module.forward = partial(forward, module, *more)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def vae_decoder(module: nn.Module, hidden_states: T, temb: T | None = None, *noise: T) -> T:
    planes = iter([plane for block in noise for plane in block.unbind(0)])
    with _vae_forwards(module, planes):
        out: T = module(hidden_states, temb)
    return out


def vae_encoder(module: nn.Module, hidden_states: T) -> T:
    with _vae_forwards(module, iter(())):
        out: T = module(hidden_states)
    return out


@contextmanager
def _vae_forwards(module: nn.Module, noise: Iterator[T]) -> Iterator[None]:
    kinds = {"LTXVideoCausalConv3d": (_conv,), "LTXVideoResnetBlock3d": (_resnet, noise)}
    with ExitStack() as stack:
        for cls, (forward, *more) in kinds.items():
            named = [m for m in module.modules() if type(m).__name__ == cls]
            stack.enter_context(_forwards(named, forward, *more))
        yield


def _conv(conv: Any, x: T) -> T:
    """LTXVideoCausalConv3d.forward with its frame repetition as one edge padding."""
    from torch.nn.functional import pad

    extra = conv.kernel_size[0] - 1
    before, after = (extra, 0) if conv.is_causal else (extra // 2, extra // 2)
    out: T = conv.conv(pad(x, (0, 0, 0, 0, before, after), mode="replicate") if extra else x)
    return out


def _resnet(block: Any, noise: Iterator[T], x: T, temb: T | None = None, generator: Any = None) -> T:
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
    return y + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu_conv(block: Any, norm: Any, conv: Any, x: T, shift: T | None, scale: T | None) -> Any:
    variance = x.float().pow(2).mean(1, keepdim=True)
    y = (x * (variance + norm.eps).rsqrt()).to(x.dtype)
    if shift is not None and scale is not None:
        y = y * (1 + scale) + shift
    return conv(block.nonlinearity(y))


# ── from a diffusers call to named inputs ────────────────────────────────────────────


def adapt_denoiser(
    module: nn.Module,
    hidden_states: T,
    encoder_hidden_states: T,
    timestep: T,
    encoder_attention_mask: T,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: T | None = None,
    attention_kwargs: Any = None,
    return_dict: bool = True,
    *,
    per_token: bool,
) -> dict[str, T]:
    """The engine's inputs for a call of LTXVideoTransformer3DModel (same arguments).

    Pipelines give every item of a batch the same timestep and coordinates, so those of the
    first stand for all, unless `per_token`.
    """
    batch, tokens = hidden_states.shape[:2]
    rope: Any = module.rope
    coords = None if video_coords is None else video_coords[:1]
    cos, sin = rope(hidden_states[:1], num_frames, height, width, rope_interpolation_scale, coords)
    times = timestep.reshape(batch, -1).float()
    return {
        "hidden_states": hidden_states,
        "encoder_hidden_states": encoder_hidden_states,
        "timestep": times.expand(batch, tokens).contiguous() if per_token else times[0, :1],
        "encoder_attention_mask": encoder_attention_mask.to(hidden_states.dtype),
        "rope_cos": cos[..., 0::2].contiguous(),  # the stock tables hold each value twice
        "rope_sin": sin[..., 0::2].contiguous(),
    }


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
        "timestep": torch.where(fixed, 20.0, 750.0) if per_token else torch.full((batch,), 750.0),
        "encoder_attention_mask": keep.float(),
        "video_coords": coords.expand(batch, -1, -1),
        "return_dict": False,
    }


def adapt_vae_decoder(
    module: nn.Module, hidden_states: T, temb: T | None = None, *, noise: tuple[Tensor, ...] = ()
) -> dict[str, T]:
    """Noise planes are drawn here, one by one, exactly as the stock decoder would draw them."""
    import torch

    height, width = hidden_states.shape[-2:]
    out = {"hidden_states": hidden_states} | ({} if temb is None else {"temb": temb})
    for spec in noise:
        scale = int(str(spec.dims[1]).partition("_x")[2])
        size = (height * scale, width * scale)
        like = {"device": hidden_states.device, "dtype": hidden_states.dtype}
        out[spec.name] = torch.stack([torch.randn(size, **like) for _ in range(int(spec.dims[0]))])
    return out


def sample_vae_decoder(
    module: nn.Module, sizes: Sizes, generator: Any, *, channels: int, timed: bool
) -> dict[str, Any]:
    import torch

    shape = (1, channels, sizes["frames"], sizes["height"], sizes["width"])
    temb = {"temb": torch.tensor([0.05])} if timed else {}
    return {"hidden_states": torch.randn(shape, generator=generator)} | temb


def adapt_vae_encoder(module: nn.Module, hidden_states: T) -> dict[str, T]:
    return {"hidden_states": hidden_states}


def sample_vae_encoder(module: nn.Module, sizes: Sizes, generator: Any, *, channels: int) -> dict[str, Any]:
    import torch

    shape = (1, channels, sizes["frames"], sizes["height"], sizes["width"])
    return {"hidden_states": torch.rand(shape, generator=generator) * 2 - 1}
