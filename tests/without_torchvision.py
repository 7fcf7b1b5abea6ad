"""torchvision's build for this PyTorch cannot be had on every machine that runs these tests.

Stock Cosmos calls two functions of it, a nearest resize and a picture's tensor, which are given here in its absence.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
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
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
        pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=SimpleNamespace(functional=functional))
