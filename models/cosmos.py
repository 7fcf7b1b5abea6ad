"""Cosmos (NVIDIA): world models Predict1, Predict2 and Predict2.5.

Configurations are those of diffusers' conversion of the published checkpoints. Papers:
arXiv:2501.03575 (Cosmos), arXiv:2511.00062 (Cosmos-Predict2.5). The pipelines need NVIDIA's
guardrail (`pip install cosmos_guardrail`) and torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.errors import RequestError, ShapeError
from overcrank.models import _cosmos_vae, _negative_prompts, _wan_vae, wan
from overcrank.models._common import (
    PerOwnerCache,
    attend,
    forwards,
    given,
    one_time,
    patches,
    sample_output,
    shallow,
    state_of,
    token_count,
)
from overcrank.models._family import Family
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

TEXT_LENGTH = 512

# ── published checkpoints ────────────────────────────────────────────────────────────

_DIT: Config = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "num_layers": 28,
    "mlp_ratio": 4.0,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": "learnable",
}
_BIG = {"num_attention_heads": 40, "num_layers": 36}
_BIG_ONE: Config = _DIT | _BIG | {"rope_scale": (2.0, 2.0, 2.0)}
_VIDEO = {"in_channels": 17}
_TWO: Config = _DIT | _VIDEO | {
    "num_attention_heads": 16, "extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0),
}  # fmt: skip
_TWO_BIG: Config = _TWO | _BIG | {"rope_scale": (20 / 24, 2.0, 2.0)}
_TWO_FIVE = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
    "rope_scale": (1.0, 3.0, 3.0),
}
_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "encoder_block_out_channels": (128, 256, 512, 512),
    "decode_block_out_channels": (256, 512, 512, 512),
    "attention_resolutions": (32,),
    "resolution": 1024,
    "num_layers": 2,
    "patch_size": 4,
    "patch_type": "haar",
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 8,
}
_TEXT = {"text-to-video": "CosmosTextToWorldPipeline"}
_TO_WORLD = dict.fromkeys(("image-to-video", "video-to-video"), "CosmosVideoToWorldPipeline")
_TO_WORLD_2 = dict.fromkeys(("image-to-video", "video-to-video"), "Cosmos2VideoToWorldPipeline")
_ANY_2_5 = dict.fromkeys(("text-to-video", "image-to-video", "video-to-video"), "Cosmos2_5_PredictBasePipeline")

_REVISION_25 = "diffusers/base/post-trained"  # main holds the original checkpoints alone


_SCHEDULERS: Mapping[str, Config] = {
    "1": {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    "2": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
    "2.5": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_karras_sigmas": True,
        "use_flow_sigmas": True,
        "sigma_min": 0.01,
        "sigma_max": 200.0,
    },
}


def _variant(name: str, hub: str, dit: Config, tasks: Mapping[str, str]) -> Variant:
    first = "predict1" in name
    native = VideoShape(704, 1280, 121 if first else 93)
    newest = bool(dit.get("use_crossattn_projection"))
    generation = "1" if first else "2.5" if newest else "2"
    return Variant(
        name=name,
        family="cosmos",
        title=name.replace("cosmos-p", "Cosmos P").replace("-", " ").title().replace("2B", "2B"),
        hub_id=f"nvidia/{hub}",
        repositories=(Repository(f"nvidia/{hub}", revision=_REVISION_25),) if "predict2.5" in name else (),
        configs={"transformer": dit, "vae": _VAE if first else wan.VAE_21, "scheduler": _SCHEDULERS[generation]},
        native=native,
        minimum=VideoShape(256, 256, 9),
        maximum=native,
        fps=24 if first else 16,
        renders=renderings(
            tasks,
            guidance=7.0,
            steps=35 if generation == "2" else 36,
            negative_prompt=_negative_prompts.COSMOS,
            source=f"github.com/nvidia-cosmos/cosmos-predict{generation} and the model's page, which runs diffusers",
            differs={
                "1": "the original counts 35 steps and one to the clean video; diffusers has 30 fps",
                "2": "",
                "2.5": "the original: 35 steps, 77 frames, a sampler of its own at shift 5",
            }[generation],
        ),
        text_length=TEXT_LENGTH,
    )


_P1 = "Cosmos-1.0-Diffusion"
VARIANTS: tuple[Variant, ...] = (
    _variant("cosmos-predict1-7b-text2world", f"{_P1}-7B-Text2World", _DIT, _TEXT),
    _variant("cosmos-predict1-7b-video2world", f"{_P1}-7B-Video2World", _DIT | _VIDEO, _TO_WORLD),
    _variant("cosmos-predict1-14b-text2world", f"{_P1}-14B-Text2World", _BIG_ONE, _TEXT),
    _variant("cosmos-predict1-14b-video2world", f"{_P1}-14B-Video2World", _BIG_ONE | _VIDEO, _TO_WORLD),
    _variant("cosmos-predict2-2b-video2world", "Cosmos-Predict2-2B-Video2World", _TWO, _TO_WORLD_2),
    _variant("cosmos-predict2-14b-video2world", "Cosmos-Predict2-14B-Video2World", _TWO_BIG, _TO_WORLD_2),
    _variant("cosmos-predict2.5-2b", "Cosmos-Predict2.5-2B", _TWO | _TWO_FIVE, _ANY_2_5),
    _variant("cosmos-predict2.5-14b", "Cosmos-Predict2.5-14B", _TWO | _BIG | _TWO_FIVE, _ANY_2_5),
)

# ── shapes and components ────────────────────────────────────────────────────────────


class Cosmos(Family):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        vae, latent = variant.configs["vae"], partial(self.latent, variant)
        coded = _wan_vae.components if "scale_factor_spatial" in vae else _cosmos_vae.components
        return (_denoiser(variant.configs["transformer"], latent), *coded(vae, latent))

    def clip_of(self, variant: Variant, shape: VideoShape) -> tuple[int, bool]:
        """The last frames, two latent ones: the world goes on from there, as the originals do it."""
        return self.strides(variant)[1] + 1, True

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        keywords = super().call_arguments(pipe, variant, media, arguments)
        if media.video and arguments["num_frames"] <= len(media.video):
            raise RequestError(
                f"frames {arguments['num_frames']}: the video begins with the last {len(media.video)} of the one "
                f"given; ask for more."
            )
        if media.video:
            keywords["video"] = list(media.video)
        if not variant.configs["transformer"].get("use_crossattn_projection"):
            keywords["fps"] = int(media.fps)
        return keywords


FAMILY = Cosmos(
    title="Cosmos",
    default="cosmos-predict2-2b-video2world",
    denoiser_classes=("CosmosTransformer3DModel",),
    variants=VARIANTS,
    guides_apart=True,
)


def _denoiser(config: Config, latent: LatentOf) -> Component:
    """Predict1 has one timestep for all; Predict2 and 2.5 have one for each latent frame."""
    patch = tuple(config["patch_size"])
    features = prod(patch)
    mask = 1 if config["concat_padding_mask"] else 0
    learned = bool(config["extra_pos_embed_type"])
    text = config["crossattn_proj_in_channels"] if config.get("use_crossattn_projection") else config["text_embed_dim"]
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    inputs = [
        TensorSpec("hidden_states", ("frames", "pixels", (config["in_channels"] + mask) * features)),
        TensorSpec("encoder_hidden_states", (1, "text", text)),
        TensorSpec("timestep", (1,) if learned else ("frames",), "float32"),
        TensorSpec("rope_cos", ("frames", "pixels", dim // 2), "float32"),
        TensorSpec("rope_sin", ("frames", "pixels", dim // 2), "float32"),
        *((TensorSpec("extra_pos_emb", ("frames", "pixels", heads * dim)),) if learned else ()),
    ]

    def sizes(shape: VideoShape) -> Sizes:
        frames, height, width = latent(shape)  # the sides, of no input, are what `sample` makes latents of
        pixels = token_count((1, height, width), (1, *patch[1:]))
        return {"frames": frames, "pixels": pixels, "text": TEXT_LENGTH, "height": height, "width": width}

    return Component(
        name="denoiser",
        cls=FAMILY.denoiser_classes[0],
        subfolder="transformer",
        config=config,
        **shallow(config),
        inputs=tuple(inputs),
        outputs=(TensorSpec("sample", ("frames", "pixels", config["out_channels"] * features)),),
        forward=_traced,
        adapt=partial(_adapt, learned=learned),
        returns=partial(_returns, patch=patch),
        sample=partial(_sample, learned=learned, text=text),
        sizes=sizes,
        trace_sizes={"pixels": 8, "text": 12, "frames": 3},
        free_axes={"text": 1},
    )


# ── what is traced ───────────────────────────────────────────────────────────────────


def _traced(module: nn.Module, x: T, text: T, timestep: T, cos: T, sin: T, position: T | None = None) -> T:
    """CosmosTransformer3DModel.forward on patches [F, P, C], so that a frame's values need no copy for each token."""
    m: Any = module
    x = m.patch_embed.proj(x)
    temb, time = m.time_embed(x, timestep)
    if m.config.use_crossattn_projection:
        text = m.crossattn_proj(text)
    rope = tuple(t.flatten(0, 1)[None, :, None] for t in (cos, sin))
    with forwards(list(m.transformer_blocks), _block):
        for block in m.transformer_blocks:
            x = block(x, text, time, temb, rope, position)
    shift, scale = _values(m.norm_out, time, temb[:, : 2 * x.shape[-1]], 2)
    out: T = m.proj_out(m.norm_out.norm(x) * (1 + scale) + shift)
    return out


