"""Variant + targets → bundles: plan the jobs, run them in worker processes, put bundles in place."""

from __future__ import annotations

import hashlib
import shutil
import signal
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from overcrank import __version__
from overcrank.engines.compile import FLAGS
from overcrank.engines.estimates import Forecast, cost_of
from overcrank.engines.manifest import (
    MANIFEST,
    EngineKey,
    Manifest,
    ShapeEntry,
    file_entry,
    read_manifest,
    require_label,
)
from overcrank.engines.profiles import Profile
from overcrank.engines.store import Store
from overcrank.engines.targets import Target
from overcrank.engines.tensorrt import require_flavour
from overcrank.engines.types import compute_of
from overcrank.engines.worker import (
    BuildJob,
    compile_component,
    export_component,
    finished,
    has_graph,
    lora_inputs_of,
)
from overcrank.engines.workers import LocalWorkers, Workers
from overcrank.errors import BuildCancelled, OvercrankError, UserError
from overcrank.export.cache import exporter_versions, graph_digest
from overcrank.export.expected import component_files
from overcrank.export.headers import weights_digest
from overcrank.export.quantization.lora import NO_LORA_INPUTS, LoraInputs
from overcrank.export.quantization.recipe import IN_16_BIT, ComponentRecipe, LayerFormat, Recipe, recipe_of
from overcrank.files import atomic_write, sync_folder, write_errors
from overcrank.models import components
from overcrank.models.base import Component, Variant, VideoShape
from overcrank.units import human_bytes, human_seconds

RECIPE = "recipe.json"

Progress = Callable[[str, str], None]
"""Called with a job's title and what it does; what follows a " · " changes often. ALL is the title of the whole."""
ALL = "all"
EXPORT, COMPILE = "export", "compile"


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
    dtypes: Mapping[str, str] = field(default_factory=dict)  # part → fp32, bf16 or fp16, over the variant's own
    lora: LoraInputs = NO_LORA_INPUTS


@dataclass
class Built:
    path: Path
    manifest: Manifest
    cached: bool


@dataclass
class _Bundle:
    request: Request
    jobs: list[BuildJob] = field(default_factory=list)
    key: str = ""
    staging: Path = Path()


def build(
    requests: list[Request], store: Store, progress: Progress, hire: Callable[[], Workers] = LocalWorkers
) -> list[Built]:
    """Build every request that the store does not hold yet; identical work is done once.

    Raises the first failure after cancelling the rest; finished components stay in staging,
    so the next run takes them up, unless the request itself was wrong.
    """
    return [b for b in build_each(requests, store, progress, hire, stop_at_first=True) if isinstance(b, Built)]


def build_each(
    requests: list[Request],
    store: Store,
    progress: Progress,
    hire: Callable[[], Workers] = LocalWorkers,
    stop_at_first: bool = False,
) -> list[Built | OvercrankError]:
    """As `build`, but what fails does not stop the rest: it stands in the place of its bundle."""
    store.prepare()
    bundles = [_planned(r, store) for r in requests]
    missing = {b.key: b for b in bundles if store.find(b.key) is None}
    with ExitStack() as locks:
        for key in sorted(missing):
            locks.enter_context(store.lock(key[:16]))
        fresh = {key: b for key, b in missing.items() if store.find(key) is None}  # another process may have built it
        run = _Run(list(fresh.values()), store, progress, stop_at_first)
        run.go(hire)
    results: list[Built | OvercrankError] = []
    for bundle in bundles:
        path = store.find(bundle.key)
        if path is None:
            results.append(run.failures[bundle.staging])
        else:
            results.append(Built(path, read_manifest(path), cached=bundle.key not in fresh))
    return results


def key_of(request: Request, store: Store) -> str:
    """By which the store finds the request's bundle."""
    return _planned(request, store).key


