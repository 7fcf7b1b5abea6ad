"""Published ways to render in few steps: the `presets` of the families.

Explicit sigmas are those that the scheduler counts with: shifted already, so the scheduler's own shift is 1. In Wan's
and LTX's own schedules a sigma is a timestep of 1000 and a shift s makes s·t / (1 + (s - 1)·t) of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overcrank.models.base import Preset, PublishedLora

# The checkpoints of Wan come with a multistep solver, which spaces its steps itself and rounds their timesteps.
_EULER: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def shifted(shift: float, *timesteps: float) -> tuple[float, ...]:
    """Sigmas of timesteps of 1000."""
    return tuple(shift * t / 1000 / (1 + (shift - 1) * t / 1000) for t in timesteps)


# ── Wan ──────────────────────────────────────────────────────────────────────────────

_LIGHTX2V = "https://github.com/ModelTC/LightX2V/blob/main/configs/distill"
_FOUR_STEPS: Mapping[str, Any] = {
    "steps": 4,
    "sigmas": shifted(5, 1000, 750, 500, 250),
    "timesteps": (),
    "scheduler": _EULER,
    "guidance": 1.0,
    "guidance_rescale": 0.0,
}


def _lightx2v(variant: str, task: str, config: str, repository: str, **files: str) -> Preset:
    """The experts of 2.2 take two steps each: their boundary, 0.875 or 0.9, lies between the second and third sigma."""
    second = {"guidance_2": 1.0} if "transformer_2" in files else {}
    return Preset(
        name="lightx2v-4step",
        title="4 steps without guidance",
        variants=(variant,),
        tasks=(task,),
        changes={**_FOUR_STEPS, **second},
        loras=tuple(PublishedLora(part, f"lightx2v/{repository}", file) for part, file in files.items()),
        source=f"{_LIGHTX2V}/{config}.json",
    )


WAN: tuple[Preset, ...] = (
    _lightx2v(
        "wan-2.1-t2v-14b", "text-to-video", "wan21/wan_t2v_distill_lora_4step_cfg", "Wan2.1-Distill-Loras",
        transformer="wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
    ),
    _lightx2v(
        "wan-2.1-i2v-14b-480p", "image-to-video", "wan21/wan_i2v_distill_lora_4step_cfg", "Wan2.1-Distill-Loras",
        transformer="wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
    ),
    _lightx2v(
        "wan-2.2-t2v-a14b", "text-to-video", "wan22/wan_moe_t2v_distill_lora", "Wan2.2-Distill-Loras",
        transformer="wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors",
        transformer_2="wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors",
    ),
    _lightx2v(
        "wan-2.2-i2v-a14b", "image-to-video", "wan22/wan_moe_i2v_distill_with_lora", "Wan2.2-Distill-Loras",
        transformer="wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
        transformer_2="wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors",
    ),
    Preset(
        name="fastwan-3step",
        title="FastWan: 3 steps without guidance, noise anew at each",
        variants=("wan-2.2-ti2v-5b",),
        tasks=("text-to-video",),
        checkpoint="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        # The publisher looks their sigmas up in a grid of 1000 at shift 8: 0.75676 and 0.52174.
        changes={
            "steps": 3,
            "timesteps": (1000.0, 757.0, 522.0),
            "sigmas": (),
            "scheduler": {**_EULER, "stochastic_sampling": True},
            "guidance": 1.0,
            "guidance_rescale": 0.0,
        },
        source="https://github.com/hao-ai-lab/FastVideo: configs/pipelines/wan.py, stages/denoising.py (DMD)",
    ),
)  # fmt: skip

# ── LTX-Video and LTX-2 ──────────────────────────────────────────────────────────────

LTX: tuple[Preset, ...] = (
    Preset(
        name="ltx-distilled",
        title="the distilled model as a LoRA: 8 steps without guidance",
        variants=("ltx-13b-0.9.7-dev",),
        loras=(PublishedLora("transformer", "Lightricks/LTX-Video", "ltxv-13b-0.9.7-distilled-lora128.safetensors"),),
        changes={
            "steps": 8,
            "timesteps": (1000.0, 993.0, 987.0, 981.0, 975.0, 909.0, 725.0, 0.03),
            "sigmas": (),
            "scheduler": {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None},
            "guidance": 1.0,
            "guidance_rescale": 0.0,
        },
        source="https://github.com/Lightricks/LTX-Video README (13B v0.9.7); timesteps: diffusers, LTX-Video",
    ),
)

LTX2: tuple[Preset, ...] = (
    Preset(
        name="ltx-distilled",
        title="the distilled model as a LoRA, its first stage: 8 steps without guidance",
        variants=("ltx2-19b",),
        loras=(PublishedLora("transformer", "Lightricks/LTX-2", "ltx-2-19b-distilled-lora-384.safetensors"),),
        changes={
            "steps": 8,
            "sigmas": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
            "timesteps": (),
            "scheduler": {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None},
            "guidance": 1.0,
            "guidance_rescale": 0.0,
            "arguments": {  # the pipeline guides sound and blocks too, unless it is told not to
                "stg_scale": 0.0,
                "modality_scale": 1.0,
                "audio_guidance_scale": 1.0,
                "audio_stg_scale": 0.0,
                "audio_modality_scale": 1.0,
                "audio_guidance_rescale": 0.0,
            },
        },
        source="https://github.com/Lightricks/LTX-2: utils/constants.py, dfr_pipeline.py; the LoRA: diffusers, LTX-2",
    ),
)

# ── HunyuanVideo 1.5 ─────────────────────────────────────────────────────────────────

HUNYUAN_VIDEO: tuple[Preset, ...] = (
    Preset(
        name="hunyuan-1.5-step-distilled",
        title="12 steps (8 are enough) without guidance; its engines are built from the checkpoint named here",
        variants=("hunyuan-video-1.5-480p-i2v",),
        checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled",
        changes={
            "steps": 12,
            "sigmas": (),
            "timesteps": (),
            "scheduler": {"shift": 7.0, "use_dynamic_shifting": False},
            "guidance": 1.0,
            "guidance_rescale": 0.0,
        },
        source="https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5 README, Optimal Inference Configurations",
    ),
)
