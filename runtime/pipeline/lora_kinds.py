"""What is added to a weight by kinds of LoRA whose difference has full rank: LoHa, LoKr, DoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FullRank:
    """One layer's."""

    kind: str
    make: Callable[[Tensor], Tensor]
    """The layer's weight [out, in], fp32 → what is added to it at strength one."""


def loha(halves: Mapping[str, Tensor], factor: float, rows: Rows) -> FullRank:
    """(w1a w1b) ∘ (w2a w2b) (FedPara, arXiv:2108.06098)."""
    first, second = (halves[f"hada_w{i}_a"].float() @ halves[f"hada_w{i}_b"].float() for i in (1, 2))
    whole = picked(first * second * factor, rows)
    return FullRank("LoHa", lambda weight: whole)


def lokr(halves: Mapping[str, Tensor], factor: float, rows: Rows) -> FullRank:
    """w1 ⊗ w2, each whole or a product of two (LyCORIS, arXiv:2309.14859)."""
    import torch

    first, second = (_whole(halves, f"lokr_w{i}") for i in (1, 2))
    whole = picked(torch.kron(first, second) * factor, rows)
    return FullRank("LoKr", lambda weight: whole)


def dora(halves: Mapping[str, Tensor], factor: float, rows: Rows) -> FullRank:
    """m · (W + BA) / ‖W + BA‖ (arXiv:2402.09353), the norm of each row, or of each column where m has so many."""
    low_rank = picked(halves["B"].float().flatten(1) @ halves["A"].float().flatten(1) * factor, rows)
    magnitude = halves["magnitude"].float()
    by_column = magnitude.dim() == 2 and magnitude.shape[0] == 1 and magnitude.shape[1] == low_rank.shape[1] != 1
    if not by_column:
        magnitude = picked(magnitude.reshape(-1, 1), rows)

    def make(weight: Tensor) -> Tensor:
        total = weight + low_rank.to(weight.device)
        norm = total.norm(dim=0 if by_column else 1, keepdim=True).clamp_min(1e-12)
        added: Tensor = magnitude.to(weight.device) * total / norm - weight
        return added

    return FullRank("DoRA", make)


KINDS: Mapping[str, Callable[[Mapping[str, Tensor], float, Rows], FullRank]] = {
    "LoHa": loha,
    "LoKr": lokr,
    "DoRA": dora,
}


def kind_of(halves: Mapping[str, Tensor]) -> str:
    """The kind that a layer's tensors are of, "" for plain pairs; raises CheckpointError for one that is not whole."""
    if "magnitude" in halves:
        _require(halves, "DoRA", ("A",), ("B",))
        return "DoRA"
    if any(name.startswith("hada_") for name in halves):
        _require(halves, "LoHa", *((f"hada_w{i}_{x}",) for i in (1, 2) for x in "ab"))
        return "LoHa"
    if any(name.startswith("lokr_") for name in halves):
        _require(halves, "LoKr", *((f"lokr_w{i}", f"lokr_w{i}_b") for i in (1, 2)))
        return "LoKr"
    return ""


def rank_of(kind: str, halves: Mapping[str, Tensor]) -> int:
    """By which alpha is divided; 0 for a LoKr of whole matrices, whose alpha stands for nothing."""
    names = {"LoHa": ("hada_w1_b",), "LoKr": ("lokr_w1_b", "lokr_w2_b"), "DoRA": ("A",)}[kind]
    return next((halves[name].shape[0] for name in names if name in halves), 0)


def _require(halves: Mapping[str, Tensor], kind: str, *needed: tuple[str, ...]) -> None:
    if any("_t" in name for name in halves):
        raise CheckpointError(f"is {kind} with a Tucker decomposition, which is not merged here")
    if missing := next((names[0] for names in needed if not any(n in halves for n in names)), ""):
        raise CheckpointError(f"is {kind} that is not whole ({missing} is missing)")


def _whole(halves: Mapping[str, Tensor], name: str) -> Tensor:
    if name in halves:
        return halves[name].float()
    product: Tensor = halves[f"{name}_a"].float() @ halves[f"{name}_b"].float()
    return product


def picked(whole: Tensor, rows: Rows) -> Tensor:
    import torch

    return torch.cat([whole[start:stop] for start, stop in rows])