def _planned(request: Request, store: Store) -> _Bundle:
    require_label(request.variant.name)
    version = require_flavour(request.flavour)
    bundle = _Bundle(request)
    digests: dict[str, tuple[str, tuple[Path, ...]]] = {}
    drafts: list[tuple[EngineKey, tuple[Path, ...], ComponentRecipe, str]] = []
    for component in components(request.variant, request.components):
        compute = compute_of(component, request.variant, request.target, request.precision, dict(request.dtypes))
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
            lora=lora_inputs_of(request.variant, component, request.lora).label,
        )
        drafts.append((key, files, recipe, compute))
    identity = "+".join([request.variant.name, *(k.digest() for k, *_ in drafts)])
    bundle.key = hashlib.sha256(identity.encode()).hexdigest()
    bundle.staging = store.staging(bundle.key)
    bundle.jobs = [
        BuildJob(
            variant=request.variant,
            key=key,
            compute=compute,
            precision=request.precision,
            recipe=recipe,
            target=request.target.narrowed(request.precision),
            profile=request.profile,
            flavour=request.flavour,
            weights=files,
            staging=bundle.staging,
            store=store,
            allow_fallback=request.allow_fallback,
            lora=request.lora,
            title=f"{request.variant.name} {request.target.name} {request.precision} {key.component}",
        )
        for key, files, recipe, compute in drafts
    ]
    return bundle


def _weights(request: Request, component: Component) -> tuple[str, tuple[Path, ...]]:
    if request.checkpoint is None:
        return "inputs", ()
    files = component_files(component, request.checkpoint / component.subfolder)
    return f"embedded:{weights_digest(files)}", files


class _Run:
    """One go over the jobs of some bundles: graphs are exported once, and each bundle is published when it is whole."""

    def __init__(self, bundles: list[_Bundle], store: Store, progress: Progress, stop_at_first: bool) -> None:
        self.bundles, self.store, self.progress, self.stop_at_first = bundles, store, progress, stop_at_first
        self.failures: dict[Path, OvercrankError] = {}  # by staging folder
        self._left: dict[Path, int] = {}  # jobs
        self._exporting: dict[Future[None], list[BuildJob]] = {}
        self._compiling: dict[Future[None], BuildJob] = {}
        self._started, self._peak = time.monotonic(), 0
        self._forecast, self._told = Forecast({}, 1), ""

    def go(self, hire: Callable[[], Workers]) -> None:
        todo = self._unfinished()
        if not todo:
            return
        workers = hire()
        try:
            with _terminated_as_interrupt():
                self._submit(todo, workers)
                while self._exporting or self._compiling:
                    self._watch(workers)
            self.progress(ALL, "done")
        except KeyboardInterrupt as error:
            raise BuildCancelled("Cancelled; finished components are kept and the same command resumes.") from error
        finally:
            workers.stop()
            for bundle in self.bundles:
                if isinstance(self.failures.get(bundle.staging), UserError):
                    shutil.rmtree(bundle.staging, ignore_errors=True)

    def _unfinished(self) -> list[BuildJob]:
        """Jobs to do; bundles of which an earlier run left nothing to do are published."""
        todo = []
        for bundle in self.bundles:
            with write_errors(bundle.staging):
                bundle.staging.mkdir(exist_ok=True)
            _tidy(bundle.staging)
            own = [job for job in bundle.jobs if not finished(job)]
            self._left[bundle.staging] = len(own)
            for job in bundle.jobs:
                if job not in own:
                    self.progress(job.title, "done in an earlier run")
            todo += own
            if not own:
                self._publish(bundle.staging)
        return todo

    def _submit(self, jobs: list[BuildJob], workers: Workers) -> None:
        by_graph: dict[Path, list[BuildJob]] = {}
        for job in jobs:
            by_graph.setdefault(job.graph_folder, []).append(job)
        lacking = [same[0] for same in by_graph.values() if not has_graph(same[0])]
        self._expect(jobs, lacking, workers.count)
        for same in by_graph.values():
            if same[0] not in lacking:
                self._compile(same, workers)
            else:
                self._exporting[workers.submit(export_component, same[0])] = same

    def _compile(self, jobs: list[BuildJob], workers: Workers) -> None:
        for job in jobs:
            self._compiling[workers.submit(compile_component, job)] = job

    def _watch(self, workers: Workers) -> None:
        """Wait a moment, and take up what has ended."""
        done, _ = wait([*self._exporting, *self._compiling], timeout=0.25, return_when=FIRST_COMPLETED)
        for title, doing in workers.said():
            self.progress(title, doing)
            self._note(title, doing)
        self._tell()
        self._peak = max(self._peak, workers.ram())
        for future in done:
            waiting, job = self._exporting.pop(future, []), self._compiling.pop(future, None)
            try:
                future.result()
            except OvercrankError as error:
                self._failed(waiting if job is None else [job], error)
                if self.stop_at_first:
                    raise
                continue
            self._compile(waiting, workers)
            if job is not None:
                self._left[job.staging] -= 1
                if not self._left[job.staging]:
                    self._publish(job.staging)

    def _expect(self, jobs: list[BuildJob], exports: list[BuildJob], workers: int) -> None:
        costs = {job.title: cost_of(job.variant, job.key.component, job.precision) for job in jobs}
        tasks: dict[Hashable, float] = {(job.title, EXPORT): costs[job.title].export_seconds for job in exports}
        tasks |= {(title, COMPILE): cost.compile_seconds for title, cost in costs.items()}
        self._forecast = Forecast(tasks, workers)
        size = human_bytes(int(sum(cost.engine_bytes for cost in costs.values())))
        cost = f"about {human_seconds(self._forecast.left())}, {size}"
        self.progress(ALL, f"{len(jobs)} engines, {len(exports)} graphs to export, {workers} at a time: {cost}")

    def _note(self, title: str, doing: str) -> None:
        """For the forecast: by what a job reports, one of its tasks begins or ends."""
        task = title, EXPORT if doing.startswith("export") else COMPILE
        if doing in ("exported", "done"):
            self._forecast.finished(task)
        else:
            self._forecast.started(task)

    def _tell(self) -> None:
        left = human_seconds(self._forecast.left())
        if left != self._told:
            self._told = left
            self.progress(ALL, f"building · about {left} left")

    def _failed(self, jobs: list[BuildJob], error: OvercrankError) -> None:
        for job in jobs:
            self.failures.setdefault(job.staging, error)
            self.progress(job.title, "done, failed")
            for task in (EXPORT, COMPILE):
                self._forecast.finished((job.title, task))

    def _publish(self, staging: Path) -> None:
        (bundle,) = (b for b in self.bundles if b.staging == staging)
        _publish(bundle, self.store, time.monotonic() - self._started, self._peak)


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


