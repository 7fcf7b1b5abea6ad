"""Variant + targets → bundles: plan the jobs, run them in worker processes, put bundles in place."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overcrank import __version__
from overcrank.calibration.recipe import IN_16_BIT, ComponentRecipe, LayerFormat, Recipe, recipe_of
from overcrank.engines.flavours import require_flavour
from overcrank.engines.manifest import MANIFEST, EngineKey, Manifest, ShapeEntry, file_entry, read_manifest
from overcrank.engines.profiles import Profile
from overcrank.engines.store import Store, store_errors, sync_folder, written_whole
from overcrank.engines.targets import Target, sixteen_bit
from overcrank.engines.worker import Job, Report, compile_component, export_component, finished, has_graph
from overcrank.errors import BuildCancelled, CompileError, UserError
from overcrank.export.cache import exporter_versions, graph_digest
from overcrank.export.weights import weight_files, weights_digest
from overcrank.models import components
from overcrank.models.base import Component, Variant, VideoShape

RECIPE = "recipe.json"
FLAGS = "strongly_typed,decomposable_attention,no_auxiliary_streams"
RAM_PER_WORKER = 1_500_000_000

Progress = Callable[[str, str], None]
"""Called with a job's title and what it does."""


@dataclass(frozen=True)
class Request:
    """What one bundle is to be made of."""

    variant: Variant
    target: Target
    precision: str
    profile: Profile
    flavour: str = "tensorrt_rtx"
    components: tuple[str, ...] = ()
    checkpoint: Path | None = None  # diffusers folder whose weights are embedded
    layers: LayerFormat = IN_16_BIT  # how the quantized layers of the default recipe multiply
    recipe: Recipe | None = None
    allow_fallback: bool = False


@dataclass
class Built:
    path: Path
    manifest: Manifest
    cached: bool


@dataclass
class _Bundle:
    request: Request
    jobs: list[Job] = field(default_factory=list)
    key: str = ""
    staging: Path = Path()


def build(requests: list[Request], store: Store, progress: Progress, workers: int | None = None) -> list[Built]:
    """Build every request that the store does not hold yet; identical work is done once.

    Raises the first failure after cancelling the rest; finished components stay in staging,
    so the next run takes them up, unless the request itself was wrong.
    """
    store.prepare()
    started = time.monotonic()
    bundles = [_planned(r, store) for r in requests]
    missing = {b.key: b for b in bundles if store.find(b.key) is None}
    with ExitStack() as locks:
        for key in sorted(missing):
            locks.enter_context(store.lock(key[:16]))
        fresh = [b for b in missing.values() if store.find(b.key) is None]  # another process may have built it
        peak = _run(fresh, progress, workers)
        for bundle in fresh:
            _publish(bundle, store, time.monotonic() - started, peak)
    built = []
    for bundle in bundles:
        path = store.find(bundle.key)
        assert path is not None
        built.append(Built(path, read_manifest(path), cached=bundle not in fresh))
    return built


def key_of(request: Request, store: Store) -> str:
    """By which the store finds the request's bundle."""
    return _planned(request, store).key


