"""Whole tiny pipelines, saved as diffusers saves them: random weights, real tokenizers and text encoders."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from overcrank.export.module import random_module
from overcrank.models import family
from overcrank.models.demo import networks

from tests import tiny

PROMPT = "a red circle moving right"


def t5(width: int, cls: str = "T5EncoderModel") -> dict[str, Any]:
    tokenizer = networks.tokenizer()
    config = getattr(transformers, cls).config_class(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_heads=2, num_layers=1, is_encoder_decoder=False
    )
    return {"tokenizer": tokenizer, "text_encoder": getattr(transformers, cls)(config).eval()}


def clip(width: int, projection: int = 16, cls: str = "CLIPTextModel") -> tuple[Any, Any]:
    letters = string.ascii_lowercase + string.punctuation + string.digits
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projection, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    return tokenizer, getattr(transformers, cls)(config).eval()


def clip_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})


def wan(name: str, cls: str, **more: Any) -> Any:
    width = tiny.variant(name).configs["transformer"]["text_dim"]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return getattr(diffusers, cls)(**networks_of(name), **t5(width, "UMT5EncoderModel"), scheduler=scheduler, **more)


def networks_of(name: str) -> dict[str, Any]:
    """The variant's own networks, one for each part of its pipeline."""
    variant = tiny.variant(name)
    made: dict[str, Any] = {}
    for component in family(variant.family).components(variant):
        if component.subfolder not in made:
            made[component.subfolder] = whole(component)
    return made


def whole(component: Any) -> Any:
    from dataclasses import replace

    return random_module(replace(component, attribute=""), component.config, "fp32")


def hunyuan(name: str, cls: str, **more: Any) -> Any:
    config = tiny.variant(name).configs["transformer"]
    tokenizer = networks.tokenizer()
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config["text_embed_dim"], intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    tokenizer_2, text_encoder_2 = clip(config["pooled_projection_dim"])
    return getattr(diffusers, cls)(
        **networks_of(name), tokenizer=tokenizer, text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), **more,
    )  # fmt: skip


def framepack() -> Any:
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=384, patch_size=14
    )
    return hunyuan(
        "tiny-framepack", "HunyuanVideoFramepackPipeline", image_encoder=transformers.SiglipVisionModel(vision).eval(),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 384, "width": 384}),
    )  # fmt: skip


def cosmos() -> Any:
    width = tiny.variant("tiny-cosmos-1").configs["transformer"]["text_embed_dim"]
    parts = networks_of("tiny-cosmos-1")
    return diffusers.CosmosTextToWorldPipeline(
        **parts, **t5(width), scheduler=diffusers.EDMEulerScheduler(sigma_max=80.0)
    )


def cogvideox(name: str, cls: str) -> Any:
    width = tiny.variant(name).configs["transformer"]["text_embed_dim"]
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return getattr(diffusers, cls)(**networks_of(name), **t5(width), scheduler=scheduler)


def svd() -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        **networks_of("tiny-svd"), scheduler=diffusers.EulerDiscreteScheduler(), feature_extractor=clip_processor()
    )


def animatediff() -> Any:
    parts = networks_of("tiny-animatediff")
    tokenizer, text_encoder = clip(parts["unet"].config.cross_attention_dim)
    return diffusers.AnimateDiffPipeline(
        **parts, tokenizer=tokenizer, text_encoder=text_encoder, motion_adapter=None,
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip


def modelscope() -> Any:
    parts = networks_of("tiny-modelscope")
    tokenizer, text_encoder = clip(parts["unet"].config.cross_attention_dim)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.TextToVideoSDPipeline(**parts, tokenizer=tokenizer, text_encoder=text_encoder, scheduler=scheduler)


def ltx2() -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    width = tiny.variant("tiny-ltx2").configs["transformer"]["caption_channels"]
    tokenizer = networks.tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    }  # fmt: skip
    gemma = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    connectors = LTX2TextConnectors(
        caption_channels=width, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=12, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=12, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split",
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        **networks_of("tiny-ltx2"), tokenizer=tokenizer, text_encoder=gemma.eval(), connectors=connectors.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def two_experts() -> Any:
    torch.manual_seed(1)
    second = networks_of("tiny-wan-2.2-a14b")["transformer"]
    for parameter in second.parameters():
        parameter.mul_(1.05)
    return wan("tiny-wan-2.2-a14b", "WanPipeline", transformer_2=second, boundary_ratio=0.875)


PIPELINES: dict[str, Callable[[], Any]] = {
    "wan": lambda: wan("tiny-wan-2.1", "WanPipeline"),
    "wan-video": lambda: wan("tiny-wan-2.1", "WanPipeline"),
    "wan-image": lambda: wan("tiny-wan-2.1-i2v", "WanImageToVideoPipeline", image_processor=clip_processor()),
    "wan-2.2-ti2v": lambda: wan("tiny-wan-2.2-ti2v", "WanPipeline", expand_timesteps=True),
    "wan-2.2-ti2v-image": lambda: wan("tiny-wan-2.2-ti2v", "WanPipeline", expand_timesteps=True),
    "wan-two-experts": two_experts,
    "wan-vace": lambda: wan("tiny-wan-2.1-vace", "WanVACEPipeline"),
    "skyreels": lambda: wan("tiny-skyreels-df", "SkyReelsV2DiffusionForcingPipeline"),
    "hunyuan_video": lambda: hunyuan("tiny-hunyuan", "HunyuanVideoPipeline"),
    "framepack": framepack,
    "cosmos": cosmos,
    "cogvideox": lambda: cogvideox("tiny-cogvideox-5b", "CogVideoXPipeline"),
    "cogvideox-image": lambda: cogvideox("tiny-cogvideox-5b-i2v", "CogVideoXImageToVideoPipeline"),
    "svd": svd,
    "animatediff": animatediff,
    "modelscope": modelscope,
    "ltx2": ltx2,
}
IMAGES = ("wan-image", "wan-2.2-ti2v-image", "framepack", "cogvideox-image", "svd")
VIDEOS = ("wan-video",)
SIZES = {"svd": (128, 128, 4), "animatediff": (64, 64, 4), "modelscope": (64, 64, 4), "ltx2": (64, 64, 9)}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(folder / name)
    return folder / name
