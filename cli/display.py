"""How commands show work on stderr, all alike, and the report at the end of a render.

On a terminal a bar for each thing that is done, with the time that is left; elsewhere a line when a stage begins and
one when it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from overcrank.cli.terminal import SafeConsole
from overcrank.engines.build import ALL
from overcrank.errors import safe_text
from overcrank.runtime.render.renderer import CANCELLED, DONE, FAILED, SKIPPED, Outcome, RenderJob, Silent
from overcrank.runtime.render.sidecar import timing
from overcrank.units import human_bytes
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Rows of work; those that end leave the terminal again."""

    def __init__(self, quiet: bool) -> None:
        self._console = SafeConsole(stderr=True)
        self.lines = not (quiet or self._console.is_terminal)
        self._quiet, self._began = quiet, time.monotonic()
        amount = TextColumn("{task.fields[amount]}", markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20), amount, TimeElapsedColumn())
        bars = self._console.is_terminal and not quiet
        self.bars = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not bars)

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars, in any case."""
        self._console.print(text)

    def note(self, text: str) -> None:
        """A line with the time since the beginning, where there are no bars."""
        if self.lines:
            self.say(f"[{time.monotonic() - self._began:6.1f} s] {text}")

    def row(self, title: str, total: float | None = None, unit: str = "") -> Row:
        return Row(self, title, total, unit)

    @contextmanager
    def stage(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Row]:
        """A row while it lasts."""
        began = time.monotonic()
        self.note(title)
        row = self.row(title, total, unit)
        yield row
        row.end(f"done in {time.monotonic() - began:.1f} s")


class Row:
    """One thing that is done, in stages or by an amount; `unit` "bytes" is shown as such."""

    def __init__(self, display: Display, title: str, total: float | None, unit: str) -> None:
        self._display, self._title, self._unit, self._stage = display, title, unit, ""
        self._began, self._done, self._total = time.monotonic(), 0.0, total
        self._task = display.bars.add_task(safe_text(title), total=total, amount="")

    def doing(self, what: str) -> None:
        """A stage begins; what follows a " · " is only for a terminal."""
        self._display.bars.update(self._task, description=safe_text(f"{self._title}: {what}"))
        stage = what.partition(" · ")[0]
        if stage != self._stage:
            self._stage = stage
            self._display.note(f"{self._title}: {stage}")

    def at(self, done: float, total: float | None = None) -> None:
        self._done, self._total = done, self._total if total is None else total
        self._display.bars.update(self._task, completed=done, total=self._total, amount=self._amount())

    def advance(self, count: float) -> None:
        self.at(self._done + count)

    def _amount(self) -> str:
        if self._unit != "bytes":
            return f"{self._done:.0f}/{self._total or 0:.0f} {self._unit}"
        pace = self._done / max(time.monotonic() - self._began, 1e-3)
        return f"{human_bytes(int(self._done))} of {human_bytes(int(self._total or 0))}, {human_bytes(int(pace))}/s"

    def end(self, how: str = "") -> None:
        """`how`: a line about it, where there are no bars."""
        self._display.bars.remove_task(self._task)
        if how:
            self._display.note(f"{self._title}: {how}")


class Renders:
    """Of a render or a batch: a row for all steps of all jobs, and one for each job that runs."""

    def __init__(self, display: Display, jobs: Sequence[RenderJob]) -> None:
        self._display, self._lock = display, threading.Lock()
        self._rows: dict[RenderJob, Row] = {}
        self._steps = {job: job.request.steps or 0 for job in jobs}
        self._to_come, self._done = sum(self._steps.values()), 0
        self._all = display.row("all jobs", self._to_come, "steps") if len(jobs) > 1 else None

    def started(self, job: RenderJob) -> None:
        with self._lock:
            self._rows[job] = self._display.row(job.stem.name, self._steps[job], "steps")

    def stage(self, job: RenderJob, name: str) -> None:
        self._rows[job].doing(name)

    def stepped(self, job: RenderJob, step: int, steps: int) -> None:
        self._rows[job].at(step, steps)
        with self._lock:
            self._done += 1
            self._overall()

    def _overall(self) -> None:
        if self._all is not None:
            self._all.at(self._done, self._to_come)

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            row = self._rows.pop(outcome.job, None)
            if row is None:  # skipped or never started: its steps are no longer to come
                self._to_come -= self._steps[outcome.job]
                self._overall()
        if row is not None:
            row.end()
        alone = self._all is None  # a single render's failure is its command's error
        if outcome.status != CANCELLED and not (alone and outcome.status == FAILED):
            self._display.say(line_of(outcome))


class _Lines(logging.Handler):
    """Each record as one line above the bars."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        note = record.levelno == logging.INFO
        if note and record.name != "overcrank":  # what an export says is for its own debugging
            return
        self._say(f"{'note' if note else record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def watching(display: Display, jobs: Sequence[RenderJob], quiet: bool) -> Iterator[Silent | Renders]:
    """Progress and warnings while jobs run."""
    handler = _Lines(display.say)
    log = logging.getLogger("overcrank")
    log.addHandler(handler)
    log.propagate, level = False, log.level
    try:
        if quiet:
            yield Silent()
            return
        log.setLevel(logging.INFO)
        yield Renders(display, jobs)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


@contextmanager
def building(quiet: bool) -> Iterator[Callable[[str, str], None]]:
    """For `build`: a row for all that is built, with the time that is left, and one for each job that runs."""
    with Display(quiet) as display:
        rows: dict[str, Row] = {}

        def show(title: str, doing: str) -> None:
            if quiet:
                return
            if title == ALL and "left" not in doing and doing != "done":
                display.say(doing)
                return
            if title not in rows:
                rows[title] = display.row(title)
            if doing.startswith("done"):
                rows.pop(title).end(doing)
            else:
                rows[title].doing(doing)

        yield show


@contextmanager
def transferring(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """For files that are pushed or pulled; called with a name, the bytes done, and those in all."""
    with Display(quiet) as display:
        rows: dict[str, Row] = {}

        def show(name: str, done: int, size: int) -> None:
            if name not in rows:
                rows[name] = display.row(name, size, "bytes")
            rows[name].at(done, size)

        yield show


@contextmanager
def counting(title: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """For samples or another unit; called with those done and those in all."""
    with Display(quiet) as display, display.stage(title, unit=unit) as row:
        yield row.at


@contextmanager
def downloading(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """What is fetched from the hub and how large it is, then a row; called with bytes as they come."""
    with Display(quiet) as display:
        if not quiet:
            display.say(text)
        with display.stage("downloading", total, "bytes") as row:
            yield row.advance


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
    backends = ", ".join(f"{c} {'+'.join(b)}" for c, b in outcome.record.backends().items())
    return f"{name}: done in {outcome.seconds:.1f} s{speed}; {backends or 'eager'}"


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
