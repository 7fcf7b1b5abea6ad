"""Whole tiny pipelines, saved as diffusers saves them: random weights, real tokenizers and text encoders."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable
from dataclasses import dataclass
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


def spoken(texts: str, template: str = "") -> Any:
    """A tokenizer of the texts' words, with a chat template, or the one given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.WhitespaceSplit()
    words = sorted({word for word, _ in split.pre_tokenize_str(f"{texts} {PROMPT}")})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    each = "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} "
    tokenizer.chat_template = template or "{% for m in messages %}" + each + "{% endfor %}"
    return tokenizer


def qwen(width: int, layers: int, vocabulary: int, whole: bool = False) -> Any:
    text = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, width // 4 - 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    made = transformers.Qwen2_5_VLForConditionalGeneration(config) if whole else None
    return (made or transformers.Qwen2_5_VLTextModel(config.text_config)).eval()


def siglip() -> dict[str, Any]:
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=384, patch_size=14
    )
    return {
        "image_encoder": transformers.SiglipVisionModel(vision).eval(),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 384, "width": 384}),
    }


def hunyuan_15(name: str, cls: str, **more: Any) -> Any:
    config = tiny.variant(name).configs["transformer"]
    stock = diffusers.HunyuanVideo15Pipeline
    system = inspect.signature(stock._get_mllm_prompt_embeds).parameters["system_message"].default
    filler = "word " * (108 - len(system.split()))  # the pipeline cuts off the first 108 tokens
    each = "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} "
    tokenizer = spoken("word", filler + "{% for m in messages %}" + each + "{% endfor %} word")
    bytes_ = transformers.ByT5Tokenizer()
    glyphs = transformers.T5Config(
        vocab_size=len(bytes_), d_model=config["text_embed_2_dim"], d_kv=8, d_ff=16, num_heads=2, num_layers=1,
        is_encoder_decoder=False,
    )  # fmt: skip
    return getattr(diffusers, cls)(
        **networks_of(name), tokenizer=tokenizer, text_encoder=qwen(config["text_embed_dim"], 3, len(tokenizer)),
        tokenizer_2=bytes_, text_encoder_2=transformers.T5EncoderModel(glyphs).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0), **more,
    )  # fmt: skip


def hunyuan_i2v(name: str = "tiny-hunyuan-i2v") -> Any:
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as stock

    config = tiny.variant(name).configs["transformer"]
    template = stock.DEFAULT_PROMPT_TEMPLATE["template"]
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"):
        template = template.replace(token, f" {token} ")
    tokenizer = spoken(template)
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"], special_tokens=True)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config["text_embed_dim"], intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    llava = transformers.LlavaConfig(
        vision_config=vision, text_config=llama, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0, vision_feature_layer=-1,
    )  # fmt: skip
    tokenizer_2, text_encoder_2 = clip(config["pooled_projection_dim"])
    return diffusers.HunyuanVideoImageToVideoPipeline(
        **networks_of(name), tokenizer=tokenizer,
        text_encoder=transformers.LlavaForConditionalGeneration(llava).eval(),
        tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_processor=transformers.CLIPImageProcessor(
            size={"height": 336, "width": 336}, crop_size={"height": 336, "width": 336}
        ),
    )  # fmt: skip


def framepack(name: str = "tiny-framepack") -> Any:
    return hunyuan(name, "HunyuanVideoFramepackPipeline", **siglip())


def cosmos(name: str, cls: str) -> Any:
    width = tiny.variant(name).configs["transformer"]["text_embed_dim"]
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0)
    if cls == "Cosmos2VideoToWorldPipeline":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return getattr(diffusers, cls)(**networks_of(name), **t5(width), scheduler=scheduler)


