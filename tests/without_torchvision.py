"""What stock Cosmos needs and not every machine that runs these tests can have.

torchvision's build for this PyTorch: two functions of it, a nearest resize and a picture's tensor, are given here in
its absence. NVIDIA's guardrail fetches its models; a checker that lets everything pass takes its place.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict


def _resize(image: torch.Tensor, size: list[int], interpolation: Any = None) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode="nearest")


def _to_tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255.0


def install() -> None:
    if not hasattr(transformer_cosmos, "transforms"):
        modes = SimpleNamespace(NEAREST="nearest")
        functional = SimpleNamespace(resize=_resize, to_tensor=_to_tensor)
        for module in (transformer_cosmos, controlnet_cosmos):
            module.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
        pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=SimpleNamespace(functional=functional))


class _PassesAll:
    """In the place of NVIDIA's guardrail, which fetches its models."""

    def to(self, *device: Any) -> _PassesAll:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def pass_guardrail() -> None:
    for name in (
        "cosmos_text2world",
        "cosmos_video2world",
        "cosmos2_video2world",
        "cosmos2_5_predict",
        "cosmos2_text2image",
        "cosmos2_5_transfer",
    ):
        import_module(f"diffusers.pipelines.cosmos.pipeline_{name}").CosmosSafetyChecker = _PassesAll
