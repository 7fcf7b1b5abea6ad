"""Every tiny configuration through export → ONNX Runtime parity → engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from overcrank.engines.compile import engine_from_graph
from overcrank.engines.plan import read_plan
from overcrank.engines.targets import BY_NAME
from overcrank.export.graph import Exported, onnx_from_component
from overcrank.export.module import random_module
from overcrank.models import components, family
from overcrank.models.base import Component, VideoShape
from overcrank.runtime.ort import OrtSession
from overcrank.runtime.verify import compare

from tests import tiny

# Components that two tiny variants share stand here once.
CASES = list(
    {
        (component.name, repr(component.config)): (name, component.name)
        for name in tiny.CONFIGS
        for component in family(tiny.variant(name).family).components(tiny.variant(name))
    }.values()
)
TARGETS = {"sm_75": "fp16", "sm_86": "bf16", "sm_89": "bf16", "sm_120": "bf16"}


def component_of(name: str, which: str) -> Component:
    return components(tiny.variant(name), (which,))[0]


def session_of(component: Component, exported: Exported) -> tuple[OrtSession, Any]:
    module = random_module(component, component.config, "fp32")
    named = dict(module.named_parameters())
    views = {p.input: named[p.input].view(p.shape) for p in exported.parameters}
    return OrtSession(exported.model, views), module


@pytest.mark.parametrize(("name", "which"), CASES)
def test_graph_computes_what_the_eager_module_computes(name: str, which: str) -> None:
    component = component_of(name, which)
    session, module = session_of(component, onnx_from_component(component, "fp32"))
    for shape in (VideoShape(64, 64, 17, 2), VideoShape(32, 96, 9, 1), VideoShape(32, 32, 1, 1)):
        check = compare(component, session, module, shape, "")
        assert check.relative_error < 1e-4, check


@pytest.mark.parametrize(("name", "which"), [c for c in CASES if component_of(*c).repeats])
def test_repeated_blocks_give_the_graph_of_the_plain_path(name: str, which: str) -> None:
    component = component_of(name, which)
    fast, plain = (onnx_from_component(component, "bf16", shortcut=s) for s in (True, False))
    assert Counter(n.op_type for n in fast.model.graph) == Counter(n.op_type for n in plain.model.graph)
    assert {(p.input, p.shape, p.dtype) for p in fast.parameters} == {
        (p.input, p.shape, p.dtype) for p in plain.parameters
    }


@pytest.mark.parametrize(("name", "which"), CASES)
def test_every_parameter_of_the_module_is_an_input(name: str, which: str) -> None:
    component = component_of(name, which)
    exported = onnx_from_component(component, "bf16")
    module = random_module(component, component.config, "bf16")
    table = {p.input: (p.dtype, p.module_shape) for p in exported.parameters}
    assert table == {n: (str(p.dtype)[6:], tuple(p.shape)) for n, p in module.named_parameters()}
    assert all(v.const_value is None for v in exported.model.graph.inputs)
    largest = max((v.const_value.size for v in exported.model.graph.initializers.values() if v.const_value), default=0)
    assert largest <= 256, "a weight was materialized"


@pytest.mark.parametrize(("name", "which"), CASES)
def test_engines_compile_and_leave_the_weights_alone(name: str, which: str, tmp_path: Path) -> None:
    component = component_of(name, which)
    for precision in sorted(set(TARGETS.values())):
        exported = onnx_from_component(component, precision)
        graph = tmp_path / f"{precision}.onnx"
        ir.save(exported.model, graph)
        for target in (t for t, p in TARGETS.items() if p == precision):
            made = engine_from_graph(graph, BY_NAME[target], tiny.profile(name).ranges(component))
            plan = bytes(memoryview(made.plan))
            report = read_plan(plan, [p.input for p in exported.parameters])
            assert made.activation_bytes
            assert report.known
            convolutions = {m for m in report.weight_moves if "Move" in m[0]}
            assert set(report.weight_moves) <= convolutions, "only convolution weights may be laid out anew"
            if which.startswith("denoiser"):
                assert not report.weight_moves
                assert report.gemms == report.linears


@pytest.mark.parametrize("which", ["denoiser", "denoiser_conditioned"])
def test_activation_memory_does_not_grow_with_depth(which: str, tmp_path: Path) -> None:
    """A per-layer constant kept alive would: DESIGN of record, watch activation memory."""
    from dataclasses import replace

    from overcrank.models import family

    name = "tiny-ltx-0.9.5"
    variant = tiny.variant(name)
    figures = []
    for layers in (2, 4, 8):
        configs = {**variant.configs, "transformer": {**variant.configs["transformer"], "num_layers": layers}}
        every = family("ltx").components(replace(variant, configs=configs))
        component = next(c for c in every if c.name == which)
        ir.save(onnx_from_component(component, "bf16").model, tmp_path / "g.onnx")
        made = engine_from_graph(tmp_path / "g.onnx", BY_NAME["sm_89"], tiny.profile(name).ranges(component))
        figures.append(made.activation_bytes or 0)
    growth = (figures[2] - figures[1]) / 4
    tokens_bytes = 2 * (2 * 5 * 12 * 12) * 32  # one [B·S, inner] tensor in bf16 at the maximum
    assert growth < tokens_bytes, figures
