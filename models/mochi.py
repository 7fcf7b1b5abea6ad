"""Mochi 1 (Genmo): a 10 B text-to-video transformer of two unequal streams.

The configuration is that of diffusers' conversion of the published checkpoint.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.models._common import (
    PerOwnerCache,
    attend,
    embedded,
    forwards,
    from_patches,
    given,
    one_time,
    patched,
    patches,
    random_call,
    rotated,
    shallow,
    token_sizes,
)
from overcrank.models._family import Family
from overcrank.models.base import Call, Component, Config, LatentOf, Sizes, TensorSpec, Variant, VideoShape, renderings

if TYPE_CHECKING:
    from torch import Tensor as T
    from torch import nn

TEXT_LENGTH = 256
TILE = 256  # pixels: AutoencoderKLMochi's tile_sample_min_height and width

_DIT: Config = {
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "qk_norm": "rms_norm",
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "activation_fn": "swiglu",
    "max_sequence_length": TEXT_LENGTH,
}
_VAE: Config = {
    "in_channels": 15,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 128, 256, 384),
    "decoder_block_out_channels": (128, 256, 512, 768),
    "latent_channels": 12,
    "layers_per_block": (3, 3, 4, 6, 3),
    "act_fn": "silu",
    "temporal_expansions": (1, 2, 3),
    "spatial_expansions": (2, 2, 2),
    "add_attention_block": (False, True, True, True, True),
    "scaling_factor": 1.0,
}
VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="mochi-1-preview",
        family="mochi",
        title="Mochi 1 preview",
        hub_id="genmo/mochi-1-preview",
        configs={
            "transformer": _DIT,
            "vae": _VAE,
            "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        },
        native=VideoShape(480, 848, 85),
        minimum=VideoShape(256, 256, 7),
        maximum=VideoShape(480, 848, 163),
        fps=30,
        dtypes={"": "bf16", "vae": "fp32", "text_encoder": "fp32"},
        renders=renderings(
            {"text-to-video": "MochiPipeline"},
            guidance=4.5,
            steps=64,
            source="github.com/genmoai/mochi: README.md, demos/api_example.py; linear-quadratic steps from 0.025",
            differs="the demo's command line has guidance 6 as its default",
        ),
        text_length=TEXT_LENGTH,
    ),
)

# ── shapes and components ────────────────────────────────────────────────────────────


class Mochi(Family):
    def strides(self, variant: Variant) -> tuple[int, int]:
        vae = variant.configs["vae"]
        return prod(vae["spatial_expansions"]), prod(vae["temporal_expansions"])

    def components(self, variant: Variant) -> tuple[Component, ...]:
        latent = partial(self.latent, variant)
        return _denoiser(variant, latent), _vae_decoder(variant.configs["vae"], latent, self.strides(variant)[0])

    def prepare(self, pipe: Any, variant: Variant) -> None:
        """Decoding 480p at once takes more memory than cards have."""
        pipe.vae.enable_tiling()


FAMILY = Mochi(
    title="Mochi", default="mochi-1-preview", denoiser_classes=("MochiTransformer3DModel",), variants=VARIANTS
)


def _denoiser(variant: Variant, latent: LatentOf) -> Component:
    config = variant.configs["transformer"]
    side, heads = config["patch_size"], config["num_attention_heads"]
    patch = (1, side, side)
    features = config["in_channels"] * side**2
    rope: tuple[int | str, ...] = ("tokens", heads, config["attention_head_dim"] // 2)
    return Component(
        name="denoiser",
        cls=FAMILY.denoiser_classes[0],
        subfolder="transformer",
        config=config,
        **shallow(config, after=1),
        inputs=(
            TensorSpec("hidden_states", (1, "tokens", features)),
            TensorSpec("encoder_hidden_states", (1, "text", config["text_embed_dim"])),
            TensorSpec("encoder_attention_mask", (1, "text")),
            TensorSpec("timestep", (1,), "float32"),
            TensorSpec("rope_cos", rope, "float32"),
            TensorSpec("rope_sin", rope, "float32"),
        ),
        outputs=(TensorSpec("sample", (1, "tokens", features)),),
        forward=_traced,
        adapt=partial(_adapt, patch=patch),
        returns=partial(from_patches, patch=patch),
        sample=_sample,
        sizes=lambda shape: token_sizes(latent(shape), patch, text=TEXT_LENGTH, batch=shape.batch),
        trace_sizes={"tokens": 24, "text": 12},
        free_axes={"text": 1},
    )


def _vae_decoder(vae: Config, latent: LatentOf, stride: int) -> Component:
    x = TensorSpec("hidden_states", (1, vae["latent_channels"], "frames", "height", "width"))

    def tile(shape: VideoShape) -> Sizes:
        frames, height, width = latent(shape)
        side = TILE // stride
        return {"frames": frames, "height": min(height, side), "width": min(width, side)}

    return Component(
        name="vae_decoder",
        cls="AutoencoderKLMochi",
        subfolder="vae",
        attribute="decoder",
        config=vae,
        inputs=(x,),
        outputs=(TensorSpec("sample", (1, vae["out_channels"], "out_frames", "out_height", "out_width")),),
        forward=_decoded,
        adapt=_adapt_decoder,
        returns=lambda outputs, call: (outputs["sample"], {}),
        sample=partial(random_call, specs=(x,)),
        sizes=tile,
        trace_sizes={"frames": 3, "height": 5, "width": 6},
    )


# ── what is traced ───────────────────────────────────────────────────────────────────


def _traced(module: nn.Module, x: T, text: T, mask: T, timestep: T, cos: T, sin: T) -> T:
    """MochiTransformer3DModel.forward on patches; padding is masked where the stock attention cuts it off."""
    from torch.nn.functional import pad

    m: Any = module
    tokens = embedded(m.patch_embed.proj, x)
    temb, c = m.time_embed(timestep, text, mask, hidden_dtype=x.dtype)
    bias = pad((1 - mask) * -10000.0, (tokens.shape[1], 0))[:, None, None, :]
    rope = (cos[..., None], sin[..., None])
    with forwards(list(m.transformer_blocks), _block):
        for block in m.transformer_blocks:
            tokens, c = block(tokens, c, temb, bias, rope)
    out: T = m.proj_out(m.norm_out(tokens, temb))
    return out


def _block(block: Any, x: T, c: T, temb: T, bias: T, rope: tuple[T, T]) -> tuple[T, T]:
    """MochiTransformerBlock.forward; the last block has no text stream of its own left."""
    y, gate, scale_mlp, gate_mlp = block.norm1(x, temb)
    d, *more = block.norm1_context(c, temb) if not block.context_pre_only else (block.norm1_context(c, temb),)
    y, d = _joint(block.attn1, y, d, bias, rope)
    x = _residual(block, "", x, y, gate, scale_mlp, gate_mlp)
    return (x, _residual(block, "_context", c, d, *more)) if more else (x, c)


def _residual(block: Any, stream: str, x: T, y: T, gate: T, scale_mlp: T, gate_mlp: T) -> T:
    norm2, norm3, norm4, ff = (getattr(block, f"{n}{stream}") for n in ("norm2", "norm3", "norm4", "ff"))
    x = x + norm2(y, gate.tanh()[:, None])
    out: T = x + norm4(ff(norm3(x, 1 + scale_mlp[:, None].float())), gate_mlp.tanh()[:, None])
    return out


def _joint(attn: Any, x: T, c: T, bias: T, rope: tuple[T, T]) -> tuple[T, T]:
    """Video tokens x and text c attend to both."""
    import torch

    def heads(to: Any, norm: Any, tokens: T) -> T:
        result: T = norm(to(tokens).unflatten(2, (attn.heads, -1)))
        return result

    q = torch.cat([rotated(heads(attn.to_q, attn.norm_q, x), *rope), heads(attn.add_q_proj, attn.norm_added_q, c)], 1)
    k = torch.cat([rotated(heads(attn.to_k, attn.norm_k, x), *rope), heads(attn.add_k_proj, attn.norm_added_k, c)], 1)
    v = torch.cat([attn.to_v(x), attn.add_v_proj(c)], dim=1)
    out, length = attend(q.flatten(2), k.flatten(2), v, attn.heads, bias), x.shape[1]
    last = attn.to_add_out(out[:, length:]) if hasattr(attn, "to_add_out") else c
    return attn.to_out[0](out[:, :length]), last


def _decoded(module: nn.Module, hidden_states: T) -> T:
    with patched(module, {"MochiChunkedGroupNorm3D": _norm}):
        out: T = module(hidden_states)[0]
    return out


def _norm(norm: Any, x: T) -> T:
    """MochiChunkedGroupNorm3D.forward, all frames at once."""
    out: T = norm.norm_layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return out


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables = PerOwnerCache()


def _adapt(module: nn.Module, call: Call, *, patch: tuple[int, int, int]) -> dict[str, Any]:
    """The engine's inputs for a call of MochiTransformer3DModel, whose batch shares one timestep."""
    import torch

    m: Any = module
    latents: T = call["hidden_states"]  # [B, C, F, H, W]
    frames, height, width = latents.shape[2:]
    grid = (frames, height // patch[1], width // patch[2])
    inputs = given(call, "encoder_hidden_states", "encoder_attention_mask")
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].to(latents.dtype)
    inputs["hidden_states"] = patches(latents, patch)
    inputs["timestep"] = one_time(call["timestep"], latents.device)
    key = (grid, latents.device, m.pos_frequencies._version)
    place = {"device": latents.device, "dtype": torch.float32}
    cos, sin = _tables.get(m.pos_frequencies, key, lambda: m.rope(m.pos_frequencies, *grid, **place))
    return inputs | {"rope_cos": cos, "rope_sin": sin}


def _adapt_decoder(module: nn.Module, call: Call) -> dict[str, Any]:
    return given(call, "hidden_states")  # its convolutions repeat the first frame and keep no cache


def _sample(module: nn.Module, sizes: Sizes, generator: Any) -> dict[str, Any]:
    import torch

    config: Any = module.config
    batch, length = sizes["batch"], sizes["text"]
    latents = (batch, config.in_channels, *(sizes[n] for n in ("frames", "height", "width")))
    lengths = torch.tensor([length // 2 + 1, *[0] * (batch - 1)])  # an empty prompt is all padding
    return {
        "hidden_states": torch.randn(latents, generator=generator),
        "encoder_hidden_states": torch.randn(batch, length, config.text_embed_dim, generator=generator),
        "encoder_attention_mask": torch.arange(length)[None] < lengths[:, None],
        "timestep": torch.tensor(750.0).expand(batch),
        "return_dict": False,
    }
