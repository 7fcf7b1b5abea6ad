"""Stable Video Diffusion (Stability AI): image-to-video, 14 and 25 frames.

Configurations are those of the published checkpoints. Paper: arXiv:2311.15127.
"""

from __future__ import annotations

from typing import Any

from overcrank.models import _clip, _kl_vae, _unet
from overcrank.models.base import (
    Arguments,
    Component,
    Config,
    Media,
    Repository,
    TensorSpec,
    Variant,
    VideoShape,
    renderings,
)

CHUNK = 8  # frames decoded at a time: the temporal decoder takes 1.2 GB a frame at 1024 × 576

_UNET: Config = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "num_attention_heads": (5, 10, 20, 20),
    "num_frames": 25,
}
_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}


_SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}


def _variant(name: str, hub: str, title: str, frames: int, steps: int, guidance: tuple[float, float]) -> Variant:
    """`guidance` of the first and the last frame."""
    return Variant(
        name=name,
        family="svd",
        title=title,
        hub_id=f"stabilityai/{hub}",
        repositories=(Repository(f"stabilityai/{hub}", files="fp16"),),
        configs={
            "unet": _UNET | {"num_frames": frames},
            "vae": _VAE,
            "image_encoder": _clip.VIT_H,
            "scheduler": _SCHEDULER,
        },
        native=VideoShape(576, 1024, frames),
        minimum=VideoShape(256, 256, 2),
        maximum=VideoShape(576, 1024, 25),
        fps=7,
        dtypes={"": "fp16"},
        renders=renderings(
            {"image-to-video": "StableVideoDiffusionPipeline"},
            guidance=guidance[1],
            steps=steps,
            arguments={"min_guidance_scale": guidance[0], "motion_bucket_id": 127, "noise_aug_strength": 0.02},
            source="github.com/Stability-AI/generative-models: scripts/sampling; diffusers has 25 steps, 1 to 3",
        ),
        text_length=0,
    )


VARIANTS: tuple[Variant, ...] = (
    _variant("svd-img2vid", "stable-video-diffusion-img2vid", "Stable Video Diffusion", 14, 25, (1.0, 2.5)),
    _variant("svd-xt", "stable-video-diffusion-img2vid-xt", "Stable Video Diffusion XT", 25, 30, (1.5, 3.0)),
    _variant(
        "svd-xt-1.1", "stable-video-diffusion-img2vid-xt-1-1", "Stable Video Diffusion XT 1.1", 25, 30, (1.5, 3.0),
    ),
)  # fmt: skip


class StableVideoDiffusion(_unet.UNetFamily):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        unet, vae = variant.configs["unet"], variant.configs["vae"]
        ids = unet["projection_class_embeddings_input_dim"] // unet["addition_time_embed_dim"]
        conditions = (
            TensorSpec("encoder_hidden_states", ("batch", 1, unet["cross_attention_dim"])),
            TensorSpec("added_time_ids", ("batch", ids)),
        )
        denoiser = _unet.component(
            self.denoiser_classes[0], unet, conditions, frames_first=True, stride=_kl_vae.stride(vae)
        )
        return (denoiser, *_kl_vae.temporal_components(vae, CHUNK), _clip.component(variant.configs["image_encoder"]))

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """Guidance grows along the frames, there is no text."""
        guidance = arguments.pop("guidance_scale", variant.rendering().guidance)
        return arguments | {
            "image": media.images[0],
            "fps": round(media.fps),
            "max_guidance_scale": guidance,
            "decode_chunk_size": CHUNK,
        }


FAMILY = StableVideoDiffusion(
    title="Stable Video Diffusion",
    default="svd-xt-1.1",
    denoiser_classes=("UNetSpatioTemporalConditionModel",),
    variants=VARIANTS,
)
