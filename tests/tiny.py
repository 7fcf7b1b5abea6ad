"""One tiny configuration per layout of a family: what every shared test runs over.

Adding a family adds an entry here. Configurations keep the classes and the structure of the
published ones and shrink the widths; chains stay long enough to be repeated in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from overcrank.engines.profiles import Profile
from overcrank.models import resolve
from overcrank.models.base import Variant, VideoShape

_LTX_DIT = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # with 8 no fused attention exists, and scores of a large video fill any card
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "num_layers": 5,
}
_LTX_VAE = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (3, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 3, 1, 1),
    "patch_size": 1,
    "spatial_compression_ratio": 8,
}
_LTX_090 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 3),
    "decoder_layers_per_block": (3, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "decoder_inject_noise": (False,) * 5,
    "downsample_type": ("conv",) * 4,
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1, 1, 1, 1),
    "timestep_conditioning": False,
    "patch_size": 1,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}
_LTX_091 = _LTX_090 | {
    "decoder_block_out_channels": (8, 16),
    "decoder_layers_per_block": (2, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (True, True, False),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "timestep_conditioning": True,
}

_WAN_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 5,
}
_WAN_VAE = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
_WAN_21 = _WAN_VAE | {"latents_mean": [0.1] * 4, "latents_std": [1.2] * 4}
_WAN_22 = _WAN_VAE | {"decoder_base_dim": 8, "z_dim": 48, "dim_mult": (1, 2, 2, 2)}
_WAN_22 |= {"latents_mean": [0.1] * 48, "latents_std": [1.2] * 48}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 224,
    "projection_dim": 16,
}
_HUNYUAN_DIT = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "num_single_layers": 5,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
_HUNYUAN_15 = {k: v for k, v in _HUNYUAN_DIT.items() if "single" not in k and "pooled" not in k}
_HUNYUAN_15 |= {"in_channels": 9, "text_embed_2_dim": 12, "image_embed_dim": 8}
_HUNYUAN_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_HUNYUAN_VAE_15 = {"latent_channels": 4, "block_out_channels": (16, 16, 16, 16, 16), "layers_per_block": 1}
_COSMOS_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 5,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "out_channels": 4,
}
_COSMOS_VAE = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8),
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "latents_mean": None,
    "latents_std": None,
}
_COG_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 5,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 17,
}
_COG_VAE = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
_LTX2_DIT = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 5,
    "caption_channels": 24,
}
_LTX2_VAE = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
}
_LTX2_AUDIO = {"base_channels": 8, "ch_mult": (1, 2, 4), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 16}
_LTX2_VOCODER = {
    "in_channels": 32,
    "hidden_channels": 16,
    "upsample_kernel_sizes": (4, 4),
    "upsample_factors": (2, 2),
    "resnet_kernel_sizes": (3,),
    "resnet_dilations": ((1, 3),),
    "output_sampling_rate": 400,
}
_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}  # one level with text, one without
_SVD_UNET = {
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 64),  # in 32 groups: a group of one pixel would normalize rounding errors
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "num_attention_heads": (2, 2),
}
_SDXL_UNET = _UNET | {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 24,
    "num_attention_heads": (2, 4),
    "motion_num_attention_heads": 2,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}
_KL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_SMALL = {
    "native": VideoShape(64, 128, 4),
    "minimum": VideoShape(64, 64, 2),
    "maximum": VideoShape(128, 128, 6),
    "odd": VideoShape(128, 64, 3),
}


NATIVE, MINIMUM, MAXIMUM, ODD = (
    VideoShape(64, 64, 17),
    VideoShape(32, 32, 1),
    VideoShape(96, 96, 33),
    VideoShape(32, 96, 9),
)


@dataclass(frozen=True)
class Tiny:
    """A published variant with some fields of its configurations shrunk."""

    like: str
    configs: Mapping[str, Mapping[str, Any]]
    native: VideoShape = NATIVE
    minimum: VideoShape = MINIMUM
    maximum: VideoShape = MAXIMUM
    odd: VideoShape = ODD
    more: Mapping[str, Any] = field(default_factory=dict)


_NO_PICTURES = {"minimum": VideoShape(32, 32, 5), "more": {"text_length": 16}}  # no video of one frame
_COG = {"minimum": VideoShape(32, 32, 9)}
_PAIRS = {"minimum": VideoShape(32, 32, 5)}

TINY = {
    "tiny-ltx-0.9.5": Tiny("ltx-2b-0.9.5", {"transformer": _LTX_DIT, "vae": _LTX_VAE}, more={"text_length": 16}),
    "tiny-ltx-0.9.0": Tiny("ltx-2b-0.9.0", {"transformer": _LTX_DIT, "vae": _LTX_090}, more={"text_length": 16}),
    "tiny-ltx-0.9.1": Tiny("ltx-2b-0.9.1", {"transformer": _LTX_DIT, "vae": _LTX_091}, more={"text_length": 16}),
    "tiny-ltx-upsampler": Tiny(
        "ltx-upsampler-0.9.7",
        {"latent_upsampler": {"in_channels": 8, "mid_channels": 64, "num_blocks_per_stage": 1}, "vae": _LTX_VAE},
        native=VideoShape(128, 128, 17),
        minimum=VideoShape(64, 64, 1),
        maximum=VideoShape(192, 192, 33),
        odd=VideoShape(128, 192, 9),
    ),
    "tiny-wan-2.1": Tiny(
        "wan-2.1-t2v-1.3b", {"transformer": _WAN_DIT | {"in_channels": 4, "out_channels": 4}, "vae": _WAN_21}
    ),
    "tiny-wan-2.1-i2v": Tiny(
        "wan-2.1-i2v-14b-480p",
        {
            "transformer": _WAN_DIT | {"in_channels": 12, "out_channels": 4, "image_dim": 32, "added_kv_proj_dim": 32},
            "vae": _WAN_21,
            "image_encoder": _CLIP,
        },
    ),
    "tiny-wan-2.1-flf": Tiny(
        "wan-2.1-flf2v-14b-720p",
        {
            "transformer": _WAN_DIT | {"in_channels": 12, "out_channels": 4, "image_dim": 32, "added_kv_proj_dim": 32},
            "vae": _WAN_21,
            "image_encoder": _CLIP,
        },
    ),
    "tiny-wan-2.1-vace": Tiny(
        "wan-2.1-vace-1.3b",
        {
            "transformer": _WAN_DIT
            | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "vace_layers": (0, 2), "vace_in_channels": 72},
            "vae": _WAN_21,
        },
    ),
    "tiny-wan-2.2-ti2v": Tiny("wan-2.2-ti2v-5b", {"transformer": _WAN_DIT, "vae": _WAN_22}),
    "tiny-hunyuan": Tiny("hunyuan-video-13b", {"transformer": _HUNYUAN_DIT, "vae": _HUNYUAN_VAE}, **_NO_PICTURES),
    "tiny-hunyuan-i2v": Tiny(
        "hunyuan-video-13b-i2v", {"transformer": _HUNYUAN_DIT, "vae": _HUNYUAN_VAE}, **_NO_PICTURES
    ),
    "tiny-hunyuan-i2v-33ch": Tiny(
        "hunyuan-video-13b-i2v-33ch",
        {"transformer": _HUNYUAN_DIT | {"in_channels": 9}, "vae": _HUNYUAN_VAE},
        **_NO_PICTURES,
    ),
    "tiny-hunyuan-1.5": Tiny(
        "hunyuan-video-1.5-480p", {"transformer": _HUNYUAN_15, "vae": _HUNYUAN_VAE_15}, **_NO_PICTURES
    ),
    "tiny-hunyuan-1.5-i2v": Tiny(
        "hunyuan-video-1.5-480p-i2v", {"transformer": _HUNYUAN_15, "vae": _HUNYUAN_VAE_15}, **_NO_PICTURES
    ),
    "tiny-framepack": Tiny(
        "framepack-i2v-13b",
        {"transformer": _HUNYUAN_DIT | {"image_proj_dim": 8}, "vae": _HUNYUAN_VAE},
        **_NO_PICTURES,
    ),
    "tiny-cosmos-1": Tiny(
        "cosmos-predict1-7b-text2world",
        {"transformer": _COSMOS_DIT | {"in_channels": 4}, "vae": _COSMOS_VAE},
        **_NO_PICTURES | {"minimum": VideoShape(32, 32, 9)},
    ),
    "tiny-cosmos-1-video": Tiny(
        "cosmos-predict1-7b-video2world",
        {"transformer": _COSMOS_DIT | {"in_channels": 5}, "vae": _COSMOS_VAE},
        **_NO_PICTURES | {"minimum": VideoShape(32, 32, 9)},
    ),
    "tiny-cosmos-2": Tiny(
        "cosmos-predict2-2b-video2world",
        {"transformer": _COSMOS_DIT | {"in_channels": 5}, "vae": _WAN_21},
    ),
    "tiny-cosmos-2.5": Tiny(
        "cosmos-predict2.5-2b",
        {
            "transformer": _COSMOS_DIT
            | {"in_channels": 5, "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 16},
            "vae": _WAN_21,
        },
    ),
    "tiny-cogvideox-2b": Tiny("cogvideox-2b", {"transformer": _COG_DIT, "vae": _COG_VAE}, **_COG),
    "tiny-cogvideox-5b": Tiny("cogvideox-5b", {"transformer": _COG_DIT, "vae": _COG_VAE}, **_COG),
    "tiny-cogvideox-5b-i2v": Tiny(
        "cogvideox-5b-i2v", {"transformer": _COG_DIT | {"in_channels": 8}, "vae": _COG_VAE}, **_COG
    ),
    "tiny-cogvideox-1.5": Tiny("cogvideox-1.5-5b", {"transformer": _COG_DIT, "vae": _COG_VAE}, **_COG),
    "tiny-cogvideox-1.5-i2v": Tiny(
        "cogvideox-1.5-5b-i2v",
        {"transformer": _COG_DIT | {"in_channels": 8, "ofs_embed_dim": 8}, "vae": _COG_VAE},
        **_COG,
    ),
    "tiny-ltx2": Tiny(
        "ltx2-19b",
        {"transformer": _LTX2_DIT, "vae": _LTX2_VAE, "audio_vae": _LTX2_AUDIO, "vocoder": _LTX2_VOCODER},
        minimum=VideoShape(64, 64, 9),
        maximum=VideoShape(128, 128, 33),
        odd=VideoShape(64, 96, 9),
        more={"text_length": 16},
    ),
    "tiny-skyreels": Tiny(
        "skyreels-v2-t2v-14b-540p",
        {"transformer": _WAN_DIT | {"in_channels": 4, "out_channels": 4}, "vae": _WAN_21},
        **_PAIRS,
    ),
    "tiny-skyreels-df": Tiny(
        "skyreels-v2-df-1.3b-540p",
        {"transformer": _WAN_DIT | {"in_channels": 4, "out_channels": 4}, "vae": _WAN_21},
        **_PAIRS,
    ),
    "tiny-skyreels-i2v": Tiny(
        "skyreels-v2-i2v-14b-540p",
        {
            "transformer": _WAN_DIT | {"in_channels": 12, "out_channels": 4, "image_dim": 32, "added_kv_proj_dim": 32},
            "vae": _WAN_21,
            "image_encoder": _CLIP,
        },
        **_PAIRS,
    ),
    "tiny-svd": Tiny(
        "svd-xt-1.1",
        {
            "unet": _SVD_UNET | {"num_frames": 4},
            "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
            "image_encoder": _CLIP,
        },
        native=VideoShape(128, 192, 4),
        minimum=VideoShape(128, 128, 2),
        maximum=VideoShape(192, 192, 6),
        odd=VideoShape(192, 128, 3),
    ),
    "tiny-animatediff": Tiny(
        "animatediff-sd15-v1.5.3",
        {
            "unet": _UNET
            | {
                "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
                "cross_attention_dim": 24,
                "num_attention_heads": 2,
                "motion_num_attention_heads": 2,
            },
            "vae": _KL,
        },
        native=VideoShape(64, 128, 22),  # three of FreeNoise's windows
        minimum=VideoShape(64, 64, 2),
        maximum=VideoShape(128, 128, 30),
        odd=VideoShape(128, 64, 25),
    ),
    "tiny-animatediff-sdxl": Tiny("animatediff-sdxl", {"unet": _SDXL_UNET, "vae": _KL}, **_SMALL),
    "tiny-mochi": Tiny(
        "mochi-1-preview",
        {
            "transformer": {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "pooled_projection_dim": 16,
                "in_channels": 12,
                "text_embed_dim": 16,
                "num_layers": 6,
            },
            "vae": {"decoder_block_out_channels": (32, 32, 64, 64), "layers_per_block": (1, 1, 1, 1, 1)},
        },
        minimum=VideoShape(32, 32, 1),
        native=VideoShape(64, 64, 19),
        odd=VideoShape(32, 96, 7),
        maximum=VideoShape(96, 96, 31),
    ),
    "tiny-modelscope": Tiny(
        "modelscope-1.7b",
        {
            "unet": _UNET
            | {
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "cross_attention_dim": 24,
                "attention_head_dim": 4,
            },
            "vae": _KL,
        },
        **_SMALL,
    ),
    "tiny-wan-2.2-a14b": Tiny(
        "wan-2.2-t2v-a14b", {"transformer": _WAN_DIT | {"in_channels": 4, "out_channels": 4}, "vae": _WAN_21}
    ),
    "tiny-wan-2.2-a14b-i2v": Tiny(
        "wan-2.2-i2v-a14b", {"transformer": _WAN_DIT | {"in_channels": 12, "out_channels": 4}, "vae": _WAN_21}
    ),
}


def specimens(cases: Iterable[Any], *usual: Any) -> list[Any]:
    """Test cases of which each run takes the `usual`, one of each kind; `./build.sh test-all` the others too."""
    known = list(cases)
    assert set(usual) <= set(known), f"no such case: {set(usual) - set(known)}"
    return [
        pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=() if c in usual else (pytest.mark.sweep,))
        for c in known
    ]


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """Test cases that are all of one kind: each run takes one in `every`."""
    known = list(cases)
    return specimens(known, *known[::every])


# Published variants of the layouts above: the first tiny one that a name begins with shrinks them too.
_ALIKE = {
    "ltx-upsampler": "tiny-ltx-upsampler",
    "ltx-2b-0.9.0": "tiny-ltx-0.9.0",
    "ltx-2b-0.9.1": "tiny-ltx-0.9.1",
    "ltx-": "tiny-ltx-0.9.5",
    "ltx2": "tiny-ltx2",
    "wan-2.1-t2v": "tiny-wan-2.1",
    "wan-2.1-i2v": "tiny-wan-2.1-i2v",
    "wan-2.1-flf2v": "tiny-wan-2.1-flf",
    "wan-2.1-vace": "tiny-wan-2.1-vace",
    "wan-2.2-ti2v": "tiny-wan-2.2-ti2v",
    "wan-2.2-t2v": "tiny-wan-2.2-a14b",
    "wan-2.2-i2v": "tiny-wan-2.2-a14b-i2v",
    "hunyuan-video-13b-i2v-33ch": "tiny-hunyuan-i2v-33ch",
    "hunyuan-video-13b-i2v": "tiny-hunyuan-i2v",
    "hunyuan-video-13b": "tiny-hunyuan",
    "hunyuan-video-1.5-480p-i2v": "tiny-hunyuan-1.5-i2v",
    "hunyuan-video-1.5-720p-i2v": "tiny-hunyuan-1.5-i2v",
    "hunyuan-video-1.5": "tiny-hunyuan-1.5",
    "framepack": "tiny-framepack",
    "cosmos-predict1-7b-text": "tiny-cosmos-1",
    "cosmos-predict1-14b-text": "tiny-cosmos-1",
    "cosmos-predict1": "tiny-cosmos-1-video",
    "cosmos-predict2-": "tiny-cosmos-2",
    "cosmos-predict2.5": "tiny-cosmos-2.5",
    "cogvideox-2b": "tiny-cogvideox-2b",
    "cogvideox-5b-i2v": "tiny-cogvideox-5b-i2v",
    "cogvideox-5b": "tiny-cogvideox-5b",
    "cogvideox-1.5-5b-i2v": "tiny-cogvideox-1.5-i2v",
    "cogvideox-1.5": "tiny-cogvideox-1.5",
    "skyreels-v2-t2v": "tiny-skyreels",
    "skyreels-v2-df": "tiny-skyreels-df",
    "skyreels-v2-i2v": "tiny-skyreels-i2v",
    "svd": "tiny-svd",
    "animatediff-sd15": "tiny-animatediff",
    "animatediff-sdxl": "tiny-animatediff-sdxl",
    "mochi": "tiny-mochi",
    "modelscope": "tiny-modelscope",
}


def layout(name: str) -> Tiny:
    """Of a tiny variant, or the one that shrinks this published variant."""
    return TINY[name if name in TINY else next(t for start, t in _ALIKE.items() if name.startswith(start))]


def variant(name: str) -> Variant:
    """A tiny variant by its name, or the small form of the published one of this name."""
    tiny = layout(name)
    published = resolve(tiny.like if name in TINY else name)
    return replace(
        published,
        name=name,
        hub_id="",
        hub_file="",
        repositories=(),
        configs={part: {**config, **shrunk(name, part)} for part, config in published.configs.items()},
        native=tiny.native,
        minimum=tiny.minimum,
        maximum=tiny.maximum,
        **tiny.more,
    )


def shrunk(name: str, part: str) -> Mapping[str, Any]:
    """The fields of a part that are smaller than published; a second expert's are the first one's."""
    return layout(name).configs.get(part.removesuffix("_2"), {})


def shapes(name: str) -> tuple[VideoShape, ...]:
    """Shapes a graph is compared at: never only the one it was traced at."""
    tiny = TINY[name]
    return replace(tiny.native, batch=2), tiny.odd, tiny.minimum


def profile(name: str) -> Profile:
    tiny = TINY[name]
    return Profile(tiny.minimum, replace(tiny.native, batch=2), replace(tiny.maximum, batch=2))
