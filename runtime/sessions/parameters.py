"""A module's own storage, as the inputs of a graph whose parameters are inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from overcrank.engines.manifest import ComponentEntry
from overcrank.engines.module_refusals import NoParameter, NoRange
from overcrank.engines.refusals import CannotServe
from overcrank.errors import CheckpointError
from overcrank.export.quantization.packing import packed_tensors
from overcrank.export.quantization.recipe import ActivationRange, LayerFormat, unmeasured
from overcrank.export.weights import Parameter
from overcrank.models.base import Component
from overcrank.runtime.sessions.stored_linear import StoredLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED_TYPES = {
    "float8e4m3fn": "float8_e4m3fn",
    "int8": "int8",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float": "float32",
    "float4e2m1": "uint8",
}
"""ONNX's names of what packs hold → PyTorch's."""


def parameters_of(entry: ComponentEntry) -> tuple[Parameter, ...]:
    return tuple(Parameter(p.input, p.parameter, p.dtype, tuple(p.view), tuple(p.shape)) for p in entry.parameters)


def packed_parameters(
    module: nn.Module,
    formats: Mapping[str, LayerFormat],
    ranges: Mapping[str, ActivationRange],
    compute: str,
) -> dict[str, Tensor]:
    """Graph input → tensor of the quantized layers in `formats`, made of the module's weights where they are.

    `compute`: torch's name of the factors' type. Raises CannotServe for a range that was not measured.
    """

    import torch

    def weight(layer: str) -> Tensor:
        owner = module.get_submodule(layer)
        return owner.values() if isinstance(owner, StoredLinear) else module.get_parameter(f"{layer}.weight").detach()

    tensors = {}
    device = next(module.parameters()).device
    for layer, form in formats.items():
        if missing := unmeasured(layer, form, ranges):
            raise CannotServe(NoRange(missing))
        owner = module.get_submodule(layer) if form.kind == "linear" else None
        if isinstance(owner, StoredLinear) and owner.is_bound_to(form):
            bound = owner.bound(getattr(torch, compute))
        else:
            bound = packed_tensors(layer, form, weight, ranges, compute)
        for role, tensor in bound.items():
            tensors[f"{layer}.{role}"] = tensor.to(device)
    return tensors


def live_weights(module: nn.Module, formats: Mapping[str, LayerFormat]) -> dict[str, nn.Parameter]:
    """Graph input → the module's own bytes, of the layers in `formats` that are multiplied as a file has them.

    They follow when the module is moved; their type says no more than that they are bytes.
    """
    stored = {name: own for name, own in module.named_modules() if isinstance(own, StoredLinear) and name in formats}
    return {f"{name}.weight": own.weight for name, own in stored.items() if own.is_bound_to(formats[name])}


def copied_layers(parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Layers whose weight, among an engine's parameters, is not the module's own."""
    import torch

    weights = {name: t for name, t in parameters.items() if name.endswith(".weight")}
    return tuple(n.removesuffix(".weight") for n, t in weights.items() if not isinstance(t, torch.nn.Parameter))


def declared(entry: ComponentEntry, packs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed tensors, factors in the types of the manifest: those behind products were in 16 bit in earlier engines."""
    import torch

    factors = {p.input: getattr(torch, PACKED_TYPES[p.dtype]) for p in entry.packed if p.role in ("before", "behind")}
    return {name: tensor.to(factors.get(name, tensor.dtype)) for name, tensor in packs.items()}


def require_packed(entry: ComponentEntry, packs: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for packed tensors that are not all of the types and shapes that the manifest says.

    An engine is told addresses alone, and reads as many bytes as it was compiled for.
    """
    for packed in entry.packed:
        tensor, shape = packs.get(packed.input), packed.shape
        if packed.dtype == "float4e2m1":  # two values in a byte
            shape = [*shape[:-1], shape[-1] // 2]
        there = None if tensor is None else (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        if there != (PACKED_TYPES.get(packed.dtype), shape):
            raise CheckpointError(
                f"the weight pack has {packed.input} {'not at all' if there is None else f'as {there[0]} {there[1]}'}, "
                f"and the engine takes it as {packed.dtype} {packed.shape}; pack it again with the engine's recipe."
            )


def compute_of(entry: ComponentEntry) -> str:
    """Torch's name of the 16-bit type in a quantized component's graph."""
    return next((p.dtype for p in entry.packed if p.role.endswith("before")), "bfloat16")


def own_parameters(module: nn.Module, component: Component, parameters: Iterable[Parameter]) -> dict[str, Tensor]:
    """Graph input → the module's parameter, which follows when the module is moved.

    What a quantized file holds of a layer that the graph multiplies in 16 bit is widened. Raises CannotServe when the
    module lacks one, as with LoRA layers that are not fused.
    """
    import torch

    named: dict[str, Tensor] = dict(module.named_parameters())
    stored = {name: owner for name, owner in module.named_modules() if isinstance(owner, StoredLinear)}
    prefix = f"{component.attribute}." if component.attribute else ""
    inputs = {}
    for parameter in parameters:
        name = parameter.name.removeprefix(prefix)
        own = named.get(name)
        if name.endswith(".weight") and (owner := stored.get(name.removesuffix(".weight"))) is not None:
            own = owner.values().to(getattr(torch, parameter.dtype))
        if own is None or tuple(own.shape) != parameter.module_shape:
            raise CannotServe(NoParameter(component.subfolder, parameter.name, parameter.module_shape))
        inputs[parameter.input] = own
    return inputs


def bound_parameters(module: nn.Module, component: Component, parameters: Iterable[Parameter]) -> dict[str, Tensor]:
    """Graph input → view of the module's parameter in the graph's shape; nothing is copied."""
    parameters = tuple(parameters)
    own = own_parameters(module, component, parameters)
    return {p.input: own[p.input].detach().view(p.shape) for p in parameters}
