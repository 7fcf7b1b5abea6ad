"""The `render` and `batch` commands: options → jobs → renderer → report."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from overcrank.cli.json_output import print_json
from overcrank.cli.options import SOME_FAILED
from overcrank.engines.store import Store
from overcrank.engines.types import typed
from overcrank.errors import RequestError
from overcrank.models import packaged_model, prompt_note, resolve
from overcrank.models.base import Variant
from overcrank.models.presets import with_preset
from overcrank.runtime.options import RenderOptions
from overcrank.runtime.render.request import FORMATS, RenderRequest, read_jobs, request_of

if TYPE_CHECKING:
    from overcrank.runtime.render.renderer import Outcome, RenderJob, Watcher

REQUEST_OPTIONS = (
    *("prompt", "negative_prompt", "image", "last_image", "video", "strength", "audio", "steps", "guidance", "seed"),
    *("guidance_2", "guidance_rescale", "guidance_until", "scheduler", "shift", "sigmas", "timesteps"),
    *("height", "width", "frames", "fps"),
)


def render_one(options: dict[str, Any]) -> int:
    """Exit status of `overcrank render`; everything about the request is checked before the model is loaded."""
    options["model"] = options["model"] or packaged_model()
    variant, _ = with_preset(resolve(options["model"]), options["preset"])
    stem, formats = _output(options["out"], options["formats"])
    values = {k: options[k] for k in REQUEST_OPTIONS if options[k] is not None}
    request = request_of({**values, "formats": formats, "output": stem.name}).completed(variant)
    return _run(options, variant, [(request, stem)], again=True, many=False)


def render_batch(options: dict[str, Any]) -> int:
    """Exit status of `overcrank batch`: 0 when every job is done, 3 when some failed, 130 when cancelled."""
    options["model"] = options["model"] or packaged_model()
    variant, _ = with_preset(resolve(options["model"]), options["preset"])
    jobs = read_jobs(options["jobs"], variant)
    folder: Path = options["out"].expanduser().absolute()
    return _run(options, variant, [(r, folder / r.output) for r in jobs], again=options["again"], many=True)


def _output(out: Path, formats: str) -> tuple[Path, tuple[str, ...]]:
    """Results' path without a suffix, and the formats: those asked for, or what the suffix says and a sheet."""
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in ("mp4", "gif", "png", ""):
        raise RequestError(f"--out {out}: unknown suffix .{suffix}; use .mp4, .gif, .png (frames), or none.")
    asked = tuple(formats.replace(",", " ").split())
    for name in asked:
        if name not in FORMATS:
            raise RequestError(f"--formats: unknown format '{name}'; use {', '.join(FORMATS)}.")
    stem = out.expanduser().absolute()
    stem = stem.with_suffix("") if suffix else stem
    if out.is_dir() or not stem.name:
        raise RequestError(f"--out {out} is a folder; give a file name such as {out / 'out.mp4'}.")
    if not asked:
        return stem, (suffix or "mp4", "sheet")
    return stem, tuple(dict.fromkeys((suffix, *asked) if suffix else asked))


def _run(
    options: dict[str, Any], variant: Variant, work: list[tuple[RenderRequest, Path]], again: bool, many: bool
) -> int:
    from overcrank.runtime.render.output import prepare_folder

    quiet = options["quiet"] or options["as_json"]
    if not quiet:
        click.echo(f"loading {variant.name} …", err=True)  # before anything heavy is imported
        for note in {note for request, _ in work if (note := prompt_note(variant, request.prompt))}:
            click.echo(f"note: {note}.", err=True)
    typed(options["dtype"])
    prepare_folder(work[0][1].parent)
    from overcrank.cli import display as show
    from overcrank.runtime.render.renderer import CANCELLED, FAILED, RenderJob, load_renderer
    from overcrank.runtime.render.stepcache import threshold_of

    threshold_of(options["cache"], variant)
    names = [field.name for field in fields(RenderOptions) if options.get(field.name) is not None]
    loading = RenderOptions(**{name: options[name] for name in names})
    loading.quantization()
    if not options.get("ray"):  # each machine of a cluster has its own cache
        from overcrank.runtime.pipeline.load import checkpoint_folder

        checkpoint_folder(options["model"], variant, Store(options["store"]), partial(show.downloading, quiet=quiet))
    jobs = [RenderJob(request, stem) for request, stem in work]
    started = time.monotonic()
    with show.Display(quiet) as display, show.watching(display, jobs, quiet) as watcher:
        if options.get("ray"):
            outcomes = _on_cluster(options["ray"], loading, variant, watcher, jobs, resume=not again)
        else:
            with display.stage(f"loading {variant.name}"):
                renderer = load_renderer(loading, variant, watcher)
            outcomes = renderer.run(jobs, resume=not again)
    _print(outcomes, options["as_json"], many, time.monotonic() - started)
    if any(o.status == CANCELLED for o in outcomes):
        return 130
    failed = [o.exit_code for o in outcomes if o.status == FAILED]
    return SOME_FAILED if 0 < len(failed) < len(outcomes) else max(failed, default=0)


def _on_cluster(
    address: str, options: RenderOptions, variant: Variant, watcher: Watcher, jobs: list[RenderJob], resume: bool
) -> list[Outcome]:
    from overcrank.engines.cluster import connected
    from overcrank.runtime.render.cluster import ClusterRenderer

    with connected(address) as ray:
        here = replace(options, store=Store(options.store).root)  # which this machine's environment names
        return ClusterRenderer(ray, here, variant, watcher).run(jobs, resume)


def _print(outcomes: list[Any], as_json: bool, many: bool, seconds: float) -> None:
    from overcrank.cli import display as show
    from overcrank.runtime.render.renderer import CANCELLED, FAILED

    if as_json:
        print_json("batch" if many else "render", seconds=round(seconds, 2), jobs=show.as_json(outcomes))
        return
    if many:
        show.report(outcomes, seconds)
        return
    (outcome,) = outcomes
    if outcome.status == FAILED:
        click.echo(f"error: {outcome.error}", err=True)
    elif outcome.status == CANCELLED:
        click.echo("cancelled; nothing was written.", err=True)
    for file in outcome.files:
        click.echo(file)
