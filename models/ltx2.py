"""LTX-2 (Lightricks): 19B text- and image-to-video with synchronous sound.

Configurations are those of diffusers' conversion of the published checkpoint. One transformer
denoises video and sound together; a video VAE, an audio VAE and a vocoder decode them. Paper:
arXiv:2601.03233.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from overcrank.models import _few_steps, _ltx, _ltx2, _negative_prompts, _video_vae
from overcrank.models._common import random_call, shallow, tensors_named, token_count
from overcrank.models._family import Family
from overcrank.models.base import (
    Arguments,
    Component,
    Config,
    LatentOf,
    Media,
    Sizes,
    TensorSpec,
    Variant,
    VideoShape,
    renderings,
)

TEXT_LENGTH = 1024

# ── published checkpoints ────────────────────────────────────────────────────────────

_DIT: Config = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "vae_scale_factors": (8, 32, 32),
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_scale_factor": 4,
    "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000,
    "audio_hop_length": 160,
    "num_layers": 48,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 3840,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
    "causal_offset": 1,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
    "rope_type": "split",
}
_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": (256, 512, 1024, 2048),
    "down_block_types": ("LTX2VideoDownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_type": ("spatiotemporal",) * 3,
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "encoder_causal": True,
    "decoder_causal": False,
    "encoder_spatial_padding_mode": "zeros",
    "decoder_spatial_padding_mode": "reflect",
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_AUDIO_VAE: Config = {
    "base_channels": 128,
    "output_channels": 2,
    "ch_mult": (1, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": None,
    "in_channels": 2,
    "resolution": 256,
    "latent_channels": 8,
    "norm_type": "pixel",
    "causality_axis": "height",
    "mid_block_add_attention": False,
    "sample_rate": 16000,
    "mel_hop_length": 160,
    "is_causal": True,
    "mel_bins": 64,
}
_VOCODER: Config = {
    "in_channels": 128,
    "hidden_channels": 1024,
    "out_channels": 2,
    "upsample_kernel_sizes": (16, 15, 8, 4, 4),
    "upsample_factors": (6, 5, 2, 2, 2),
    "resnet_kernel_sizes": (3, 7, 11),
    "resnet_dilations": ((1, 3, 5),) * 3,
    "leaky_relu_negative_slope": 0.1,
    "output_sampling_rate": 24000,
}
_TASKS = {"text-to-video": "LTX2Pipeline", "image-to-video": "LTX2ImageToVideoPipeline"}
_CLASSIFIER_FREE: Arguments = {
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}

VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="ltx2-19b",
        family="ltx2",
        title="LTX-2 19B",
        hub_id="Lightricks/LTX-2",
        configs={
            "transformer": _DIT,
            "vae": _VAE,
            "audio_vae": _AUDIO_VAE,
            "vocoder": _VOCODER,
            "scheduler": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "use_dynamic_shifting": True,
                "base_shift": 0.95,
                "max_shift": 2.05,
                "base_image_seq_len": 1024,
                "max_image_seq_len": 4096,
                "shift_terminal": 0.1,
            },
        },
        native=VideoShape(512, 768, 121),
        minimum=VideoShape(256, 256, 9),
        maximum=VideoShape(768, 768, 241),
        fps=24,
        renders=renderings(
            _TASKS,
            guidance=4.0,
            steps=40,
            negative_prompt=_negative_prompts.LTX_2,
            arguments=_CLASSIFIER_FREE,
            source="github.com/Lightricks/LTX-2 as of the checkpoint's publication: ltx_pipelines/utils/constants.py",
            differs="its constants of today (guidance 3, sound 7, perturbed block 29, isolated modalities 3, rescale "
            "0.7) are for 2.3 too and take four times the work, half of it on no engine",
        ),
        text_length=TEXT_LENGTH,
    ),
)


class LTX2(Family):
    def strides(self, variant: Variant) -> tuple[int, int]:
        return _ltx.strides(variant.configs["vae"])

    def components(self, variant: Variant) -> tuple[Component, ...]:
        """As of LTX-Video, `denoiser_conditioned` takes a timestep for each token: image-to-video."""
        vae, latent = variant.configs["vae"], partial(self.latent, variant)
        plain, conditioned = (_denoiser(variant, latent, per_token) for per_token in (False, True))
        coders = _video_vae.components(
            vae, "AutoencoderKLLTX2Video", _ltx2.vae, sizes=_video_vae.whole(latent), strides=self.strides(variant)
        )
        return plain, *coders, _audio_decoder(variant), _vocoder(variant), conditioned

    def call_arguments(self, pipe: Any, variant: Variant, media: Media, arguments: Arguments) -> Arguments:
        """Sound is guided as the picture is."""
        keywords = super().call_arguments(pipe, variant, media, arguments)
        return keywords | {"frame_rate": media.fps, "audio_guidance_scale": arguments["guidance_scale"]}

    def results(self, pipe: Any, result: Any) -> tuple[Any, tuple[Any, int] | None]:
        """The sound is at the vocoder's rate."""
        samples = result.audio[0].float().cpu().numpy()
        return result.frames[0], (samples, pipe.vocoder.config.output_sampling_rate)