def _publish(bundle: _Bundle, store: Store, seconds: float, peak: int) -> None:
    """Manifest into the staged folder, then the folder under its final name."""
    request = bundle.request
    entries = [e for j in bundle.jobs if (e := finished(j))]
    recipe = None
    if request.recipe is not None:
        with atomic_write(bundle.staging / RECIPE) as part:
            part.write_text(request.recipe.model_dump_json(indent=1), "utf-8")
        recipe = file_entry(bundle.staging / RECIPE)
    manifest = Manifest(
        overcrank=__version__,
        model=request.variant.name,
        like=request.variant.like,
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
    with atomic_write(bundle.staging / MANIFEST) as part:
        part.write_text(manifest.model_dump_json(indent=1), "utf-8")
    for job in bundle.jobs:
        job.done.unlink(missing_ok=True)
    _tidy(bundle.staging)
    name = f"{_safe(request.variant.name)}-{request.target.name}-{request.precision}-{bundle.key[:16]}"
    with write_errors(store.bundles):
        bundle.staging.rename(store.bundles / name)
        sync_folder(store.bundles)


def _tidy(staging: Path) -> None:
    """What workers that died were about to write."""
    for part in staging.glob(".*"):
        part.unlink(missing_ok=True)


def _shape(shape: VideoShape) -> ShapeEntry:
    return ShapeEntry(height=shape.height, width=shape.width, frames=shape.frames, batch=shape.batch)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