def _values(norm: Any, time: T, temb: T, count: int) -> tuple[T, ...]:
    """adaLN values [F, 1, C], or [1, 1, C] for all frames."""
    rows = (norm.linear_2(norm.linear_1(norm.activation(time))) + temb).chunk(count, dim=-1)
    return tuple(row[:, None] for row in rows)


def _block(block: Any, x: T, text: T, time: T, temb: T, rope: Any, position: T | None) -> T:
    if position is not None:
        x = x + position
    shift, scale, gate = _values(block.norm1, time, temb, 3)
    y = block.norm1.norm(x) * (1 + scale) + shift
    x = x + gate * _attention(block.attn1, y, y, rope)
    shift, scale, gate = _values(block.norm2, time, temb, 3)
    x = x + gate * _attention(block.attn2, block.norm2.norm(x) * (1 + scale) + shift, text, None)
    shift, scale, gate = _values(block.norm3, time, temb, 3)
    out: T = x + gate * block.ff(block.norm3.norm(x) * (1 + scale) + shift)
    return out


def _attention(attn: Any, x: T, context: T, rope: Any) -> Any:
    """x [F, P, C] attends to context, as one sequence of all frames."""
    q, k, v = (to(t) for to, t in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context)))
    q, k, v = (t.reshape(1, -1, t.shape[-1]) for t in (q, k, v))
    q, k = (norm(t.unflatten(2, (attn.heads, -1))) for norm, t in ((attn.norm_q, q), (attn.norm_k, k)))
    if rope is not None:
        q, k = _turned(q, *rope), _turned(k, *rope)
    out = attn.to_out[0](attend(q.flatten(2), k.flatten(2), v, attn.heads))
    return out.reshape(x.shape[0], -1, x.shape[-1])


