"""Progress and summaries of builds, for people and for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from overcrank.engines.build import Built
from overcrank.engines.manifest import profile_line
from overcrank.units import human_bytes

Show = Callable[[str, str], None]


@contextmanager
def progress_display(quiet: bool) -> Iterator[Show]:
    """A rich progress bar per job on a terminal, a line per stage elsewhere, nothing if quiet."""
    if quiet:
        yield lambda title, doing: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Show]:
    from overcrank.cli.terminal import SafeConsole
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[title]:<22}", markup=False),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=SafeConsole(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(title: str, doing: str) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(doing, total=None, title=title)
            bars.update(tasks[title], description=doing)
            if doing.startswith("done"):
                bars.update(tasks[title], total=1.0, completed=1.0)

        yield show


@contextmanager
def transfer_display() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each file on a terminal, nothing elsewhere."""
    from overcrank.cli.terminal import SafeConsole
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    console = SafeConsole(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, there: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=size)
            bars.update(tasks[name], completed=there)

        yield show


def _lines() -> Show:
    started = time.monotonic()
    last: dict[str, str] = {}

    def show(title: str, doing: str) -> None:
        stage = doing.partition(" · ")[0]
        if last.get(title) != stage:
            last[title] = stage
            print(f"[{time.monotonic() - started:6.1f} s] {title}: {stage}", file=sys.stderr, flush=True)

    return show


def summary(built: list[Built], seconds: float) -> None:
    """The table a person reads after a build, and the command to type next."""
    from overcrank.cli.terminal import SafeConsole
    from rich.table import Table

    console = SafeConsole(width=None if sys.stdout.isatty() else 120, soft_wrap=False)
    for bundle in built:
        manifest = bundle.manifest
        table = Table(
            title=f"{manifest.model} · {manifest.target} · {manifest.precision} · weights {manifest.weights[:15]}"
        )
        for column in ("component", "engine", "activation memory", "export", "compile"):
            table.add_column(column, justify="left" if column == "component" else "right")
        for entry in manifest.components:
            table.add_row(
                entry.name,
                human_bytes(entry.engine.bytes),
                human_bytes(entry.activation_bytes),
                f"{entry.export_seconds:.1f} s",
                f"{entry.compile_seconds:.1f} s",
            )
        console.print(table)
        console.print(f"profile  {profile_line(manifest)}; activation memory is at its largest shape", highlight=False)
        for entry in manifest.components:
            console.print(f"plan     {entry.name}: {entry.lint}", highlight=False, soft_wrap=True)
        how = (
            f"cache hit (built {manifest.created} in {manifest.build_seconds:.0f} s)"
            if bundle.cached
            else f"built in {manifest.build_seconds:.1f} s, peak RAM {human_bytes(manifest.peak_ram_bytes or None)}"
        )
        console.print(f"{how}, this command took {seconds:.1f} s", highlight=False)
        console.print(f"path     {bundle.path}", highlight=False, soft_wrap=True)
        console.print(f"next     overcrank verify {_quoted(str(bundle.path))}\n", highlight=False, soft_wrap=True)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
