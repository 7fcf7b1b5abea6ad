"""Wan 2.1 and 2.2 (Alibaba): text, image, first/last frame and video to video; VACE.

Configurations are those of the published checkpoints, as diffusers' conversion of the
original files gives them. The two experts of 2.2 A14B are one architecture: one engine serves
both, each with its own weights. Paper: "Wan: Open and Advanced Large-Scale Video Generative
Models", arXiv:2503.20314.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from overcrank.models import _clip, _few_steps, _negative_prompts, _wan_dit, _wan_vae
from overcrank.models._family import Family
from overcrank.models.base import Arguments, Component, Config, Media, Variant, VideoShape, renderings

# ── published checkpoints ────────────────────────────────────────────────────────────

DIT: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
DIT_SMALL: Config = DIT | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_FIVE: Config = DIT | {
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_IMAGE: Config = DIT | {"in_channels": 36}
_CLIP_IMAGE: Config = _IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}
_FLF: Config = _CLIP_IMAGE | {"pos_embed_seq_len": 514}
_VACE: Config = {"vace_in_channels": 96}
_VACE_SMALL: Config = DIT_SMALL | _VACE | {"vace_layers": tuple(range(0, 30, 2))}
_VACE_BIG: Config = DIT | _VACE | {"vace_layers": tuple(range(0, 40, 5))}

VAE_21: Config = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
# Of the latents of 2.2's own VAE; 2.1's are the class's defaults.
MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.157,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
VAE_22: Config = VAE_21 | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": MEAN_22,
    "latents_std": STD_22,
}
_TASKS = {
    "text": {"text-to-video": "WanPipeline", "video-to-video": "WanVideoToVideoPipeline"},
    "experts": {"text-to-video": "WanPipeline"},  # the pipeline of videos has but one expert
    "image": {"image-to-video": "WanImageToVideoPipeline"},
    "frames": {"first-last-frame": "WanImageToVideoPipeline"},
    "image, frames": {"image-to-video": "WanImageToVideoPipeline", "first-last-frame": "WanImageToVideoPipeline"},
    "both": {"text-to-video": "WanPipeline", "image-to-video": "WanImageToVideoPipeline"},
    "vace": {"text-to-video": "WanVACEPipeline", "video-to-video": "WanVACEPipeline"},
}
_SIZE = {
    "480p": VideoShape(480, 832, 81),
    "720p": VideoShape(720, 1280, 81),
    "704p": VideoShape(704, 1280, 121),
}


# What the checkpoints carry; that of SkyReels V2 is the same at another shift.
SCHEDULER: Config = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
DTYPES = {"": "bf16", "vae": "fp32", "image_encoder": "fp32"}
_SOURCE = "github.com/Wan-Video/Wan{}: generate.py, README.md, wan/configs"


def _variant(
    name: str,
    hub: str,
    dit: Config,
    does: str,
    size: str,
    shift: float,
    carried: float = 3.0,
    fps: int = 16,
    **more: Any,
) -> Variant:
    """`shift` is the publisher's; `carried` the one in the checkpoint's own scheduler."""
    configs: dict[str, Config] = {
        "transformer": dit,
        "vae": VAE_22 if dit["in_channels"] == 48 else VAE_21,
        "scheduler": SCHEDULER | {"flow_shift": carried},
    }
    if "a14b" in name:  # two experts of one architecture
        configs["transformer_2"] = dit
    if dit["image_dim"]:
        configs["image_encoder"] = _clip.VIT_H
    usual: dict[str, Any] = {
        "guidance": 5.0,
        "steps": 50,
        "negative_prompt": _negative_prompts.WAN_IMAGE if dit["image_dim"] else _negative_prompts.WAN,
        "scheduler": {"flow_shift": shift},
        "source": _SOURCE.format(name[4:7]),
    }
    hub_id = f"Wan-AI/{hub}-{'diffusers' if does == 'vace' or 'FLF2V' in hub else 'Diffusers'}"
    return Variant(
        name=name,
        family="wan",
        title=f"Wan {name[4:7]} {name[8:].replace('-', ' ').upper()}",
        hub_id=hub_id,
        configs=configs,
        native=_SIZE[size],
        minimum=VideoShape(256, 256, 1 if does in ("text", "both", "vace", "experts") else 5),
        maximum=_SIZE[size],
        text_length=_wan_dit.TEXT_LENGTH,
        fps=fps,
        dtypes=DTYPES,
        renders=renderings(_TASKS[does], **(usual | more)),
    )


_SMALL_STEPS: Any = {
    "guidance": 6.0,
    "source": _SOURCE.format("2.1") + "; the README asks for shift 8 to 12 and guidance 6 of this size",
}
_TWO_GUIDES: Any = {"guidance": 4.0, "guidance_2": 3.0, "steps": 40}
_TWO_GUIDES_IMAGE: Any = {"guidance": 3.5, "guidance_2": 3.5, "steps": 40}
VARIANTS: tuple[Variant, ...] = (
    _variant("wan-2.1-t2v-1.3b", "Wan2.1-T2V-1.3B", DIT_SMALL, "text", "480p", 8.0, **_SMALL_STEPS),
    _variant("wan-2.1-t2v-14b", "Wan2.1-T2V-14B", DIT, "text", "720p", 5.0),
    _variant("wan-2.1-i2v-14b-480p", "Wan2.1-I2V-14B-480P", _CLIP_IMAGE, "image", "480p", 3.0, steps=40),
    _variant("wan-2.1-i2v-14b-720p", "Wan2.1-I2V-14B-720P", _CLIP_IMAGE, "image", "720p", 5.0, steps=40),
    _variant("wan-2.1-flf2v-14b-720p", "Wan2.1-FLF2V-14B-720P", _FLF, "frames", "720p", 16.0, carried=16.0),
    _variant("wan-2.1-vace-1.3b", "Wan2.1-VACE-1.3B", _VACE_SMALL, "vace", "480p", 16.0),
    _variant("wan-2.1-vace-14b", "Wan2.1-VACE-14B", _VACE_BIG, "vace", "720p", 16.0),
    _variant("wan-2.2-ti2v-5b", "Wan2.2-TI2V-5B", _FIVE, "both", "704p", 5.0, carried=5.0, fps=24),
    _variant("wan-2.2-t2v-a14b", "Wan2.2-T2V-A14B", DIT, "experts", "720p", 12.0, **_TWO_GUIDES),
    _variant("wan-2.2-i2v-a14b", "Wan2.2-I2V-A14B", _IMAGE, "image, frames", "720p", 5.0, **_TWO_GUIDES_IMAGE),
)


class Wan(Family):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        """2.2 TI2V gives each token a timestep, the others one to all; only 2.1 looks at images through CLIP."""
        dit, vae, latent = variant.configs["transformer"], variant.configs["vae"], partial(self.latent, variant)
        cls = self.denoiser_classes[1 if dit.get("vace_layers") else 0]
        denoiser = _wan_dit.component(cls, dit, latent, per_token=vae["z_dim"] == 48, also_serves=("transformer_2",))
        encoder = variant.configs.get("image_encoder")
        images = (_clip.component(encoder, hidden=-2),) if encoder and dit.get("image_dim") else ()
        return (denoiser, *_wan_vae.components(vae, latent), *images)

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        keywords = dict(arguments)
        if media.images:
            keywords["image"] = media.images[0]
        if len(media.images) > 1:
            keywords["last_image"] = media.images[max(media.images)]
        if media.video:
            keywords["video"] = media.video
        if media.video and not variant.configs["transformer"].get("vace_layers"):
            keywords["strength"] = media.strength
            keywords.pop("num_frames", None)  # as many as the video has
        return keywords


FAMILY = Wan(
    title="Wan",
    default="wan-2.2-ti2v-5b",
    denoiser_classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    variants=VARIANTS,
    presets=_few_steps.WAN,
    part_words={"high": "transformer", "low": "transformer_2"},  # experts of high and of low noise
    guides_apart=True,
)
