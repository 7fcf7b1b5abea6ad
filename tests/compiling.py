"""Compilation in a process of its own, as the product does it: the compiler may crash one that has compiled before."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from overcrank.engines.plan import PlanReport
from overcrank.engines.store import Store
from overcrank.export.graph import Exported
from overcrank.models.base import Component

Plans = list[tuple[int, PlanReport]]
Graphs = Callable[[Component, str], Exported]


def exported_once(component: Component, precision: str, store: Store) -> Exported:
    """The component's graph, exported by the first test of all workers that asks, and read anew for each."""
    import onnx_ir as ir

    graph = store.graph(component, precision)
    return Exported(ir.load(graph.onnx), graph.parameters)


def _work(graph: Path, targets: tuple[str, ...], ranges: Any, names: list[str], precision: str) -> Plans:
    from overcrank.engines.compile import engine_from_graph
    from overcrank.engines.plan import read_plan
    from overcrank.engines.targets import BY_NAME

    made = [engine_from_graph(graph, BY_NAME[target].narrowed(precision), ranges) for target in targets]
    return [(m.activation_bytes or 0, read_plan(bytes(memoryview(m.plan)), names)) for m in made]


def compiled(graph: Path, targets: tuple[str, ...], ranges: Any, names: list[str], precision: str = "bf16") -> Plans:
    """For each target: activation memory in bytes, and what the plan does."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_work, graph, targets, ranges, names, precision).result()
