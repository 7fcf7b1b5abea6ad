"""The `render` and `batch` commands: options → jobs → renderer → report."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import click
from overcrank.cli.json_output import print_json
from overcrank.cli.options import SOME_FAILED
from overcrank.engines.store import Store
from overcrank.engines.types import typed
from overcrank.errors import RequestError
from overcrank.files import user_path
from overcrank.models import packaged_model, prompt_note, resolve
from overcrank.models.base import Variant
from overcrank.models.presets import with_preset
from overcrank.runtime.options import LoadOptions, RenderOptions
from overcrank.runtime.pipeline.naming import files_of, is_file, with_paths
from overcrank.runtime.render.names import check_name, split_suffix
from overcrank.runtime.render.request import FORMATS, RenderRequest, read_jobs, request_of, require_memory
from overcrank.runtime.render.results import Replace, prepare_folder, remove_partial_results, require_free

if TYPE_CHECKING:
    from overcrank.runtime.render.renderer import Outcome, RenderJob

REQUEST_OPTIONS = (
    *("prompt", "negative_prompt", "image", "last_image", "video", "strength", "audio", "steps", "guidance", "seed"),
    *("guidance_2", "guidance_rescale", "guidance_until", "scheduler", "shift", "sigmas", "timesteps"),
    *("height", "width", "frames", "seconds", "fit", "fps"),
)


def render_one(options: dict[str, Any]) -> int:
    """Exit status of `overcrank render`; everything about the request is checked before the model is loaded."""
    options |= _with_paths(options)
    variant, _ = with_preset(resolve(options["model"]), options["preset"])
    stem, formats = _output(options["out"], options["formats"])
    values = {k: options[k] for k in REQUEST_OPTIONS if options[k] is not None}
    request = request_of({**values, "formats": formats, "output": stem.name}).completed(variant)
    options["again"] = True
    return _run(options, variant, [(request, stem)], "all" if options["overwrite"] else "nothing")


def render_batch(options: dict[str, Any]) -> int:
    """Exit status of `overcrank batch`: 0 when every job is done, 3 when some failed, 130 when cancelled."""
    options |= _with_paths(options)
    variant, _ = with_preset(resolve(options["model"]), options["preset"])
    jobs = read_jobs(options["jobs"], variant)
    folder: Path = user_path(options["out"], "--out").absolute()
    return _run(options, variant, [(r, folder / r.output) for r in jobs], "own")


def _with_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Model and files by the names under which `load` finds them, wherever it runs."""
    model = options["model"] or packaged_model()
    if is_file(model) and not (options["quiet"] or options["as_json"]):
        click.echo(f"reading {model} …", err=True)  # before anything heavy is imported
    named = LoadOptions(weights=options["weights"], loras=options["loras"], comfy=options["comfy"])
    model, named = with_paths(model, named)
    return {"model": model, "weights": named.weights, "loras": named.loras, "comfy": None}


def _output(out: Path, formats: str) -> tuple[Path, tuple[str, ...]]:
    """Results' path without a suffix, and the formats: those asked for, or what the suffix says and a sheet."""
    stem, suffix = split_suffix(user_path(out, "--out").absolute(), ("mp4", "gif", "png"))
    names = tuple(formats.replace(",", " ").split())
    for name in names:
        if name not in FORMATS:
            raise RequestError(f"--formats: unknown format '{name}'; use {', '.join(FORMATS)}.")
    if out.is_dir() or not stem.name:
        raise RequestError(f"--out {out} is a folder; give a file name such as {out / 'out.mp4'}.")
    check_name(stem.name, "--out")
    if not names:
        return stem, (suffix or "mp4", "sheet")
    return stem, tuple(dict.fromkeys((suffix, *names) if suffix else names))


def _run(options: dict[str, Any], variant: Variant, work: list[tuple[RenderRequest, Path]], over: Replace) -> int:
    """`over`: what results may take the place of; in a batch ("own") a job that would take more fails alone."""
    typed(options["dtype"])
    quiet = options["quiet"] or options["as_json"]
    if not quiet:
        click.echo(f"loading {variant.name} …", err=True)  # before anything heavy is imported
        for note in {note for request, _ in work if (note := prompt_note(variant, request.prompt))}:
            click.echo(f"note: {note}.", err=True)
    for request, stem in work:
        remove_partial_results(stem)
        if over != "own":
            require_free(stem, request.formats, over)
        if not options.get("ray"):  # whose machines have their own memory
            require_memory(request)
    prepare_folder(work[0][1].parent)
    from overcrank.cli import display as show
    from overcrank.runtime.render.renderer import CANCELLED, FAILED, RenderJob, Terminated
    from overcrank.runtime.render.stepcache import threshold_of

    threshold_of(options["cache"], variant)
    names = [field.name for field in fields(RenderOptions) if options.get(field.name) is not None]
    loading = RenderOptions(**{name: options[name] for name in names})
    loading.quantization()
    if not options.get("ray"):  # each machine of a cluster has its own cache
        from overcrank.runtime.pipeline.load import checkpoint_folder, require_files

        require_files(loading, variant)
        watch = partial(show.downloading, quiet=quiet)
        checkpoint_folder(options["model"], variant, Store(options["store"]), watch, files_of(loading))
    jobs = [RenderJob(request, stem, over) for request, stem in work]
    started = time.monotonic()
    try:
        with _ended_by_signals(), show.Display(quiet) as display, show.watching(display, jobs, quiet) as watcher:
            outcomes = _outcomes(options, loading, variant, jobs, (display, watcher))
    except Terminated as stop:
        sys.stderr.flush()
        os._exit(stop.exit_code)  # threads may be in the middle of a step
    _print(outcomes, options["as_json"], over == "own", time.monotonic() - started)
    if any(o.status == CANCELLED for o in outcomes):
        return 130
    failed = [o.exit_code for o in outcomes if o.status == FAILED]
    return SOME_FAILED if 0 < len(failed) < len(outcomes) else max(failed, default=0)


def _outcomes(
    options: dict[str, Any], loading: RenderOptions, variant: Variant, jobs: list[RenderJob], views: Any
) -> list[Outcome]:
    """`views`: the display and the watcher that draws on it."""
    display, watcher = views
    resume = not options["again"]
    if not options.get("ray"):
        from overcrank.runtime.render.renderer import load_renderer

        with display.stage(f"loading {variant.name}"):
            renderer = load_renderer(loading, variant, watcher, any(job.request.lora is not None for job in jobs))
        return renderer.run(jobs, resume)
    from overcrank.engines.cluster import connected
    from overcrank.runtime.render.cluster import ClusterRenderer

    with connected(options["ray"]) as ray:
        here = replace(loading, store=Store(loading.store).root)  # which this machine's environment names
        return ClusterRenderer(ray, here, variant, watcher).run(jobs, resume)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as a second Ctrl-C does; one that nohup had ignored stays so."""
    from overcrank.runtime.render.renderer import Terminated

    def end(number: int, _: Any) -> None:
        raise Terminated(128 + number)

    former = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL and current_thread() is main_thread():
            former[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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
