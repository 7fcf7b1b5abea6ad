"""The renderer: runs one or many renders over shared sessions.

A job goes through three stages, text encoding, denoising and decoding, and each stage is
held by one job at a time. Where the device gains from it (`lanes`), the text encoding and
the decoding of one job overlap the denoising of another. The sampling mathematics stays
in diffusers' pipelines; the renderer enters at their step callback.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from overcrank.engines.refusals import NonFiniteResult, free_memory
from overcrank.errors import OvercrankError, RenderCancelled, RenderError, RequestError
from overcrank.models import family
from overcrank.models.base import Media, Variant
from overcrank.models.hub import unwatched
from overcrank.options import merged, option
from overcrank.runtime.options import RenderOptions
from overcrank.runtime.pipeline.accelerate import device_of
from overcrank.runtime.pipeline.adapters import adapters_of
from overcrank.runtime.pipeline.checkpoint import broken_weight
from overcrank.runtime.pipeline.imports import pipeline_class, uncollected
from overcrank.runtime.pipeline.load import loaded, pipeline_for
from overcrank.runtime.pipeline.lora_sets import LoraSets
from overcrank.runtime.render.job_loras import by_loras, lora_files
from overcrank.runtime.render.media import cropped, media_of
from overcrank.runtime.render.output import Video, Writing, write_results
from overcrank.runtime.render.request import RenderRequest, require_memory
from overcrank.runtime.render.results import Replace, is_complete, remove_partial_results, stop_writing
from overcrank.runtime.render.sidecar import about_render
from overcrank.runtime.render.stepcache import StepCache, threshold_of
from overcrank.runtime.render.steps import NonFinite, Steps, require_finite
from overcrank.runtime.sessions.session import Record
from overcrank.runtime.sessions.workspace import memory_of

if TYPE_CHECKING:
    from overcrank.runtime.pipeline.accelerate import Acceleration

log = logging.getLogger("overcrank")
DONE, SKIPPED, FAILED, CANCELLED = "done", "skipped", "failed", "cancelled"


@dataclass(frozen=True)
class RenderJob:
    request: RenderRequest  # completed
    stem: Path  # the results' path without a suffix
    replace: Replace = "own"


class Terminated(KeyboardInterrupt):
    """The process ends at once: a second Ctrl-C, SIGTERM, or SIGHUP, as when its terminal is gone."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@dataclass
class Outcome:
    """How a job ended; seconds of wall time, and of each denoising step after the first."""

    job: RenderJob
    status: str = CANCELLED
    error: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    record: Record = field(default_factory=Record)
    files: list[Path] = field(default_factory=list)


class Watcher(Protocol):
    """Told what happens, from the jobs' own threads."""

    def started(self, job: RenderJob) -> None: ...
    def stage(self, job: RenderJob, name: str) -> None: ...
    def stepped(self, job: RenderJob, step: int, steps: int) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...


class Silent:
    """Watches nothing."""

    def started(self, job: RenderJob) -> None: ...
    def stage(self, job: RenderJob, name: str) -> None: ...
    def stepped(self, job: RenderJob, step: int, steps: int) -> None: ...
    def ended(self, outcome: Outcome) -> None: ...


