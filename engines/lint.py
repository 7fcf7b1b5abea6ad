"""`engines lint`: what a bundle's plans do, and what constant weights would have changed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overcrank.engines.compile import engine_from_graph
from overcrank.engines.manifest import Manifest
from overcrank.engines.plan import PlanReport, read_plan
from overcrank.engines.profiles import Profile
from overcrank.engines.targets import Target
from overcrank.engines.trust import Keyring
from overcrank.models.base import Component, VideoShape


@dataclass(frozen=True)
class Comparison:
    """The same network at the traced depth, compiled both ways."""

    inputs: PlanReport
    embedded: PlanReport


def lint_bundle(bundle: Path) -> Iterator[tuple[str, PlanReport]]:
    """(component, what its plan does) for each engine of a bundle."""
    manifest = Keyring().whole(bundle)
    for entry in manifest.components:
        names = [p.input for p in entry.parameters] if manifest.weights == "inputs" else []
        yield entry.name, read_plan(bundle / entry.engine.name, names)


def compared(
    component: Component, precision: str, target: Target, profile: Profile, flavour: str = "tensorrt_rtx"
) -> Comparison:
    """Compile the traced depth of `component` with weights as inputs, and with random ones embedded."""
    import onnx_ir as ir
    import torch
    from overcrank.export.graph import onnx_from_component
    from overcrank.export.weights import embed

    shallow = component.at_depth(component.traced_config) if component.traced_config else component
    exported = onnx_from_component(shallow, precision)
    ranges = profile.ranges(shallow)
    with tempfile.TemporaryDirectory(prefix="overcrank-lint-") as folder:
        graph = Path(folder) / "inputs.onnx"
        ir.save(exported.model, graph)
        names = [p.input for p in exported.parameters]
        plan = engine_from_graph(graph, target, ranges, flavour=flavour).plan
        inputs = read_plan(bytes(memoryview(plan)), names)
        shapes = {p.name: p.module_shape for p in exported.parameters}
        embed(exported.model, exported.parameters, lambda name: torch.randn(shapes[name]) * 0.02)
        graph = Path(folder) / "embedded.onnx"
        ir.save(exported.model, graph, external_data="embedded.weights")
        plan = engine_from_graph(graph, target, ranges, flavour=flavour).plan
        return Comparison(inputs, read_plan(bytes(memoryview(plan)), []))


def profile_of(manifest: Manifest) -> Profile:
    low, best, high = (VideoShape(**s.model_dump()) for s in (manifest.min, manifest.opt, manifest.max))
    return Profile(low, best, high)
