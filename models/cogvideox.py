"""CogVideoX (Zhipu AI): 2B and 5B text-, image- and video-to-video; 1.5.

Configurations are those of diffusers' conversion of the published checkpoints. Paper:
arXiv:2408.06072.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.models import _cogvideox_vae
from overcrank.models._common import (
    PerOwnerCache,
    attend,
    embedded,
    flat,
    forwards,
    given,
    one_time,
    patches,
    rotated,
    sample_output,
    shallow,
    state_of,
    token_count,
    token_sizes,
    unpatched_first,
)
from overcrank.models._family import Family, Grid
from overcrank.models.base import (
    Arguments,
    Call,
    Component,
    Config,
    LatentOf,
    Media,
    Repository,
    Sizes,
    TensorSpec,
    Variant,
    VideoShape,
    renderings,
)

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

TEXT_LENGTH = 226

# ── published checkpoints ────────────────────────────────────────────────────────────

_2B: Config = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": 512,
    "ofs_embed_dim": None,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "attention_bias": True,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
}
_5B: Config = _2B | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_5B_IMAGE: Config = _5B | {"in_channels": 32, "use_learned_positional_embeddings": True}
_15: Config = _5B | {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
_15_IMAGE: Config = _15 | {"in_channels": 32, "ofs_embed_dim": 512}
_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 3,
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.15258426,
}
_TEXT = {"text-to-video": "CogVideoXPipeline", "video-to-video": "CogVideoXVideoToVideoPipeline"}
_TEXT_ALONE = {"text-to-video": "CogVideoXPipeline"}  # 1.5 encodes a video to as many frames as no patch divides
_IMAGE = {"image-to-video": "CogVideoXImageToVideoPipeline"}


_SCHEDULER: Config = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
_DPM = "CogVideoXDPMScheduler"  # the publisher's choice for 5B, with guidance that grows along the steps


def _variant(name: str, hub: str, title: str, dit: Config, tasks: Mapping[str, str]) -> Variant:
    newer = dit["patch_size_t"] is not None
    native = VideoShape(768, 1360, 81) if newer else VideoShape(480, 720, 49)
    scale = 0.7 if newer or "5b" in name else 1.15258426
    small = "2b" in name
    return Variant(
        name=name,
        family="cogvideox",
        title=title,
        hub_id=f"zai-org/{hub}",
        repositories=(Repository(f"zai-org/{hub}", former=(f"THUDM/{hub}",)),),
        configs={
            "transformer": dit,
            "vae": _VAE | {"scaling_factor": scale} | ({"invert_scale_latents": True} if newer else {}),
            "scheduler": _SCHEDULER | {"snr_shift_scale": 3.0 if small else 1.0},
        },
        native=native,
        minimum=VideoShape(256, 256, 9),
        maximum=native,
        fps=16 if newer else 8,
        dtypes={"": "fp16" if small else "bf16"},
        renders=renderings(
            tasks,
            guidance=6.0,
            steps=50,
            scheduler={"_class_name": _SCHEDULER["_class_name"] if small else _DPM, "timestep_spacing": "trailing"},
            source="github.com/zai-org/CogVideo: inference/cli_demo.py",
        ),
        text_length=TEXT_LENGTH,
    )


VARIANTS: tuple[Variant, ...] = (
    _variant("cogvideox-2b", "CogVideoX-2b", "CogVideoX 2B", _2B, _TEXT),
    _variant("cogvideox-5b", "CogVideoX-5b", "CogVideoX 5B", _5B, _TEXT),
    _variant("cogvideox-5b-i2v", "CogVideoX-5b-I2V", "CogVideoX 5B I2V", _5B_IMAGE, _IMAGE),
    _variant("cogvideox-1.5-5b", "CogVideoX1.5-5B", "CogVideoX 1.5 5B", _15, _TEXT_ALONE),
    _variant("cogvideox-1.5-5b-i2v", "CogVideoX1.5-5B-I2V", "CogVideoX 1.5 5B I2V", _15_IMAGE, _IMAGE),
)

# ── shapes and components ────────────────────────────────────────────────────────────


class CogVideoX(Family):
    def strides(self, variant: Variant) -> tuple[int, int]:
        vae = variant.configs["vae"]
        return 2 ** (len(vae["block_out_channels"]) - 1), vae["temporal_compression_ratio"]

    def grid(self, variant: Variant) -> Grid:
        """The VAE works on pairs of latent frames after the first."""
        step = 8 * variant.configs["transformer"]["patch_size"]
        return {"height": (step, 0), "width": (step, 0), "frames": (8, 1)}

    def components(self, variant: Variant) -> tuple[Component, ...]:
        latent = partial(self.latent, variant)
        return (
            _denoiser(variant.configs["transformer"], latent),
            *_cogvideox_vae.components(variant.configs["vae"], latent),
        )

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """Guidance is dynamic on the DPM scheduler."""
        keywords = super().call_arguments(pipe, variant, media, arguments)
        if media.video:
            keywords |= {"video": list(media.video), "strength": media.strength}
        return keywords | {"use_dynamic_cfg": type(pipe.scheduler).__name__ == _DPM}


FAMILY = CogVideoX(
    title="CogVideoX",
    default="cogvideox-5b",
    denoiser_classes=("CogVideoXTransformer3DModel",),
    variants=VARIANTS,
)


def _denoiser(config: Config, latent: LatentOf) -> Component:
    patch = (config["patch_size_t"] or 1, config["patch_size"], config["patch_size"])
    features = prod(patch)
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    inputs = [
        TensorSpec("hidden_states", ("batch", "tokens", config["in_channels"] * features)),
        TensorSpec("encoder_hidden_states", ("batch", "text", config["text_embed_dim"])),
        TensorSpec("timestep", (1,), "float32"),
    ]
    if config["use_rotary_positional_embeddings"]:
        half = config["attention_head_dim"] // 2
        inputs += [TensorSpec(n, (1, "tokens", half), "float32") for n in ("rope_cos", "rope_sin")]
    if not config["use_rotary_positional_embeddings"] or config["use_learned_positional_embeddings"]:
        inputs.append(TensorSpec("position", (1, "tokens", inner)))
    if config["ofs_embed_dim"]:
        inputs.append(TensorSpec("ofs", (1,), "float32"))
    names = tuple(t.name for t in inputs)

    def sizes(shape: VideoShape) -> Sizes:
        frames, height, width = latent(shape)
        frames += -frames % patch[0]  # the 1.5 pipelines round up to whole patches
        return token_sizes((frames, height, width), patch, batch=shape.batch, text=TEXT_LENGTH)

    return Component(
        name="denoiser",
        cls=FAMILY.denoiser_classes[0],
        subfolder="transformer",
        config=config,
        **shallow(config),
        inputs=tuple(inputs),
        outputs=(TensorSpec("sample", ("batch", "tokens", config["out_channels"] * features)),),
        forward=partial(_traced, names=names),
        adapt=partial(_adapt, names=names, patch=patch),
        returns=partial(_returns, patch=patch),
        sample=partial(_sample, names=names, patch=patch),
        sizes=sizes,
        trace_sizes={"batch": 2, "tokens": 24, "text": 12},
        free_axes={"text": 1},
        fed=("patch_embed.pos_embedding",),
    )


# ── what is traced ───────────────────────────────────────────────────────────────────


def _traced(module: nn.Module, *inputs: T, names: tuple[str, ...]) -> tuple[T, T]:
    """CogVideoXTransformer3DModel.forward on patches; tokens and text stay flat, [1, B·S, C], outside attention."""
    m: Any = module
    of = dict(zip(names, inputs, strict=True))
    tokens, text = of["hidden_states"], of["encoder_hidden_states"]
    batch, dtype = tokens.shape[0], tokens.dtype
    temb = m.time_embedding(m.time_proj(of["timestep"]).to(dtype))
    if "ofs" in of:
        temb = temb + m.ofs_embedding(m.ofs_proj(of["ofs"]).to(dtype))
    proj = m.patch_embed.proj
    x = proj(tokens) if m.config.patch_size_t else embedded(proj, tokens)
    if "position" in of:
        x = x + of["position"]
    x, c = flat(x), flat(m.patch_embed.text_proj(text))
    rope = (of["rope_cos"][:, :, None, :, None], of["rope_sin"][:, :, None, :, None]) if "rope_cos" in of else None
    sizes = (batch, text.shape[1])
    with forwards(list(m.transformer_blocks), _block):
        for block in m.transformer_blocks:
            x, c = block(x, c, temb, rope, sizes)
    shift, scale = (v[:, None] for v in m.norm_out.linear(m.norm_out.silu(temb)).chunk(2, dim=1))
    out: T = m.proj_out(m.norm_out.norm(m.norm_final(x)) * (1 + scale) + shift)
    return out.reshape(batch, -1, out.shape[-1]), c


def _block(block: Any, x: T, c: T, temb: T, rope: Any, sizes: tuple[Any, Any]) -> tuple[T, T]:
    shift, scale, gate, c_shift, c_scale, c_gate = _values(block.norm1, temb)
    norm = block.norm1.norm
    y, d = _joint(block.attn1, norm(x) * (1 + scale) + shift, norm(c) * (1 + c_scale) + c_shift, rope, sizes)
    x, c = x + gate * y, c + c_gate * d
    shift, scale, gate, c_shift, c_scale, c_gate = _values(block.norm2, temb)
    norm = block.norm2.norm
    x = x + gate * block.ff(norm(x) * (1 + scale) + shift)
    c = c + c_gate * block.ff(norm(c) * (1 + c_scale) + c_shift)
    return x, c


def _values(norm: Any, temb: T) -> list[T]:
    return [v[:, None] for v in norm.linear(norm.silu(temb)).chunk(6, dim=1)]


def _joint(attn: Any, x: T, c: T, rope: Any, sizes: tuple[Any, Any]) -> tuple[T, T]:
    """Video tokens x and text c attend to both; the batch comes apart only here."""
    import torch

    batch, length = sizes

    def heads(to: Any, norm: Any, tokens: T, rope: Any) -> T:
        t: T = to(tokens).reshape(batch, -1, x.shape[-1])
        if norm is None:
            return t
        t = norm(t.unflatten(2, (attn.heads, -1)))
        out: T = (rotated(t, *rope) if rope is not None else t).flatten(2)
        return out

    q, k, v = (
        torch.cat([heads(to, norm, c, None), heads(to, norm, x, rope if norm is not None else None)], dim=1)
        for to, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
    )
    out = attend(q, k, v, attn.heads)
    return attn.to_out[0](flat(out[:, length:])), attn.to_out[0](flat(out[:, :length]))


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables, _positions = PerOwnerCache(), PerOwnerCache()


def _adapt(module: nn.Module, call: Call, *, names: tuple[str, ...], patch: tuple[int, int, int]) -> dict[str, Any]:
    """The engine's inputs for a call of CogVideoXTransformer3DModel, whose batch shares one timestep."""
    m: Any = module
    latents: T = call["hidden_states"]  # [B, F, C, H, W]
    inputs: dict[str, Any] = {"hidden_states": patches(latents.transpose(1, 2), patch)}
    inputs["timestep"] = one_time(call["timestep"], latents.device)
    if "rope_cos" in names:
        cos, sin = given(call, "image_rotary_emb")["image_rotary_emb"]
        halves = _tables.get(cos, latents.device, lambda: [t[None, :, 0::2].float().contiguous() for t in (cos, sin)])
        inputs["rope_cos"], inputs["rope_sin"] = (t.to(latents.device) for t in halves)
    if "position" in names:
        key = (latents.shape[1:], latents.dtype, latents.device, state_of(m.patch_embed.buffers()))
        inputs["position"] = _positions.get(module, key, lambda: _position(m.patch_embed, latents))
    if "ofs" in names:
        inputs["ofs"] = one_time(given(call, "ofs")["ofs"], latents.device)
    return inputs | given(call, "encoder_hidden_states")


