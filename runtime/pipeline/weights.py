"""Parts of a pipeline out of single files: `--weights transformer=FILE`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from overcrank.errors import CheckpointError, present
from overcrank.export.files.contents import contents_of
from overcrank.export.files.kinds import LORA, kind_of
from overcrank.export.files.single_file import Origins, Rows, difference, origins
from overcrank.export.files.stored_layers import StoredLayer, stored_layers, weight_shapes
from overcrank.export.files.weight_file import WeightFile, open_weights
from overcrank.export.module import cast_like_diffusers, construct
from overcrank.export.quantization.recipe import ComponentRecipe, LayerFormat, Recipe, Rule
from overcrank.export.quantization.stored import Quantized, joined, read_layer
from overcrank.models import components
from overcrank.models.base import Component, Variant
from overcrank.options import option
from overcrank.runtime.sessions.stored_linear import StoredLinear
from torch import nn


@dataclass(frozen=True)
class PartFile:
    """A file, and where in it each parameter of a part's class is."""

    file: WeightFile
    layers: Mapping[str, StoredLayer]
    """By their names in the file."""
    origins: Origins

    def formats(self) -> dict[str, StoredLayer]:
        """Linear layer of the class → the quantized layer of the file that it, or a part of it, is."""
        found = {}
        for name, rows in self.origins.items():
            layer = self.layers.get(rows[0].tensor.removesuffix(".weight"))
            if layer is not None and name.endswith(".weight"):
                found[name.removesuffix(".weight")] = layer
        return found


def part_file(path: Path, component: Component, module: nn.Module) -> PartFile:
    """The file at `path` as the weights of `module`, of which only names and shapes are read.

    Raises CheckpointError for a file that is not these weights, whole, naming what differs.
    """
    file = open_weights(path)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    reason = ""
    if kind_of(file.tensors) != LORA:
        layers = stored_layers(file)
        shapes = weight_shapes(file, layers)
        try:
            places = origins(type(module), shapes, wanted, component.subfolder)
            reason = difference(wanted, places, shapes)
        except CheckpointError as error:
            reason = f"has other names: {error}"
        if not reason:
            return PartFile(file, layers, places)
    reason = _whose(path, component) or f"{reason}; give a file of this model"
    raise CheckpointError(f"{path} is not the {component.subfolder} of this model ({component.cls}): it {reason}.")


def _whose(path: Path, component: Component) -> str:
    """What a file is that is not the part it was given as, and how to give it; empty for what is no known network."""
    contents = contents_of(path)
    if contents.kind == LORA:
        return f"is a LoRA; give {option('loras', [path])}"
    cls = component.cls.rpartition(".")[2]
    known = sorted((n for n in contents.networks if n.variants), key=lambda n: n.cls != cls)
    for network in known[:1]:
        names = ", ".join(network.variants[:3])
        if network.part == component.subfolder:
            return f"is that of {names}; give {option('model', network.variants[0])}, or another file"
        return f"is the {network.part} of {names}; give {option('weights', [f'{network.part}={path}'])}"
    if contents.encoder and not contents.networks:
        return f"is a {contents.kind}; give {option('weights', [f'text_encoder={path}'])}"
    return ""


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
            stored = StoredLinear(_quantized(part, part.origins[f"{name}.weight"]), owner.bias)
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


def _quantized(part: PartFile, rows: Sequence[Rows]) -> Quantized:
    pieces = [read_layer(part.file, part.layers[r.tensor.removesuffix(".weight")]).rows(r.start, r.stop) for r in rows]
    return joined(pieces)


def _plain(part: PartFile, rows: Sequence[Rows]) -> torch.Tensor:
    """Rows in the file's type, mapped if they are one run; widened where the file has them quantized."""
    if _is_stored(part, rows):
        return _quantized(part, rows).values()
    whole = [part.file.read(r.tensor) for r in rows]
    pieces = [t[r.start : r.stop] if t.dim() else t for t, r in zip(whole, rows, strict=True)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def recipe_of_module(module: nn.Module, component: Component) -> ComponentRecipe | None:
    """How an engine multiplies the quantized layers that a module has of a file; None if it has none."""
    forms = {name: own.engine_format for name, own in module.named_modules() if isinstance(own, StoredLinear)}
    return recipe_of_layers({name: form for name, form in forms.items() if form is not None}, component)


def recipe_of_layers(forms: Mapping[str, LayerFormat], component: Component) -> ComponentRecipe | None:
    """One rule a layer, in one order, so that the engines of files of one layout are the same."""
    rules = [
        Rule(layers=name, format=form.format, activations=form.activations, rotation=form.rotation)
        for name, form in sorted(forms.items())
    ]
    config = dict(component.config)
    return ComponentRecipe(cls=component.cls, config=config, rules=rules) if rules else None


def stored_recipe(pipe: Any, variant: Variant) -> Recipe | None:
    """How engines multiply the quantized layers of a pipeline's parts as the files have them; None if there are none.

    Raises CheckpointError for experts, which share an engine, of different layouts.
    """
    recipes: dict[str, ComponentRecipe] = {}
    for component in components(variant):
        parts = [] if component.attribute else [component.subfolder, *component.also_serves]
        modules = {name: module for name in parts if (module := getattr(pipe, name, None)) is not None}
        own = {name: recipe_of_module(module, component) for name, module in modules.items()}
        if len(set(map(repr, own.values()))) > 1:
            raise CheckpointError(f"{' and '.join(own)} share an engine, and their files quantize different layers.")
        if (recipe := next(iter(own.values()), None)) is not None:
            recipes[component.name] = recipe
    counts = Counter(rule.format for recipe in recipes.values() for rule in recipe.rules)
    if not counts:
        return None
    return Recipe(model=variant.name, precision=counts.most_common(1)[0][0], components=recipes)
