"""What `render` and `batch` print: progress while jobs run, and the report at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from overcrank.cli.terminal import SafeConsole
from overcrank.runtime.render.renderer import CANCELLED, DONE, FAILED, SKIPPED, Outcome, RenderJob, Silent
from overcrank.runtime.render.sidecar import timing
from overcrank.units import safe_text
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bars:
    """One bar for all steps of all jobs, and one for each job that runs."""

    def __init__(self, progress: Progress, jobs: Sequence[RenderJob]) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._rows: dict[RenderJob, Any] = {}
        self._steps = {job: job.request.steps or 0 for job in jobs}
        self._all = progress.add_task("all jobs", total=sum(self._steps.values())) if len(jobs) > 1 else None

    def started(self, job: RenderJob) -> None:
        with self._lock:
            self._rows[job] = self._progress.add_task(safe_text(job.stem.name), total=self._steps[job])

    def stage(self, job: RenderJob, name: str) -> None:
        self._progress.update(self._rows[job], description=safe_text(f"{job.stem.name}: {name}"))

    def stepped(self, job: RenderJob, step: int, steps: int) -> None:
        self._progress.update(self._rows[job], completed=step, total=steps)
        if self._all is not None:
            self._progress.advance(self._all)

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            row = self._rows.pop(outcome.job, None)
        if row is not None:
            self._progress.remove_task(row)
        if self._all is not None and row is None:  # skipped or never started: its steps are no longer to come
            left = self._progress.tasks[0].total or 0
            self._progress.update(self._all, total=left - self._steps[outcome.job])
        alone = self._all is None  # a single render's failure is its command's error
        if outcome.status != CANCELLED and not (alone and outcome.status == FAILED):
            self._progress.console.print(line_of(outcome))


class _Lines(logging.Handler):
    """Each record as one line above the progress bars."""

    def __init__(self, console: SafeConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        note = record.levelno == logging.INFO
        if note and record.name != "overcrank":  # what an export says is for its own debugging
            return
        text = safe_text(f"{'note' if note else record.levelname.lower()}: {record.getMessage()}")
        self._console.print(text)


@contextmanager
def watching(jobs: Sequence[RenderJob], quiet: bool) -> Iterator[Silent | Bars]:
    """Progress and warnings on stderr while jobs run."""
    console = SafeConsole(stderr=True)
    handler = _Lines(console)
    log = logging.getLogger("overcrank")
    log.addHandler(handler)
    log.propagate, level = False, log.level
    try:
        if quiet:
            yield Silent()
            return
        log.setLevel(logging.INFO)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            yield Bars(progress, jobs)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


@contextmanager
def counting(title: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over samples or another unit, on stderr; called with those done and those in all."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = SafeConsole(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=quiet) as progress:
        row = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(row, completed=done, total=total)


@contextmanager
def downloading(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """What is fetched from the hub and how large it is, then a bar, on stderr; called with bytes as they come."""
    console = SafeConsole(stderr=True)
    if not quiet:
        console.print(text)
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet) as progress:
        row = progress.add_task("downloading", total=total)
        yield lambda count: progress.update(row, advance=count)


def line_of(outcome: Outcome) -> str:
    """One job in one line."""
    name = safe_text(outcome.job.stem.name)
    if outcome.status == FAILED:
        return f"{name}: failed: {safe_text(outcome.error)}"
    if outcome.status != DONE:
        return f"{name}: {outcome.status}"
    pace = timing(outcome.steps)
    speed = (
        f", {pace['per_second']:.2f} steps/s (p50 {pace['p50_ms']:.1f}, p95 {pace['p95_ms']:.1f} ms)" if pace else ""
    )
    used = ", ".join(f"{c} {'+'.join(b)}" for c, b in outcome.record.backends().items())
    return f"{name}: done in {outcome.seconds:.1f} s{speed}; {used or 'eager'}"


def report(outcomes: Sequence[Outcome], seconds: float) -> None:
    """The end of a batch: how many ended how, the pace over all, and what fell back."""
    console = SafeConsole(stderr=True)
    counts = {s: sum(o.status == s for o in outcomes) for s in (DONE, SKIPPED, FAILED, CANCELLED)}
    console.print(f"{len(outcomes)} jobs in {seconds:.1f} s: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
    pace = timing([s for o in outcomes for s in o.steps])
    if pace:
        console.print(f"steps: {pace['per_second']:.2f}/s, p50 {pace['p50_ms']:.1f} ms, p95 {pace['p95_ms']:.1f} ms")
    fallbacks = {(f.component, f.reason, f.fix) for o in outcomes for f in o.record.fallbacks}
    for component, reason, fix in sorted(fallbacks):
        console.print(safe_text(f"fell back to eager: {component}: {reason}; {fix}"))
    for outcome in outcomes:
        if outcome.status == FAILED:
            console.print(line_of(outcome))


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "name": o.job.stem.name,
            "status": o.status,
            "error": o.error,
            "seconds": round(o.seconds, 3),
            "steps": timing(o.steps),
            "calls": o.record.backends(),
            "fallbacks": [vars(f) for f in o.record.fallbacks],
            "files": [str(f) for f in o.files],
        }
        for o in outcomes
    ]
