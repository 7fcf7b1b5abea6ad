"""Weights that wait in host memory, while an engine multiplies packed ones in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Parked:
    """Weights of a module's quantized layers.

    A module with hooks that move it is left alone. Its first parameter stays, as it tells where the module is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._away: dict[str, torch.device] = {}

    def park(self, layers: Sequence[str]) -> bool:
        """Returns whether any was moved."""
        first = next(self._module.parameters())
        if not on_a_card(first) or hasattr(self._module, "_hf_hook"):
            return False
        before = len(self._away)
        for name in layers:
            weight = self._module.get_parameter(f"{name}.weight")
            if weight is not first and name not in self._away:
                self._away[name] = weight.device
                weight.data = to_host(weight.data)
        return len(self._away) > before

    def fetch(self) -> None:
        """Back to where they were, for PyTorch to multiply; of those that have been moved since, none."""
        for name, device in self._away.items():
            weight = self._module.get_parameter(f"{name}.weight")
            weight.data = to_device(weight.data, device)
        self._away.clear()


def on_a_card(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device)
