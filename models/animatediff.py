"""AnimateDiff: Stable Diffusion 1.5 and SDXL with a motion module.

The configuration is that of the UNet with the motion module loaded (diffusers' UNetMotionModel).
Videos of more frames than the motion module knows go through FreeNoise's windows, and an engine
of their own. Paper: arXiv:2307.04725.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError, RequestError
from overcrank.models import _freenoise, _kl_vae, _negative_prompts, _unet
from overcrank.models._hub_files import weight_names
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
from overcrank.models.hub import read_json
from overcrank.options import option

CHUNK, TEXT_LENGTH = 16, 77

_SD15: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
    "up_block_types": ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "motion_num_attention_heads": 8,
    "use_motion_mid_block": False,
    "sample_size": 64,
}
_SDXL: Config = _SD15 | {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "num_attention_heads": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "motion_max_seq_length": 32,
    "sample_size": 128,
}
# The motion adapter's files lie at the top of its repository; the image model is the one of diffusers' documentation.
_IMAGE_MODEL = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def _repositories(adapter: str, image_model: str, *more: str, files: str = "") -> tuple[Repository, ...]:
    return (
        Repository(adapter, parts=("motion_adapter",), top="motion_adapter"),
        Repository(image_model, parts=(*_IMAGE_MODEL, *more), files=files),
    )


# What the base models carry, and what is laid over it, as both motion modules were trained.
_CARRIED: Config = {
    "_class_name": "DEISMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
_CARRIED_XL: Config = _CARRIED | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_DDIM: Config = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
}
_USUAL: Any = {
    "scheduler": _DDIM,
    "source": "diffusers' documentation of it, which names the base model; DDIM: github.com/guoyww/AnimateDiff",
    "differs": "the original's prompts and guidance (8) belong to another base model",
}
_USUAL_XL: Any = _USUAL | {
    "differs": "diffusers' own way of joining the two leaves the embedding of size and pooled text random; here it is "
    "the image model's"
}
_DTYPES = {"": "fp16"}
_TASKS = {"text-to-video": "AnimateDiffPipeline", "video-to-video": "AnimateDiffVideoToVideoPipeline"}

VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="animatediff-sd15-v1.5.3",
        family="animatediff",
        title="AnimateDiff SD 1.5, motion module v1.5.3",
        hub_id="guoyww/animatediff-motion-adapter-v1-5-3",
        repositories=_repositories("guoyww/animatediff-motion-adapter-v1-5-3", "SG161222/Realistic_Vision_V5.1_noVAE"),
        configs={"unet": _SD15, "vae": _kl_vae.SD, "scheduler": _CARRIED},
        native=VideoShape(512, 512, 16),
        minimum=VideoShape(256, 256, 8),
        maximum=VideoShape(768, 768, 24),
        fps=8,
        dtypes=_DTYPES,
        renders=renderings(_TASKS, guidance=7.5, steps=25, negative_prompt=_negative_prompts.ANIMATEDIFF, **_USUAL),
        text_length=TEXT_LENGTH,
    ),
    Variant(
        name="animatediff-sdxl",
        family="animatediff",
        title="AnimateDiff SDXL beta",
        hub_id="guoyww/animatediff-motion-adapter-sdxl-beta",
        repositories=_repositories(
            "guoyww/animatediff-motion-adapter-sdxl-beta",
            "stabilityai/stable-diffusion-xl-base-1.0",
            *("text_encoder_2", "tokenizer_2"),
            files="fp16",
        ),
        configs={
            "unet": _SDXL,
            "vae": _kl_vae.SD | {"scaling_factor": 0.13025, "sample_size": 1024},
            "scheduler": _CARRIED_XL,
        },
        native=VideoShape(1024, 1024, 16),
        minimum=VideoShape(512, 512, 8),
        maximum=VideoShape(1024, 1024, 16),
        fps=8,
        dtypes=_DTYPES,
        renders=renderings(
            {"text-to-video": "AnimateDiffSDXLPipeline"},
            guidance=8.0,
            steps=20,
            negative_prompt=_negative_prompts.ANIMATEDIFF_XL,
            **_USUAL_XL,
        ),
        text_length=TEXT_LENGTH,
    ),
)


class AnimateDiff(_unet.UNetFamily):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        unet, vae = variant.configs["unet"], variant.configs["vae"]
        text = (TEXT_LENGTH, unet["cross_attention_dim"])
        conditions = [TensorSpec("encoder_hidden_states", ("batch", *text))]
        sdxl = unet.get("addition_embed_type") == "text_time"
        if sdxl:
            pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            conditions += [TensorSpec("text_embeds", ("batch", pooled)), TensorSpec("time_ids", ("batch", 6))]
        component_of = partial(_unet.component, self.denoiser_classes[0], unet, stride=_kl_vae.stride(vae))
        denoiser, around = component_of(tuple(conditions)), _kl_vae.components(vae, CHUNK)
        if sdxl:  # its pipeline has no FreeNoise
            return (denoiser, *around)
        by_frame = (TensorSpec("encoder_hidden_states", ("batch", "frames", *text)),)
        return (_freenoise.unwindowed(denoiser), *around, _freenoise.windowed(component_of(by_frame)))

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """FreeNoise is on for a long video, and else off."""
        frames = len(media.video) or arguments["num_frames"]
        longest = variant.configs["unet"]["motion_max_seq_length"]
        if frames > longest:
            if not hasattr(pipe, "enable_free_noise") or pipe.motion_adapter is None:
                raise RequestError(
                    f"frames {frames}: {variant.name} makes at most {longest} at once, and more need FreeNoise, which "
                    f"{type(pipe).__name__} of a checkpoint without motion_adapter has not; lower {option('frames')}."
                )
            pipe.enable_free_noise(context_length=_freenoise.LENGTH, context_stride=_freenoise.STRIDE)
        elif _freenoise.is_on(pipe.unet):
            pipe.disable_free_noise()
        if not media.video:
            return arguments
        return arguments | {"video": list(media.video), "strength": media.strength}

    def join(self, folder: Path) -> None:
        """Make `unet` the UNet with the motion module: a configuration, and an index over both repositories' files.

        As diffusers' UNetMotionModel.from_unet2d does, whose tensors are those of both under the same names. Raises
        ModelError for a part that has no safetensors.
        """
        image, motion = (folder / part for part in ("unet", "motion_adapter"))
        config = _with_motion(self.denoiser_classes[0], *(read_json(f / "config.json") for f in (image, motion)))
        files = [  # by names without ".fp16": the index that is written here has no such twin
            (f"{part.name}-{file.stem.replace('.', '-')}.safetensors", file)
            for part in (image, motion)
            for file in _weights_in(part.resolve())
        ]
        image.unlink()
        image.mkdir()
        weights: dict[str, str] = {}
        for name, file in files:
            (image / name).symlink_to(file)
            weights |= dict.fromkeys(_tensors_of(file), name)
        index = {"metadata": {"total_size": sum(f.stat().st_size for _, f in files)}, "weight_map": weights}
        (image / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        (image / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


FAMILY = AnimateDiff(
    title="AnimateDiff",
    default="animatediff-sd15-v1.5.3",
    denoiser_classes=("UNetMotionModel",),
    variants=VARIANTS,
)

# ── motion adapter and image model, joined ───────────────────────────────────────────


_SHARED = (  # fields that both kinds of UNet have
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "reverse_transformer_layers_per_block", "use_linear_projection"),
    *("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "time_cond_proj_dim"),
)


def _with_motion(cls: str, image: Config, motion: Config) -> Config:
    """Configuration of the UNet with the motion module, of class `cls`."""
    config = {k: v for k, v in image.items() if k in _SHARED} | {"_class_name": cls}
    for side in ("down", "up"):
        cross = ["CrossAttn" * ("CrossAttn" in kind) for kind in image[f"{side}_block_types"]]
        config[f"{side}_block_types"] = [f"{prefix}{side.title()}BlockMotion" for prefix in cross]
    config["num_attention_heads"] = image.get("num_attention_heads") or image.get("attention_head_dim", 8)
    config["layers_per_block"] = motion["motion_layers_per_block"]
    for where in ("block", "mid_block"):
        config[f"temporal_transformer_layers_per_{where}"] = motion.get(f"motion_transformer_layers_per_{where}", 1)
    keys = ("motion_num_attention_heads", "motion_max_seq_length", "use_motion_mid_block")
    return config | {key: motion[key] for key in keys}


def _weights_in(folder: Path) -> list[Path]:
    here = {f.name for f in folder.iterdir()}

    def read(name: str) -> Config:
        return read_json(folder / name)

    names = weight_names(here, "", read) or weight_names(here, "fp16", read)
    files = [folder / n for n in names if n.endswith(".safetensors")]
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors file: motion adapter and image model are joined of those alone; convert it "
            f"with diffusers (save_pretrained), and give the folder of the whole pipeline as {option('model')}."
        )
    return files


def _tensors_of(file: Path) -> list[str]:
    """Names of a safetensors file's tensors: its header is their description in JSON."""
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [name for name in header if name != "__metadata__"]
