"""`overcrank calibrate`: denoise prompts eagerly, collect the ranges, write the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.calibration.collect import collected
from overcrank.calibration.sensitivity import QualityTarget, SearchResult, searched
from overcrank.engines.store import Store
from overcrank.errors import RequestError, UserError, present
from overcrank.export.quantization.linear import layout_in
from overcrank.export.quantization.recipe import (
    Calibration,
    ComponentRecipe,
    LayerFormat,
    Method,
    Recipe,
    default_recipe,
)
from overcrank.files import atomic_write
from overcrank.models import components, local_folder, packaged_model, resolve
from overcrank.models.base import Component, Variant
from overcrank.models.hub import Watch, unwatched
from overcrank.runtime.pipeline.checkpoint import checkpoint_digest
from overcrank.runtime.render.media import media_of
from overcrank.runtime.render.request import RenderRequest, prompts_of, read_jobs

if TYPE_CHECKING:
    from torch import nn

PHOTOGRAPHS = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""
Count = Callable[[str, str], AbstractContextManager[Progress]]
"""Called with what is done, and with the unit that it is counted in."""


@contextmanager
def uncounted(title: str, unit: str) -> Iterator[Progress]:
    yield lambda done, total: None


@dataclass(frozen=True)
class CalibrationConfig:
    """What a user asks of `overcrank calibrate`."""

    model: str
    form: LayerFormat
    method: Method
    prompts: Path | None
    images: Path | None
    samples: int
    steps: int | None
    device: str | None
    store: Path | None
    out: Path
    watch: Watch = unwatched  # a download
    count: Count = uncounted  # samples, and tries of a search
    report: Callable[[SearchResult, QualityTarget], None] = lambda found, target: None  # what a search came to
    target: QualityTarget | None = None  # keep sensitive blocks in 16 bit until it holds


def calibrate(wanted: CalibrationConfig) -> Recipe:
    """Write the recipe to `wanted.out` and return it; what was done is kept beside it until it is whole.

    Raises UserError for prompts, images or a model that cannot be used, CalibrationError for
    activations that are not finite.
    """
    from overcrank.runtime.pipeline.load import load

    if wanted.samples < 1:
        raise UserError("--samples 0 measures nothing; give at least 1.")
    model = wanted.model or packaged_model()
    variant = resolve(model)
    requests = _requests(wanted, variant)
    pipe = load(model, backend="eager", device=wanted.device, store=wanted.store, watch=wanted.watch)
    layouts = _layouts(variant, wanted.form, Store(wanted.store))
    if not layouts:
        raise UserError(f"{variant.name} has no layer that can be quantized: its networks are convolutions.")
    folder = local_folder(model)
    checkpoint = checkpoint_digest(folder, [c for c, _ in layouts.values()], Store(wanted.store)) if folder else ""
    prompts = hashlib.sha256("\n".join(r.prompt for r in requests).encode()).hexdigest()
    about = Calibration(
        method=wanted.method,
        samples=len(requests),
        steps=requests[0].steps or variant.rendering().steps,
        prompts=prompts,
        checkpoint=checkpoint,
        versions={name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "diffusers")},
    )
    with wanted.count("calibrating", "samples") as progress:
        run = _denoising(pipe, variant, requests, progress)
        measured = {n: _measured(pipe, c, own, wanted, about, run) for n, (c, own) in layouts.items()}
    recipe = Recipe(model=variant.name, precision=wanted.form.format, calibration=about, components=measured)
    if wanted.target is not None:
        recipe = _searched(wanted, model, recipe, layouts, requests)
    with atomic_write(wanted.out) as part:
        part.write_text(recipe.model_dump_json(indent=1), "utf-8")
    for name in measured:
        _state(wanted.out, name, about).unlink(missing_ok=True)
    return recipe


def _searched(
    wanted: CalibrationConfig,
    model: str,
    recipe: Recipe,
    layouts: Mapping[str, tuple[Component, ComponentRecipe]],
    requests: list[RenderRequest],
) -> Recipe:
    """With sensitive blocks in 16 bit; in a pipeline of its own, for calibration leaves its layers in the first."""
    from overcrank.runtime.pipeline.load import load

    target = present(wanted.target, "the target of a search")
    pipe = load(model, backend="eager", device=wanted.device, store=wanted.store, watch=wanted.watch)
    parts = {
        name: ((component.subfolder, *component.also_serves), layout_of(component, own, Store(wanted.store)))
        for name, (component, own) in layouts.items()
        if not component.attribute
    }
    latents = [r.model_copy(update={"formats": ("latents",)}) for r in requests]
    with wanted.count("searching", "tries") as progress:
        found = searched(pipe, recipe, parts, latents, target, progress)
    wanted.report(found, target)
    return found.recipe


def _requests(wanted: CalibrationConfig, variant: Variant) -> list[RenderRequest]:
    """One a sample: jobs of a .jsonl file, or a line of prompts each, with pictures in turn; seeds count up."""
    native = RenderRequest(prompt="x", steps=wanted.steps)
    if wanted.prompts is not None and wanted.prompts.suffix == ".jsonl":
        jobs = [
            job.model_copy(update={"steps": wanted.steps or job.steps}) for job in read_jobs(wanted.prompts, variant)
        ]
    else:
        pictures = _pictures(wanted.images)
        if not pictures and "text-to-video" not in variant.tasks:
            pictures = _photographs(Store(wanted.store))
        lines = prompts_of(wanted.prompts, variant)
        jobs = []
        for i in range(max(len(lines), len(pictures))):
            update: dict[str, Any] = {"prompt": lines[i % len(lines)], "seed": i}
            if pictures:
                update["image"] = pictures[i % len(pictures)]
            jobs.append(native.model_copy(update=update).completed(variant))
    return [jobs[i % len(jobs)].model_copy(update={"seed": i}) for i in range(wanted.samples)]


def _pictures(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = sorted(p.absolute() for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not found:
        raise RequestError(f"--images {folder} holds no picture ({', '.join(PICTURES)}).")
    return found


def _photographs(store: Store) -> list[Path]:
    """First frames for who gives none: colour photographs that scikit-image brings, written to the store."""
    from PIL import Image
    from skimage import data

    folder = store.root / "photographs"
    store.prepare()
    folder.mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        if not (folder / f"{name}.png").is_file():
            with atomic_write(folder / f"{name}.png") as part:
                Image.fromarray(getattr(data, name)()).save(part, "PNG")
    return _pictures(folder)


def _layouts(variant: Variant, form: LayerFormat, store: Store) -> dict[str, tuple[Component, ComponentRecipe]]:
    """Components of which the default recipe quantizes something."""
    found = {}
    for component in components(variant):
        recipe = default_recipe(component, form)
        if layout_of(component, recipe, store):
            found[component.name] = component, recipe
    return found


def layout_of(component: Component, recipe: ComponentRecipe, store: Store) -> dict[str, LayerFormat]:
    """Layer → format, by the layers of the component's graph."""
    import onnx_ir as ir

    graph = store.graph(component, "bf16")
    return layout_in(ir.load(graph.onnx), recipe)


