"""What diffusers' schedulers can be told, which of them a pipeline can run, and which pipelines rescale guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOW, NOISE, COGVIDEOX, EDM = "flow", "noise", "CogVideoX", "EDM"


@dataclass(frozen=True)
class Scheduler:
    """`kinds`: the models it samples; `shift`: what it calls its time shift, "" for one that has none.

    `listed`: its schedule can be given as a list of sigmas.
    """

    kinds: tuple[str, ...]
    shift: str = ""
    listed: bool = False


_EITHER = Scheduler((FLOW, NOISE), "flow_shift")
SCHEDULERS: Mapping[str, Scheduler] = {
    "FlowMatchEulerDiscreteScheduler": Scheduler((FLOW,), "shift", listed=True),
    "FlowMatchLCMScheduler": Scheduler((FLOW,), "shift", listed=True),
    "FlowMatchHeunDiscreteScheduler": Scheduler((FLOW,), "shift"),
    "UniPCMultistepScheduler": Scheduler((FLOW, NOISE), "flow_shift", listed=True),
    "DPMSolverMultistepScheduler": _EITHER,
    "DPMSolverSinglestepScheduler": _EITHER,
    "DEISMultistepScheduler": _EITHER,
    "SASolverScheduler": _EITHER,
    "EulerDiscreteScheduler": Scheduler((NOISE,), listed=True),
    **{
        f"{name}Scheduler": Scheduler((NOISE,))
        for name in (
            "DDIM", "DDPM", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM",
            "LMSDiscrete", "PNDM", "TCD",
        )
    },
    "CogVideoXDDIMScheduler": Scheduler((COGVIDEOX,)),
    "CogVideoXDPMScheduler": Scheduler((COGVIDEOX,)),
    "EDMEulerScheduler": Scheduler((EDM,)),
}  # fmt: skip
# Pipelines that hand sigmas of their own to the scheduler, and pipelines that take the steps' arithmetic into their
# own hands, by what they then run.
_GIVING_SIGMAS = (
    "LTXPipeline", "LTXImageToVideoPipeline", "LTX2Pipeline", "LTX2ImageToVideoPipeline", "HunyuanVideoPipeline",
    "HunyuanVideoImageToVideoPipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline",
    "HunyuanVideoFramepackPipeline",
)  # fmt: skip
_OF_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler")
_EULER = ("FlowMatchEulerDiscreteScheduler",)
ONLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_GIVING_SIGMAS, _OF_FLOW),
    "LTXConditionPipeline": _EULER,
    "MochiPipeline": _EULER,
    "Cosmos2VideoToWorldPipeline": _EULER,
    "Cosmos2_5_PredictBasePipeline": ("UniPCMultistepScheduler",),
    "StableVideoDiffusionPipeline": ("EulerDiscreteScheduler",),
}

RESCALING = (
    "LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTX2Pipeline", "LTX2ImageToVideoPipeline",
    "AnimateDiffSDXLPipeline",
)  # fmt: skip


def kind_of(config: Mapping[str, Any]) -> str:
    """Of the model that a scheduler's configuration belongs to."""
    scheduler = SCHEDULERS.get(str(config.get("_class_name")))
    if scheduler is None or len(scheduler.kinds) > 1:
        return FLOW if config.get("use_flow_sigmas") else NOISE
    return scheduler.kinds[0]


def usable(pipeline: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Scheduler classes that the pipeline can run, for a checkpoint whose scheduler has this configuration."""
    kind = kind_of(config)
    return ONLY.get(pipeline) or tuple(name for name, s in SCHEDULERS.items() if kind in s.kinds)


def limit(config: Mapping[str, Any]) -> float | None:
    """The largest sigma of a schedule; None where there is none: flow models go from 1 to 0."""
    edm = config.get("use_karras_sigmas") and not config.get("use_flow_sigmas")
    return 1.0 if kind_of(config) == FLOW and not edm else None
