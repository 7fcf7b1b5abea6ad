"""LTX-Video (Lightricks): 2B and 13B text/image-to-video diffusion transformers.

Configurations are those of the published checkpoints, as diffusers' conversion of the
original files gives them. Spatial compression 32, temporal 8: one denoiser token is a
32x32x8 pixel box, so height and width are multiples of 32 and frames are 8k+1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Any

from overcrank.models import _few_steps, _ltx, _ltx_upsampler, _negative_prompts
from overcrank.models import _ltx_configs as configs
from overcrank.models._common import named_output, shallow, tensors_named, token_count
from overcrank.models._family import Family, Grid
from overcrank.models.base import (
    Arguments,
    Component,
    Config,
    LatentOf,
    Media,
    Rendering,
    Repeat,
    Repository,
    Sizes,
    TensorSpec,
    Variant,
    VideoShape,
    renderings,
)

CONDITION = "LTXConditionPipeline"
TASKS = {"text-to-video": "LTXPipeline", "image-to-video": "LTXImageToVideoPipeline", "first-last-frame": CONDITION}
TRACED_RESNETS = 2  # depth of a traced chain (export/repeat.py)

# ── published checkpoints ────────────────────────────────────────────────────────────


def _variant(
    name: str, hub: str, dit: Config, vae: Config, scheduler: Config, renders: Mapping[str, Rendering], **more: Any
) -> Variant:
    conditions = vae["spatio_temporal_scaling"] != configs.VAE_090["spatio_temporal_scaling"]
    usual: dict[str, Any] = {
        "native": VideoShape(512, 768, 121),
        "minimum": VideoShape(256, 256, 1),
        "maximum": VideoShape(768, 768, 161),
        "fps": 24,
        "text_length": 256 if conditions else 128,  # max_sequence_length of the pipelines
    }
    return Variant(
        name=name,
        family="ltx",
        title=name.replace("ltx", "LTX-Video").replace("-2b-", " 2B ").replace("-13b-", " 13B "),
        hub_id=hub.partition(":")[0],
        hub_file=hub.partition(":")[2],
        configs={"transformer": dit, "vae": vae, "scheduler": scheduler},
        renders=renders,
        saved_as=tuple(TASKS.values()) if conditions else (),
        **(usual | more),
    )


_REPO = "Lightricks/LTX-Video"
_BIG: Mapping[str, Any] = {
    "native": VideoShape(704, 1216, 121),
    "maximum": VideoShape(1216, 1216, 161),
    "fps": 30,
}
# Of a VAE that takes a timestep: 0.9.1 and later.
_DECODED: Arguments = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
_SOURCE = "github.com/Lightricks/LTX-Video: ltx_video/inference.py, configs"
_NO_STG = "its spatiotemporal guidance is left out: no diffusers pipeline of this model has it"


def _first(vae: Config) -> dict[str, Rendering]:
    """0.9.0 and 0.9.1: uniform steps, shifted by the number of tokens."""
    return renderings(
        {task: pipeline for task, pipeline in TASKS.items() if pipeline != CONDITION},
        guidance=3.0,
        steps=40,
        negative_prompt=_negative_prompts.LTX,
        arguments=_DECODED if vae["timestep_conditioning"] else {},
        source=_SOURCE,
        differs=_NO_STG,
    )


def _later(guidance: float, steps: int, **more: Any) -> dict[str, Rendering]:
    """From 0.9.5 on: linear, then quadratic steps, which of diffusers' pipelines only the conditioned one makes."""
    usual: dict[str, Any] = {"guidance": guidance, "steps": steps, "negative_prompt": _negative_prompts.LTX}
    usual |= {"source": _SOURCE, "differs": _NO_STG if guidance > 1 else ""}
    noised = _DECODED | {"image_cond_noise_scale": 0.15}
    return {
        task: Rendering(CONDITION, arguments=_DECODED if task == "text-to-video" else noised, **(usual | more))
        for task in TASKS
    }