class Renderer:
    def __init__(
        self,
        pipe: Any,
        model: str,
        watcher: Watcher,
        options: RenderOptions | None = None,
        **changes: Any,
    ) -> None:
        """`pipe`: an accelerated pipeline. `changes`: fields of RenderOptions, over those of `options`.

        Of the options its own fields are looked at; the pipeline is loaded. One job at a time if parts of it come
        and go, whatever `lanes` says. Raises UserError for an unknown option or word.
        """
        options = merged(RenderOptions, options, changes)
        self.pipe, self.model, self.watcher = pipe, model, watcher
        self.preview, self.metadata = options.preview, options.metadata
        self.acceleration: Acceleration = pipe.overcrank
        variant = self.acceleration.variant
        adapters = adapters_of(pipe, variant)
        if self.acceleration.lora_sets is None and adapters.changeable and options.pack is None:
            self.acceleration.lora_sets = LoraSets(adapters, adapters.files)
        self.cache = StepCache(threshold_of(options.cache, variant), variant, self.acceleration.ledger)
        self.lanes = 1 if self.acceleration.moved else options.lanes or _lanes(device_of(pipe))
        self._stages = {name: threading.Lock() for name in ("encoding", "denoising", "decoding")}
        self._cancelled = threading.Event()

    def run(self, jobs: Sequence[RenderJob], resume: bool = False) -> list[Outcome]:
        """Render every job; one that fails does not stop the rest.

        Ctrl-C cancels between steps, keeps finished videos and leaves the rest `cancelled`;
        a second one stops at once, removes what is half written and raises Terminated, while a step
        may still be computed in a thread. `resume` skips jobs whose results lie there whole.
        """
        outcomes, at_once = [Outcome(job) for job in jobs], False
        pool = ThreadPoolExecutor(self.lanes, "render")
        running = [pool.submit(self._guarded, outcomes[i], resume) for i in by_loras([job.request for job in jobs])]
        try:
            self._wait(running)
        except KeyboardInterrupt as stop:
            at_once = True
            stop_writing([job.stem for job in jobs])
            raise stop if isinstance(stop, Terminated) else Terminated(RenderCancelled.exit_code) from None
        finally:
            pool.shutdown(wait=not at_once)
        return outcomes

    def _wait(self, running: Sequence[Future[None]]) -> None:
        """Until every job has ended; KeyboardInterrupt when they shall end at once."""
        try:
            wait(running)
        except KeyboardInterrupt as stop:
            self.cancel()
            if isinstance(stop, Terminated):
                raise
            log.warning("cancelling after the current step; Ctrl-C again stops at once.")
            wait(running)

    def cancel(self) -> None:
        """Jobs end after their current step; those not begun do not begin."""
        self._cancelled.set()

    def _guarded(self, outcome: Outcome, resume: bool) -> None:
        """Every way a job can end, as its outcome."""
        start = time.monotonic()
        job = outcome.job
        try:
            if self._cancelled.is_set():
                return
            if resume and is_complete(job.stem, job.request.digest(self.model, self._settings(job.request))):
                outcome.status = SKIPPED
                return
            with self._with_loras(job.request):
                self.check_cancelled()
                self.watcher.started(job)
                self._render(outcome)
            outcome.status = DONE
        except RenderCancelled:
            outcome.status = CANCELLED
        except OvercrankError as error:
            outcome.status, outcome.error, outcome.exit_code = FAILED, str(error), error.exit_code
        except Exception as error:
            log.debug("job %s", job.stem.name, exc_info=True)
            outcome.status, outcome.error, outcome.exit_code = FAILED, self._said(error), 1
        finally:
            remove_partial_results(job.stem)
            outcome.seconds = time.monotonic() - start
            self.watcher.ended(outcome)

    def _said(self, error: Exception) -> str:
        """An unforeseen error as a sentence; one of the card's stops the jobs that are left."""
        import torch

        device = device_of(self.pipe)
        if isinstance(error, torch.OutOfMemoryError):
            figures = f" ({free_memory(*memory_of(device))})" if device.type == "cuda" else ""
            less = f"with {option('vram', 'low')}, or with {option('lanes', 1)}"
            return f"out of memory{figures}; render fewer frames, a smaller size, {less}."
        if isinstance(error, torch.AcceleratorError):
            self._cancelled.set()  # nothing more can be computed in this process
            first = str(error).strip().splitlines()[0]
            return f"the card failed: {first}; see nvidia-smi and the system's log, then run the same command again."
        return f"{type(error).__name__}: {error}"

    def _render(self, outcome: Outcome) -> None:
        """One job; a non-finite result is rendered again without engines."""
        job, ledger = outcome.job, self.acceleration.ledger
        with ledger.recording() as record:
            outcome.record = record
            try:
                video, pipe = self.made(outcome)
            except NonFinite as error:
                components = sorted(c for c, b in record.backends().items() if set(b) != {"eager"})
                if broken := broken_weight(self.pipe):
                    raise RenderError(
                        f"{error}: {broken} holds NaN or infinities, so the checkpoint is damaged, or is too large for "
                        f"the part's dtype; download it again, or load that part in bf16 or fp32."
                    ) from error
                if not components:
                    raise RenderError(f"the model itself gave {error}; try another seed, or dtype.") from error
                ledger.fall_back(components, NonFiniteResult(str(error)))
                with ledger.eagerly():
                    try:
                        video, pipe = self.made(outcome)
                    except NonFinite as again:
                        raise RenderError(f"engines and eager PyTorch both gave {again}; try another seed.") from again
            self.acceleration.save_kernels()
            self.watcher.stage(job, "writing")
            about = about_render(self.acceleration, self._settings(job.request), self.model, pipe, job.request, outcome)
            writing = Writing(job.request.formats, about, job.request.audio, self.metadata, job.replace)
            outcome.files = write_results(video, job.stem, writing)

    def _settings(self, request: RenderRequest) -> dict[str, Any]:
        settings = self.acceleration.settings() | self.cache.settings()
        sets = self._lora_sets(request)
        settings.pop("loras", None)
        loras = sets.about(sets.of(lora_files(request))) if sets else self.acceleration.loras
        return settings | ({"loras": loras} if loras else {})

    def _lora_sets(self, request: RenderRequest) -> LoraSets | None:
        """None where weights stay as they are; raises RequestError for a request that needs others."""
        sets = self.acceleration.lora_sets
        if sets is None and request.lora is not None:
            raise RequestError("lora: this pipeline has LoRAs or packed weights for good; load it without them.")
        return sets

    def _with_loras(self, request: RenderRequest) -> AbstractContextManager[None]:
        sets = self._lora_sets(request)
        return sets.merged(sets.of(lora_files(request))) if sets else nullcontext()

    def video(self, request: RenderRequest) -> Video:
        """A completed request's video, not written anywhere."""
        with self.acceleration.ledger.recording(), self._with_loras(request):
            return self.made(Outcome(RenderJob(request, Path("video"))))[0]

    def made(self, outcome: Outcome) -> tuple[Video, Any]:
        """The video of a job, not written anywhere, and the pipeline that made it; fills `outcome.steps`."""
        import numpy as np
        import torch

        job, variant = outcome.job, self.acceleration.variant
        request = job.request
        require_memory(request)
        pipe = pipeline_for(self.pipe, variant, request.task, request)
        media = media_of(request, variant)
        with torch.no_grad(), _own_stream(device_of(pipe)), self._releasing():
            with self.stage(job, "encoding"), self._preloading(request):
                text = encoded(pipe, variant, request)
            steps = Steps(self, job, pipe)
            with steps.denoising():
                result = pipe(
                    **call_arguments(pipe, variant, request, media, text),
                    **steps.callback(),
                    generator=torch.Generator("cpu").manual_seed(request.seed),
                    output_type="np",
                )
        frames, sound = family(variant.family).results(pipe, result)
        outcome.steps = steps.seconds()
        frames = np.asarray(frames)
        require_finite(frames)
        if request.crop is not None:
            frames = cropped(frames, request.kept)
        pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
        return Video(pixels, float(request.fps or variant.fps), steps.latents(), sound), pipe

    @contextmanager
    def _preloading(self, request: RenderRequest) -> Iterator[None]:
        """Engines are loaded meanwhile; not when parts move, as an engine reads weights where they are."""
        device = device_of(self.pipe)
        if device.type != "cuda" or self.acceleration.moved:
            yield
            return
        import torch

        def work() -> None:
            with torch.cuda.device(device):
                self.acceleration.preload(request.task != "text-to-video")

        with ThreadPoolExecutor(1, "preload") as pool:
            loading = pool.submit(work)
            yield
            loading.result()

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """However a job ends, what only it used on the card goes back: an encoder may be the next to need room."""
        try:
            yield
        finally:
            self.acceleration.workspace.release()

    @contextmanager
    def stage(self, job: RenderJob, name: str) -> Iterator[None]:
        with self._stages[name]:
            self.check_cancelled()
            self.watcher.stage(job, name)
            yield

    def check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RenderCancelled("cancelled")