def _position(embed: Any, latents: T) -> T:
    """CogVideoXPatchEmbed's embedding of the video's tokens; that of text is zero."""
    _, frames, _, height, width = latents.shape
    length = (frames - 1) * embed.temporal_compression_ratio + 1
    if (height, width, length) == (embed.sample_height, embed.sample_width, embed.sample_frames):
        joint = embed.pos_embedding
    else:
        joint = embed._get_positional_embeddings(height, width, length, device=latents.device)
    out: T = joint[:, embed.max_text_seq_length :].to(latents.device, latents.dtype)
    return out


def _returns(outputs: Mapping[str, T], call: Mapping[str, Any], *, patch: tuple[int, int, int]) -> Any:
    like = call["hidden_states"].transpose(1, 2)
    return sample_output(unpatched_first(outputs["sample"], like, patch).transpose(1, 2), call)


def _sample(
    module: nn.Module, sizes: Sizes, generator: Any, *, names: tuple[str, ...], patch: tuple[int, int, int]
) -> dict[str, Any]:
    import torch

    config: Any = module.config
    batch, frames, height, width = (sizes[n] for n in ("batch", "frames", "height", "width"))
    length = TEXT_LENGTH if "position" in names else sizes["text"]
    if config.use_learned_positional_embeddings:
        height, width = config.sample_height, config.sample_width
    shape = (batch, frames, config.in_channels, height, width)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(batch, length, config.text_embed_dim, generator=generator),
        "timestep": torch.tensor(750).expand(batch),
        "return_dict": False,
    }
    if "rope_cos" in names:
        angles = torch.rand(
            token_count((frames, height, width), patch), config.attention_head_dim // 2, generator=generator
        )
        angles = angles.repeat_interleave(2, dim=1) * 6
        call["image_rotary_emb"] = (angles.cos(), angles.sin())
    if "ofs" in names:
        call["ofs"] = torch.full((1,), 2.0)
    return call