def cosmos_25(name: str = "tiny-cosmos-2.5") -> Any:
    config = tiny.variant(name).configs["transformer"]
    tokenizer = spoken("You are a helpful assistant")
    layers = 3
    encoder = qwen(config["crossattn_proj_in_channels"] // layers, layers, len(tokenizer), whole=True)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    parts = networks_of(name)
    return diffusers.Cosmos2_5_PredictBasePipeline(
        **parts, tokenizer=tokenizer, text_encoder=encoder, scheduler=scheduler
    )


def cogvideox(name: str, cls: str) -> Any:
    width = tiny.variant(name).configs["transformer"]["text_embed_dim"]
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return getattr(diffusers, cls)(**networks_of(name), **t5(width), scheduler=scheduler)


def svd(name: str = "tiny-svd") -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        **networks_of(name), scheduler=diffusers.EulerDiscreteScheduler(), feature_extractor=clip_processor()
    )


def motion_adapter(unet: Any) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2, motion_mid_block_layers_per_block=1, use_motion_mid_block=False,
    )  # fmt: skip


def animatediff(name: str = "tiny-animatediff") -> Any:
    parts = networks_of(name)
    tokenizer, text_encoder = clip(parts["unet"].config.cross_attention_dim)
    return diffusers.AnimateDiffPipeline(
        **parts, tokenizer=tokenizer, text_encoder=text_encoder, motion_adapter=motion_adapter(parts["unet"]),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip


def animatediff_sdxl(name: str = "tiny-animatediff-sdxl") -> Any:
    parts = networks_of(name)
    config = parts["unet"].config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    half = config.cross_attention_dim // 2
    tokenizer, text_encoder = clip(half)
    tokenizer_2, text_encoder_2 = clip(half, pooled, "CLIPTextModelWithProjection")
    return diffusers.AnimateDiffSDXLPipeline(
        **parts, tokenizer=tokenizer, text_encoder=text_encoder, tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2, motion_adapter=motion_adapter(parts["unet"]),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip


def mochi(name: str = "tiny-mochi") -> Any:
    width = tiny.variant(name).configs["transformer"]["text_embed_dim"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(
        **networks_of(name), **t5(width), scheduler=scheduler, force_zeros_for_empty_prompt=True
    )


def modelscope(name: str = "tiny-modelscope") -> Any:
    parts = networks_of(name)
    tokenizer, text_encoder = clip(parts["unet"].config.cross_attention_dim)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.TextToVideoSDPipeline(**parts, tokenizer=tokenizer, text_encoder=text_encoder, scheduler=scheduler)


def ltx(name: str = "tiny-ltx-0.9.5", cls: str = "LTXConditionPipeline") -> Any:
    parts = networks_of(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, cls)(**parts, **t5(parts["transformer"].config.caption_channels), scheduler=scheduler)


def upsampler(name: str = "tiny-ltx-upsampler") -> Any:
    return diffusers.LTXLatentUpsamplePipeline(**networks_of(name))


def ltx2(name: str = "tiny-ltx2") -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    width = tiny.variant(name).configs["transformer"]["caption_channels"]
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
        **networks_of(name), tokenizer=tokenizer, text_encoder=gemma.eval(), connectors=connectors.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def two_experts(name: str = "tiny-wan-2.2-a14b", cls: str = "WanPipeline", boundary: float = 0.875) -> Any:
    torch.manual_seed(1)
    second = networks_of(name)["transformer"]
    for parameter in second.parameters():
        parameter.mul_(1.05)
    return wan(name, cls, transformer_2=second, boundary_ratio=boundary)


@dataclass(frozen=True)
class Case:
    """A pipeline, and what it is rendered from besides text: "image", "ends" (first and last) or "video"."""

    make: Callable[[], Any]
    media: str = ""
    height: int = 64
    width: int = 64
    frames: int = 9
    prompt: bool = True


def _skyreels(cls: str, name: str = "tiny-skyreels-df") -> Callable[[], Any]:
    return lambda: wan(name, cls)


_UNET: Any = {"frames": 4}
_COSMOS = "Cosmos2VideoToWorldPipeline"
_IMAGE_WAN = "WanImageToVideoPipeline"
CASES: dict[str, Case] = {
    "ltx-upsampler": Case(upsampler, "video", 128, 128, prompt=False),
    "ltx": Case(ltx),
    "ltx-image": Case(ltx, "image"),
    "ltx2": Case(ltx2),
    "ltx2-image": Case(ltx2, "image"),
    "wan": Case(lambda: wan("tiny-wan-2.1", "WanPipeline")),
    "wan-video": Case(lambda: wan("tiny-wan-2.1", "WanPipeline"), "video"),
    "wan-image": Case(lambda: wan("tiny-wan-2.1-i2v", _IMAGE_WAN, image_processor=clip_processor()), "image"),
    "wan-ends": Case(lambda: wan("tiny-wan-2.1-flf", _IMAGE_WAN, image_processor=clip_processor()), "ends"),
    "wan-2.2-ti2v": Case(lambda: wan("tiny-wan-2.2-ti2v", "WanPipeline", expand_timesteps=True)),
    "wan-2.2-ti2v-image": Case(lambda: wan("tiny-wan-2.2-ti2v", "WanPipeline", expand_timesteps=True), "image"),
    "wan-two-experts": Case(two_experts),
    "wan-vace": Case(lambda: wan("tiny-wan-2.1-vace", "WanVACEPipeline")),
    "wan-vace-video": Case(lambda: wan("tiny-wan-2.1-vace", "WanVACEPipeline"), "video"),
    "hunyuan_video": Case(lambda: hunyuan("tiny-hunyuan", "HunyuanVideoPipeline")),
    "hunyuan_video-image": Case(hunyuan_i2v, "image"),
    "hunyuan_video-1.5": Case(lambda: hunyuan_15("tiny-hunyuan-1.5", "HunyuanVideo15Pipeline")),
    "hunyuan_video-1.5-image": Case(
        lambda: hunyuan_15("tiny-hunyuan-1.5-i2v", "HunyuanVideo15ImageToVideoPipeline", **siglip()), "image"
    ),
    "framepack": Case(framepack, "image"),
    "framepack-ends": Case(framepack, "ends"),
    "cosmos": Case(lambda: cosmos("tiny-cosmos-1", "CosmosTextToWorldPipeline")),
    "cosmos-image": Case(lambda: cosmos("tiny-cosmos-1-video", "CosmosVideoToWorldPipeline"), "image"),
    "cosmos-2-image": Case(lambda: cosmos("tiny-cosmos-2", _COSMOS), "image"),
    "cosmos-2-video": Case(lambda: cosmos("tiny-cosmos-2", _COSMOS), "video"),
    "cosmos-2.5": Case(cosmos_25),
    "cosmos-2.5-image": Case(cosmos_25, "image"),
    "cogvideox": Case(lambda: cogvideox("tiny-cogvideox-5b", "CogVideoXPipeline")),
    "cogvideox-video": Case(lambda: cogvideox("tiny-cogvideox-5b", "CogVideoXPipeline"), "video"),
    "cogvideox-image": Case(lambda: cogvideox("tiny-cogvideox-5b-i2v", "CogVideoXImageToVideoPipeline"), "image"),
    "skyreels": Case(_skyreels("SkyReelsV2Pipeline", "tiny-skyreels")),
    "skyreels-image": Case(
        lambda: wan("tiny-skyreels-i2v", "SkyReelsV2ImageToVideoPipeline", image_processor=clip_processor()), "image"
    ),
    "skyreels-forcing": Case(_skyreels("SkyReelsV2DiffusionForcingPipeline")),
    "skyreels-forcing-image": Case(_skyreels("SkyReelsV2DiffusionForcingPipeline"), "image"),
    "skyreels-forcing-video": Case(_skyreels("SkyReelsV2DiffusionForcingPipeline"), "video", frames=25),
    "svd": Case(svd, "image", 128, 128, 4, prompt=False),
    "animatediff": Case(animatediff, **_UNET),
    "animatediff-long": Case(animatediff, frames=37),
    "animatediff-video": Case(animatediff, "video", **_UNET),
    "animatediff-sdxl": Case(animatediff_sdxl, **_UNET),
    "mochi": Case(mochi, frames=19),
    "modelscope": Case(modelscope, **_UNET),
}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    CASES[name].make().save_pretrained(folder / name)
    return folder / name
