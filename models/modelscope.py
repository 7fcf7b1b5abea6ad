"""ModelScope text-to-video (Alibaba): 1.7B, 256 × 256.

The configuration is that of the published checkpoint. Paper: arXiv:2308.06571.
"""

from __future__ import annotations

from overcrank.models import _kl_vae, _unet
from overcrank.models.base import Component, Config, Repository, TensorSpec, Variant, VideoShape, renderings

TEXT_LENGTH = 77

_UNET: Config = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
    "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1024,
    "attention_head_dim": 64,
}

_SCHEDULER: Config = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="modelscope-1.7b",
        family="modelscope",
        title="ModelScope 1.7B",
        hub_id="ali-vilab/text-to-video-ms-1.7b",
        repositories=(
            Repository("ali-vilab/text-to-video-ms-1.7b", files="fp16", former=("damo-vilab/text-to-video-ms-1.7b",)),
        ),
        configs={"unet": _UNET, "vae": _kl_vae.SD, "scheduler": _SCHEDULER},
        native=VideoShape(256, 256, 16),
        minimum=VideoShape(256, 256, 8),
        maximum=VideoShape(512, 512, 32),
        fps=8,
        dtypes={"": "fp16"},
        renders=renderings(
            {"text-to-video": "TextToVideoSDPipeline"},
            guidance=9.0,
            steps=25,
            scheduler={"_class_name": "DPMSolverMultistepScheduler"},
            source="the model's page; guidance is the pipeline's own",
        ),
        text_length=TEXT_LENGTH,
    ),
)


class ModelScope(_unet.UNetFamily):
    def components(self, variant: Variant) -> tuple[Component, ...]:
        """Every frame is decoded in one call, as the pipeline does."""
        unet, vae = variant.configs["unet"], variant.configs["vae"]
        text = TensorSpec("encoder_hidden_states", ("batch", TEXT_LENGTH, unet["cross_attention_dim"]))
        denoiser = _unet.component(self.denoiser_classes[0], unet, (text,), stride=_kl_vae.stride(vae))
        return (denoiser, *_kl_vae.components(vae, variant.maximum.frames))


FAMILY = ModelScope(
    title="ModelScope", default="modelscope-1.7b", denoiser_classes=("UNet3DConditionModel",), variants=VARIANTS
)
