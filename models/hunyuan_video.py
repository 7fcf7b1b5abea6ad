"""HunyuanVideo (Tencent): 13B text- and image-to-video, and HunyuanVideo 1.5 (8.3B).

Configurations are those of diffusers' conversion of the published checkpoints. Papers:
arXiv:2412.03603 (HunyuanVideo), arXiv:2511.18870 (HunyuanVideo 1.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from overcrank.models import _few_steps, _hunyuan_dit, _hunyuan_vae
from overcrank.models._common import token_count
from overcrank.models.base import (
    Arguments,
    Component,
    Config,
    Media,
    Repeat,
    Sizes,
    TensorSpec,
    Variant,
    VideoShape,
    renderings,
)

TITLE = "HunyuanVideo"
DEFAULT = "hunyuan-video-13b"
DENOISER_CLASSES = ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel")
PRESETS = _few_steps.HUNYUAN_VIDEO
TRACED_BLOCKS = 3

# ── published checkpoints ────────────────────────────────────────────────────────────

DIT: Config = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
    "image_condition_type": None,
}
_CONCAT: Config = DIT | {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}
_REPLACE: Config = DIT | {"image_condition_type": "token_replace"}
_NEWER: Config = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
    "target_size": 640,
    "task_type": "t2v",
    "use_meanflow": False,
}
VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}
_VAE_NEWER: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "block_out_channels": (128, 256, 512, 1024, 1024),
    "layers_per_block": 2,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "downsample_match_channel": True,
    "upsample_match_channel": True,
    "scaling_factor": 1.03682,
}
TEXT = {"text-to-video": "HunyuanVideoPipeline"}
IMAGE = {"image-to-video": "HunyuanVideoImageToVideoPipeline"}
_TEXT_NEWER = {"text-to-video": "HunyuanVideo15Pipeline"}
_IMAGE_NEWER = {"image-to-video": "HunyuanVideo15ImageToVideoPipeline"}
_129 = VideoShape(720, 1280, 129)
DTYPES = {"": "fp16", "transformer": "bf16"}
_REPOSITORY = {
    "HunyuanVideoPipeline": "HunyuanVideo",
    "HunyuanVideoImageToVideoPipeline": "HunyuanVideo-I2V",
    "HunyuanVideo15Pipeline": "HunyuanVideo-1.5",
    "HunyuanVideo15ImageToVideoPipeline": "HunyuanVideo-1.5",
}


def _variant(
    name: str,
    hub: str,
    title: str,
    dit: Config,
    vae: Config,
    shift: float,
    tasks: Mapping[str, str] = TEXT,
    native: VideoShape = _129,
    maximum: VideoShape | None = None,
    text_length: int = 256,
    guidance: float = 6.0,
    carried: float = 0.0,
) -> Variant:
    """`shift` is the publisher's; `carried` the one in the checkpoint's own scheduler, if it is another."""
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": carried or shift}
    return Variant(
        name=name,
        family="hunyuan_video",
        title=title,
        hub_id=f"hunyuanvideo-community/{hub}",
        configs={"transformer": dit, "vae": vae, "scheduler": scheduler},
        native=native,
        minimum=VideoShape(256, 256, 5),
        maximum=maximum or native,
        fps=24,
        dtypes={"": "bf16"} if vae is _VAE_NEWER else DTYPES,
        renders=renderings(
            tasks,
            guidance=guidance,
            steps=50,
            scheduler={"shift": shift},
            sized=tasks != _IMAGE_NEWER,
            contrasted=vae is _VAE_NEWER,
            source=f"github.com/Tencent-Hunyuan/{_REPOSITORY[next(iter(tasks.values()))]}: README.md; types: "
            "diffusers' documentation",
        ),
        text_length=text_length,
    )


_PLACES: Mapping[str, Any] = {"tasks": IMAGE, "text_length": 1024}  # the picture's tokens are among the text's
_480P: Mapping[str, Any] = {"native": VideoShape(480, 848, 121), "text_length": 1000}
_720P: Mapping[str, Any] = {"native": VideoShape(720, 1280, 121), "text_length": 1000}
_I2V: Config = _NEWER | {"task_type": "i2v"}
_15 = "HunyuanVideo-1.5-Diffusers"

VARIANTS: tuple[Variant, ...] = (
    _variant("hunyuan-video-13b", "HunyuanVideo", "HunyuanVideo 13B", DIT, VAE, 7.0),
    _variant(  # 17 moves more; 7 is for the steady mode, the only one that diffusers' pipeline has
        "hunyuan-video-13b-i2v", "HunyuanVideo-I2V", "HunyuanVideo 13B I2V", _REPLACE, VAE, 7.0, carried=17.0, **_PLACES
    ),
    _variant(
        "hunyuan-video-13b-i2v-33ch", "HunyuanVideo-I2V-33ch", "HunyuanVideo 13B I2V, 33 channels",
        _CONCAT, VAE, 7.0, guidance=1.0, **_PLACES,
    ),
    _variant(
        "hunyuan-video-1.5-480p", f"{_15}-480p_t2v", "HunyuanVideo 1.5 480p",
        _NEWER, _VAE_NEWER, 5.0, tasks=_TEXT_NEWER, **_480P,
    ),
    _variant(
        "hunyuan-video-1.5-480p-i2v", f"{_15}-480p_i2v", "HunyuanVideo 1.5 480p I2V",
        _I2V, _VAE_NEWER, 5.0, tasks=_IMAGE_NEWER, maximum=VideoShape(480, 864, 121), **_480P,  # for square pictures
    ),
    _variant(
        "hunyuan-video-1.5-720p", f"{_15}-720p_t2v", "HunyuanVideo 1.5 720p",
        _NEWER | {"target_size": 960}, _VAE_NEWER, 9.0, tasks=_TEXT_NEWER, **_720P,
    ),
    _variant(
        "hunyuan-video-1.5-720p-i2v", f"{_15}-720p_i2v", "HunyuanVideo 1.5 720p I2V",
        _I2V | {"target_size": 960}, _VAE_NEWER, 7.0, tasks=_IMAGE_NEWER, **_720P,
    ),
)  # fmt: skip
TEXT_2_LENGTH = 256  # tokens of the byT5 encoder that reads quoted words

# ── shapes and components ────────────────────────────────────────────────────────────


def grid(variant: Variant) -> dict[str, tuple[int, int]]:
    """Valid sizes of each axis as (step, offset)."""
    vae = variant.configs["vae"]
    step = vae["spatial_compression_ratio"] * variant.configs["transformer"]["patch_size"]
    return {"height": (step, 0), "width": (step, 0), "frames": (vae["temporal_compression_ratio"], 1)}


def latent(variant: Variant, shape: VideoShape) -> tuple[int, int, int]:
    """Latent (frames, height, width) of a video shape."""
    vae = variant.configs["vae"]
    side = vae["spatial_compression_ratio"]
    return (shape.frames - 1) // vae["temporal_compression_ratio"] + 1, shape.height // side, shape.width // side


def components(variant: Variant) -> tuple[Component, ...]:
    vae = variant.configs["vae"]
    newer = "text_embed_2_dim" in variant.configs["transformer"]
    cls = "AutoencoderKLHunyuanVideo15" if newer else "AutoencoderKLHunyuanVideo"
    return (_denoiser(variant, newer), *_hunyuan_vae.components(vae, lambda s: latent(variant, s), cls))


def _denoiser(variant: Variant, newer: bool) -> Component:
    config = variant.configs["transformer"]
    inputs = _hunyuan_dit.inputs_of(config, newer=newer)
    names = tuple(t.name for t in inputs)
    patch = _hunyuan_dit.patch_of(config)

    def sizes(shape: VideoShape) -> Sizes:
        frames, height, width = latent(variant, shape)
        texts = {"text": variant.text_length, "text_2": TEXT_2_LENGTH}
        sides = {"frames": frames, "height": height, "width": width}  # of no input; `sample` makes latents of them
        return {"tokens": token_count((frames, height, width), patch)} | texts | sides

    features = config["out_channels"] * patch[0] * patch[1] * patch[2]
    traced, repeats = shallow(config)
    return Component(
        name="denoiser",
        cls=DENOISER_CLASSES[newer],
        subfolder="transformer",
        config=config,
        traced_config=traced,
        repeats=repeats,
        inputs=inputs,
        outputs=(TensorSpec("sample", (1, "tokens", features)),),
        forward=partial(_hunyuan_dit.newer_denoiser if newer else _hunyuan_dit.denoiser, names=names),
        adapt=partial(_hunyuan_dit.adapt, names=names, config=config),
        returns=partial(_hunyuan_dit.output, patch=patch),
        sample=partial(_hunyuan_dit.sample, names=names),
        sizes=sizes,
        trace_sizes={"tokens": 24, "text": 12, "text_2": 7},
        free_axes={"text": 1} | ({"text_2": 1} if newer else {}),
    )


def shallow(config: Config) -> tuple[Config, tuple[Repeat, ...]]:
    """The configuration that is traced, and the chains of it that are repeated."""
    chains = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
    deep = {field: path for field, path in chains.items() if config.get(field, 0) > TRACED_BLOCKS}
    repeats = tuple(Repeat(path, TRACED_BLOCKS, config[field]) for field, path in deep.items())
    return ({**config, **dict.fromkeys(deep, TRACED_BLOCKS)} if deep else {}), repeats


# ── rendering ────────────────────────────────────────────────────────────────────────


def size_of(variant: Variant, height: int, width: int) -> tuple[int, int]:
    """(height, width) that 1.5 makes of a picture: of as many patches as a square has, nearest in shape, not longer."""
    step, target = variant.configs["vae"]["spatial_compression_ratio"], variant.configs["transformer"]["target_size"]
    area, asked = round((target / step) ** 2), height / width
    sizes: list[tuple[float, int, int]] = []
    h, w = area, 1
    while h:  # the largest sizes within the area, from tall to wide
        if max(h, w) <= 4 * min(h, w):
            sizes.append((round(h / w, 5), h * step, w * step))
        h, w = (h, w + 1) if h * (w + 1) <= area else (h - 1, w)
    able = [size for size in sizes if (size[0] <= asked if asked >= 1 else size[0] >= asked)]
    _, tall, wide = min(able, key=lambda size: abs(size[0] - asked))
    return tall, wide


def prepare(pipe: Any, variant: Variant) -> None:
    _hunyuan_vae.prepare(pipe)


def call_arguments(pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
    """Arguments of the pipelines' calls beyond those all share; 1.5 guides through an object of its own."""
    if hasattr(pipe, "guider"):
        pipe.guider = pipe.guider.new(guidance_scale=arguments["guidance_scale"])
    return arguments | ({"image": media.images[0]} if media.images else {})
