"""The card that PyTorch computes on, and why it computes on none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from overcrank.engines.cards import Card, installed_cards
from overcrank.engines.refusals import CannotServe, CardsUnseen, Refusal, TorchWithoutCuda
from overcrank.engines.tensorrt import DISTRIBUTIONS, flavour_version, too_old
from overcrank.errors import TargetError

if TYPE_CHECKING:
    import torch

WHEEL = "cu130"
"""PyTorch's build for the CUDA that engines need; what pip installs by default on Windows is without."""


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


def require_driver(card: Card) -> None:
    """Raise CannotServe when no TensorRT that is installed runs on the card's driver."""
    reasons = [too_old(flavour, card.driver) for flavour in DISTRIBUTIONS if flavour_version(flavour)]
    if reasons and all(reasons):
        raise CannotServe(next(reason for reason in reasons if reason))


def why_no_card(version: str, cuda: str | None, cards: Sequence[Card]) -> Refusal | None:
    """Why PyTorch sees none of the cards that are here; None if there is none to see.

    `version`: of PyTorch; `cuda`: the version it was made for, None for a build without.
    """
    if not cards:
        return None
    names = tuple(dict.fromkeys(card.name for card in cards))
    if not cuda:
        return TorchWithoutCuda(version, f"torch=={version.partition('+')[0]}+{WHEEL}", names)
    reasons = (too_old(flavour, cards[0].driver) for flavour in DISTRIBUTIONS if flavour_version(flavour))
    return next(filter(None, reasons), None) or CardsUnseen(version, cuda, names)


def no_card() -> Refusal | None:
    """As `why_no_card`, of this machine."""
    import torch

    try:
        cards = installed_cards()
    except TargetError:
        return None
    return why_no_card(torch.__version__, torch.version.cuda, cards)


def in_pytorchs_order(cards: Sequence[Card], uuids: Sequence[str]) -> tuple[Card, ...]:
    """As PyTorch numbers them, which `uuids` are in the order of; those it does not see come last."""
    by_uuid = {card.uuid.removeprefix("GPU-"): card for card in cards if card.uuid}
    visible = [by_uuid[uuid] for u in uuids if (uuid := u.removeprefix("GPU-")) in by_uuid]
    return (*visible, *(card for card in cards if card not in visible))
