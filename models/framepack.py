"""FramePack (lllyasviel): HunyuanVideo 13B that continues a picture section by section, to any length.

Each section of 33 frames is denoised beside clean frames of the others, kept at three scales. Paper:
"Packing Input Frame Context in Next-Frame Prediction Models", arXiv:2504.12626.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

from overcrank.models import _hunyuan_dit, _hunyuan_vae, hunyuan_video
from overcrank.models._common import token_sizes
from overcrank.models._family import Family
from overcrank.models.base import (
    Arguments,
    Component,
    Config,
    Media,
    Repository,
    Sizes,
    Variant,
    VideoShape,
    renderings,
)

WINDOW = 9  # latent frames of a section
HISTORY = {"latents_clean": (2, 1), "latents_history_2x": (2, 2), "latents_history_4x": (16, 4)}  # (frames, scale)
TRACED = {"latents_clean": 6, "latents_history_2x": 5, "latents_history_4x": 7}  # tokens of each, while tracing

_DIT: Config = hunyuan_video.DIT | {
    "has_image_proj": True,
    "image_proj_dim": 1152,
    "has_clean_x_embedder": True,
}
_TASKS = dict.fromkeys(("image-to-video", "first-last-frame"), "HunyuanVideoFramepackPipeline")
_FORWARDS = {"image-to-video": "HunyuanVideoFramepackPipeline"}  # F1 does not know how the video ends

# The publisher's repositories hold the transformer alone; the other parts are HunyuanVideo's, and FLUX Redux's SigLIP.
_OTHER_PARTS = (
    Repository(
        "hunyuanvideo-community/HunyuanVideo",
        parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"),
    ),
    Repository("lllyasviel/flux_redux_bfl", parts=("image_encoder", "feature_extractor")),
)


def _variant(name: str, hub: str, title: str, tasks: Mapping[str, str], **arguments: Any) -> Variant:
    return Variant(
        name=name,
        family="framepack",
        title=title,
        hub_id=hub,
        repositories=(Repository(hub, parts=("transformer",), top="transformer"), *_OTHER_PARTS),
        configs={
            "transformer": _DIT,
            "vae": hunyuan_video.VAE,
            "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
        },
        native=VideoShape(640, 640, 129),
        minimum=VideoShape(256, 256, 5),
        maximum=VideoShape(640, 640, 1025),  # a section is as large whatever the video's length
        fps=30,
        dtypes=hunyuan_video.DTYPES,
        renders=renderings(
            tasks,
            guidance=10.0,
            steps=25,
            contrasted=False,
            arguments={"latent_window_size": WINDOW, **arguments},
            source="github.com/lllyasviel/FramePack: demo_gradio.py; diffusers' documentation has 30 steps, guidance 9",
            differs="the original samples with UniPC, which diffusers' pipeline was not made for",
        ),
        text_length=256,
    )


VARIANTS: tuple[Variant, ...] = (
    _variant("framepack-i2v-13b", "lllyasviel/FramePackI2V_HY", "FramePack I2V 13B", _TASKS),
    _variant(
        "framepack-f1-i2v-13b",
        "lllyasviel/FramePack_F1_I2V_HY_20250503",
        "FramePack F1 I2V 13B",
        _FORWARDS,
        sampling_type="vanilla",
    ),
)


class FramePack(Family):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        """The denoiser sees one section and its history, whatever the length of the video."""
        dit, latent = variant.configs["transformer"], partial(self.latent, variant)
        patch = _hunyuan_dit.patch_of(dit)

        def sizes(shape: VideoShape) -> Sizes:
            _, height, width = latent(shape)
            history = {
                name: ceil(frames / scale) * ceil(height / (2 * scale)) * ceil(width / (2 * scale))
                for name, (frames, scale) in HISTORY.items()
            }
            return token_sizes((WINDOW, height, width), patch, text=variant.text_length, **history)

        (cls,) = self.denoiser_classes
        denoiser = _hunyuan_dit.component(cls, dit, sizes, TRACED, framepack=True)
        return (denoiser, *_hunyuan_vae.components(variant.configs["vae"], latent))

    def prepare(self, pipe: Any, variant: Variant) -> None:
        pipe.vae.enable_tiling()

    def rounds(self, variant: Variant, shape: VideoShape) -> int:
        """Sections of the video; each runs through all the steps."""
        return max(1, ceil(shape.frames / ((WINDOW - 1) * self.strides(variant)[1] + 1)))

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        keywords = arguments | {"image": media.images[0]}
        if len(media.images) > 1:
            keywords["last_image"] = media.images[max(media.images)]
        return keywords


FAMILY = FramePack(
    title="FramePack",
    default="framepack-i2v-13b",
    denoiser_classes=("HunyuanVideoFramepackTransformer3DModel",),
    variants=VARIANTS,
)
