"""`overcrank pack`: a checkpoint and a recipe → the weight pack that quantized engines read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.calibration.lora import Lora
from overcrank.calibration.lora_parts import lora_of, read_loras
from overcrank.calibration.pack import Part, write_pack
from overcrank.calibration.quantize import layout_in, quantized
from overcrank.calibration.recipe import ComponentRecipe, LayerFormat, Recipe, recipe_of
from overcrank.engines.store import Store, store_errors, written_whole
from overcrank.errors import UserError
from overcrank.export.module import DTYPES, abstract_module
from overcrank.export.weights import Parameter, checkpoint_values, weight_files, weights_digest
from overcrank.models import components, hook, hub_folder, local_folder, resolve
from overcrank.models.base import Component, Variant
from overcrank.runtime.checkpoint import require_calibrated_on

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import Tensor


def pack(
    model: str,
    layers: LayerFormat,
    recipe: Recipe | None,
    compute: str,
    loras: Sequence[str],
    out: Path,
    store: Store,
    progress: Callable[[str], None] = lambda layer: None,
) -> None:
    """Write `out`. `compute`: the engines' 16-bit type, "bf16" or "fp16".

    Raises UserError for a model without quantizable layers, CheckpointError for files that
    are damaged or of another architecture.
    """
    variant = resolve(model)
    folder = local_folder(model) or hub_folder(variant, home=store.root)
    require_calibrated_on(folder, recipe, variant, store)
    parts: list[Part] = []
    files: list[Path] = []
    merged = _loras(variant, folder, loras)
    for component in components(variant):
        own = recipe_of(recipe, component, layers)
        for name in (component.subfolder, *component.twins):
            if not own.rules or not (folder / name).is_dir():
                continue
            part = _part(component, name, own, compute, folder / name, merged, store)
            if part.formats:
                files += weight_files(folder / name)
                parts.append(_without_shared(part, parts))
    if not parts:
        raise UserError(f"{variant.name} has no layer that this recipe quantizes.")
    about = {
        "model": variant.name,
        "precision": layers.format,
        "recipe": recipe.digest() if recipe else "",
        "checkpoint": weights_digest(dict.fromkeys(files)),
        "loras": json.dumps([[x.about()["sha256"], x.scale, x.parts] for x in merged]),
    }
    with written_whole(out) as partial, partial.open("wb") as stream:
        write_pack(stream, parts, about, progress)


def _part(
    component: Component,
    name: str,
    recipe: ComponentRecipe,
    compute: str,
    folder: Path,
    loras: Sequence[Lora],
    store: Store,
) -> Part:
    model, parameters = _graph(component, compute, store)
    layout = layout_in(model, recipe)
    weights = {p.input.removesuffix(".weight"): p for p in parameters if p.input.removesuffix(".weight") in layout}
    values = checkpoint_values(weight_files(folder) if layout else (), weights.values())
    _, packed = quantized(model, parameters, layout)

    def read(layer: str) -> Tensor:
        weight: Tensor = values(weights[layer].name)
        for lora in loras:
            added = lora.delta(name, f"{layer}.weight")
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


def kept_pack(
    identity: Sequence[object], store: Store, make: Callable[[], Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """What `make` returns, from the store if it was made before; `identity` is all it depends on, as JSON."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    key = sha256(json.dumps(identity).encode()).hexdigest()[:32]
    file = store.root / "packs" / f"{key}.safetensors"
    store.prepare()
    with store_errors(file), store.lock(f"pack-{key}"):
        file.parent.mkdir(exist_ok=True)
        with suppress(OSError, SafetensorError):  # there is none, or it is damaged
            kept: dict[str, Tensor] = load_file(file, device=str(device))
            return kept
        made = dict(make())
        with written_whole(file) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in made.items()}, part)
        return made


def _without_shared(part: Part, earlier: Sequence[Part]) -> Part:
    """Components that describe one module share its layers, which are written once."""
    known = {p.input: p for other in earlier if other.name == part.name for p in other.packed}
    for entry in part.packed:
        if known.get(entry.input, entry) != entry:
            raise UserError(
                f"the recipe has {entry.layer} of {part.name} in two formats, one in {part.component}; make them agree."
            )
    return replace(part, packed=tuple(p for p in part.packed if p.input not in known))


def _graph(component: Component, compute: str, store: Store) -> tuple[ir.Model, tuple[Parameter, ...]]:
    import onnx_ir as ir

    graph = store.graph(component, compute)
    return ir.load(graph.onnx), graph.parameters


def _loras(variant: Variant, folder: Path, arguments: Sequence[str]) -> list[Lora]:
    if not arguments:
        return []
    import diffusers

    asked = [lora_of(argument) for argument in arguments]
    known: dict[str, Any] = {}
    for component in components(variant):
        if not component.attribute:
            module = abstract_module(component, component.config, "bf16")
            there = [part for part in (component.subfolder, *component.twins) if (folder / part).is_dir()]
            known |= dict.fromkeys(there, module)
    pipeline = getattr(diffusers, next(iter(variant.tasks.values())))
    return read_loras(asked, pipeline, known, hook(variant, "PART_WORDS"))


def shown(out: Path, seconds: float) -> None:
    print(f"pack     {out}  {out.stat().st_size / 1e9:.2f} GB in {seconds:.1f} s")


def timed_pack(quiet: bool, **options: Any) -> None:
    """`pack` with a line a layer on a terminal, and its size and time at the end."""
    from overcrank.runtime.show import downloading
    from rich.console import Console

    started = time.monotonic()
    if local_folder(options["model"]) is None:  # first, for a terminal shows one thing that moves
        hub_folder(resolve(options["model"]), home=options["store"].root, watch=partial(downloading, quiet=quiet))
    with Console(stderr=True, quiet=quiet).status("packing") as status:
        pack(**options, progress=lambda layer: status.update(f"packing {layer}"))
    shown(options["out"], time.monotonic() - started)
