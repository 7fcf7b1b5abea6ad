"""The card that PyTorch computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overcrank.engines.cards import Card, installed_cards
from overcrank.errors import TargetError

if TYPE_CHECKING:
    import torch


def card_of(device: torch.device) -> Card:
    """Name, target such as "sm_89", memory now, and the driver of a CUDA device."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    try:
        driver = installed_cards()[0].driver  # one driver serves all cards
    except TargetError:  # nvidia-smi is not there; CUDA still is
        driver = "unknown"
    return Card(index, torch.cuda.get_device_name(index), f"sm_{major}{minor}", total, free, driver)
