"""What users do to pipelines and their calls, by name."""

from __future__ import annotations

from typing import Any

import torch

from tests.diffusers_suite import calls, changes, weights
from tests.diffusers_suite.calls import given
from tests.diffusers_suite.cells import Changed, Variation
from tests.diffusers_suite.changes import before
from tests.diffusers_suite.classes import CLASSES, clip, picture


def _then(change: Any, call: Any) -> Variation:
    return Variation(call, before=before(change), changes=True)


def _only(*classes: str, changes: bool = True, **arguments: Any) -> Variation:
    """Arguments of the calls of some classes; those that depend on the size are functions of it."""

    def made(pipe: Any, subject: Any, usual: Any) -> Any:
        sizes = (subject.width, subject.height, subject.frames)
        return usual | {n: v(*sizes) if callable(v) else v for n, v in arguments.items()}

    return Variation(made, changes=changes, classes=classes)


_CONTROLS = (
    "AnimateDiffControlNetPipeline", "AnimateDiffSparseControlNetPipeline", "AnimateDiffVideoToVideoControlNetPipeline"
)  # fmt: skip
_TWO = ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX2InContextPipeline", "LTX2HDRPipeline")
_FORCED = tuple(f"SkyReelsV2DiffusionForcing{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo"))
_TO_WORLD = ("Cosmos2VideoToWorldPipeline", "CosmosVideoToWorldPipeline")

CALLS: dict[str, Variation] = {
    "plain": Variation(),
    "unguided": Variation(calls.guided(1.0, 1.0)),
    "guided": Variation(calls.guided(5.0, 3.0), changes=True),
    "guidance rescaled": Variation(given(guidance_rescale=0.7)),
    "two prompts": Variation(calls.two_prompts),
    "two videos": Variation(calls.two_videos),
    "two videos, two seeds": Variation(calls.two_seeds),
    "prompt embeds": Variation(calls.embeds),
    "given latents": Variation(calls.latents, changes=True),
    "latent output": Variation(given(output_type="latent")),
    "tensor output": Variation(given(output_type="pt")),
    "tuple output": Variation(given(return_dict=False)),
    "step callback": Variation(calls.stepped, changes=True),
    "interrupted": Variation(calls.interrupted, changes=True),
    "another size": Variation(calls.another_size),
    "longer": Variation(calls.longer),
    "shorter text": Variation(calls.short_text),
    "clip skip": Variation(calls.clip_skip, changes=True),
    "last picture": Variation(calls.last_picture, changes=True),
    "attention_kwargs": Variation(calls.attention_arguments),
}
OWN: dict[str, Variation] = {
    "dynamic guidance": Variation(given(use_dynamic_cfg=True)),
    "decode timestep": Variation(given(decode_timestep=0.05, decode_noise_scale=0.025), changes=True),
    "guess mode": _only(_CONTROLS[0], _CONTROLS[2], guess_mode=True),
    "weaker control": _only(*_CONTROLS, controlnet_conditioning_scale=0.5),
    "cross timestep off": _only(*_TWO, changes=False, use_cross_timestep=False),
    "cross timestep on": _only("LTX2HDRPipeline", use_cross_timestep=True),
    "perturbed guidance": _only(
        *_TWO[:4], stg_scale=20.0, audio_stg_scale=20.0, spatio_temporal_guidance_blocks=[2]
    ),
    "modality guidance": _only(*_TWO[:4], modality_scale=3.0, audio_modality_scale=3.0),
    "weaker context": _only("LTX2InContextPipeline", conditioning_attention_strength=0.5),
    "asynchronous": _only(*_FORCED, changes=False, ar_step=1, causal_block_size=1),
    "noised history": _only(_FORCED[2], addnoise_condition=20),
    "of a video": _only(*_TO_WORLD, image=None, video=clip),
    "of a picture": _only("Cosmos2_5_PredictBasePipeline", image=lambda w, h, f: picture(w, h)),
    "no guidance in given frames": _only("CosmosVideoToWorldPipeline", changes=False, input_frames_guidance=True),
    "reference picture": _only("WanVACEPipeline", reference_images=lambda w, h, f: [picture(w, h)]),
    "weaker conditioning": _only("WanVACEPipeline", conditioning_scale=0.5, video=clip),
    "forwards": _only("HunyuanVideoFramepackPipeline", sampling_type="vanilla"),
    "adaptive PAG": _only("AnimateDiffPAGPipeline", pag_scale=3.0, pag_adaptive_scale=0.01),
    "PAG off": _only("AnimateDiffPAGPipeline", pag_scale=0.0),
    "AdaIN": Variation(given(adain_factor=0.5)),
}  # fmt: skip
SWITCHES = {
    "FreeU": changes.switched("enable_freeu", "disable_freeu", s1=0.6, s2=0.4, b1=1.4, b2=1.6),
    "FreeNoise": changes.switched("enable_free_noise", "disable_free_noise", context_length=2, context_stride=1),
}
_CHANGING = {
    "LoRA": changes.lora,
    "LoRA fused": changes.lora_fused,
    "LoRA fused and unloaded": changes.lora_in,
    "two LoRAs": changes.two_loras,
    "attention processors": changes.processors,
    "hook inside": changes.hook_inside,
    "early hook inside": changes.early_hook_inside,
    "hook outside": changes.hook_outside,
    "forward inside": changes.forward_inside,
    "other submodule": changes.submodule,
    "new data": weights.new_data,
    "in-place weights": weights.in_place,
    "new parameters": weights.new_parameters,
    "state dict": weights.loaded,
    "state dict put in": weights.loaded_over,
    **SWITCHES,
}
_NEUTRAL = {
    "LoRA off": changes.lora_off,
    "same processors": changes.same_processors,
    "layerwise casting": weights.layerwise,
    "tiles": changes.tiles,
    "slices": changes.slices,
    "whole parts offloaded": weights.whole_offload,
    "layers offloaded": weights.layer_offload,
    "groups offloaded": weights.group_offload,
    "moved": weights.moved,
    "compiled": changes.compiled,
    "compiled in place": changes.compiled_in_place,
    "denoiser saved and loaded": changes.weights_of_part_saved,
    "denoiser pickled": changes.part_pickled,
}
_IN_STEPS = {f"{kind} cache": changes.cache(kind) for kind in ("first block", "pyramid", "mag", "faster", "taylor")}
_IN_STEPS["FreeInit"] = changes.switched("enable_free_init", "disable_free_init", num_iters=2)
_ROUNDED = {"layerwise casting"}

