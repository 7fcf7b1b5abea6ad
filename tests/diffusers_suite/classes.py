"""Every pipeline class of the installed diffusers that makes video: a tiny one, and a call that renders it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import pipelines
from tests.diffusers_suite import makers
from tests.diffusers_suite.makers import of_class, wan, with_clip

Arguments = dict[str, Any]
STEPS = 2


@lru_cache
def picture(width: int, height: int, number: int = 0) -> Image.Image:
    """Soft random colours."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def clip(width: int, height: int, frames: int) -> list[Image.Image]:
    return [picture(width, height, number) for number in range(frames)]


@dataclass(frozen=True)
class Subject:
    """A tiny pipeline and its call; `call` is further arguments, which may be functions of the sizes.

    `sized` and `framed` are off where the call does not take a size or a number of frames.
    """

    make: Callable[[], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    width: int = 64
    height: int = 64
    frames: int = 9
    prompt: bool = True
    sized: bool = True
    framed: bool = True
    steps: bool = True
    count: str = "num_frames"

    def arguments(self, width: int = 0, height: int = 0, frames: int = 0) -> Arguments:
        """Of one call, of the usual size unless another is given."""
        size = {"width": width or self.width, "height": height or self.height}
        length = frames or self.frames
        made: Arguments = dict(size) if self.sized else {}
        made |= {self.count: length} if self.framed else {}
        made |= {"prompt": pipelines.PROMPT} if self.prompt else {}
        made |= {"num_inference_steps": STEPS} if self.steps else {}
        made |= {"output_type": "np", "generator": torch.Generator().manual_seed(0)}
        given = {n: v(size["width"], size["height"], length) if callable(v) else v for n, v in self.call.items()}
        return made | given


def _image(width: int, height: int, frames: int) -> Image.Image:
    return picture(width, height)


def _last(width: int, height: int, frames: int) -> Image.Image:
    return picture(width, height, 9)


IMAGE, VIDEO, LAST = {"image": _image}, {"video": clip}, {"last_image": _last}
STILL = {"guidance_scale": 3.0}


def _conditions(kind: str, **more: Any) -> Callable[[int, int, int], Any]:
    """Of LTX and LTX-2: one picture, or a video to follow."""

    def made(width: int, height: int, frames: int) -> Any:
        from diffusers.pipelines.ltx2 import pipeline_ltx2_condition as two
        from diffusers.pipelines.ltx2 import pipeline_ltx2_hdr_lora as hdr
        from diffusers.pipelines.ltx2 import pipeline_ltx2_ic_lora as context

        if kind == "picture":
            return [two.LTX2VideoCondition(picture(width, height), 0, **more)]
        cls = {"hdr": hdr.LTX2HDRReferenceCondition, "context": context.LTX2ReferenceCondition}[kind]
        return [cls(frames=clip(width, height, frames), **more)]

    return made


def _latents(channels: int, seed: int, ratio: int = 32, frames_ratio: int = 8) -> Callable[[int, int, int], Any]:
    def made(width: int, height: int, frames: int) -> torch.Tensor:
        shape = (1, channels, (frames - 1) // frames_ratio + 1, height // ratio, width // ratio)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return made


def _sound(width: int, height: int, frames: int) -> torch.Tensor:
    return torch.randn(1, 2, 10, 4, generator=torch.Generator().manual_seed(3))


_FREE = {
    "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0,
}  # fmt: skip
_UNET: Any = {"frames": 4}
_COG_IMAGE = "CogVideoXImageToVideoPipeline"
_SKY, _SKY_DF = "SkyReelsV2", "SkyReelsV2DiffusionForcing"
_DF = {"base_num_frames": 9}
_SIGMAS = {"sigmas": [1.0, 0.6]}
CLASSES: dict[str, Subject] = {
    "AnimateDiffPipeline": Subject(pipelines.animatediff, **_UNET),
    "AnimateDiffControlNetPipeline": Subject(
        of_class("AnimateDiffControlNetPipeline", pipelines.animatediff, controlnet=makers.controlnet),
        {"conditioning_frames": clip}, **_UNET,
    ),
    "AnimateDiffSDXLPipeline": Subject(pipelines.animatediff_sdxl, **_UNET),
    "AnimateDiffSparseControlNetPipeline": Subject(
        of_class("AnimateDiffSparseControlNetPipeline", pipelines.animatediff, controlnet=makers.sparse_controlnet),
        {"conditioning_frames": _image, "controlnet_frame_indices": [0]}, **_UNET,
    ),
    "AnimateDiffVideoToVideoPipeline": Subject(
        of_class("AnimateDiffVideoToVideoPipeline", pipelines.animatediff), VIDEO, framed=False, **_UNET
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": Subject(
        of_class("AnimateDiffVideoToVideoControlNetPipeline", pipelines.animatediff, controlnet=makers.controlnet),
        VIDEO | {"conditioning_frames": clip}, framed=False, **_UNET,
    ),
    "AnimateDiffPAGPipeline": Subject(makers.pag, **_UNET),
    "PIAPipeline": Subject(makers.pia, IMAGE, **_UNET),
    "CogVideoXPipeline": Subject(lambda: pipelines.cogvideox("tiny-cogvideox-5b", "CogVideoXPipeline")),
    "CogVideoXFunControlPipeline": Subject(makers.fun_control, {"control_video": clip}, framed=False),
    "CogVideoXImageToVideoPipeline": Subject(lambda: pipelines.cogvideox("tiny-cogvideox-5b-i2v", _COG_IMAGE), IMAGE),
    "CogVideoXVideoToVideoPipeline": Subject(
        lambda: pipelines.cogvideox("tiny-cogvideox-5b", "CogVideoXVideoToVideoPipeline"), VIDEO, framed=False
    ),
    "Cosmos2_5_PredictBasePipeline": Subject(pipelines.cosmos_25),
    "Cosmos2_5_TransferPipeline": Subject(
        makers.cosmos_transfer, {"controls": clip, "num_frames_per_chunk": 9}
    ),
    "Cosmos2TextToImagePipeline": Subject(
        makers.cosmos_2_image, framed=False, frames=1
    ),
    "Cosmos2VideoToWorldPipeline": Subject(
        lambda: pipelines.cosmos("tiny-cosmos-2", "Cosmos2VideoToWorldPipeline"), IMAGE
    ),
    "CosmosTextToWorldPipeline": Subject(lambda: pipelines.cosmos("tiny-cosmos-1", "CosmosTextToWorldPipeline")),
    "CosmosVideoToWorldPipeline": Subject(
        lambda: pipelines.cosmos("tiny-cosmos-1-video", "CosmosVideoToWorldPipeline"), IMAGE
    ),
    "TextToVideoSDPipeline": Subject(pipelines.modelscope, **_UNET),
    "VideoToVideoSDPipeline": Subject(
        of_class("VideoToVideoSDPipeline", pipelines.modelscope), VIDEO, sized=False, framed=False, **_UNET
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Subject(makers.hunyuan_skyreels, IMAGE),
    "HunyuanVideoPipeline": Subject(lambda: pipelines.hunyuan("tiny-hunyuan", "HunyuanVideoPipeline")),
    "HunyuanVideoFramepackPipeline": Subject(pipelines.framepack, IMAGE | {"latent_window_size": 3}),
    "HunyuanVideoImageToVideoPipeline": Subject(pipelines.hunyuan_i2v, IMAGE),
    "HunyuanVideo15Pipeline": Subject(lambda: pipelines.hunyuan_15("tiny-hunyuan-1.5", "HunyuanVideo15Pipeline")),
    "HunyuanVideo15ImageToVideoPipeline": Subject(
        makers.hunyuan_15_image, IMAGE, sized=False
    ),
    "LTXPipeline": Subject(lambda: pipelines.ltx("tiny-ltx-0.9.5", "LTXPipeline")),
    "LTXConditionPipeline": Subject(pipelines.ltx, IMAGE),
    "LTXI2VLongMultiPromptPipeline": Subject(
        lambda: pipelines.ltx("tiny-ltx-0.9.5", "LTXI2VLongMultiPromptPipeline"),
        {"cond_image": _image, "temporal_tile_size": 16, "temporal_overlap": 8, "decode_horizontal_tiles": 1,
         "decode_vertical_tiles": 1, "decode_overlap": 1}, frames=17,
    ),
    "LTXImageToVideoPipeline": Subject(lambda: pipelines.ltx("tiny-ltx-0.9.5", "LTXImageToVideoPipeline"), IMAGE),
    "LTXLatentUpsamplePipeline": Subject(
        pipelines.upsampler, VIDEO, prompt=False, framed=False, steps=False
    ),
    "LTX2Pipeline": Subject(pipelines.ltx2, _FREE),
    "LTX2ConditionPipeline": Subject(
        of_class("LTX2ConditionPipeline", pipelines.ltx2), _FREE | {"conditions": _conditions("picture", strength=0.8)}
    ),
    "LTX2DFRPipeline": Subject(makers.ltx2_keyframes, _SIGMAS, steps=False, frames=17),
    "LTX2DFRTemporalRefinePipeline": Subject(
        makers.ltx2_refine,
        {"latents": _latents(8, 1), "keyframes_latents": lambda w, h, f: _latents(8, 2)(w, h, 9),
         "keyframe_positions": [8, 16], "audio_latents": _sound, "sigmas": [0.9, 0.5]}, steps=False, frames=17,
    ),
    "LTX2HDRPipeline": Subject(
        of_class("LTX2HDRPipeline", pipelines.ltx2), {"reference_conditions": _conditions("hdr"), "output_type": "pt"}
    ),
    "LTX2InContextPipeline": Subject(
        of_class("LTX2InContextPipeline", pipelines.ltx2), _FREE | {"reference_conditions": _conditions("context")}
    ),
    "LTX2ImageToVideoPipeline": Subject(of_class("LTX2ImageToVideoPipeline", pipelines.ltx2), _FREE | IMAGE),
    "LucyEditPipeline": Subject(makers.lucy, VIDEO),
    "MochiPipeline": Subject(pipelines.mochi, frames=7),
    "SkyReelsV2Pipeline": Subject(wan("tiny-skyreels", f"{_SKY}Pipeline")),
    "SkyReelsV2DiffusionForcingPipeline": Subject(wan("tiny-skyreels-df", f"{_SKY_DF}Pipeline"), _DF),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Subject(
        wan("tiny-skyreels-df", f"{_SKY_DF}ImageToVideoPipeline"), _DF | IMAGE
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Subject(
        wan("tiny-skyreels-df", f"{_SKY_DF}VideoToVideoPipeline"),
        {"video": lambda w, h, f: clip(w, h, 9), "overlap_history": 5, "base_num_frames": 17}, frames=17,
    ),
    "SkyReelsV2ImageToVideoPipeline": Subject(with_clip("tiny-skyreels-i2v", f"{_SKY}ImageToVideoPipeline"), IMAGE),
    "StableVideoDiffusionPipeline": Subject(pipelines.svd, IMAGE, 128, 128, 4, prompt=False),
    "WanPipeline": Subject(wan("tiny-wan-2.1")),
    "WanPipeline of 2.2 5B": Subject(wan("tiny-wan-2.2-ti2v", expand_timesteps=True)),
    "WanPipeline of 2.2 A14B": Subject(pipelines.two_experts),
    "WanImageToVideoPipeline": Subject(with_clip("tiny-wan-2.1-i2v", "WanImageToVideoPipeline"), IMAGE),
    "WanImageToVideoPipeline of first and last frame": Subject(
        with_clip("tiny-wan-2.1-flf", "WanImageToVideoPipeline"), IMAGE | LAST
    ),
    "WanImageToVideoPipeline of 2.2 5B": Subject(
        wan("tiny-wan-2.2-ti2v", "WanImageToVideoPipeline", expand_timesteps=True), IMAGE
    ),
    "WanVACEPipeline": Subject(wan("tiny-wan-2.1-vace", "WanVACEPipeline")),
    "WanVideoToVideoPipeline": Subject(wan("tiny-wan-2.1", "WanVideoToVideoPipeline"), VIDEO, framed=False),
    "LTX2Pipeline without ratios": Subject(makers.ltx2_without_ratios, _FREE, 128, 128, 17),
    "Cosmos2VideoToWorldPipeline with a learned embedding": Subject(makers.cosmos_2_learned, IMAGE),
    "WanImageToVideoPipeline without projections": Subject(makers.wan_without_projections, IMAGE),
    "WanImageToVideoPipeline of a small image encoder": Subject(makers.wan_small_clip, IMAGE),
    "HunyuanVideoFramepackPipeline of a small image encoder": Subject(
        makers.framepack_small_siglip, IMAGE | {"latent_window_size": 3}
    ),
}  # fmt: skip
