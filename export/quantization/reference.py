"""The quantized linear layer in plain PyTorch: what a graph should compute, and what each layer costs in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from overcrank.export.quantization.attention import attended, intercepted, packed_factors
from overcrank.export.quantization.formats import BLOCK, NUMBERS
from overcrank.export.quantization.packing import fp4_values, packed_layer, unpacked_fp4
from overcrank.export.quantization.recipe import ATTENTION, OPERANDS, ActivationRange, LayerFormat
from overcrank.export.quantization.rotation import rotated

if TYPE_CHECKING:
    from torch import Tensor, nn


def multiplied(x: Tensor, packed: Mapping[str, Tensor], form: LayerFormat) -> Tensor:
    """x [..., K] times the packed weight of N rows → [..., N], in fp32, without the bias."""
    number = NUMBERS[form.format]
    if form.format == "nvfp4":
        weight = unpacked_fp4(packed["weight"], packed["block_scale"])
    else:
        weight = packed["weight"].float()
    weight = (weight if form.activations == "16bit" else weight.transpose(1, 2))[0] * number.step
    wide = rotated(x.float(), form.rotation) if form.rotation else x.float()
    y = wide * packed["before"][0, 0].float()
    token: Tensor | float = 1.0
    if form.activations == "dynamic":
        token = y.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        y = y / token * number.reach
    if form.activations != "16bit":
        y = _rounded(y, form, number.step)
    out: Tensor = y @ weight * token * packed["behind"][0, 0].float()
    return out


def _rounded(x: Tensor, form: LayerFormat, step: float) -> Tensor:
    import torch

    if form.format == "fp8":
        return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    if form.format == "int8":
        return (x / step).round().clamp(-128, 127) * step
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / step).clamp_max(448).to(torch.float8_e4m3fn).float() * step
    out: Tensor = (fp4_values(blocks / scale.clamp_min(1e-30)) * scale).flatten(-2)
    return out


@contextmanager
def quantized_layers(
    module: nn.Module, formats: Mapping[str, LayerFormat], ranges: Mapping[str, ActivationRange], compute: str
) -> Iterator[None]:
    """Layers of `formats` multiply as quantized ones meanwhile; `compute`: torch's name of the factors' type."""
    changed: list[Any] = []
    factors = {n: packed_factors(n, ranges, compute) for n, form in formats.items() if form.kind == ATTENTION}

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
        return attended(query, key, value, call, factors[name])

    try:
        for name, form in formats.items():
            if form.kind == ATTENTION:
                continue
            layer: Any = module.get_submodule(name)
            packed = packed_layer(name, layer.weight.detach(), form, ranges.get(name), compute)
            layer.forward = _forward(layer, packed, form)
            changed.append(layer)
        with intercepted(module, factors, attend):
            yield
    finally:
        for layer in changed:
            del layer.forward


def ranges_of_call(
    module: nn.Module, formats: Mapping[str, LayerFormat], call: Mapping[str, Any]
) -> dict[str, ActivationRange]:
    """Layer → the range of its input in one call of the module, for networks nothing was measured of."""
    maxima: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        maxima[name] = max(float(x.abs().max()), 1e-6, maxima.get(name, 0.0))

    def noting(name: str) -> Any:
        return lambda _, args: note(name, args[0])

    def attended_to(name: str, *operands: Any) -> None:
        for operand, x in zip(OPERANDS, operands, strict=False):
            note(f"{name}.{operand}", x)

    linear = [name for name, form in formats.items() if form.kind != ATTENTION]
    handles = [module.get_submodule(name).register_forward_pre_hook(noting(name)) for name in linear]
    try:
        with intercepted(module, formats.keys() - set(linear), attended_to):
            module(**call)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ActivationRange(amax=largest) for name, largest in maxima.items()}


def _forward(layer: Any, packed: Mapping[str, Tensor], form: LayerFormat) -> Any:
    def forward(x: Tensor, *_: Any) -> Tensor:
        y = multiplied(x, packed, form)
        out: Tensor = (y if layer.bias is None else y + layer.bias.float()).to(x.dtype)
        return layer.with_lora(x, out) if hasattr(layer, "with_lora") else out

    return forward