BEFORE = {
    f"{name}, before": Variation(before=before(change), changes=name in _CHANGING, rounded=name in _ROUNDED)
    for name, change in {**_CHANGING, **_NEUTRAL}.items()
} | {
    f"{name}, before": Variation(calls.more_steps, before=before(change), changes=True)
    for name, change in _IN_STEPS.items()
}
AFTER = {
    f"{name}, after": Variation(after=change, changes=name in _CHANGING, rounded=name in _ROUNDED)
    for name, change in {**_CHANGING, **_NEUTRAL}.items()
} | {f"{name}, after": Variation(calls.more_steps, after=change, changes=True) for name, change in _IN_STEPS.items()}
WHOLE = {
    "fp16": Variation(before=before(changes.in_type(torch.float16)), rounded=True),
    "bf16": Variation(before=before(changes.in_type(torch.bfloat16)), rounded=True),
    "bf16 after the first call": Variation(after=changes.in_type(torch.bfloat16), rounded=True),
    "LoRA fused in bf16 after the first call": Variation(after=changes.lora_in_16_bit, rounded=True, changes=True),
    "LoRA at half strength": _then(changes.lora, calls.attention_arguments),
    "slices of two videos": Variation(calls.two_videos, before=before(changes.slices)),
    "saved and loaded": Variation(after=changes.saved, again=True),
    "loaded copy unaccelerated": Variation(after=changes.saved, eager=True),
    "copied": Variation(after=changes.copied, eager=True),
    "pickled": Variation(after=changes.pickled, eager=True),
    "copied, then accelerated": Variation(after=changes.copied, again=True),
    "copy of the denoiser, changed": Variation(after=changes.part_copied, changes=True),
    "removed": Variation(after=changes.removed, eager=True),
    "accelerated twice": Variation(after=lambda pipe: Changed(), again=True),
}
VARIATIONS: dict[str, Variation] = CALLS | OWN | WHOLE | BEFORE | AFTER
CELLS = [(name, variation) for name in CLASSES for variation in VARIATIONS if VARIATIONS[variation].of(name)]
