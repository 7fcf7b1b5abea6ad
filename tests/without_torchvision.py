"""torchvision's build for this PyTorch cannot be had on every machine that runs these tests.

Stock Cosmos calls one function of it, a nearest resize, which is given here in its absence.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.transformers import transformer_cosmos


def _resize(image: torch.Tensor, size: list[int], interpolation: Any = None) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode="nearest")


def install() -> None:
    if not hasattr(transformer_cosmos, "transforms"):
        modes = SimpleNamespace(NEAREST="nearest")
        functional = SimpleNamespace(resize=_resize)
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
