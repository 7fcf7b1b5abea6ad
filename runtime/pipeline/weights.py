"""Parts of a pipeline out of single files: `--weights transformer=FILE`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from overcrank.errors import CheckpointError, present
from overcrank.export.files.parts import (
    PartFile,
    part_file,
    recipe_of_components,
    recipe_of_layers,
)
from overcrank.export.files.single_file import Rows
from overcrank.export.module import cast_like_diffusers, construct
from overcrank.export.quantization.recipe import ComponentRecipe, Recipe
from overcrank.export.quantization.stored import Quantized, joined, read_layer
from overcrank.models import family
from overcrank.models.base import Component, Variant
from overcrank.runtime.sessions.stored_linear import StoredLinear
from torch import nn


def module_of(path: Path, component: Component, dtype: torch.dtype) -> nn.Module:
    """The component's whole part of the pipeline with the file's weights, mapped where they are of `dtype` already.

    Linear layers that the file has quantized stay so (StoredLinear). Raises CheckpointError as `part_file`.
    """
    module = empty_module(component, path)
    cast_like_diffusers(module, dtype)
    return filled(module, part_file(path, component, module))


def empty_module(component: Component, path: Path) -> nn.Module:
    """The component's whole part of the pipeline without values, which `path` has."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return construct(component.cls, component.config, str(path))


def filled(module: nn.Module, part: PartFile) -> nn.Module:
    """The module with a file's weights in the place of its empty ones, in their types."""
    layer = cache(partial(_layer, part))  # of a fused one, each part is some of its rows
    for name, rows in part.origins.items():
        owner_name, _, last = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if last == "weight" and isinstance(owner, nn.Linear) and _is_stored(part, rows):
            continue
        empty = present(owner._parameters.get(last, owner._buffers.get(last)), name)
        value = _plain(part, rows).to(empty.dtype).reshape(empty.shape)
        if last in owner._buffers:
            owner._buffers[last] = value
        else:
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    for name in part.formats():
        owner = module.get_submodule(name)
        if isinstance(owner, nn.Linear):
            stored = StoredLinear(_quantized(layer, part.origins[f"{name}.weight"]), owner.bias, part.file.path)
            module.set_submodule(name, stored)
    return module.eval()


def file_values(path: Path, component: Component) -> Callable[[str], torch.Tensor]:
    """Parameter of the component's class → its value in the file; widened where the file has it quantized.

    Raises CheckpointError as `part_file`.
    """
    module = empty_module(component, path)
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    part = part_file(path, component, module)

    def value(name: str) -> torch.Tensor:
        tensor = _plain(part, part.origins[name]).reshape(shapes[name])
        if not bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all()):
            where = part.origins[name][0].tensor
            raise CheckpointError(f"{path}: tensor '{where}' holds NaN or infinities; download it again.")
        return tensor

    return value


def _is_stored(part: PartFile, rows: Sequence[Rows]) -> bool:
    return rows[0].tensor.removesuffix(".weight") in part.layers


def _layer(part: PartFile, name: str) -> Quantized:
    return read_layer(part.file, part.layers[name])


def _quantized(layer: Callable[[str], Quantized], rows: Sequence[Rows]) -> Quantized:
    return joined([layer(r.tensor.removesuffix(".weight")).rows(r.start, r.stop) for r in rows])


def _plain(part: PartFile, rows: Sequence[Rows]) -> torch.Tensor:
    """Rows in the file's type, mapped if they are one run; widened where the file has them quantized."""
    if _is_stored(part, rows):
        return _quantized(partial(_layer, part), rows).values()
    whole = [part.file.read(r.tensor) for r in rows]
    pieces = [t[r.start : r.stop] if t.dim() else t for t, r in zip(whole, rows, strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class StoredLayout:
    """How engines multiply the quantized layers of a pipeline's parts as their files have them."""

    recipe: Recipe
    words: tuple[str, ...]
    """PART=FILE of each."""


def stored_layout(pipe: Any, variant: Variant, precisions: Collection[str] | None) -> StoredLayout | None:
    """None where no file quantizes a layer that is multiplied as it is, or in a format of `precisions` (layer_format).

    Raises CheckpointError for experts, which share an engine, of different layouts.
    """
    recipes: dict[str, ComponentRecipe] = {}
    words: dict[str, None] = {}
    for component in family(variant.family).components(variant):
        parts = [] if component.attribute else [component.subfolder, *component.also_serves]
        layers = {p: _stored_layers(module) for p in parts if (module := getattr(pipe, p, None)) is not None}
        own = {p: _recipe_of(stored, component, precisions) for p, stored in layers.items()}
        if len(set(map(repr, own.values()))) > 1:
            raise CheckpointError(f"{' and '.join(own)} share an engine, and their files quantize different layers.")
        if (recipe := next(iter(own.values()), None)) is not None:
            recipes[component.name] = recipe
            words |= {f"{part}={next(iter(stored.values())).file}": None for part, stored in layers.items()}
    recipe_of_all = recipe_of_components(recipes, variant)
    return None if recipe_of_all is None else StoredLayout(recipe_of_all, tuple(words))


def _stored_layers(module: nn.Module) -> dict[str, StoredLinear]:
    return {name: own for name, own in module.named_modules() if isinstance(own, StoredLinear)}


def _recipe_of(
    layers: Mapping[str, StoredLinear], component: Component, precisions: Collection[str] | None
) -> ComponentRecipe | None:
    return recipe_of_layers({n: (own.format, own.rotation) for n, own in layers.items()}, component, precisions)
