"""Tiny pipelines of the classes that tests/pipelines.py does not make: the published layouts, in small."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from tests import pipelines, tiny

Maker = Callable[[], Any]


def of_class(name: str, make: Maker, **more: Any) -> Maker:
    """A pipeline of another class of the parts that `make` gives; `more` are parts, or functions of the pipeline."""

    def made() -> Any:
        pipe = make()
        cls = getattr(diffusers, name)
        taken = inspect.signature(cls.__init__).parameters
        given = {part: value for part, value in pipe.components.items() if part in taken and value is not None}
        return cls(
            **given | {part: value(pipe) if inspect.isfunction(value) else value for part, value in more.items()}
        )

    return made


def wan(name: str, cls: str = "WanPipeline", **more: Any) -> Maker:
    return lambda: pipelines.wan(name, cls, **more)


def with_clip(name: str, cls: str) -> Maker:
    return lambda: pipelines.wan(name, cls, image_processor=pipelines.clip_processor())


def hunyuan_skyreels() -> Any:
    """SkyReels V1: HunyuanVideo whose picture's latents are further channels."""
    parts = pipelines.hunyuan_i2v("tiny-hunyuan-i2v")
    config = dict(parts.transformer.config) | {"in_channels": 8, "image_condition_type": None, "guidance_embeds": True}
    whole = diffusers.HunyuanVideoTransformer3DModel.from_config(config).eval().requires_grad_(False)
    base = pipelines.hunyuan("tiny-hunyuan", "HunyuanVideoPipeline")
    base.register_modules(transformer=whole)
    return of_class("HunyuanSkyreelsImageToVideoPipeline", lambda: base)()


def controlnet(pipe: Any) -> Any:
    """Of the motion UNet's layout, in still pictures."""
    config = pipe.unet.config
    made = diffusers.ControlNetModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups, cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=2, conditioning_embedding_out_channels=(4, 8, 8, 8),
    )  # fmt: skip
    return loud(made)


def sparse_controlnet(pipe: Any) -> Any:
    config = pipe.unet.config
    made = diffusers.SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups, cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=2, motion_num_attention_heads=2, conditioning_embedding_out_channels=(4, 8, 8, 8),
    )  # fmt: skip
    return loud(made)


def loud(module: Any) -> Any:
    """Its last layers start at zero, which would control nothing."""
    for parameter in module.parameters():
        if not parameter.abs().max():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def pag() -> Any:
    return of_class("AnimateDiffPAGPipeline", pipelines.animatediff, pag_applied_layers="mid_block.*attn1")()


def pia() -> Any:
    """The UNet takes the picture's latents and a mask beside the noise."""
    base = pipelines.animatediff()
    config = dict(base.unet.config) | {"in_channels": 9}
    unet = diffusers.UNetMotionModel.from_config(config).eval().requires_grad_(False)
    return of_class("PIAPipeline", pipelines.animatediff, unet=unet)()


def fun_control() -> Any:
    return of_class(
        "CogVideoXFunControlPipeline", lambda: pipelines.cogvideox("tiny-cogvideox-5b-i2v", "CogVideoXPipeline")
    )()


def cosmos_transfer() -> Any:
    base = pipelines.cosmos_25()
    config = base.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    # The control net adds to every second block, as published (four of 28 layers)
    transformer = diffusers.CosmosTransformer3DModel.from_config({**config, "controlnet_block_every_n": 2})
    control = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=3, in_channels=config.in_channels + 1, latent_channels=config.in_channels + 1,
        model_channels=width, num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim, text_embed_dim=config.text_embed_dim,
        adaln_lora_dim=config.adaln_lora_dim, max_size=config.max_size, rope_scale=config.rope_scale,
        use_crossattn_projection=config.use_crossattn_projection,
        crossattn_proj_in_channels=config.crossattn_proj_in_channels,
        encoder_hidden_states_channels=config.encoder_hidden_states_channels,
    )  # fmt: skip
    transformer.eval().requires_grad_(False)
    return of_class("Cosmos2_5_TransferPipeline", lambda: base, controlnet=loud(control), transformer=transformer)()


