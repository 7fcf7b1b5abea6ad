"""SkyReels V2 (Skywork): text- and image-to-video, and diffusion forcing for long videos.

The networks are Wan's with one embedding more. Diffusion forcing gives every latent frame its
own timestep; its causal mode (`ar_step`, `causal_block_size`) runs in PyTorch. Paper:
arXiv:2504.13074.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from overcrank.errors import RequestError
from overcrank.models import _clip, _negative_prompts, _wan_dit, _wan_vae, wan
from overcrank.models._family import Family
from overcrank.models.base import Arguments, Component, Config, Media, Rendering, Variant, VideoShape

OVERLAP, NOISE = 17, 20  # frames a longer video's windows share, and the noise on them, as its authors recommend

_BIG: Config = wan.DIT | {"inject_sample_info": False, "num_frame_per_block": 1}
_SMALL: Config = wan.DIT_SMALL | {"inject_sample_info": False, "num_frame_per_block": 1}
_PICTURE = {"in_channels": 36, "image_dim": 1280}
_KV = {"added_kv_proj_dim": 5120}
_T2V = {"text-to-video": "SkyReelsV2Pipeline"}
_I2V = dict.fromkeys(("image-to-video", "first-last-frame"), "SkyReelsV2ImageToVideoPipeline")
_DF = {
    "text-to-video": "SkyReelsV2DiffusionForcingPipeline",
    "image-to-video": "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "video-to-video": "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
}
_SIZE = {"540p": VideoShape(544, 960, 97), "720p": VideoShape(720, 1280, 121)}


_SOURCE = "github.com/SkyworkAI/SkyReels-V2: README.md, generate_video.py, generate_video_df.py"


def _rendering(task: str, pipeline: str) -> Rendering:
    """From pictures at less shift and guidance than from text; diffusion forcing in 30 steps, the others in 50."""
    pictured, forcing = task in ("image-to-video", "first-last-frame"), pipeline in _DF.values()
    noted = " (its table of options; a note says shift 3.0)" if pictured else ""
    return Rendering(
        pipeline,
        steps=30 if forcing else 50,
        guidance=5.0 if pictured else 6.0,
        scheduler={"flow_shift": 5.0 if pictured else 8.0},
        negative_prompt=_negative_prompts.WAN if forcing else _negative_prompts.SKYREELS,
        source=_SOURCE + noted,
    )


def _variant(name: str, hub: str, dit: Config, tasks: Any, size: str) -> Variant:
    configs: dict[str, Config] = {
        "transformer": dit,
        "vae": wan.VAE_21,
        "scheduler": wan.SCHEDULER | {"flow_shift": 1.0},
    }
    if dit["image_dim"]:
        configs["image_encoder"] = _clip.VIT_H
    return Variant(
        name=name,
        family="skyreels",
        title=name.replace("skyreels-v2-", "SkyReels V2 ").upper().replace("SKYREELS", "SkyReels").replace("-", " "),
        hub_id=f"Skywork/SkyReels-V2-{hub}-Diffusers",
        configs=configs,
        native=_SIZE[size],
        minimum=VideoShape(256, 256, 5),
        maximum=_SIZE[size],
        fps=24,
        dtypes=wan.DTYPES,
        renders={task: _rendering(task, pipeline) for task, pipeline in tasks.items()},
        text_length=_wan_dit.TEXT_LENGTH,
    )


_SMALL_DF: Config = _SMALL | {"inject_sample_info": True}
VARIANTS: tuple[Variant, ...] = (
    _variant("skyreels-v2-t2v-14b-540p", "T2V-14B-540P", _BIG, _T2V, "540p"),
    _variant("skyreels-v2-t2v-14b-720p", "T2V-14B-720P", _BIG, _T2V, "720p"),
    _variant(
        "skyreels-v2-i2v-1.3b-540p", "I2V-1.3B-540P", _SMALL | _PICTURE | {"added_kv_proj_dim": 1536}, _I2V, "540p"
    ),
    _variant("skyreels-v2-i2v-14b-540p", "I2V-14B-540P", _BIG | _PICTURE | _KV, _I2V, "540p"),
    _variant("skyreels-v2-i2v-14b-720p", "I2V-14B-720P", _BIG | _PICTURE | _KV, _I2V, "720p"),
    _variant("skyreels-v2-df-1.3b-540p", "DF-1.3B-540P", _SMALL_DF, _DF, "540p"),
    _variant("skyreels-v2-df-14b-540p", "DF-14B-540P", _BIG, _DF, "540p"),
    _variant("skyreels-v2-df-14b-720p", "DF-14B-720P", _BIG, _DF, "720p"),
)


class SkyReels(Family):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        """`denoiser` takes one timestep; `denoiser_forcing` one for each latent frame: diffusion forcing."""
        dit, latent = variant.configs["transformer"], partial(self.latent, variant)
        forcing = variant.tasks == _DF
        (cls,) = self.denoiser_classes
        plain = _wan_dit.component(cls, dit, latent, default=not forcing)
        forced = _wan_dit.component(cls, dit, latent, name="denoiser_forcing", per_token=True, default=forcing)
        encoder = variant.configs.get("image_encoder")  # diffusion forcing has none, whatever its transformer takes
        images = (_clip.component(encoder, hidden=-2),) if encoder and dit.get("image_dim") else ()
        return (plain, forced, *_wan_vae.components(variant.configs["vae"], latent), *images)

    def clip_of(self, variant: Variant, shape: VideoShape) -> tuple[int, bool]:
        """Diffusion forcing goes on from the last frames."""
        return (OVERLAP, True) if variant.tasks == _DF else super().clip_of(variant, shape)

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """A long video goes window by window."""
        if variant.tasks != _DF:
            return wan.FAMILY.call_arguments(pipe, variant, media, arguments)
        frames = arguments["num_frames"]
        keywords = arguments | {"fps": 16 if media.fps <= 16 else 24, "base_num_frames": variant.native.frames}
        keywords |= {"image": media.images[0]} if media.images else {}
        if media.video and frames <= OVERLAP:
            raise RequestError(
                f"frames {frames}: the video begins with the last {OVERLAP} of the one given; ask for more."
            )
        if media.video:
            keywords["video"] = list(media.video)
        if media.video or frames > variant.native.frames:
            keywords |= {"overlap_history": OVERLAP, "addnoise_condition": NOISE}
        return keywords


FAMILY = SkyReels(
    title="SkyReels V2",
    default="skyreels-v2-t2v-14b-540p",
    denoiser_classes=("SkyReelsV2Transformer3DModel",),
    variants=VARIANTS,
    guides_apart=True,
)
