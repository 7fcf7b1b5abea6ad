"""Linear layers that hold LoRAs beside their weights: eager PyTorch adds them, engines bind them as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, cast

import torch
from overcrank.engines.module_refusals import lora_unfit
from overcrank.engines.refusals import CannotServe
from overcrank.export.quantization.lora import LORA_A, LORA_B
from torch import nn


class LoraLayer(nn.Module):
    """A linear layer of `in_features` and `out_features`, with the LoRAs of a pipeline stacked along their ranks."""

    in_features: int
    out_features: int
    weight: torch.Tensor
    lora_a: torch.Tensor | None
    """[rank, in_features]; None for no LoRA."""
    lora_b: torch.Tensor | None
    """[out_features, rank], strengths multiplied in."""

    def prepare(self) -> None:
        """To be called once, of a module that is a layer already."""
        self.register_buffer(LORA_A, None, persistent=False)
        self.register_buffer(LORA_B, None, persistent=False)

    def hold(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.lora_a, self.lora_b = a, b

    def let_go(self) -> None:
        self.lora_a = self.lora_b = None

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else len(self.lora_a)

    def with_lora(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The layer's output, y for x without, with its LoRAs."""
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


class UnmergedLinear(LoraLayer, nn.Linear):
    """An nn.Linear whose LoRAs stay beside its weight."""

    @staticmethod
    def of(layer: nn.Linear) -> UnmergedLinear:
        """The layer itself, which is one from now on."""
        made = cast(UnmergedLinear, layer)
        made.__class__ = UnmergedLinear
        made.prepare()
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_lora(x, nn.functional.linear(x, self.weight, self.bias))


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """By name, those that can hold a LoRA."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def held_ranks(module: nn.Module) -> dict[str, int]:
    """Layer → the rank of the LoRAs it holds."""
    return {name: layer.rank for name, layer in lora_layers(module).items() if layer.rank}


class LoraInput(Protocol):
    """A graph input for one half of a layer's LoRAs (Packed, or PackedEntry of a manifest)."""

    @property
    def input(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class BoundLoras:
    """The LoRA inputs of a graph, filled with what a module's layers hold whenever it is called."""

    component: str
    precision: str
    """Of the engine."""
    inputs: Sequence[LoraInput]
    module: nn.Module
    dtype: torch.dtype = torch.float32
    """That the graph computes in."""

    def __call__(self) -> dict[str, torch.Tensor]:
        """Graph input → tensor of the rank that the graph takes, with zeros where there is no LoRA.

        Those of zeros share their memory. Raises CannotServe for LoRAs that the graph cannot take.
        """
        taken = {entry.layer: entry.shape[1] for entry in self.inputs if entry.role == LORA_A}
        if unfit := lora_unfit(self.component, held_ranks(self.module), taken, self.precision):
            raise CannotServe(unfit)
        if not self.inputs:
            return {}
        layers, device = lora_layers(self.module), next(self.module.parameters()).device
        most = max(prod(entry.shape) for entry in self.inputs)
        zeros = {dtype: torch.zeros(most, dtype=dtype, device=device) for dtype in (self.dtype, torch.float32)}
        tensors = {}
        for entry in self.inputs:
            layer = layers.get(entry.layer)
            half = None if layer is None else layer.lora_a if entry.role == LORA_A else layer.lora_b
            own = torch.float32 if entry.dtype == "float" else self.dtype  # of a layer that its network keeps in fp32
            tensor = zeros[own][: prod(entry.shape)].view(*entry.shape)
            tensors[entry.input] = tensor if half is None else _filled(torch.zeros_like(tensor), half)
        return tensors


def _filled(whole: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """A [1, R, K] or B [1, N, R] of zeros, with what is held at its beginning."""
    whole[0, : half.shape[0], : half.shape[1]] = half.to(whole)
    return whole