def encoded(pipe: Any, variant: Variant, request: RenderRequest) -> dict[str, Any]:
    """Arguments of the pipeline's call that stand for the prompts."""
    if not variant.text_length:
        return {}
    guided = (request.guidance or 0) > 1
    negative = request.negative_prompt or ""
    if negative and not guided and negative != variant.rendering(request.task).negative_prompt:
        log.warning("negative_prompt does nothing at guidance %g: only above 1 is it looked at.", request.guidance or 0)
    return family(variant.family).encode(pipe, variant, request.prompt, negative, guided)


def call_arguments(
    pipe: Any, variant: Variant, request: RenderRequest, media: Media, text: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of the pipeline's call, without callback, generator and output type."""
    usual = text | _usual_arguments(request)
    own = dict(variant.rendering(request.task).arguments) | _guidance(request)
    return _taken(pipe, family(variant.family).call_arguments(pipe, variant, media, usual | own), usual)


def _usual_arguments(request: RenderRequest) -> dict[str, Any]:
    return {
        "height": request.height,
        "width": request.width,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }


def _guidance(request: RenderRequest) -> dict[str, Any]:
    """Kinds of guidance that not every pipeline has."""
    values = {"guidance_scale_2": request.guidance_2, "guidance_rescale": request.guidance_rescale or None}
    return {k: v for k, v in values.items() if v is not None}


def _taken(pipe: Any, arguments: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """The arguments but those of the usual ones that this pipeline lacks: not every one takes a size, or guidance."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {k: v for k, v in arguments.items() if k in parameters or k not in usual}


def _lanes(device: Any) -> int:
    """Decoding one video while denoising another gains only on a GPU, and needs memory for both."""
    import torch

    return 2 if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= 24e9 else 1


@contextmanager
def _own_stream(device: Any) -> Iterator[None]:
    """Jobs that overlap need a CUDA stream each, and the default one cannot be captured into a CUDA graph."""
    import torch

    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way
        with torch.cuda.stream(stream):
            yield
    else:
        yield


def load_renderer(options: RenderOptions, variant: Variant, watcher: Watcher, changing: bool = False) -> Renderer:
    """The pipeline of `options.model`, loaded and accelerated in this process, which is for rendering alone.

    `changing`: some of its jobs bring their own LoRAs.
    """
    with uncollected(forever=True), suppress(Exception):  # what cannot be imported, `load` tells
        pipeline_class(next(iter(variant.tasks.values())))
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    threshold_of(options.cache, variant)  # a wrong word is told before anything is loaded
    pipe = loaded(options.model, options, unwatched, changing)  # a bar would be drawn over that of the jobs
    return Renderer(pipe, variant.name, watcher, options)
