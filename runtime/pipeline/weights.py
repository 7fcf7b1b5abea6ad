"""Parts of a pipeline out of single files: `--weights transformer=FILE`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from overcrank.errors import CheckpointError, UserError, present
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
    layers = stored_layers(file)
    shapes = weight_shapes(file, layers)
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    places = origins(type(module), shapes, wanted, component.subfolder)
    if reason := difference(wanted, places, shapes):
        raise CheckpointError(f"{path} is not the {component.subfolder} of this model ({component.cls}): it {reason}.")
    return PartFile(file, layers, places)


def module_of(path: Path, component: Component, dtype: torch.dtype) -> nn.Module:
    """The component's whole part of the pipeline with the file's weights, mapped where they are of `dtype` already.

    Linear layers that the file has quantized stay so (StoredLinear). Raises CheckpointError as `part_file`.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = construct(component.cls, component.config, str(path))
    cast_like_diffusers(module, dtype)
    part = part_file(path, component, module)
    for name, rows in part.origins.items():
        owner_name, _, last = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if last == "weight" and isinstance(owner, nn.Linear) and _is_stored(part, rows):
            continue
        empty = owner._parameters[last]
        value = _plain(part, rows).to(present(empty, name).dtype).reshape(present(empty, name).shape)
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    for name in part.formats():
        owner = module.get_submodule(name)
        if isinstance(owner, nn.Linear):
            stored = StoredLinear(_quantized(part, part.origins[f"{name}.weight"]), owner.bias)
            module.set_submodule(name, stored)
    return module.eval()


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


def parts_from_files(words: Sequence[str], variant: Variant, dtypes: Mapping[str, torch.dtype]) -> dict[str, nn.Module]:
    """Part of the pipeline → its module with a file's weights, of words PART=FILE.

    Raises UserError for words of another form, a part that is none or is named twice, CheckpointError for a file that
    is not the part's.
    """
    known = {part: c for c in components(variant) for part in (c.subfolder, *c.also_serves)}
    modules: dict[str, nn.Module] = {}
    for word in words:
        part, equals, file = word.partition("=")
        if not (part and equals and file):
            raise UserError(f"{option('weights', word)}: write PART=FILE, such as transformer=model.safetensors.")
        if part not in known:
            raise UserError(
                f"{option('weights', word)}: {variant.name} has no part '{part}'; it has {', '.join(known)}."
            )
        if part in modules:
            raise UserError(f"{option('weights', word)}: {part} is given twice; give it once.")
        dtype = dtypes.get(part, dtypes.get("", torch.bfloat16))
        modules[part] = module_of(Path(file).expanduser(), known[part], dtype)
    return modules


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
