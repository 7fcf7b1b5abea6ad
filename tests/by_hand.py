"""How each publisher renders, as calls of plain diffusers: written down from their repositories and pages.

The numbers are theirs (sources in docs/recipes.md), not read from the product's data. Where diffusers cannot do what
a publisher does, the call is what is nearest to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from overcrank.models import _negative_prompts as texts
from overcrank.models import resolve

from tests import checkpoints

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """A pipeline class and the publisher's call; `scheduler` changes the loaded one, `media` is rendered from."""

    pipeline: str
    call: Call
    scheduler: Callable[[Any], Any] = lambda loaded: loaded
    media: str = ""
    width: int = 64
    frames: int = 9
    steps: int = 0  # asked for, where the publisher's would take minutes
    load: Callable[[Path, str, str], Any] | None = None
    more: Call = field(default_factory=dict)  # of from_pretrained


def unipc(shift: float) -> Callable[[Any], Any]:
    return lambda loaded: diffusers.UniPCMultistepScheduler.from_config(loaded.config, flow_shift=shift)


def euler(shift: float) -> Callable[[Any], Any]:
    return lambda loaded: diffusers.FlowMatchEulerDiscreteScheduler.from_config(loaded.config, shift=shift)


def dpm_trailing(loaded: Any) -> Any:
    return diffusers.CogVideoXDPMScheduler.from_config(loaded.config, timestep_spacing="trailing")


def ddim_trailing(loaded: Any) -> Any:
    return diffusers.CogVideoXDDIMScheduler.from_config(loaded.config, timestep_spacing="trailing")