_DEMO = renderings(TASKS, guidance=3.0, steps=24, source="how it was trained: models/demo")
_DEMO["first-last-frame"] = replace(_DEMO["first-last-frame"], arguments={"image_cond_noise_scale": 0.0})
_DISTILLED = _later(
    1.0,
    8,
    sigmas=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
    source=f"{_SOURCE}: its allowed_inference_steps; diffusers' documentation has the first seven, which are the first "
    "of two passes, and closes them with 0.00003",
    differs="rendered at full size at once, not at two thirds and then upsampled",
)
_DEV = _later(
    5.0,
    30,
    guidance_rescale=0.7,
    source="the model's page and diffusers' documentation of it",
    differs="rendered at full size at once, not at two thirds and then upsampled; the original's guidance changes "
    "from step to step",
)
_SMALL: Mapping[str, Any] = {
    "native": VideoShape(64, 64, 17),
    "minimum": VideoShape(64, 64, 9),  # 48 tokens: attention of fewer than 32 is not fused in fp8
    "maximum": VideoShape(128, 128, 33),
    "fps": 8,
    "text_length": 128,
    "packaged": "demo/ltx-demo",
}
_091 = "diffusers/LTX-Video-0.9.1"
_096 = f"{_REPO}:ltxv-2b-0.9.6-dev-04-25.safetensors"
_096D = "multimodalart/ltxv-2b-0.9.6-distilled"
_098D = f"{_REPO}-0.9.8-13B-distilled"

VARIANTS: tuple[Variant, ...] = (
    _variant("ltx-2b-0.9.0", _REPO, configs.DIT_2B, configs.VAE_090, configs.SHIFTED, _first(configs.VAE_090)),
    _variant(
        "ltx-2b-0.9.1",
        _091,
        configs.DIT_2B,
        configs.VAE_091,
        configs.SHIFTED,
        _first(configs.VAE_091),
        repositories=(Repository(_091, former=("Lightricks/LTX-Video-0.9.1",)),),
    ),
    _variant("ltx-2b-0.9.5", f"{_REPO}-0.9.5", configs.DIT_2B, configs.VAE_095, configs.UNIFORM, _later(3.0, 40)),
    _variant("ltx-2b-0.9.6-dev", _096, configs.DIT_2B, configs.VAE_095, configs.UNIFORM, _later(3.0, 40), **_BIG),
    _variant(
        "ltx-2b-0.9.6-distilled",
        _096D,
        configs.DIT_2B,
        configs.VAE_095,
        configs.STOCHASTIC,
        _later(1.0, 8, scheduler={"stochastic_sampling": True}),
        **_BIG,
    ),
    _variant(
        "ltx-13b-0.9.7-dev", f"{_REPO}-0.9.7-dev", configs.DIT_13B, configs.VAE_095, configs.UNIFORM, _DEV, **_BIG
    ),
    _variant(
        "ltx-13b-0.9.7-distilled",
        f"{_REPO}-0.9.7-distilled",
        configs.DIT_13B,
        configs.VAE_095,
        configs.UNIFORM,
        _DISTILLED,
        **_BIG,
    ),
    _variant("ltx-13b-0.9.8-distilled", _098D, configs.DIT_13B, configs.VAE_095, configs.UNIFORM, _DISTILLED, **_BIG),
    Variant(
        name="ltx-upsampler-0.9.7",
        family="ltx",
        title="LTX-Video spatial upsampler 0.9.7",
        hub_id="Lightricks/ltxv-spatial-upscaler-0.9.7",
        configs={"latent_upsampler": _ltx_upsampler.CONFIG, "vae": configs.VAE_095},
        native=VideoShape(1024, 1536, 121),
        minimum=VideoShape(512, 512, 1),
        maximum=VideoShape(1408, 1536, 121),
        fps=24,
        renders=renderings(
            {"video-to-video": "LTXLatentUpsamplePipeline"},
            steps=1,
            arguments=_DECODED,
            source="diffusers' documentation of LTX-Video 0.9.7",
        ),
        text_length=0,
    ),
    _variant(
        "ltx-demo",
        "",
        configs.DIT_DEMO,
        configs.VAE_DEMO,
        configs.UNIFORM,
        _DEMO,
        **_SMALL,
    ),
)


