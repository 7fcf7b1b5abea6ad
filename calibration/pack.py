"""`overcrank pack`: a checkpoint and a recipe → the weight pack that quantized engines read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.store import Store
from overcrank.errors import UserError, present
from overcrank.export.expected import component_files
from overcrank.export.files.weight_file import open_weights
from overcrank.export.headers import weight_files, weights_digest
from overcrank.export.module import DTYPES, abstract_module
from overcrank.export.quantization.linear import layout_in, quantize
from overcrank.export.quantization.pack import Part, write_pack
from overcrank.export.quantization.recipe import ComponentRecipe, LayerFormat, Recipe, recipe_of
from overcrank.export.weights import Parameter, checkpoint_values
from overcrank.files import atomic_write
from overcrank.models import components, family, hub_folder, local_folder, resolve
from overcrank.models.base import Component, Variant
from overcrank.runtime.options import LoadOptions
from overcrank.runtime.pipeline.checkpoint import require_calibrated_on
from overcrank.runtime.pipeline.lora import Lora
from overcrank.runtime.pipeline.lora_parts import lora_of, read_loras
from overcrank.runtime.pipeline.naming import files_of, with_paths
from overcrank.runtime.pipeline.weights import file_values

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """What becomes of a checkpoint's weights."""

    layers: LayerFormat
    recipe: Recipe | None = None
    compute: str = "bf16"
    """The engines' 16-bit type, or "fp16"."""
    loras: Sequence[str] = ()
    """Merged before packing: [PART=]FILE[:SCALE]."""
    weights: Sequence[str] | Mapping[str, str | Path] = ()
    """Parts out of files of their own, [PART=]FILE."""
    comfy: Path | None = None
    """A ComfyUI folder, in whose models names of files are looked up."""


@dataclass(frozen=True)
class _Weights:
    """A diffusers folder, files in the place of parts of it, and what is merged into them."""

    folder: Path
    given: Mapping[str, Path]
    loras: Sequence[Lora]

    def files(self, part: str) -> Sequence[Path]:
        return open_weights(self.given[part]).files if part in self.given else weight_files(self.folder / part)


def pack(
    model: str, packing: Packing, out: Path, store: Store, progress: Callable[[str], None] = lambda layer: None
) -> None:
    """Write `out`.

    Raises UserError for a model without quantizable layers, CheckpointError for files that
    are damaged or of another architecture.
    """
    model, options = with_paths(model, LoadOptions(weights=packing.weights, loras=packing.loras, comfy=packing.comfy))
    variant, given = resolve(model), files_of(options)
    folder = local_folder(model) or hub_folder(variant, home=store.root, elsewhere=given)
    require_calibrated_on(folder, packing.recipe, variant, store, given)
    parts: list[Part] = []
    files: list[Path] = []
    weights = _Weights(folder, given, _loras(variant, folder, options.loras))
    for component in components(variant):
        own = recipe_of(packing.recipe, component, packing.layers)
        for name in (component.subfolder, *component.also_serves):
            if not own.rules or not (folder / name).is_dir():
                continue
            part = _part(component, name, own, weights, packing.compute, store)
            if part.formats:
                files += weights.files(name)
                parts.append(_without_shared(part, parts))
    if not parts:
        raise UserError(f"{variant.name} has no layer that this recipe quantizes.")
    about = {
        "model": variant.name,
        "precision": packing.layers.format,
        "recipe": packing.recipe.digest() if packing.recipe else "",
        "checkpoint": weights_digest(dict.fromkeys(files)),
        "loras": json.dumps([[x.about()["sha256"], x.scale, x.parts] for x in weights.loras]),
    }
    with atomic_write(out) as partial, partial.open("wb") as stream:
        write_pack(stream, parts, about, progress)


def _part(
    component: Component, name: str, recipe: ComponentRecipe, weights: _Weights, compute: str, store: Store
) -> Part:
    model, parameters = _graph(component, compute, store)
    layout = layout_in(model, recipe)
    own = {p.input.removesuffix(".weight"): p for p in parameters if p.input.removesuffix(".weight") in layout}
    values = _values(component, name, weights, own) if layout else None
    _, packed = quantize(model, parameters, layout)

    def read(layer: str) -> Tensor:
        weight: Tensor = present(values, "the checkpoint's values")(own[layer].name)
        for lora in weights.loras:
            added = lora.delta(name, f"{layer}.weight", weight)
            weight = weight if added is None else weight.float() + added.reshape(weight.shape)
        return weight

    return Part(
        name=name,
        component=component.name,
        layout=recipe.digest(),
        compute=DTYPES[compute],
        formats=layout,
        packed=packed,
        ranges=recipe.ranges.get(name, {}),
        read=read,
    )


def _values(
    component: Component, part: str, weights: _Weights, own: Mapping[str, Parameter]
) -> Callable[[str], Tensor]:
    """Parameter → its value in the checkpoint, or in the file that takes the part's place."""
    if part in weights.given:
        return file_values(weights.given[part], component)
    return checkpoint_values(component_files(component, weights.folder / part), own.values())


def _without_shared(part: Part, earlier: Sequence[Part]) -> Part:
    """Components that describe one module share its layers, which are written once."""
    entries = {p.input: p for other in earlier if other.name == part.name for p in other.packed}
    for entry in part.packed:
        if entries.get(entry.input, entry) != entry:
            raise UserError(
                f"the recipe has {entry.layer} of {part.name} in two formats, one in {part.component}; make them agree."
            )
    return replace(part, packed=tuple(p for p in part.packed if p.input not in entries))


def _graph(component: Component, compute: str, store: Store) -> tuple[ir.Model, tuple[Parameter, ...]]:
    import onnx_ir as ir

    graph = store.graph(component, compute)
    return ir.load(graph.onnx), graph.parameters


def _loras(variant: Variant, folder: Path, arguments: Sequence[str]) -> list[Lora]:
    if not arguments:
        return []
    import diffusers

    files = [lora_of(argument) for argument in arguments]
    modules: dict[str, Any] = {}
    for component in components(variant):
        if not component.attribute:
            module = abstract_module(component, component.config, "bf16")
            there = [part for part in (component.subfolder, *component.also_serves) if (folder / part).is_dir()]
            modules |= dict.fromkeys(there, module)
    pipeline = getattr(diffusers, next(iter(variant.tasks.values())))
    return read_loras(files, pipeline, modules, family(variant.family).part_words)