def _turned(x: T, cos: T, sin: T) -> T:
    """Rotary embedding whose pairs are the halves of a head: x [1, S, h, d], cos and sin [1, S, 1, d / 2]."""
    import torch

    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ── from a diffusers call to named inputs ────────────────────────────────────────────

_tables = PerOwnerCache()


def _adapt(module: nn.Module, call: Call, *, learned: bool) -> dict[str, Any]:
    """The engine's inputs for a call of CosmosTransformer3DModel (same arguments)."""
    import torch
    from torch.nn.functional import interpolate

    m: Any = module
    latents: T = call["hidden_states"]
    if len(latents) != 1:
        raise ShapeError(f"this call renders {len(latents)} videos at once; render one at a time")
    if isinstance(call.get("encoder_hidden_states"), tuple):
        raise ShapeError("this call gives its text together with an image's context")
    if call.get("condition_mask") is not None:
        latents = torch.cat([latents, call["condition_mask"].to(latents.dtype)], dim=1)
    if m.config.concat_padding_mask:
        padding = given(call, "padding_mask")["padding_mask"]
        mask = interpolate(padding.to(latents.dtype), latents.shape[-2:], mode="nearest")
        latents = torch.cat([latents, mask.unsqueeze(2).expand(latents.shape[0], -1, latents.shape[2], -1, -1)], dim=1)
    fps = call.get("fps")
    state = state_of(m.learnable_pos_embed.parameters()) if learned else ()
    key = (latents.shape[2:], latents.device, latents.dtype, float(fps) if fps is not None else None, state)
    places = _tables.get(module, key, lambda: _places(m, latents, fps, learned))
    times = call["timestep"].reshape(-1).float()
    if learned and call["timestep"].ndim > 1 and not bool((times == times[0]).all()):
        raise ShapeError("this call gives each frame its timestep, and the engine takes one for all")
    times = one_time(times, latents.device) if learned else times.expand(latents.shape[2])
    tokens = patches(latents, tuple(m.config.patch_size))
    frames = latents.shape[2]
    inputs: dict[str, Any] = {"hidden_states": tokens.reshape(frames, -1, tokens.shape[-1]), "timestep": times}
    inputs |= places | given(call, "encoder_hidden_states")
    return inputs


