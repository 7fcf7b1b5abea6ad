"""Graphs that ship with this package, beside the checkpoint that does: ONNX Runtime runs them on any machine.

`python -m overcrank.export.packaged` (a part of `./build.sh pages`) writes them anew; tests/test_without_card.py
holds them against a fresh export.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from overcrank.errors import present
from overcrank.export.cache import CachedGraph, load_cached, save_graph
from overcrank.models import local_folder
from overcrank.models.base import Component
from overcrank.models.network import network
from overcrank.models.registry import family, published

PRECISION = "fp32"
"""What a processor computes in."""


def packaged_components() -> Iterator[tuple[Component, Path]]:
    """Every component of a checkpoint in this package, with the folder that its graph is in."""
    for variant in published().values():
        if variant.packaged:
            graphs = present(local_folder(variant.name), variant.name) / "graphs"
            yield from ((c, graphs / c.name) for c in family(variant.family).components(variant))


def packaged_graph(component: Component) -> CachedGraph | None:
    """The fp32 graph of the component's very network; None where none is in this package."""
    for own, folder in packaged_components():
        if (own.name, own.cls) == (component.name, component.cls) and network(own) == network(component):
            return load_cached(folder)
    return None


def main() -> None:
    from overcrank.export.graph import onnx_from_component

    for component, folder in packaged_components():
        save_graph(onnx_from_component(component, PRECISION), folder)


if __name__ == "__main__":
    main()