def _denoising(pipe: Any, variant: Variant, requests: list[RenderRequest], progress: Progress) -> Callable[[int], None]:
    """A function that renders one sample's latents."""
    import torch
    from overcrank.runtime.pipeline.load import pipeline_for
    from overcrank.runtime.render.renderer import call_arguments, encoded

    def run(index: int) -> None:
        request = requests[index]
        progress(index, len(requests))
        own = pipeline_for(pipe, variant, request.task, request)
        with torch.no_grad():
            text = encoded(own, variant, request)
            arguments = call_arguments(own, variant, request, media_of(request, variant), text)
            seeded = torch.Generator("cpu").manual_seed(request.seed)
            torch.manual_seed(request.seed)
            own(**arguments, generator=seeded, output_type="latent")
        progress(index + 1, len(requests))

    return run


def _measured(
    pipe: Any,
    component: Component,
    recipe: ComponentRecipe,
    wanted: CalibrationConfig,
    about: Calibration,
    run: Callable[[int], None],
) -> ComponentRecipe:
    modules: dict[str, nn.Module] = {}
    for part in (component.subfolder, *component.also_serves):
        owner = getattr(pipe, part, None)
        if owner is not None:
            modules[part] = owner.get_submodule(component.attribute) if component.attribute else owner
    layout = layout_of(component, recipe, Store(wanted.store))
    state = _state(wanted.out, component.name, about)
    state.parent.mkdir(parents=True, exist_ok=True)
    ranges = collected(modules, layout, wanted.method, about.samples, run, state)
    return recipe.model_copy(update={"ranges": ranges})


def _state(out: Path, component: str, about: Calibration) -> Path:
    """Where an interrupted calibration goes on: another one, differently made, does not find it."""
    digest = hashlib.sha256(about.model_dump_json().encode()).hexdigest()[:8]
    return out.with_name(f".{out.name}.{component}.{digest}.part")
