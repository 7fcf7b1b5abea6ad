"""Summaries of builds, for people."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from overcrank.engines.build import Built
from overcrank.engines.manifest import profile_line
from overcrank.export.quantization.recipe import QUANTIZED
from overcrank.models.registry import variant_named
from overcrank.units import human_bytes


def summary(bundles: list[Built], seconds: float, layout: Sequence[str] = ()) -> None:
    """The table a person reads after a build, and the command to type next; `layout`: PART=FILE it was built for."""
    from overcrank.cli.terminal import SafeConsole
    from rich.table import Table

    console = SafeConsole(width=None if sys.stdout.isatty() else 120, soft_wrap=False)
    for bundle in bundles:
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
            console.print(f"plan     {entry.name}: {entry.verdict}", highlight=False, soft_wrap=True)
        how = (
            f"cache hit (built {manifest.created} in {manifest.build_seconds:.0f} s)"
            if bundle.cached
            else f"built in {manifest.build_seconds:.1f} s, peak RAM {human_bytes(manifest.peak_ram_bytes or None)}"
        )
        console.print(f"{how}, this command took {seconds:.1f} s", highlight=False)
        console.print(f"path     {bundle.path}", highlight=False, soft_wrap=True)
        console.print(f"next     overcrank verify {shlex.quote(str(bundle.path))}", highlight=False, soft_wrap=True)
        if bundle.manifest.weights == "inputs" and variant_named(manifest.model) is not None:
            how = f" --precision {manifest.precision}" if manifest.precision in QUANTIZED else ""
            if layout:
                how = "".join(f" --weights {shlex.quote(word)}" for word in layout)
            console.print(f'         overcrank render "a prompt" --model {manifest.model}{how}', soft_wrap=True)
        console.print()
