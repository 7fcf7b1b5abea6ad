"""What a build will cost, by what bench/results measured of full-size networks, and how long it still takes here."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median
from typing import Any

from overcrank.models.base import Variant

FILE = "costs.json"
"""Made of bench/results by bench/build_families.py and bench/build_quantized.py."""


@dataclass(frozen=True)
class Cost:
    """Of one component, on one core of the machine that was measured."""

    export_seconds: float
    compile_seconds: float
    engine_bytes: float


def costs_of(builds: list[dict[str, Any]], quantized: list[dict[str, Any]]) -> dict[str, Any]:
    """What of the rows in bench/results is shipped: by family, variant and component the median of all targets.

    `grown`: precision → by how much a quantized denoiser's engine is larger.
    """
    components: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in builds:
        alike = [r for r in builds if (r["variant"], r["component"]) == (row["variant"], row["component"])]
        cost = [round(median(r[f] for r in alike), 2) for f in ("export_s", "compile_s", "engine_mb")]
        components.setdefault(row["family"], {}).setdefault(row["variant"], {})[row["component"]] = cost
    plain = {(r["variant"], r["target"]): r["engine_mb"] for r in quantized if not r["activations"]}
    grown: dict[str, list[float]] = {}
    for row in quantized:
        if row["activations"] == "dynamic":
            grown.setdefault(row["precision"], []).append(row["engine_mb"] / plain[row["variant"], row["target"]])
    return {"components": components, "grown": {p: round(median(ratios), 2) for p, ratios in sorted(grown.items())}}


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files("overcrank.engines").joinpath(FILE).read_text("utf-8"))
    return table


def cost_of(variant: Variant, component: str, precision: str) -> Cost:
    """As measured of this variant, else of the nearest that was: one of its family, one of the same component."""
    table = _table()
    measured: dict[str, dict[str, dict[str, list[float]]]] = table["components"]
    own = measured.get(variant.family, {})
    everyone = [costs for of_family in measured.values() for costs in of_family.values()]
    exact = [costs for name, costs in own.items() if name in (variant.name, variant.like)]
    alike = next((rows for group in (exact, [*own.values()], everyone) if (rows := _rows(group, component))), None)
    rows = alike or [cost for costs in everyone for cost in costs.values()]
    export, compiling, megabytes = (median(column) for column in zip(*rows, strict=True))
    grown = table["grown"].get(precision, 1.0) if component.startswith("denoiser") else 1.0
    return Cost(export, compiling, megabytes * grown * 1e6)


def _rows(variants: list[dict[str, list[float]]], component: str) -> list[list[float]]:
    return [costs[component] for costs in variants if component in costs]


class Forecast:
    """How long a build still takes: first as expected, then as fast as this machine has shown to be."""

    def __init__(self, seconds: Mapping[Hashable, float], workers: int) -> None:
        """`seconds`: task → what it is expected to take; `workers`: tasks at a time."""
        self._expected, self._workers = dict(seconds), max(1, workers)
        self._began: dict[Hashable, float] = {}
        self._done: dict[Hashable, float] = {}  # seconds it took

    def started(self, task: Hashable) -> None:
        self._began.setdefault(task, time.monotonic())

    def finished(self, task: Hashable) -> None:
        now = time.monotonic()
        if task in self._expected:
            self._done[task] = now - self._began.get(task, now)

    @property
    def pace(self) -> float:
        """Seconds here for an expected second."""
        expected = sum(self._expected[task] for task in self._done)
        return sum(self._done.values()) / expected if expected else 1.0

    def left(self) -> float:
        """Seconds until the last task ends: all that is to do by all workers, and no less than the longest task."""
        now, pace = time.monotonic(), self.pace
        rest = [
            max(0.0, seconds * pace - (now - self._began.get(task, now)))
            for task, seconds in self._expected.items()
            if task not in self._done
        ]
        return max(sum(rest) / self._workers, max(rest, default=0.0))
