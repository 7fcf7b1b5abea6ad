"""A linear layer with the weight that a quantized file holds: eager PyTorch widens it, engines bind its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from overcrank.export.files.parts import AS_STORED
from overcrank.export.quantization.formats import NUMBERS
from overcrank.export.quantization.recipe import LayerFormat
from overcrank.export.quantization.stored import Quantized
from overcrank.runtime.sessions.lora_layer import LoraLayer
from torch import nn


class StoredLinear(LoraLayer):
    """In the place of an nn.Linear; its `weight` is bytes, so it stays as small as in the file wherever it is moved."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: torch.Tensor
    block_scale: torch.Tensor | None
    input_factor: torch.Tensor | None

    def __init__(self, quantized: Quantized, bias: torch.Tensor | None, file: Path) -> None:
        """`file`: where it is from."""
        super().__init__()
        self.file = file
        self.format, self.rotation = quantized.format, quantized.rotation
        self.in_features, self.out_features = quantized.inner, len(quantized.weight)
        own = quantized.weight.view(torch.int8)  # to whose type T5, which looks, casts no activations
        self.weight = nn.Parameter(own, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name in ("scale", "block_scale", "input_factor"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)
        self.prepare()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StoredLinear:
        """Moved, but never cast: scales are fp32, and LoRAs of the type that the network computes in."""
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            self._buffers[name] = value.to(self.weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_lora(x, nn.functional.linear(x, self.values().to(x.dtype), self.bias))

    def values(self) -> torch.Tensor:
        """The weight in fp32 [N, K]."""
        raw = self.weight.detach().view(torch.uint8)
        own = (raw, self.scale, self.in_features, self.block_scale, self.rotation, self.input_factor)
        return Quantized(self.format, *own).values()

    def is_bound_to(self, form: LayerFormat) -> bool:
        """Whether a layer of a graph in this format multiplies the file's own bytes."""
        own = LayerFormat(AS_STORED.get(self.format, "16bit"), "dynamic", rotation=self.rotation)
        return form == own and (self.input_factor is None or not self.rotation)

    def bound(self, compute: torch.dtype) -> dict[str, torch.Tensor]:
        """Role → tensor that the quantized layer of a graph reads (export/quantization/linear.py), of the file's bytes.

        The graph multiplies with the format's constant step and largest value, which the factor behind takes back.
        """
        number = NUMBERS[AS_STORED[self.format]]
        raw = self.weight.detach().view(torch.uint8)
        before = torch.ones(self.in_features, device=raw.device) if self.input_factor is None else self.input_factor
        tensors = {
            "before": before.to(compute)[None, None],
            "behind": (self.scale / (number.reach * number.step))[None, None],
        }
        if self.block_scale is not None:
            return tensors | {"weight": raw[None], "block_scale": self.block_scale.view(torch.float8_e4m3fn)[None]}
        return tensors | {"weight": raw.view(torch.int8 if self.format == "int8" else torch.float8_e4m3fn)[None]}