def dpm_multistep(loaded: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler.from_config(loaded.config)


def wan(pipeline: str, shift: float, steps: int, guidance: float, media: str = "", **more: Any) -> Way:
    prompt = texts.WAN_IMAGE if media and more.pop("shaken", True) else texts.WAN
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": prompt, **more}
    return Way(pipeline, call, unipc(shift), media)


def skyreels(pipeline: str, shift: float, steps: int, guidance: float, media: str = "") -> Way:
    text = texts.WAN if "Forcing" in pipeline else texts.SKYREELS
    return Way(
        pipeline,
        {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": text},
        unipc(shift),
        media,
    )


def ltx(pipeline: str, rate: int, guidance: float, steps: int | None, decoded: bool = True, **more: Any) -> Way:
    call: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": texts.LTX, "frame_rate": rate, **more}
    call |= {"num_inference_steps": steps} if steps else {}
    call |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if decoded else {}
    return Way(pipeline, call)


def cosmos(pipeline: str, steps: int, rate: int | None, media: str = "") -> Way:
    """The pipelines have the publisher's negative prompt themselves."""
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 7.0}
    return Way(pipeline, call | ({"fps": rate} if rate else {}), media=media)


def cogvideox(media: str = "", dpm: bool = True) -> Way:
    pipeline = "CogVideoXImageToVideoPipeline" if media else "CogVideoXPipeline"
    call = {"num_inference_steps": 50, "guidance_scale": 6.0, "use_dynamic_cfg": dpm}
    return Way(pipeline, call, dpm_trailing if dpm else ddim_trailing, media)


def svd(steps: int, least: float, most: float) -> Way:
    call = {"num_inference_steps": steps, "min_guidance_scale": least, "max_guidance_scale": most, "fps": 7}
    call |= {"motion_bucket_id": 127, "noise_aug_strength": 0.02}
    return Way("StableVideoDiffusionPipeline", call, media="image", width=128, frames=4, more={"variant": "fp16"})


def hunyuan(guidance: float, media: str = "") -> Way:
    pipeline = "HunyuanVideoImageToVideoPipeline" if media else "HunyuanVideoPipeline"
    return Way(pipeline, {"num_inference_steps": 50, "guidance_scale": guidance}, euler(7.0), media)


def hunyuan_15(shift: float, media: str = "") -> Way:
    """Its guidance (6) is in the checkpoint's guider; of a picture it makes 640 x 640 or 960 x 960."""
    pipeline = "HunyuanVideo15ImageToVideoPipeline" if media else "HunyuanVideo15Pipeline"
    large = {"width": 640 if shift == 5 else 960, "steps": 2} if media else {}
    return Way(pipeline, {"num_inference_steps": 50}, euler(shift), media, **large)


def with_adapter(root: Path, name: str, pipeline: str) -> Any:
    """As diffusers' documentation loads AnimateDiff."""
    variant = resolve(name)
    base, kind = checkpoints.at(root, variant, "unet"), {"variant": "fp16"} if "sdxl" in name else {}
    adapter = diffusers.MotionAdapter.from_pretrained(checkpoints.at(root, variant, "motion_adapter"))
    made = getattr(diffusers, pipeline).from_pretrained(base, motion_adapter=adapter, **kind)
    if hasattr(made.unet, "add_embedding"):  # which from_unet2d leaves random (review of diffusers' #6721)
        image_model = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet", **kind)
        made.unet.add_embedding.load_state_dict(image_model.add_embedding.state_dict())
    made.scheduler = diffusers.DDIMScheduler.from_pretrained(
        base, subfolder="scheduler", clip_sample=False, timestep_spacing="linspace", beta_schedule="linear",
        steps_offset=1,
    )  # fmt: skip
    return made


def framepack_parts(root: Path, name: str, pipeline: str) -> Any:
    """As diffusers' documentation loads FramePack."""
    import transformers

    variant = resolve(name)
    redux, base = checkpoints.at(root, variant, "image_encoder"), checkpoints.at(root, variant, "vae")
    networks = diffusers.HunyuanVideoFramepackTransformer3DModel
    return getattr(diffusers, pipeline).from_pretrained(
        base,
        transformer=networks.from_pretrained(checkpoints.at(root, variant, "transformer")),
        feature_extractor=transformers.SiglipImageProcessor.from_pretrained(redux, subfolder="feature_extractor"),
        image_encoder=transformers.SiglipVisionModel.from_pretrained(redux, subfolder="image_encoder"),
    )


def framepack(**more: Any) -> Way:
    call = {"num_inference_steps": 25, "guidance_scale": 10.0, **more}
    return Way("HunyuanVideoFramepackPipeline", call, media="image", load=framepack_parts)


def animatediff(pipeline: str, steps: int, guidance: float, negative: str) -> Way:
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    return Way(pipeline, call, frames=4, load=with_adapter)


_STEPS = [1000, 993.75, 987.5, 981.25, 975, 909.375, 725, 421.875]  # allowed_inference_steps
_DISTILLED = ltx("LTXConditionPipeline", 30, 1.0, None, timesteps=_STEPS)
_LTX2 = {
    "num_inference_steps": 40, "guidance_scale": 4.0, "audio_guidance_scale": 4.0, "frame_rate": 24,
    "negative_prompt": texts.LTX_2, "stg_scale": 0, "audio_stg_scale": 0, "modality_scale": 1,
    "audio_modality_scale": 1, "guidance_rescale": 0, "audio_guidance_rescale": 0,
}  # fmt: skip
_IMAGE_WAN, _VACE = "WanImageToVideoPipeline", "WanVACEPipeline"
_SKY, _SKY_IMAGE, _SKY_DF = (f"SkyReelsV2{kind}Pipeline" for kind in ("", "ImageToVideo", "DiffusionForcing"))
WAYS: dict[str, Way] = {
    "ltx-2b-0.9.0": ltx("LTXPipeline", 24, 3.0, 40, decoded=False),
    "ltx-2b-0.9.1": ltx("LTXPipeline", 24, 3.0, 40),
    "ltx-2b-0.9.5": ltx("LTXConditionPipeline", 24, 3.0, 40),
    "ltx-2b-0.9.6-dev": ltx("LTXConditionPipeline", 30, 3.0, 40),
    "ltx-2b-0.9.6-distilled": ltx("LTXConditionPipeline", 30, 1.0, 8),
    "ltx-13b-0.9.7-dev": ltx("LTXConditionPipeline", 30, 5.0, 30, guidance_rescale=0.7),
    "ltx-13b-0.9.7-distilled": _DISTILLED,
    "ltx-13b-0.9.8-distilled": _DISTILLED,
    "ltx-upsampler-0.9.7": Way(
        "LTXLatentUpsamplePipeline", {"decode_timestep": 0.05, "decode_noise_scale": 0.025}, media="video", width=128
    ),
    "ltx2-19b": Way("LTX2Pipeline", _LTX2),
    "wan-2.1-t2v-1.3b": wan("WanPipeline", 8, 50, 6),
    "wan-2.1-t2v-14b": wan("WanPipeline", 5, 50, 5),
    "wan-2.1-i2v-14b-480p": wan(_IMAGE_WAN, 3, 40, 5, "image"),
    "wan-2.1-i2v-14b-720p": wan(_IMAGE_WAN, 5, 40, 5, "image"),
    "wan-2.1-flf2v-14b-720p": wan(_IMAGE_WAN, 16, 50, 5, "ends"),
    "wan-2.1-vace-1.3b": wan(_VACE, 16, 50, 5),
    "wan-2.1-vace-14b": wan(_VACE, 16, 50, 5),
    "wan-2.2-ti2v-5b": wan("WanPipeline", 5, 50, 5),
    "wan-2.2-t2v-a14b": wan("WanPipeline", 12, 40, 4, guidance_scale_2=3.0),
    "wan-2.2-i2v-a14b": wan(_IMAGE_WAN, 5, 40, 3.5, "image", guidance_scale_2=3.5, shaken=False),
    "skyreels-v2-t2v-14b-540p": skyreels(_SKY, 8, 50, 6),
    "skyreels-v2-t2v-14b-720p": skyreels(_SKY, 8, 50, 6),
    "skyreels-v2-i2v-1.3b-540p": skyreels(_SKY_IMAGE, 5, 50, 5, "image"),
    "skyreels-v2-i2v-14b-540p": skyreels(_SKY_IMAGE, 5, 50, 5, "image"),
    "skyreels-v2-i2v-14b-720p": skyreels(_SKY_IMAGE, 5, 50, 5, "image"),
    "skyreels-v2-df-1.3b-540p": skyreels(_SKY_DF, 8, 30, 6),
    "skyreels-v2-df-14b-540p": skyreels(_SKY_DF, 8, 30, 6),
    "skyreels-v2-df-14b-720p": skyreels(_SKY_DF, 8, 30, 6),
    "hunyuan-video-13b": hunyuan(6.0),
    "hunyuan-video-13b-i2v": hunyuan(6.0, "image"),
    "hunyuan-video-13b-i2v-33ch": hunyuan(1.0, "image"),
    "hunyuan-video-1.5-480p": hunyuan_15(5.0),
    "hunyuan-video-1.5-480p-i2v": hunyuan_15(5.0, "image"),
    "hunyuan-video-1.5-720p": hunyuan_15(9.0),
    "hunyuan-video-1.5-720p-i2v": hunyuan_15(7.0, "image"),
    "framepack-i2v-13b": framepack(),
    "framepack-f1-i2v-13b": framepack(sampling_type="vanilla"),
    "cosmos-predict1-7b-text2world": cosmos("CosmosTextToWorldPipeline", 36, 24),
    "cosmos-predict1-7b-video2world": cosmos("CosmosVideoToWorldPipeline", 36, 24, "image"),
    "cosmos-predict1-14b-text2world": cosmos("CosmosTextToWorldPipeline", 36, 24),
    "cosmos-predict1-14b-video2world": cosmos("CosmosVideoToWorldPipeline", 36, 24, "image"),
    "cosmos-predict2-2b-video2world": cosmos("Cosmos2VideoToWorldPipeline", 35, 16, "image"),
    "cosmos-predict2-14b-video2world": cosmos("Cosmos2VideoToWorldPipeline", 35, 16, "image"),
    "cosmos-predict2.5-2b": cosmos("Cosmos2_5_PredictBasePipeline", 36, None),
    "cosmos-predict2.5-14b": cosmos("Cosmos2_5_PredictBasePipeline", 36, None),
    "cogvideox-2b": cogvideox(dpm=False),
    "cogvideox-5b": cogvideox(),
    "cogvideox-5b-i2v": cogvideox("image"),
    "cogvideox-1.5-5b": cogvideox(),
    "cogvideox-1.5-5b-i2v": cogvideox("image"),
    "svd-img2vid": svd(25, 1.0, 2.5),
    "svd-xt": svd(30, 1.5, 3.0),
    "svd-xt-1.1": svd(30, 1.5, 3.0),
    "mochi-1-preview": Way("MochiPipeline", {"num_inference_steps": 64, "guidance_scale": 4.5}, frames=19),
    "modelscope-1.7b": Way(
        "TextToVideoSDPipeline",
        {"num_inference_steps": 25, "guidance_scale": 9.0},
        dpm_multistep,
        frames=4,
        more={"variant": "fp16"},
    ),
    "animatediff-sd15-v1.5.3": animatediff("AnimateDiffPipeline", 25, 7.5, "bad quality, worse quality"),
    "animatediff-sdxl": animatediff("AnimateDiffSDXLPipeline", 20, 8.0, "low quality, worst quality"),
}


def loaded(root: Path, name: str) -> Any:
    """The pipeline, of plain diffusers, with the publisher's scheduler."""
    way = WAYS[name]
    if way.load is not None:
        pipe = way.load(root, name, way.pipeline)
    else:
        pipe = getattr(diffusers, way.pipeline).from_pretrained(checkpoints.at(root, resolve(name)), **way.more)
    if getattr(pipe, "scheduler", None) is not None:
        pipe.scheduler = way.scheduler(pipe.scheduler)
    if name.startswith(("hunyuan", "framepack")):
        pipe.vae.enable_tiling()  # as every example of theirs does
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rendered(root: Path, name: str, shape: Mapping[str, int], media: Mapping[str, Any]) -> Any:
    """Frames [F, H, W, 3] in [0, 1]; seed 0, of the global generator too, which stochastic steps draw from."""
    pipe, way = loaded(root, name), WAYS[name]
    taken = inspect.signature(type(pipe).__call__).parameters  # some make the size of the picture's shape
    sizes = {name: value for name, value in shape.items() if name in taken}
    fewer = {"num_inference_steps": way.steps} if way.steps else {}
    call = {
        **sizes,
        **media,
        **way.call,
        **fewer,
        "output_type": "np",
        "generator": torch.Generator("cpu").manual_seed(0),
    }
    decode = pipe.vae.decode

    def seeded(*inputs: Any, **more: Any) -> Any:  # a decoder may inject noise of the global generator
        if not seen:
            torch.manual_seed(0)
        seen.append(1)
        return decode(*inputs, **more)

    seen: list[int] = []
    pipe.vae.decode = seeded
    torch.manual_seed(0)
    with torch.no_grad():
        return pipe(**call).frames[0]
