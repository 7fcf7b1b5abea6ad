"""Exported graphs cached by the content of everything they are made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.export.weights import Parameter
from overcrank.files import commit
from overcrank.models.base import Component
from overcrank.models.network import network

if TYPE_CHECKING:
    from overcrank.export.graph import Exported

EXPORTERS = ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "accelerate")


@lru_cache
def exporter_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in EXPORTERS}


def graph_digest(component: Component, precision: str) -> str:
    """SHA-256 of the component's description, the code that exports it, and the exporters' versions."""
    described = {
        "component": component.name,
        "class": component.cls,
        "attribute": component.attribute,
        "config": network(component),
        "inputs": [asdict(t) for t in component.inputs],
        "outputs": [asdict(t) for t in component.outputs],
        "repeats": [asdict(r) for r in component.repeats],
        "precision": precision,
        "versions": exporter_versions(),
        "code": _code_digest(component.forward),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _code_digest(forward: Any) -> str:
    """SHA-256 of the export package, of the files of `forward` and what it is made of, and of what families share."""
    import inspect

    own = sorted({Path(inspect.getfile(f)) for f in _functions(forward)})
    files = [*sorted(Path(__file__).parent.glob("*.py")), *own, own[0].parent / "_common.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _functions(value: Any) -> Iterator[Any]:
    """The functions in a partial and its arguments."""
    if isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _functions(part)
    elif callable(value):
        yield value


@dataclass(frozen=True)
class CachedGraph:
    onnx: Path
    parameters: tuple[Parameter, ...]
    seconds: float  # of the export that made it


def load_cached(folder: Path) -> CachedGraph | None:
    """The graph in a cache folder; None if it is not there whole."""
    try:
        table = json.loads((folder / "graph.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    parameters = tuple(
        Parameter(p["input"], p["name"], p["dtype"], tuple(p["shape"]), tuple(p["module_shape"]))
        for p in table["parameters"]
    )
    return CachedGraph(folder / "graph.onnx", parameters, table["seconds"])


def cached_graph(component: Component, precision: str, folder: Path) -> CachedGraph:
    """The graph from `folder`, exported into it if it is not there; the caller holds its lock."""
    graph = load_cached(folder)
    if graph is not None:
        return graph
    from overcrank.export.graph import onnx_from_component

    start = time.monotonic()
    exported = onnx_from_component(component, precision)
    return save_graph(exported, folder, time.monotonic() - start)


def save_graph(exported: Exported, folder: Path, seconds: float = 0.0) -> CachedGraph:
    """Write a graph and its parameters as `load_cached` reads them, in the place of what was in `folder`."""
    import onnx_ir as ir

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        ir.save(exported.model, part / "graph.onnx")
        table = {"seconds": seconds, "parameters": [asdict(p) for p in exported.parameters]}
        (part / "graph.json").write_text(json.dumps(table), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        commit(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return CachedGraph(folder / "graph.onnx", exported.parameters, seconds)
