"""A batch on a Ray cluster: processes that keep a loaded pipeline, one for each GPU, take jobs as they get free.

Results go where every machine sees them. A job whose process was lost is rendered again elsewhere.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from overcrank.engines.cluster import RETRIES, heard
from overcrank.errors import OvercrankError, RenderError, UserError
from overcrank.models.base import Variant
from overcrank.options import use_flags
from overcrank.runtime.options import RenderOptions
from overcrank.runtime.render.job_loras import by_loras
from overcrank.runtime.render.renderer import (
    CANCELLED,
    FAILED,
    Outcome,
    Renderer,
    RenderJob,
    Terminated,
    Watcher,
    load_renderer,
    log,
)
from overcrank.runtime.render.results import remove_partial_results, stop_writing

LANES = 4
"""Most jobs that one process is given at a time."""


class _RemoteRenderer:
    """Lives in a process of the cluster; loads the pipeline when it is first needed."""

    def __init__(self) -> None:
        use_flags(True)  # a command started this process
        self._loading = threading.Lock()
        self._renderer: Renderer | None = None
        self._attempts: dict[RenderJob, tuple[int, int]] = {}

    def load(self, options: RenderOptions, variant: Variant, folder: str, events: Any, changing: bool) -> int:
        """The model, once; how many jobs it takes at a time; `changing` as of `load_renderer`."""
        self._events = events
        with self._loading:
            if self._renderer is None:
                try:
                    os.chdir(folder)
                except OSError as error:
                    raise UserError(
                        f"--ray: {os.uname().nodename} has no {folder}; start the batch in a folder that every "
                        f"machine of the cluster sees."
                    ) from error
                self._renderer = load_renderer(options, variant, self, changing)
            return self._renderer.lanes

    def render(self, number: int, attempt: int, job: RenderJob, resume: bool) -> Outcome | None:
        """None if this process was restarted meanwhile and has no model."""
        if self._renderer is None:
            return None
        self._attempts[job] = (number, attempt)
        (outcome,) = self._renderer.run([job], resume)
        return outcome

    def cancel(self) -> None:
        if self._renderer is not None:
            self._renderer.cancel()

    def stop(self) -> None:
        """What is half written goes; only this process may remove it."""
        stop_writing([job.stem for job in self._attempts])

    def started(self, job: RenderJob) -> None:
        self._events.put((*self._attempts[job], "started", ()))

    def stage(self, job: RenderJob, name: str) -> None:
        self._events.put((*self._attempts[job], "stage", (name,)))

    def stepped(self, job: RenderJob, step: int, steps: int) -> None:
        self._events.put((*self._attempts[job], "stepped", (step, steps)))

    def ended(self, outcome: Outcome) -> None: ...


class ClusterRenderer:
    """As `Renderer`, with the cluster in the place of this process."""

    def __init__(self, ray: Any, options: RenderOptions, variant: Variant, watcher: Watcher) -> None:
        from ray.util.queue import Queue

        there = ray.cluster_resources()
        on_cards = there.get("GPU", 0) >= 1 and not (options.device or "").startswith("cpu")
        self._room = int(there["GPU"] if on_cards else there.get("CPU", 0))
        if not self._room:
            raise UserError("--ray: the cluster has neither a GPU nor a core for work; start its machines with some.")
        events: Any = Queue(actor_options={"num_cpus": 0})
        self._ray, self._watcher, self._events = ray, watcher, events
        kind = ray.remote(
            num_gpus=int(on_cards), num_cpus=int(not on_cards), max_restarts=-1, max_concurrency=LANES + 1
        )(_RemoteRenderer)
        self._new: Callable[[], Any] = kind.remote
        self._setup = (options, variant, os.getcwd(), events)

    def run(self, jobs: Sequence[RenderJob], resume: bool = False) -> list[Outcome]:
        """Render every job; one that fails does not stop the rest, and Ctrl-C cancels between steps."""
        self._jobs, self._outcomes = jobs, [Outcome(job) for job in jobs]
        self._resume, self._attempt = resume, [0] * len(jobs)
        self._waiting = deque(by_loras([job.request for job in jobs]))
        self._changing = any(job.request.lora is not None for job in jobs)
        self._actors = [self._new() for _ in range(min(self._room, len(jobs)))]
        self._free: list[Any] = []
        self._running: dict[Any, tuple[int, Any]] = {}  # result → number of the job, actor
        self._starting = {self._asked(actor): actor for actor in self._actors}
        try:
            self._go()
        except KeyboardInterrupt as stop:
            self._cancel(at_once=isinstance(stop, Terminated))
        finally:
            for actor in self._actors:
                self._ray.kill(actor)
        return self._outcomes

    def _asked(self, actor: Any) -> Any:
        return actor.load.options(max_task_retries=RETRIES).remote(*self._setup, self._changing)

    def _go(self) -> None:
        while self._waiting or self._running:
            ready, _ = self._ray.wait([*self._starting, *self._running], num_returns=1, timeout=0.25)
            self._hear()
            for ref in ready:
                if ref in self._starting:
                    self._begun(ref)
                else:
                    self._ended(ref)
            while self._waiting and self._free:
                self._give(self._waiting.popleft(), self._free.pop())

    def _begun(self, ref: Any) -> None:
        """A process has loaded the model; what keeps it from that ends the batch, as it would here."""
        actor, failed = self._starting.pop(ref), self._ray.exceptions
        try:
            self._free += [actor] * min(LANES, self._ray.get(ref))
        except failed.RayTaskError as error:
            raise error.cause if isinstance(error.cause, OvercrankError) else error from None
        except failed.RayError as error:
            raise RenderError(
                "--ray: processes died while they loaded the model (out of memory?); see the machines' logs."
            ) from error

    def _give(self, number: int, actor: Any) -> None:
        self._attempt[number] += 1
        attempt = self._attempt[number]
        resume = self._resume or attempt > 1  # the lost process may have written the results
        ref = actor.render.remote(number, attempt, self._jobs[number], resume)
        self._running[ref] = (number, actor)

    def _ended(self, ref: Any) -> None:
        number, actor = self._running.pop(ref)
        job, failed = self._jobs[number], self._ray.exceptions
        try:
            outcome = self._ray.get(ref)
        except failed.RayTaskError as error:
            outcome = _failure(job, str(error.cause))
        except failed.RayError as error:
            log.debug("%s: %s", job.stem.name, error)
            outcome = None
        if outcome is None:
            self._lost(number, actor)
            return
        outcome.job = job
        self._free.append(actor)
        self._outcomes[number] = outcome
        self._watcher.ended(outcome)

    def _lost(self, number: int, actor: Any) -> None:
        """Load the model anew where the process was, and render the job where there is room."""
        job, attempts = self._jobs[number], self._attempt[number]
        self._free = [a for a in self._free if a is not actor]
        if actor not in self._starting.values():
            self._starting[self._asked(actor)] = actor
        remove_partial_results(job.stem)
        if attempts > RETRIES:
            self._outcomes[number] = _failure(job, f"its process was lost {attempts} times (out of memory?)")
            self._watcher.ended(self._outcomes[number])
            return
        log.warning("%s: its process was lost; it is rendered again.", job.stem.name)
        self._waiting.appendleft(number)
        self._watcher.ended(Outcome(job))

    def _hear(self) -> None:
        for number, attempt, event, values in heard(self._events):
            running = any(n == number for n, _ in self._running.values())
            if running and attempt == self._attempt[number]:
                getattr(self._watcher, event)(self._jobs[number], *values)

    def _cancel(self, at_once: bool) -> None:
        """Between steps; a second Ctrl-C at once. What was begun is finished or leaves nothing."""
        self._waiting.clear()
        try:
            if at_once:
                raise KeyboardInterrupt
            log.warning("cancelling after the current step; Ctrl-C again stops at once.")
            for actor in self._actors:
                actor.cancel.remote()
            self._go()
        except KeyboardInterrupt:
            self._ray.wait([actor.stop.remote() for actor in self._actors], num_returns=len(self._actors), timeout=10)
            for number, _ in self._running.values():
                self._outcomes[number].status = CANCELLED


def _failure(job: RenderJob, error: str) -> Outcome:
    return Outcome(job, FAILED, error, RenderError.exit_code)