class LTXVideo(Family):
    def strides(self, variant: Variant) -> tuple[int, int]:
        return _ltx.strides(variant.configs["vae"])

    def grid(self, variant: Variant) -> Grid:
        """The pipelines want multiples of 32 of any VAE."""
        spatial, temporal = self.strides(variant)
        step = lcm(spatial * (_ltx_upsampler.SCALE if "latent_upsampler" in variant.configs else 1), 32)
        return {"height": (step, 0), "width": (step, 0), "frames": (temporal, 1)}

    def components(self, variant: Variant) -> tuple[Component, ...]:
        """Text-to-video runs `denoiser`; image and video conditioning, with a timestep per token,
        `denoiser_conditioned`: same weights, another engine."""
        vae, strides, latent = variant.configs["vae"], self.strides(variant), partial(self.latent, variant)
        decoder, encoder = _vae_decoder(vae, strides, latent), _vae_encoder(vae, strides)
        if "latent_upsampler" in variant.configs:
            config = variant.configs["latent_upsampler"]
            return (*_ltx_upsampler.components(config, latent, encoder), decoder)
        plain, conditioned = (_denoiser(variant, latent, per_token) for per_token in (False, True))
        return plain, decoder, encoder, conditioned

    def encode(self, pipe: Any, variant: Variant, prompt: str, negative_prompt: str, guided: bool) -> Arguments:
        """The prompts are encoded ahead of the call."""
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        encoded = pipe.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=variant.text_length,
            device=pipe._execution_device,
        )
        return dict(zip(names, encoded, strict=True))

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        if media.video:  # the size that the upsampler is told is that of what it encodes
            small = {axis: arguments[axis] // _ltx_upsampler.SCALE for axis in ("height", "width")}
            return arguments | small | {"video": list(media.video)}
        keywords = arguments | {"frame_rate": media.fps, "max_sequence_length": variant.text_length}
        if list(media.images) == [0]:
            keywords["image"] = media.images[0]
        elif media.images:
            keywords |= {"image": list(media.images.values()), "video": [None] * len(media.images)}
            keywords |= {"frame_index": list(media.images), "strength": [1.0] * len(media.images)}
        return keywords


FAMILY = LTXVideo(
    title="LTX-Video",
    default="ltx-2b-0.9.5",
    denoiser_classes=("LTXVideoTransformer3DModel", _ltx_upsampler.CLASS),
    variants=VARIANTS,
    presets=_few_steps.LTX,
    preview=_ltx.preview,
)

# ── components ───────────────────────────────────────────────────────────────────────


def _denoiser(variant: Variant, latent: LatentOf, per_token: bool) -> Component:
    config = variant.configs["transformer"]
    inner = config["num_attention_heads"] * config["attention_head_dim"]

    def sizes(shape: VideoShape) -> Sizes:
        return {"batch": shape.batch, "tokens": token_count(latent(shape)), "text": variant.text_length}

    return Component(
        name="denoiser_conditioned" if per_token else "denoiser",
        default=not per_token,
        cls=FAMILY.denoiser_classes[0],
        subfolder="transformer",
        config=config,
        **shallow(config),
        inputs=(
            TensorSpec("hidden_states", ("batch", "tokens", config["in_channels"])),
            TensorSpec("encoder_hidden_states", ("batch", "text", config["caption_channels"])),
            TensorSpec("timestep", ("batch", "tokens") if per_token else (1,), "float32"),
            TensorSpec("encoder_attention_mask", ("batch", "text")),
            TensorSpec("rope_cos", (1, "tokens", inner // 2), "float32"),
            TensorSpec("rope_sin", (1, "tokens", inner // 2), "float32"),
        ),
        outputs=(TensorSpec("sample", ("batch", "tokens", config["out_channels"])),),
        forward=partial(_ltx.denoiser, per_token=per_token),
        adapt=partial(_ltx.adapt_denoiser, per_token=per_token),
        returns=named_output,
        sample=partial(_ltx.sample_denoiser, per_token=per_token),
        sizes=sizes,
        trace_sizes={"batch": 2, "tokens": 24, "text": 16},
        free_axes={"text": 1},
    )


def _chains(layers: tuple[int, ...], paths: list[str]) -> tuple[tuple[int, ...], tuple[Repeat, ...]]:
    """Layer counts cut to what is traced, and the chains that were cut."""
    traced = TRACED_RESNETS
    cut = tuple(min(n, traced) for n in layers)
    return cut, tuple(Repeat(p, traced, n) for p, n in zip(paths, layers, strict=True) if n > traced)


def _noise_inputs(vae: Config) -> tuple[TensorSpec, ...]:
    """One input per up block that injects noise: two planes for each of its resnets (0.9.1)."""
    blocks = zip(
        reversed(vae["decoder_inject_noise"][:-1]),
        reversed(vae["decoder_layers_per_block"][:-1]),
        reversed(vae["decoder_spatio_temporal_scaling"]),
        strict=True,
    )
    inputs, scale = [], 1
    for i, (injects, layers, doubles) in enumerate(blocks):
        scale *= 2 if doubles else 1
        if injects:
            inputs.append(TensorSpec(f"noise_{i}", (2 * layers, f"height_x{scale}", f"width_x{scale}")))
    return tuple(inputs)


def _vae_decoder(vae: Config, strides: tuple[int, int], latent: LatentOf) -> Component:
    layers = tuple(vae["decoder_layers_per_block"])
    blocks = [f"up_blocks.{i}.resnets" for i in range(len(layers) - 1)]
    cut, repeats = _chains(layers, [*reversed(blocks), "mid_block.resnets"])
    noise = _noise_inputs(vae)
    if noise:  # every resnet reads its own plane of the noise, so the chain is not a repetition
        cut, repeats = layers, ()
    scales = sorted({int(str(t.dims[1]).partition("_x")[2]) for t in noise})
    temb = (TensorSpec("temb", (1,)),) if vae["timestep_conditioning"] else ()

    def sizes(shape: VideoShape) -> Sizes:
        f, h, w = latent(shape)
        scaled = {f"height_x{s}": h * s for s in scales} | {f"width_x{s}": w * s for s in scales}
        return {"frames": f, "height": h, "width": w} | scaled

    spatial, temporal = strides
    return Component(
        name="vae_decoder",
        cls="AutoencoderKLLTXVideo",
        subfolder="vae",
        attribute="decoder",
        config=vae,
        traced_config={**vae, "decoder_layers_per_block": cut} if repeats else {},
        repeats=repeats,
        inputs=(
            TensorSpec("hidden_states", (1, vae["latent_channels"], "frames", "height", "width")),
            *temb,
            *noise,
        ),
        outputs=(TensorSpec("sample", (1, vae["out_channels"], "out_frames", "out_height", "out_width")),),
        forward=_ltx.vae_decoder,
        adapt=partial(_ltx.adapt_vae_decoder, noise=noise),
        sample=partial(_ltx.sample_vae_decoder, channels=vae["latent_channels"], timed=bool(temb)),
        sizes=sizes,
        trace_sizes=sizes(VideoShape(3 * spatial, 4 * spatial, 2 * temporal + 1)),
        affine_axes={f"{axis}_x{s}": (axis, s, 0) for s in scales if s > 1 for axis in ("height", "width")},
    )


def _vae_encoder(vae: Config, strides: tuple[int, int]) -> Component:
    layers = tuple(vae["layers_per_block"])
    paths = [f"down_blocks.{i}.resnets" for i in range(len(layers) - 1)]
    cut, repeats = _chains(layers, [*paths, "mid_block.resnets"])
    spatial, temporal = strides
    return Component(
        name="vae_encoder",
        cls="AutoencoderKLLTXVideo",
        subfolder="vae",
        attribute="encoder",
        config=vae,
        traced_config={**vae, "layers_per_block": cut} if repeats else {},
        repeats=repeats,
        inputs=(TensorSpec("hidden_states", (1, vae["in_channels"], "frames", "height", "width")),),
        outputs=(TensorSpec("latent", (1, 2 * vae["latent_channels"], "out_frames", "out_height", "out_width")),),
        forward=_ltx.vae_encoder,
        adapt=partial(tensors_named, names=("hidden_states",)),
        sample=partial(_ltx.sample_vae_encoder, channels=vae["in_channels"]),
        sizes=lambda shape: {"frames": shape.frames, "height": shape.height, "width": shape.width},
        trace_sizes={"frames": 2 * temporal + 1, "height": 3 * spatial, "width": 4 * spatial},
        affine_axes={
            "frames": ("frames_k", temporal, 1),
            "height": ("height_k", spatial, 0),
            "width": ("width_k", spatial, 0),
        },
    )
