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
from overcrank.calibration.sensitivity import QualityTarget, SearchResult, searched, target_of
from overcrank.engines.store import Store
from overcrank.errors import CheckpointError, RequestError, UserError
from overcrank.export.quantization.linear import layout_in
from overcrank.export.quantization.recipe import (
    QUANTIZED,
    Calibration,
    ComponentRecipe,
    LayerFormat,
    Method,
    Recipe,
    default_recipe,
)
from overcrank.files import atomic_write, user_path
from overcrank.models import components, local_folder, packaged_model, resolve
from overcrank.models.base import Component, Variant
from overcrank.models.hub import Watch, unwatched
from overcrank.options import merged, option
from overcrank.runtime.pipeline.checkpoint import broken_weight, checkpoint_digest
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
class CalibrationOptions:
    """What is measured, and how; as the options of `overcrank calibrate`."""

    precision: str = "fp8"
    """Of the quantized layers: "fp8", "int8" or "nvfp4"."""
    method: Method = "max"
    """How ranges follow from what is seen; "mse" and "smoothquant" are for int8."""
    prompts: Path | None = None
    """One a line, or jobs as for batch (.jsonl) [default: the model's own, or 64 that ship]."""
    images: Path | None = None
    """Folder of first frames, for image-to-video."""
    samples: int = 16
    """Videos to denoise."""
    steps: int | None = None
    """Denoising steps [default: the model's]."""
    quality: str = ""
    """Keep sensitive blocks in 16 bit until this PSNR of frames ("35dB") or cosine of latents ("0.995") holds."""
    device: str | None = None
    """cpu or cuda [default: cuda when there is a card]."""
    store: Store | Path | str | None = None
    """Where graphs are kept [default: $OVERCRANK_HOME, else the user's cache]."""
    out: Path | str = "recipe.json"
    """The recipe to write; what an interrupted run has measured is kept beside it."""


@dataclass(frozen=True)
class Watching:
    """Who is told what goes on."""

    download: Watch = unwatched
    count: Count = uncounted
    """Samples, and tries of a search."""
    report: Callable[[SearchResult, QualityTarget], None] = lambda result, target: None
    """What a search came to."""


@dataclass(frozen=True)
class _Run:
    """One calibration: what was asked, resolved."""

    model: str
    options: CalibrationOptions
    form: LayerFormat
    variant: Variant
    store: Store
    out: Path
    watching: Watching

    def pipeline(self) -> Any:
        from overcrank.runtime.pipeline.load import load

        options = self.options
        return load(self.model, backend="eager", device=options.device, store=self.store, watch=self.watching.download)


def calibrate(
    model: str, options: CalibrationOptions | None = None, *, watching: Watching | None = None, **changes: Any
) -> Recipe:
    """Denoise prompts in 16 bit, measure the range of every layer that can be quantized, write the recipe, return it.

    `model`: family, variant, diffusers folder or hub id; "" is the demo model. `changes`: fields of
    CalibrationOptions, over those of `options`.

    Raises UserError for an unknown option, for prompts, images or a model that cannot be used, CalibrationError for
    activations that are not finite.
    """
    options = merged(CalibrationOptions, options, changes)
    if options.samples < 1:
        raise UserError(f"{option('samples', options.samples)} measures nothing; give at least 1.")
    if options.precision not in QUANTIZED:
        raise UserError(f"{option('precision', options.precision)}: use {', '.join(QUANTIZED)}.")
    target = target_of(options.quality) if options.quality else None
    model = model or packaged_model()
    form = LayerFormat(options.precision, "static")  # type: ignore[arg-type]
    out = user_path(options.out, option("out"))
    run = _Run(model, options, form, resolve(model), Store(options.store), out, watching or Watching())
    return _calibrated(run, target)