def _places(m: Any, latents: T, fps: Any, learned: bool) -> dict[str, T]:
    """Rotary tables [F, P, d / 2], whose stock halves are equal, and the learned embedding [F, P, C]."""
    frames = latents.shape[2]
    cos, sin = (t[:, : t.shape[-1] // 2].float().unflatten(0, (frames, -1)) for t in m.rope(latents[:1], fps=fps))
    tables = {"rope_cos": cos.contiguous(), "rope_sin": sin.contiguous()}
    if learned:
        tables["extra_pos_emb"] = m.learnable_pos_embed(latents[:1])[0].unflatten(0, (frames, -1))
    return tables


def _returns(outputs: Mapping[str, T], call: Mapping[str, Any], *, patch: tuple[int, ...]) -> Any:
    """[F, P, patch · C], features in the stock order, → [1, C, F, H, W]."""
    t, h, w = (n // p for n, p in zip(call["hidden_states"].shape[2:], patch, strict=True))
    x = outputs["sample"].reshape(1, t, h, w, patch[1], patch[2], patch[0], -1)
    video = x.permute(0, 7, 1, 6, 2, 4, 3, 5).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return sample_output(video, call)


def _sample(module: nn.Module, sizes: Sizes, generator: Any, *, learned: bool, text: int) -> dict[str, Any]:
    import torch

    config: Any = module.config
    frames, height, width = (sizes[n] for n in ("frames", "height", "width"))
    conditioned = config.in_channels > config.out_channels
    call: dict[str, Any] = {
        "hidden_states": torch.randn(1, config.out_channels, frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(1, sizes["text"], text, generator=generator),
        "timestep": torch.tensor([0.75]),
        "fps": 16,
        "padding_mask": torch.zeros(1, 1, height * 8, width * 8),
        "return_dict": False,
    }
    if conditioned:
        call["condition_mask"] = (torch.rand(1, 1, frames, 1, 1, generator=generator) < 0.3).float()
        call["condition_mask"] = call["condition_mask"].expand(-1, -1, -1, height, width)
    if not learned:
        call["timestep"] = torch.rand(1, 1, frames, 1, 1, generator=generator)
    return call