def ltx2_keyframes() -> Any:
    """As of LTX-2.5: the transformer marks tokens of keyframes."""
    base = pipelines.ltx2()
    config = {**base.transformer.config, "use_keyframes_abs_pos_embedding": True}
    transformer = diffusers.LTX2VideoTransformer3DModel.from_config(config).eval().requires_grad_(False)
    return of_class("LTX2DFRPipeline", lambda: base, transformer=loud(transformer))()


def ltx2_refine() -> Any:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    upsampler = LTX2LatentUpsamplerModel(
        in_channels=tiny.variant("tiny-ltx2").configs["vae"]["latent_channels"], mid_channels=32,
        num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True, use_rational_resampler=False,
    )  # fmt: skip
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=0.5)
    base = ltx2_keyframes()
    cls = "LTX2DFRTemporalRefinePipeline"
    return of_class(cls, lambda: base, temporal_latent_upsampler=upsampler.eval(), scheduler=scheduler)()


def lucy() -> Any:
    """Wan 2.2 5B that sees the video to edit beside the noise."""
    base = wan("tiny-wan-2.2-ti2v", expand_timesteps=True)()
    config = dict(base.transformer.config)
    whole = diffusers.WanTransformer3DModel.from_config(config | {"in_channels": 2 * config["in_channels"]})
    return of_class(
        "LucyEditPipeline", lambda: base, transformer=whole.eval().requires_grad_(False), expand_timesteps=True
    )()


def cosmos_2_image() -> Any:
    """Without the channel that tells given frames from made ones."""
    base = pipelines.cosmos("tiny-cosmos-2", "Cosmos2VideoToWorldPipeline")
    config = dict(base.transformer.config)
    whole = diffusers.CosmosTransformer3DModel.from_config(config | {"in_channels": config["in_channels"] - 1})
    return of_class("Cosmos2TextToImagePipeline", lambda: base, transformer=whole.eval().requires_grad_(False))()


def hunyuan_15_image() -> Any:
    """It makes videos of its own area, which is 640 x 640 as published."""
    pipe = pipelines.hunyuan_15("tiny-hunyuan-1.5-i2v", "HunyuanVideo15ImageToVideoPipeline", **pipelines.siglip())
    pipe.target_size = 64
    return pipe


def _with(base: Any, part: str, **fields: Any) -> Any:
    """The pipeline with a part of the same class made anew, some fields of its configuration being others."""
    module = getattr(base, part)
    made = type(module).from_config({**module.config, **fields}).eval().requires_grad_(False)
    return of_class(type(base).__name__, lambda: base, **{part: made})()


def ltx2_without_ratios() -> Any:
    """A VAE whose configuration leaves its compression to the class."""
    return _with(pipelines.ltx2(), "vae", spatial_compression_ratio=None, temporal_compression_ratio=None)


def cosmos_2_learned() -> Any:
    base = pipelines.cosmos("tiny-cosmos-2", "Cosmos2VideoToWorldPipeline")
    return _with(base, "transformer", extra_pos_embed_type="learnable")


def wan_without_projections() -> Any:
    """The picture's tokens are among the text's in every block's attention."""
    base = with_clip("tiny-wan-2.1-i2v", "WanImageToVideoPipeline")()
    return _with(base, "transformer", added_kv_proj_dim=None)


def wan_small_clip() -> Any:
    """An image encoder that gives other than 257 tokens."""
    base = with_clip("tiny-wan-2.1-i2v", "WanImageToVideoPipeline")()
    size = {"height": 112, "width": 112}
    config = base.image_encoder.config.to_dict() | {"image_size": 112}
    encoder = type(base.image_encoder)(type(base.image_encoder.config).from_dict(config)).eval().requires_grad_(False)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 112}, crop_size=size)
    return of_class("WanImageToVideoPipeline", lambda: base, image_encoder=encoder, image_processor=processor)()


def framepack_small_siglip() -> Any:
    """An image encoder that gives other than 729 tokens."""
    base = pipelines.framepack()
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=112, patch_size=14
    )
    size = {"height": 112, "width": 112}
    encoder = transformers.SiglipVisionModel(vision).eval()
    extractor = transformers.SiglipImageProcessor(size=size)
    cls = "HunyuanVideoFramepackPipeline"
    return of_class(cls, lambda: base, image_encoder=encoder, feature_extractor=extractor)()
