"""A weight file as one part of a pipeline: where its parameters are, and how engines multiply its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.errors import CheckpointError, UserError
from overcrank.export.files.contents import Contents, read_contents
from overcrank.export.files.kinds import LORA, encoder_part, kind_of
from overcrank.export.files.remote import local_header
from overcrank.export.files.single_file import Origins, difference, origins
from overcrank.export.files.stored_layers import StoredLayer, stored_layers, weight_shapes
from overcrank.export.files.weight_file import WeightFile, open_weights
from overcrank.export.quantization.recipe import ComponentRecipe, Format, LayerFormat, Recipe, Rule
from overcrank.models import family
from overcrank.models.base import Component, Variant
from overcrank.models.network import network
from overcrank.options import option

if TYPE_CHECKING:
    from torch import nn

AS_STORED: Mapping[str, Format] = {"fp8_e4m3": "fp8", "int8": "int8", "nvfp4": "nvfp4"}
"""Formats of files whose bytes an engine multiplies as they are."""
STORED = "stored in "
"""Begins a rule's reason where the layer is multiplied in another format than it is stored in."""
ANEW: tuple[Format, ...] = ("fp8", "int8")
"""What other formats are quantized to, the first that the card has; a layer stays as small as 8 bit."""


@dataclass(frozen=True)
class PartFile:
    """A file, and where in it each parameter of a part's class is."""

    file: WeightFile
    layers: Mapping[str, StoredLayer]
    """By their names in the file."""
    origins: Origins

    def formats(self) -> dict[str, StoredLayer]:
        """Linear layer of the class → the quantized layer of the file that it, or a part of it, is."""
        formats = {}
        for name, rows in self.origins.items():
            layer = self.layers.get(rows[0].tensor.removesuffix(".weight"))
            if layer is not None and name.endswith(".weight"):
                formats[name.removesuffix(".weight")] = layer
        return formats


def part_file(path: Path, component: Component, module: nn.Module, holes: bool = False) -> PartFile:
    """The file at `path` as the weights of `module`, of which only names and shapes are read.

    `holes`: the file has but its header. Raises CheckpointError for a file that is not these weights, whole, naming
    what differs, or what it is.
    """
    file = open_weights(path)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    reason = ""
    if kind_of(file.tensors) != LORA:
        layers = stored_layers(file, holes)
        shapes = weight_shapes(file, layers)
        try:
            places = origins(type(module), shapes, wanted, component.subfolder)
            reason = difference(wanted, places, shapes)
        except CheckpointError as error:
            reason = f"has other names: {error}"
        if not reason:
            return PartFile(file, layers, places)
    reason = _whose(read_contents(file, holes), component) or f"{reason}; give a file of this model"
    raise CheckpointError(f"{path} is not the {component.subfolder} of this model ({component.cls}): it {reason}.")


def _whose(contents: Contents, component: Component) -> str:
    """What a file is that is not the part it was given as, and how to give it; empty for what is no known network."""
    path = contents.file.path
    if contents.kind == LORA:
        return f"is a LoRA; give {option('loras', [path])}"
    cls = component.cls.rpartition(".")[2]
    known = sorted((n for n in contents.networks if n.variants), key=lambda n: n.cls != cls)
    for owner in known[:1]:
        names = ", ".join(owner.variants[:3])
        if owner.part == component.subfolder:
            return f"is that of {names}; give {option('model', owner.variants[0])}, or another file"
        return f"is the {owner.part} of {names}; give {option('weights', [f'{owner.part}={path}'])}"
    if contents.encoder and not contents.networks:
        return f"is a {contents.kind}; give {option('weights', [f'{encoder_part(contents.kind)}={path}'])}"
    return ""


def layer_format(stored: str, rotation: int, precisions: Collection[str] | None) -> LayerFormat | None:
    """How an engine multiplies a layer that a file stores in this format; None for in 16 bit.

    `precisions`: of the card; None for no card, where layers are multiplied as they are stored or in 16 bit.
    """
    own = AS_STORED.get(stored)
    if own is not None and (precisions is None or own in precisions):
        return LayerFormat(own, "dynamic", rotation=rotation)
    anew = next((form for form in ANEW if precisions is not None and form in precisions), None)
    return None if anew is None else LayerFormat(anew, "dynamic")


