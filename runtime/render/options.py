"""Everything that decides how a pipeline is loaded and driven, beside the videos that are asked for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overcrank.models.base import Variant
from overcrank.models.hub import unwatched
from overcrank.runtime.pipeline.imports import pipeline_class, uncollected

if TYPE_CHECKING:
    from overcrank.runtime.render.renderer import Renderer, Watcher
    from overcrank.runtime.sessions.sources import Quantization


@dataclass(frozen=True)
class RenderOptions:
    """As the options of `overcrank render` and `batch` are called; `load` and `Renderer` say what they mean.

    `dtype` are words such as "vae=fp32", `cache` a threshold in words, and `lanes` how many jobs overlap.
    """

    model: str
    bundle: str | None = None
    backend: str = "auto"
    device: str | None = None
    dtype: tuple[str, ...] = ()
    store: Path | None = None
    quantization: Quantization | None = None
    loras: tuple[str, ...] = ()
    preset: str = ""
    vram: str = "auto"
    slow_engines: bool = False
    pull: str | None = None
    cache: str = "off"
    preview: bool = False
    lanes: int | None = None


def load_renderer(options: RenderOptions, variant: Variant, watcher: Watcher) -> Renderer:
    """The pipeline, loaded and accelerated in this process, which is for rendering alone."""
    with uncollected(forever=True), suppress(Exception):  # what cannot be imported, `load` tells
        pipeline_class(next(iter(variant.tasks.values())))
    import diffusers
    from overcrank.runtime.pipeline.load import load
    from overcrank.runtime.render.renderer import Renderer
    from overcrank.runtime.render.stepcache import threshold_of

    diffusers.utils.logging.set_verbosity_error()
    pipe = load(
        options.model,
        bundle=options.bundle,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype or None,
        store=options.store,
        quantization=options.quantization,
        loras=options.loras,
        preset=options.preset,
        vram=options.vram,
        slow_engines=options.slow_engines,
        pull=options.pull or "",
        watch=unwatched,  # a bar would be drawn over that of the jobs
    )
    threshold = threshold_of(options.cache, variant)
    return Renderer(pipe, variant.name, watcher, preview=options.preview, lanes=options.lanes, cache=threshold)
