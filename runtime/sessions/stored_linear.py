"""A linear layer with the weight that a quantized file holds: eager PyTorch widens it, engines bind its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from overcrank.export.quantization.formats import NUMBERS
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.export.quantization.stored import Quantized
from torch import nn

ENGINE_FORMATS: dict[str, Literal["fp8", "int8", "nvfp4"]] = {"fp8_e4m3": "fp8", "int8": "int8", "nvfp4": "nvfp4"}
"""Formats of files that an engine multiplies as they are."""


class StoredLinear(nn.Module):
    """In the place of an nn.Linear; its `weight` is bytes, so it stays as small as in the file wherever it is moved."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: torch.Tensor
    block_scale: torch.Tensor | None
    input_factor: torch.Tensor | None

    def __init__(self, quantized: Quantized, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.format, self.rotation = quantized.format, quantized.rotation
        self.in_features, self.out_features = quantized.inner, len(quantized.weight)
        self.weight = nn.Parameter(quantized.weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name in ("scale", "block_scale", "input_factor"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredLinear:
        """Moved, but never cast: scales are fp32."""
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            self._buffers[name] = value.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.values().to(x.dtype), self.bias)

    def values(self) -> torch.Tensor:
        """The weight in fp32 [N, K]."""
        own = (self.weight.detach(), self.scale, self.in_features, self.block_scale, self.rotation, self.input_factor)
        return Quantized(self.format, *own).values()

    @property
    def engine_format(self) -> LayerFormat | None:
        """How an engine multiplies its own bytes; None where none does."""
        form = ENGINE_FORMATS.get(self.format)
        if form is None or self.input_factor is not None:
            return None
        return LayerFormat(form, "dynamic", rotation=self.rotation)

    def bound(self, compute: torch.dtype) -> dict[str, torch.Tensor]:
        """Role → tensor that the quantized layer of a graph reads (export/quantization/linear.py), of the file's bytes.

        The graph multiplies with the format's constant step and largest value, which the factor behind takes back.
        """
        number = NUMBERS[ENGINE_FORMATS[self.format]]
        raw = self.weight.detach()
        tensors = {
            "before": torch.ones(1, 1, self.in_features, dtype=compute, device=raw.device),
            "behind": (self.scale / (number.reach * number.step))[None, None],
        }
        if self.block_scale is not None:
            halves = (raw >> 4) | (raw << 4)  # the graph has the first value in the low half
            return tensors | {"weight": halves[None], "block_scale": self.block_scale.view(torch.float8_e4m3fn)[None]}
        return tensors | {"weight": raw.view(torch.int8 if self.format == "int8" else torch.float8_e4m3fn)[None]}