def recipe_of_layers(
    layers: Mapping[str, tuple[str, int]], component: Component, precisions: Collection[str] | None
) -> ComponentRecipe | None:
    """One rule a layer, in one order, so that the engines of files of one layout are the same; None for no layers.

    `layers`: layer → the format that the file has it in, and its rotation. `precisions`: see `layer_format`.
    """
    rules = []
    for name, (stored, rotation) in sorted(layers.items()):
        form = layer_format(stored, rotation, precisions)
        if form is not None:
            reason = "" if form.format == AS_STORED.get(stored) else f"{STORED}{stored}"
            turns = form.rotation
            rules.append(Rule(layers=name, format=form.format, activations="dynamic", rotation=turns, reason=reason))
    return ComponentRecipe(cls=component.cls, config=network(component), rules=rules) if rules else None


def recipe_of_components(recipes: Mapping[str, ComponentRecipe], variant: Variant) -> Recipe | None:
    """Component → its recipe, as a recipe of the format that most layers have; None for no components."""
    counts = Counter(rule.format for recipe in recipes.values() for rule in recipe.rules)
    if not counts:
        return None
    return Recipe(model=variant.name, precision=counts.most_common(1)[0][0], components=dict(recipes))


def anew_line(recipe: Recipe, where: str) -> str:
    """Which layers of files engines do not multiply as they are stored, for the card `where`; "" for none."""
    rules = {(r.layers, r.reason, r.format) for entry in recipe.components.values() for r in entry.rules}
    counts = Counter((reason.removeprefix(STORED), form) for _, reason, form in rules if reason.startswith(STORED))
    parts = [
        f"{count} layers in {stored} are quantized anew as {form}" for (stored, form), count in sorted(counts.items())
    ]
    return f"{recipe.model}: {', '.join(parts)}, since {where} does not multiply them as they are." if parts else ""


def part_words(words: Sequence[str], name: str, known: Iterable[str], model: str) -> dict[str, str]:
    """Part of the pipeline → file, of words PART=FILE that the option `name` gives.

    Raises UserError for words of another form, and for a part that is none or is named twice.
    """
    files: dict[str, str] = {}
    for word in words:
        part, equals, file = word.partition("=")
        if not (part and equals and file):
            raise UserError(f"{option(name, word)}: write PART=FILE, such as transformer=model.safetensors.")
        if part not in known:
            raise UserError(f"{option(name, word)}: {model} has no part '{part}'; it has {', '.join(known)}.")
        if part in files:
            raise UserError(f"{option(name, word)}: {part} is given twice; give it once.")
        files[part] = file
    return files


def parts_of(variant: Variant) -> dict[str, Component]:
    """Part of the pipeline → a component that describes its module, of the parts that the variant has."""
    every = family(variant.family).components(variant)
    return {part: c for c in every for part in (c.subfolder, *c.also_serves) if part in variant.configs}


def engines_of(part: str, variant: Variant) -> list[Component]:
    """All components that a part's whole module serves, such as with and without a first frame."""
    every = family(variant.family).components(variant)
    return [c for c in every if not c.attribute and part in (c.subfolder, *c.also_serves)]


def layout(words: Sequence[str], variant: Variant, precisions: Collection[str]) -> Recipe:
    """How engines for a card multiply the layers of files PART=FILE, of which only the headers are read.

    A file may be a URL. Raises UserError for words that name no part, CheckpointError for a file that is not the
    part's, or that quantizes nothing.
    """
    recipes: dict[str, ComponentRecipe] = {}
    known = parts_of(variant)
    for part, file in part_words(words, "layout", known, variant.name).items():
        layers = _layers_of(file, known[part])
        for component in engines_of(part, variant):
            recipe = recipe_of_layers(layers, component, precisions)
            if recipe is None:
                raise CheckpointError(f"{file}: no layer is quantized, so it needs no engine of its own; leave it out.")
            if recipes.setdefault(component.name, recipe) != recipe:
                raise UserError(
                    f"{option('layout', f'{part}={file}')}: it quantizes other layers than the file of the part with "
                    f"which it shares an engine; build two bundles."
                )
    recipe_of_all = recipe_of_components(recipes, variant)
    if recipe_of_all is None:
        raise UserError(f"{option('layout')} is empty; write PART=FILE, such as transformer=model.safetensors.")
    return recipe_of_all


def _layers_of(file: str, component: Component) -> dict[str, tuple[str, int]]:
    """Layer → its format in the file, and its rotation."""
    from accelerate import init_empty_weights
    from overcrank.export.module import construct

    with init_empty_weights(include_buffers=False):
        module = construct(component.cls, component.config, file)
    with local_header(file) as path:
        formats = part_file(path, component, module, holes="://" in file).formats()
    return {name: (own.format, own.rotation) for name, own in formats.items()}
