"""`overcrank engines build`: bundles of many models for many cards at many precisions.

Targets and precisions of a model share its exported graphs. A combination that cannot be is dropped with its
reason; one that fails does not stop the rest, and is remembered for `--retry-failed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from overcrank.engines.build import Built, Progress, Request, build_each, key_of
from overcrank.engines.estimates import Forecast, cost_of
from overcrank.engines.manifest import profile_line
from overcrank.engines.profiles import profile_for
from overcrank.engines.store import Store
from overcrank.engines.targets import PRECISIONS, precision_for, targets_for
from overcrank.engines.types import notes, own_precision
from overcrank.engines.workers import LocalWorkers, Workers
from overcrank.errors import TargetError, UserError
from overcrank.export.files.parts import anew_line, layout
from overcrank.export.quantization.recipe import IN_16_BIT, QUANTIZED, LayerFormat
from overcrank.files import atomic_write
from overcrank.models import components, resolve
from overcrank.options import option
from overcrank.units import human_bytes, human_seconds


class Cell(NamedTuple):
    """One combination, by the names that make it again."""

    model: str
    gpu: str
    precision: str
    layout: tuple[str, ...] = ()
    """PART=FILE of quantized files, whose headers say how layers are multiplied."""

    def __str__(self) -> str:
        return " ".join((self.model, self.gpu, self.precision, *self.layout))


@dataclass
class Matrix:
    requests: dict[Cell, Request] = field(default_factory=dict)
    dropped: dict[Cell, str] = field(default_factory=dict)


@dataclass
class Result:
    built: dict[Cell, Built] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)


def expanded(cells: Sequence[Cell], static: bool = False, flavour: str = "tensorrt_rtx") -> Matrix:
    """What can be built of `cells`, each with the model's own shapes (`static`: its native one alone).

    Raises UserError for a model, a card or a precision that there is not at all.
    """
    matrix = Matrix()
    for cell in cells:
        variant = resolve(cell.model)
        for target in targets_for([cell.gpu], flavour):
            own = cell._replace(gpu=target.name)
            recipe = layout(cell.layout, variant, target.precisions) if cell.layout else None
            try:
                precision = precision_for(
                    target, recipe.precision if recipe else cell.precision, own_precision(variant)
                )
            except TargetError:
                if cell.precision not in PRECISIONS:
                    raise
                matrix.dropped[own] = f"{target.name} ({target.generation}) has no {cell.precision}"
                continue
            own = own._replace(precision=precision)
            layers = LayerFormat(precision, "dynamic") if precision in QUANTIZED else IN_16_BIT  # type: ignore[arg-type]
            profile = profile_for(variant, static=static)
            matrix.requests[own] = Request(variant, target, precision, profile, flavour, layers=layers, recipe=recipe)
    return matrix


def cells_of(models: str, gpus: str, precisions: str, layout: Sequence[str] = ()) -> list[Cell]:
    """Every combination of three comma-separated lists, each for files' `layout` (BuildOptions) if there is one.

    Raises UserError for an empty list, and for precisions beside a layout, which says them.
    """
    lists = {"models": models, "gpus": gpus, "precisions": precisions}
    words = {name: text.replace(",", " ").split() for name, text in lists.items()}
    for name, values in words.items():
        if not values:
            raise UserError(f"{option(name)} is empty; separate several with commas.")
    if layout and words["precisions"] != ["auto"]:
        raise UserError(
            f"{option('precisions', precisions)}: {option('layout')} says how layers multiply; leave it out."
        )
    a, b, c = words.values()
    return [Cell(model, gpu, precision, tuple(layout)) for model in a for gpu in b for precision in c]


def run(matrix: Matrix, store: Store, progress: Progress, hire: Callable[[], Workers] = LocalWorkers) -> Result:
    """Build all that the store does not hold; failures are collected, Ctrl-C stops (and the same command resumes)."""
    result = Result()
    outcomes = build_each(list(matrix.requests.values()), store, progress, hire)
    for cell, outcome in zip(matrix.requests, outcomes, strict=True):
        if isinstance(outcome, Built):
            result.built[cell] = outcome
        else:
            result.failed[cell] = str(outcome)
    _remember(store, result.failed)
    return result


def _remember(store: Store, failed: dict[Cell, str]) -> None:
    store.prepare()
    with atomic_write(store.root / "failed.json") as part:
        rows = [cell._asdict() | {"error": error} for cell, error in failed.items()]
        part.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def failed_before(store: Store) -> list[Cell]:
    """What the last matrix in this store did not manage; raises UserError when there is nothing."""
    try:
        rows = json.loads((store.root / "failed.json").read_text("utf-8"))
        cells = [Cell(row["model"], row["gpu"], row["precision"], tuple(row.get("layout", ()))) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        cells = []
    if not cells:
        raise UserError(f"--retry-failed: nothing failed in the last 'engines build' of {store.root}.")
    return cells


def plan_lines(matrix: Matrix, store: Store, workers: int) -> Iterator[str]:
    """What is about to be done, and what it costs."""
    for cell, reason in matrix.dropped.items():
        yield f"dropped  {cell}: {reason}"
    for note in dict.fromkeys(n for r in matrix.requests.values() for n in notes(r.variant, r.target, r.precision)):
        yield f"note     {note}"
    for cell, request in matrix.requests.items():
        if request.recipe is not None and (line := anew_line(request.recipe, cell.gpu)):
            yield f"note     {line}"
    todo = [r for r in matrix.requests.values() if store.find(key_of(r, store)) is None]
    yield f"plan     {len(matrix.requests)} bundles, {len(matrix.requests) - len(todo)} of them in the store already"
    if todo:
        tasks: dict[Hashable, float] = {}
        size, engines = 0.0, [(r, c.name) for r in todo for c in components(r.variant)]
        for request, name in engines:
            cost = cost_of(request.variant, name, request.precision)
            tasks[request.variant.name, name, request.precision == "fp16"] = cost.export_seconds
            tasks[request.variant.name, name, request.target.name, request.precision] = cost.compile_seconds
            size += cost.engine_bytes
        graphs, time = len(tasks) - len(engines), human_seconds(Forecast(tasks, workers).left())
        yield (
            f"         {len(engines)} engines of {graphs} graphs on {workers} workers: about {time}, "
            f"{human_bytes(int(size))}, 1.5 GB of RAM a worker"
        )


def result_lines(result: Result) -> Iterator[str]:
    for cell, bundle in result.built.items():
        yield f"{'cached' if bundle.cached else 'built':<9}{cell}  {bundle.path}"
    for cell, error in result.failed.items():
        yield f"FAILED   {cell}: {error}"
    if result.failed:
        yield f"{len(result.failed)} failed; 'overcrank engines build --retry-failed' tries them again"


def write_index(file: Path, result: Result) -> None:
    """A Markdown table of the bundles."""
    lines = ["# Engines", "", "| model | card | precision | shapes | engines | activation memory | bundle |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for bundle in sorted(result.built.values(), key=lambda b: b.path.name):
        m = bundle.manifest
        size = human_bytes(sum(c.engine.bytes for c in m.components))
        activation = human_bytes(max(c.activation_bytes or 0 for c in m.components))
        cells = [m.model, m.target, m.precision, profile_line(m), size, activation, bundle.path.name]
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_write(file) as part:
        part.write_text("\n".join([*lines, ""]), "utf-8")


def reported(result: Result) -> dict[str, list[dict[str, Any]]]:
    """As plain data: what was built, and what failed and why."""
    bundles = [c._asdict() | {"path": str(b.path), "cached": b.cached} for c, b in result.built.items()]
    return {"built": bundles, "failed": [c._asdict() | {"error": error} for c, error in result.failed.items()]}
