"""HunyuanVideo (Tencent): 13B text- and image-to-video, and HunyuanVideo 1.5 (8.3B).

Configurations are those of diffusers' conversion of the published checkpoints. Papers:
arXiv:2412.03603 (HunyuanVideo), arXiv:2511.18870 (HunyuanVideo 1.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from overcrank.models import _few_steps, _hunyuan_dit, _hunyuan_vae
from overcrank.models._common import token_sizes
from overcrank.models._family import Family
from overcrank.models.base import Arguments, Component, Config, Media, Sizes, Variant, VideoShape, renderings

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


class HunyuanVideo(Family):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        dit, vae, latent = variant.configs["transformer"], variant.configs["vae"], partial(self.latent, variant)
        newer, patch = _hunyuan_dit.is_newer(dit), _hunyuan_dit.patch_of(dit)

        def sizes(shape: VideoShape) -> Sizes:
            return token_sizes(latent(shape), patch, text=variant.text_length, text_2=TEXT_2_LENGTH)

        denoiser = _hunyuan_dit.component(self.denoiser_classes[newer], dit, sizes, {"text_2": 7})
        cls = "AutoencoderKLHunyuanVideo15" if newer else "AutoencoderKLHunyuanVideo"
        return (denoiser, *_hunyuan_vae.components(vae, latent, cls))

    def prepare(self, pipe: Any, variant: Variant) -> None:
        pipe.vae.enable_tiling()

    def size_of(self, variant: Variant, height: int, width: int) -> tuple[int, int]:
        """What 1.5 makes of a picture: of as many patches as a square has, nearest in shape, not longer."""
        step, target = (
            variant.configs["vae"]["spatial_compression_ratio"],
            variant.configs["transformer"]["target_size"],
        )
        area, ratio = round((target / step) ** 2), height / width
        sizes: list[tuple[float, int, int]] = []
        h, w = area, 1
        while h:  # the largest sizes within the area, from tall to wide
            if max(h, w) <= 4 * min(h, w):
                sizes.append((round(h / w, 5), h * step, w * step))
            h, w = (h, w + 1) if h * (w + 1) <= area else (h - 1, w)
        able = [size for size in sizes if (size[0] <= ratio if ratio >= 1 else size[0] >= ratio)]
        _, tall, wide = min(able, key=lambda size: abs(size[0] - ratio))
        return tall, wide

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """1.5 guides through an object of its own."""
        if hasattr(pipe, "guider"):
            pipe.guider = pipe.guider.new(guidance_scale=arguments["guidance_scale"])
        return super().call_arguments(pipe, variant, media, arguments)


FAMILY = HunyuanVideo(
    title="HunyuanVideo",
    default="hunyuan-video-13b",
    denoiser_classes=("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"),
    variants=VARIANTS,
    presets=_few_steps.HUNYUAN_VIDEO,
)
