"""A module's own storage, as the inputs of a graph whose parameters are inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from overcrank.engines.manifest import ComponentEntry
from overcrank.errors import CannotServe
from overcrank.export.quantization.packing import packed_tensors
from overcrank.export.quantization.recipe import ActivationRange, LayerFormat, unmeasured
from overcrank.export.weights import Parameter
from overcrank.models.base import Component
from overcrank.runtime.sessions.stored_linear import StoredLinear

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    made = {}
    device = next(module.parameters()).device
    for layer, form in formats.items():
        if missing := unmeasured(layer, form, ranges):
            raise CannotServe(
                f"{missing} needs a range that no recipe gives",
                "calibrate, and render with --recipe, or build with --activations dynamic",
            )
        owner = module.get_submodule(layer)
        if isinstance(owner, StoredLinear) and owner.engine_format == form:
            tensors = owner.bound(getattr(torch, compute))
        else:
            tensors = packed_tensors(layer, form, weight, ranges, compute)
        for role, tensor in tensors.items():
            made[f"{layer}.{role}"] = tensor.to(device)
    return made


def compute_of(entry: ComponentEntry) -> str:
    """Torch's name of the 16-bit type in a quantized component's graph."""
    return next((p.dtype for p in entry.packed if p.role.endswith("before")), "bfloat16")


def own_parameters(module: nn.Module, component: Component, wanted: Iterable[Parameter]) -> dict[str, Tensor]:
    """Graph input → the module's parameter, which follows when the module is moved.

    What a quantized file holds of a layer that the graph multiplies in 16 bit is widened. Raises CannotServe when the
    module lacks one, as with LoRA layers that are not fused.
    """
    import torch

    named: dict[str, Tensor] = dict(module.named_parameters())
    stored = {name: owner for name, owner in module.named_modules() if isinstance(owner, StoredLinear)}
    prefix = f"{component.attribute}." if component.attribute else ""
    bound = {}
    for parameter in wanted:
        name = parameter.name.removeprefix(prefix)
        own = named.get(name)
        if name.endswith(".weight") and (owner := stored.get(name.removesuffix(".weight"))) is not None:
            own = owner.values().to(getattr(torch, parameter.dtype))
        if own is None or tuple(own.shape) != parameter.module_shape:
            raise CannotServe(
                f"the {component.subfolder} has no parameter {parameter.name} of shape {list(parameter.module_shape)}",
                "fuse LoRAs (pipe.fuse_lora(), pipe.unload_lora_weights()) and load the checkpoint unquantized",
            )
        bound[parameter.input] = own
    return bound


def bound_parameters(module: nn.Module, component: Component, wanted: Iterable[Parameter]) -> dict[str, Tensor]:
    """Graph input → view of the module's parameter in the graph's shape; nothing is copied."""
    wanted = tuple(wanted)
    own = own_parameters(module, component, wanted)
    return {p.input: own[p.input].detach().view(p.shape) for p in wanted}
