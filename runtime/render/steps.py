"""What happens at each denoising step: timing, progress, previews, cancelling, the way to the next stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from overcrank.errors import RenderError
from overcrank.models import family
from overcrank.runtime.pipeline.accelerate import device_of
from overcrank.runtime.render.results import write_preview

if TYPE_CHECKING:
    import numpy as np
    from overcrank.runtime.render.renderer import Renderer, RenderJob
    from torch import Tensor

PREVIEWS = 6  # for each render, at most


class NonFinite(Exception):
    """Latents or frames that hold infinities or NaN."""


class Steps:
    """A diffusers `callback_on_step_end`; nothing in it waits for the GPU before the last step."""

    def __init__(self, renderer: Renderer, job: RenderJob, pipe: Any) -> None:
        self._renderer, self._job, self._pipe = renderer, job, pipe
        self._held = ExitStack()
        self._marks: list[Any] = []
        self._kept: list[Tensor] = []
        self._before: Tensor | None = None
        self._scale: float | None = None  # of guidance, while it is off
        self._cuda = device_of(pipe).type == "cuda"
        variant = renderer.acceleration.variant
        self._scheduler = getattr(pipe, "scheduler", None)  # an upsampler has none, and takes no steps
        previews = renderer.preview and hasattr(self._scheduler, "sigmas")
        self._preview_of = family(variant.family).preview if previews else None
        self._left = family(variant.family).rounds(variant, job.request.shape)  # times the steps are run through

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """Holds the denoising stage until the last step, then the decoding stage."""
        import torch

        with self._held:
            self._held.enter_context(self._renderer.stage(self._job, "denoising"))
            self._held.enter_context(self._renderer.cache.over(self._pipe))
            torch.manual_seed(self._job.request.seed)  # some schedulers draw noise of the global generator
            yield
            if self._scheduler is None:
                self._renderer.watcher.stepped(self._job, 1, 1)

    def callback(self) -> dict[str, Any]:
        """How the pipeline is told to call this; older ones take another argument, some none."""
        import inspect

        parameters = inspect.signature(type(self._pipe).__call__).parameters
        if "callback_on_step_end" in parameters:
            return {"callback_on_step_end": self}
        if "callback" in parameters:
            return {"callback": lambda step, timestep, latents: self(self._pipe, step, timestep, {"latents": latents})}
        if self._scheduler is not None:
            self._watch_scheduler(self._scheduler)
        return {}

    def _watch_scheduler(self, scheduler: Any) -> None:
        """A pipeline without a callback calls its scheduler once a step; the scheduler is this job's own."""
        step = scheduler.step
        counted = iter(range(10**9))

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            latents = result[0] if isinstance(result, tuple) else result.prev_sample
            self(self._pipe, next(counted), None, {"latents": latents})
            return result

        scheduler.step = watched

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._renderer.check_cancelled()
        latents = tensors["latents"]
        self._mark()
        if "latents" in self._job.request.formats:
            self._kept.append(latents.detach().clone())
        steps = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        self._guide(pipe, step, steps)
        self._renderer.cache.stepped(step, steps)
        self._renderer.watcher.stepped(self._job, step + 1, steps)
        self._preview(step, steps, latents)
        if step + 1 == steps:
            self._left -= 1
            if self._left == 0:
                self._to_decoding(latents)
        return {}

    def _guide(self, pipe: Any, step: int, steps: int) -> None:
        """The scale that the pipeline reads at each step; in the next run through the steps it is as before."""
        until = self._job.request.guidance_until
        if step + 1 == steps and self._scale is not None:
            pipe._guidance_scale, self._scale = self._scale, None
        elif step + 1 < steps and step + 1 >= round(until * steps) and self._scale is None:
            self._scale, pipe._guidance_scale = pipe._guidance_scale, 1.0

    def _to_decoding(self, latents: Tensor) -> None:
        import torch

        if not bool(torch.isfinite(latents).all()):  # waits for the GPU
            raise NonFinite("non-finite latents")
        self._held.close()
        self._renderer.acceleration.workspace.release()
        self._held.enter_context(self._renderer.stage(self._job, "decoding"))
        torch.manual_seed(self._job.request.seed)  # some VAEs inject noise of the global generator

    def _mark(self) -> None:
        if self._cuda:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step after the first, which includes preparation."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]

    def latents(self) -> np.ndarray:
        """After each step, fp32 [steps, B, S, C]; empty unless the request asked for them."""
        import torch

        return torch.stack(self._kept).float().cpu().numpy() if self._kept else torch.empty(0).numpy()

    def _preview(self, step: int, steps: int, latents: Tensor) -> None:
        """The video that this step points at: x0 = x - sigma · v, with the velocity v from the last two latents."""
        if self._preview_of is None:
            return
        before, self._before = self._before, latents.detach().clone()
        if before is None or (step + 1) % max(1, steps // PREVIEWS) or step + 1 == steps:
            return
        sigmas = self._pipe.scheduler.sigmas
        velocity = (latents - before) / (sigmas[step + 1] - sigmas[step]).item()
        guess = latents - sigmas[step + 1].item() * velocity
        acceleration = self._renderer.acceleration
        grid = family(acceleration.variant.family).latent(acceleration.variant, self._job.request.shape)
        with acceleration.ledger.eagerly():
            image = self._preview_of(self._pipe, guess, grid)
        write_preview(image.permute(1, 2, 0).cpu().numpy(), self._job.stem)


def require_finite(frames: np.ndarray) -> None:
    import numpy as np

    if not np.isfinite(frames).all():
        raise NonFinite("non-finite frames")
    if frames.ndim != 4:
        raise RenderError(f"the pipeline returned frames of shape {frames.shape}, not [frames, height, width, 3].")