def _calibrated(run: _Run, target: QualityTarget | None) -> Recipe:
    variant, options = run.variant, run.options
    requests = _requests(options, variant, run.store)
    pipe = run.pipeline()
    if broken := broken_weight(pipe):
        raise CheckpointError(f"{broken} holds NaN or infinities, so the checkpoint is damaged; download it again.")
    layouts = _layouts(variant, run.form, run.store)
    if not layouts:
        raise UserError(f"{variant.name} has no layer that can be quantized: its networks are convolutions.")
    folder = local_folder(run.model)
    checkpoint = checkpoint_digest(folder, [c for c, _ in layouts.values()], run.store) if folder else ""
    prompts = hashlib.sha256("\n".join(r.prompt for r in requests).encode()).hexdigest()
    about = Calibration(
        method=options.method,
        samples=len(requests),
        steps=requests[0].steps or variant.rendering().steps,
        prompts=prompts,
        checkpoint=checkpoint,
        versions={name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "diffusers")},
    )
    with run.watching.count("calibrating", "samples") as progress:
        render = _denoising(pipe, variant, requests, progress)
        measured = {n: _measured(pipe, c, own, run, about, render) for n, (c, own) in layouts.items()}
    recipe = Recipe(model=variant.name, precision=run.form.format, calibration=about, components=measured)
    if target is not None:
        recipe = _searched(run, target, recipe, layouts, requests)
    with atomic_write(run.out) as part:
        part.write_text(recipe.model_dump_json(indent=1), "utf-8")
    for name in measured:
        _state(run.out, name, about).unlink(missing_ok=True)
    return recipe


def _searched(
    run: _Run,
    target: QualityTarget,
    recipe: Recipe,
    layouts: Mapping[str, tuple[Component, ComponentRecipe]],
    requests: list[RenderRequest],
) -> Recipe:
    """With sensitive blocks in 16 bit; in a pipeline of its own, for calibration leaves its layers in the first."""
    pipe = run.pipeline()
    parts = {
        name: ((component.subfolder, *component.also_serves), layout_of(component, own, run.store))
        for name, (component, own) in layouts.items()
        if not component.attribute
    }
    latents = [r.model_copy(update={"formats": ("latents",)}) for r in requests]
    with run.watching.count("searching", "tries") as progress:
        result = searched(pipe, recipe, parts, latents, target, progress)
    run.watching.report(result, target)
    return result.recipe


def _requests(options: CalibrationOptions, variant: Variant, store: Store) -> list[RenderRequest]:
    """One a sample: jobs of a .jsonl file, or a line of prompts each, with pictures in turn; seeds count up."""
    native = RenderRequest(prompt="x", steps=options.steps)
    if options.prompts is not None and options.prompts.suffix == ".jsonl":
        jobs = [
            job.model_copy(update={"steps": options.steps or job.steps}) for job in read_jobs(options.prompts, variant)
        ]
    else:
        pictures = _pictures(options.images)
        if not pictures and "text-to-video" not in variant.tasks:
            pictures = photographs(store)
        lines = prompts_of(options.prompts, variant)
        jobs = []
        for i in range(max(len(lines), len(pictures))):
            update: dict[str, Any] = {"prompt": lines[i % len(lines)], "seed": i}
            if pictures:
                update["image"] = pictures[i % len(pictures)]
            jobs.append(native.model_copy(update=update).completed(variant))
    return [jobs[i % len(jobs)].model_copy(update={"seed": i}) for i in range(options.samples)]


def _pictures(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    pictures = sorted(p.absolute() for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not pictures:
        raise RequestError(f"{option('images', folder)} holds no picture ({', '.join(PICTURES)}).")
    return pictures


def photographs(store: Store) -> list[Path]:
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
    layouts = {}
    for component in components(variant):
        recipe = default_recipe(component, form)
        if layout_of(component, recipe, store):
            layouts[component.name] = component, recipe
    return layouts


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
    run: _Run,
    about: Calibration,
    render: Callable[[int], None],
) -> ComponentRecipe:
    modules: dict[str, nn.Module] = {}
    for part in (component.subfolder, *component.also_serves):
        owner = getattr(pipe, part, None)
        if owner is not None:
            modules[part] = owner.get_submodule(component.attribute) if component.attribute else owner
    layout = layout_of(component, recipe, run.store)
    state = _state(run.out, component.name, about)
    state.parent.mkdir(parents=True, exist_ok=True)
    ranges = collected(modules, layout, run.options.method, about.samples, render, state)
    return recipe.model_copy(update={"ranges": ranges})


def _state(out: Path, component: str, about: Calibration) -> Path:
    """Where an interrupted calibration goes on: another one, differently made, does not find it."""
    digest = hashlib.sha256(about.model_dump_json().encode()).hexdigest()[:8]
    return out.with_name(f".{out.name}.{component}.{digest}.part")