FAMILY = LTX2(
    title="LTX-2",
    default="ltx2-19b",
    denoiser_classes=("LTX2VideoTransformer3DModel",),
    variants=VARIANTS,
    presets=_few_steps.LTX2,
)

# ── components ───────────────────────────────────────────────────────────────────────


def sound(variant: Variant, shape: VideoShape) -> int:
    """Audio latents of a video: 25 a second, at the variant's frame rate."""
    audio = variant.configs["audio_vae"]
    rate: float = audio["sample_rate"] / audio["mel_hop_length"] / variant.configs["transformer"]["audio_scale_factor"]
    return max(1, round(shape.frames / variant.fps * rate))


def _denoiser(variant: Variant, latent: LatentOf, per_token: bool) -> Component:
    config = variant.configs["transformer"]
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    audio_heads, audio_dim = config["audio_num_attention_heads"], config["audio_attention_head_dim"]
    crossing = config["audio_cross_attention_dim"]
    tables = {
        "video": ("tokens", heads, dim // 2),
        "audio": ("audio", audio_heads, audio_dim // 2),
        "cross": ("tokens", heads, crossing // heads // 2),
        "cross_audio": ("audio", audio_heads, crossing // audio_heads // 2),
    }
    inputs = (
        TensorSpec("hidden_states", (1, "tokens", config["in_channels"])),
        TensorSpec("audio_hidden_states", (1, "audio", config["audio_in_channels"])),
        TensorSpec("encoder_hidden_states", (1, "text", config["caption_channels"])),
        TensorSpec("audio_encoder_hidden_states", (1, "text", config["caption_channels"])),
        TensorSpec("timestep", (1, "tokens" if per_token else 1), "float32"),
        TensorSpec("audio_timestep", (1,), "float32"),
        TensorSpec("cross_timestep", (1,), "float32"),
        TensorSpec("cross_timestep_audio", (1,), "float32"),
        TensorSpec("encoder_attention_mask", (1, "text")),
        TensorSpec("audio_encoder_attention_mask", (1, "text")),
        *(TensorSpec(f"{n}_{k}", (1, *dims), "float32") for n, dims in tables.items() for k in ("cos", "sin")),
    )
    names = tuple(t.name for t in inputs)

    def sizes(shape: VideoShape) -> Sizes:
        tokens = token_count(latent(shape))
        # `batch` is of no input: the prompts of a guided call go one by one through a graph of batch 1, for a dynamic
        # batch compiled for 861 s at full size
        return {"batch": shape.batch, "tokens": tokens, "audio": sound(variant, shape), "text": variant.text_length}

    return Component(
        name="denoiser_conditioned" if per_token else "denoiser",
        default=not per_token,
        cls=FAMILY.denoiser_classes[0],
        subfolder="transformer",
        config=config,
        **shallow(config),
        inputs=inputs,
        outputs=(
            TensorSpec("sample", (1, "tokens", config["out_channels"])),
            TensorSpec("audio_sample", (1, "audio", config["audio_out_channels"])),
        ),
        forward=partial(_ltx2.denoiser, names=names),
        adapt=partial(_ltx2.adapt_denoiser, names=names, per_token=per_token),
        returns=_ltx2.denoiser_output,
        sample=partial(_ltx2.sample_denoiser, per_token=per_token),
        sizes=sizes,
        trace_sizes={"tokens": 24, "audio": 10, "text": 16},
        free_axes={"text": 1, "audio": 1},
    )


def _audio_decoder(variant: Variant) -> Component:
    audio = variant.configs["audio_vae"]
    x = TensorSpec("sample", (1, audio["latent_channels"], "audio", audio["mel_bins"] // 4))
    return Component(
        name="audio_decoder",
        cls="AutoencoderKLLTX2Audio",
        subfolder="audio_vae",
        attribute="decoder",
        config=audio,
        inputs=(x,),
        outputs=(TensorSpec("mel", (1, audio["output_channels"], "mel_frames", "mel_bins")),),
        forward=_ltx2.audio_decoder,
        adapt=partial(tensors_named, names=("sample",)),
        sample=partial(random_call, specs=(x,)),
        sizes=lambda shape: {"audio": sound(variant, shape)},
        trace_sizes={"audio": 7},
        free_axes={"audio": 2},
    )


def _vocoder(variant: Variant) -> Component:
    audio, vocoder = variant.configs["audio_vae"], variant.configs["vocoder"]
    bins = vocoder["in_channels"] // audio["output_channels"]
    x = TensorSpec("hidden_states", (1, audio["output_channels"], "mel_frames", bins))
    return Component(
        name="vocoder",
        cls="pipelines.ltx2.vocoder.LTX2Vocoder",
        subfolder="vocoder",
        config=vocoder,
        inputs=(x,),
        outputs=(TensorSpec("waveform", (1, vocoder["out_channels"], "samples")),),
        forward=_ltx2.vocoder,
        adapt=partial(tensors_named, names=("hidden_states",)),
        sample=partial(random_call, specs=(x,)),
        sizes=lambda shape: {"mel_frames": 4 * sound(variant, shape) - 3},
        trace_sizes={"mel_frames": 13},
        free_axes={"mel_frames": 5},
    )