def default_workers() -> int:
    """Worker processes by cores and by RAM that is free."""
    import psutil

    fitting = int(psutil.virtual_memory().available // RAM_PER_WORKER)
    return max(1, min(os.cpu_count() or 1, fitting))


def _planned(request: Request, store: Store) -> _Bundle:
    version = require_flavour(request.flavour)
    bundle = _Bundle(request)
    digests: dict[str, tuple[str, tuple[Path, ...]]] = {}
    compute = sixteen_bit(request.target, request.precision)
    drafts: list[tuple[EngineKey, tuple[Path, ...], ComponentRecipe]] = []
    for component in components(request.variant, request.components):
        if component.subfolder not in digests:
            digests[component.subfolder] = _weights(request, component)
        weights, files = digests[component.subfolder]
        recipe = recipe_of(request.recipe, component, request.layers)
        key = EngineKey(
            component=component.name,
            graph=graph_digest(component, compute),
            recipe=recipe.digest() if weights == "inputs" else recipe.digest_with_ranges(),
            target=request.target.name,
            profile=repr(sorted(request.profile.ranges(component).items())),
            flavour=request.flavour,
            flavour_version=version,
            flags=FLAGS,
            weights=weights,
        )
        drafts.append((key, files, recipe))
    identity = "+".join([request.variant.name, *(k.digest() for k, *_ in drafts)])
    bundle.key = hashlib.sha256(identity.encode()).hexdigest()
    bundle.staging = store.staging(bundle.key)
    bundle.jobs = [
        Job(
            variant=request.variant,
            key=key,
            precision=compute,
            recipe=recipe,
            target=request.target.narrowed(request.precision),
            profile=request.profile,
            flavour=request.flavour,
            weights=files,
            staging=bundle.staging,
            store=store,
            allow_fallback=request.allow_fallback,
        )
        for key, files, recipe in drafts
    ]
    return bundle


def _weights(request: Request, component: Component) -> tuple[str, tuple[Path, ...]]:
    if request.checkpoint is None:
        return "inputs", ()
    files = weight_files(request.checkpoint / component.subfolder)
    return f"embedded:{weights_digest(files)}", files


def _run(bundles: list[_Bundle], progress: Progress, workers: int | None) -> int:
    """All jobs of all bundles over worker processes; returns the process tree's peak RAM in bytes."""
    jobs = [j for b in bundles for j in b.jobs]
    todo = []
    for bundle in bundles:
        with store_errors(bundle.staging):
            bundle.staging.mkdir(exist_ok=True)
    for job in jobs:
        if finished(job):
            progress(_title(job), "done in an earlier run")
        else:
            todo.append(job)
    if not todo:
        return 0
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    pool = ProcessPoolExecutor(
        workers or default_workers(),
        mp_context=context,
        initializer=_start_worker,
        initargs=(messages,),
        max_tasks_per_child=1,  # an export's memory is gone before the next compilation needs it
    )
    try:
        with _terminated_as_interrupt():
            peak = _follow(pool, todo, messages, progress)
        pool.shutdown()
        return peak
    except KeyboardInterrupt as error:
        raise BuildCancelled("Cancelled; finished components are kept and the same command resumes.") from error
    except UserError:
        for bundle in bundles:
            shutil.rmtree(bundle.staging, ignore_errors=True)
        raise
    except BrokenProcessPool as error:
        raise CompileError(
            "A build worker died (out of memory?); the same command resumes what is finished."
        ) from error
    finally:
        _stop(pool)


def _follow(pool: ProcessPoolExecutor, jobs: list[Job], messages: Any, progress: Progress) -> int:
    """Export each graph once, compile each job when its graph is there, return the peak RAM.

    The first failure is raised.
    """
    import psutil

    me, peak = psutil.Process(), 0
    waiting: dict[Future[None], list[Job]] = {}
    running: set[Future[None]] = set()
    by_graph: dict[Path, list[Job]] = {}
    for job in jobs:
        by_graph.setdefault(job.graph_folder, []).append(job)
    for same in by_graph.values():
        if has_graph(same[0]):
            running |= {pool.submit(_in_worker, compile_component, job) for job in same}
        else:
            waiting[pool.submit(_in_worker, export_component, same[0])] = same
    while running or waiting:
        done, _ = wait([*running, *waiting], timeout=0.25, return_when=FIRST_COMPLETED)
        with suppress(queue.Empty):
            while True:
                progress(*messages.get_nowait())
        peak = max(peak, _tree_ram(me))
        for future in done:
            future.result()
            running.discard(future)
            running |= {pool.submit(_in_worker, compile_component, job) for job in waiting.pop(future, [])}
    return peak


def _tree_ram(process: Any) -> int:
    """Memory of a process tree in bytes, pages that processes share counted once (PSS)."""
    import psutil

    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            full = p.memory_full_info()
            total += getattr(full, "pss", full.uss)
        except psutil.Error:
            continue
    return total


def _stop(pool: ProcessPoolExecutor) -> None:
    """Workers are in native code that no exception reaches, so unfinished ones are killed.

    The pool's own thread then dies of a TypeError (it looks for workers that are gone);
    that one thread's traceback is not shown.
    """
    manager, shown = getattr(pool, "_executor_manager_thread", None), threading.excepthook
    threading.excepthook = lambda args: None if args.thread is manager else shown(args)
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
        process.join()


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM stops a build the way Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


_messages: Any = None


def _start_worker(messages: Any) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _die_with_parent()


def _die_with_parent() -> None:
    """A killed build must not leave workers running (Linux; elsewhere they end with their job)."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        pass


def _in_worker(work: Callable[[Job, Report], None], job: Job) -> None:
    work(job, lambda doing: _messages.put((_title(job), doing)))


def _title(job: Job) -> str:
    return f"{job.target.name} {job.key.component}"


def _publish(bundle: _Bundle, store: Store, seconds: float, peak: int) -> None:
    """Manifest into the staged folder, then the folder under its final name."""
    request = bundle.request
    entries = [e for j in bundle.jobs if (e := finished(j))]
    recipe = None
    if request.recipe is not None:
        with written_whole(bundle.staging / RECIPE) as part:
            part.write_text(request.recipe.model_dump_json(indent=1), "utf-8")
        recipe = file_entry(bundle.staging / RECIPE)
    manifest = Manifest(
        overcrank=__version__,
        model=request.variant.name,
        family=request.variant.family,
        hub_id=request.variant.hub_id,
        configs={k: dict(v) for k, v in request.variant.configs.items()},
        target=request.target.name,
        precision=request.precision,
        flavour=request.flavour,
        flavour_version=require_flavour(request.flavour),
        min=_shape(request.profile.min),
        opt=_shape(request.profile.opt),
        max=_shape(request.profile.max),
        weights=bundle.jobs[0].key.weights,
        versions=exporter_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        build_seconds=round(seconds, 2),
        peak_ram_bytes=peak,
        components=entries,
        recipe=recipe,
    )
    with written_whole(bundle.staging / MANIFEST) as part:
        part.write_text(manifest.model_dump_json(indent=1), "utf-8")
    for job in bundle.jobs:
        job.done.unlink(missing_ok=True)
    name = f"{_safe(request.variant.name)}-{request.target.name}-{request.precision}-{bundle.key[:16]}"
    with store_errors(store.bundles):
        bundle.staging.rename(store.bundles / name)
        sync_folder(store.bundles)


def _shape(shape: VideoShape) -> ShapeEntry:
    return ShapeEntry(height=shape.height, width=shape.width, frames=shape.frames, batch=shape.batch)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
