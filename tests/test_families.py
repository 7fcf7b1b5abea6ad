"""Every component of every tiny configuration: graph, parameters, engines; depth costs no memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from overcrank.engines.profiles import Profile
from overcrank.export.graph import Exported, onnx_from_component
from overcrank.export.module import random_module
from overcrank.models import components, families, family
from overcrank.models.base import Component
from overcrank.runtime.sessions.ort import OrtSession
from overcrank.runtime.verify import compare

from tests import tiny, without_torchvision
from tests.compiling import Graphs, compiled

without_torchvision.install()
# Components that two tiny variants share stand here once.
CASES = list(
    {
        (component.name, component.cls, repr(component.config)): (name, component.name)
        for name in tiny.TINY
        for component in family(tiny.variant(name).family).components(tiny.variant(name))
    }.values()
)
TARGETS = ("rtx",)  # every Ampere, Ada and Blackwell card at once: the compiler refuses what one of them lacks


def component_of(name: str, which: str) -> Component:
    return components(tiny.variant(name), (which,))[0]


CLASSES = list({(c.cls, c.name): case for case in CASES if (c := component_of(*case))}.values())
"""One component for each class of network."""


def test_every_family_has_a_tiny_variant() -> None:
    assert {tiny.variant(name).family for name in tiny.TINY} == set(families())


SPECIMENS = (
    ("tiny-ltx-0.9.1", "denoiser"),
    ("tiny-wan-2.2-a14b-i2v", "denoiser"),
    ("tiny-hunyuan-1.5-i2v", "denoiser"),
    ("tiny-skyreels", "denoiser_forcing"),
    ("tiny-modelscope", "denoiser"),  # a U-Net
    ("tiny-mochi", "vae_decoder"),
    ("tiny-modelscope", "vae_encoder"),
    ("tiny-cogvideox-1.5-i2v", "vae_encoder_first"),  # causal, with caches that come out
    ("tiny-cogvideox-2b", "vae_encoder_image"),
    ("tiny-skyreels-i2v", "image_encoder"),
    ("tiny-ltx2", "vocoder"),
)


@pytest.mark.parametrize(("name", "which"), tiny.specimens(CASES, *SPECIMENS))
def test_graph_and_engines(name: str, which: str, graphs: Graphs, tmp_path: Path, record_property: Any) -> None:
    component = component_of(name, which)
    exported = graphs(component, "bf16")
    module = random_module(component, component.config, "bf16").float()  # stored buffers as the graph has them
    _parameters_are_inputs(component, exported, module)
    graph = tmp_path / "graph.onnx"
    ir.save(exported.model, graph)
    compiles(component, exported, graph, TARGETS, tiny.profile(name))
    named = dict(module.named_parameters())
    views = {p.input: named[p.input].view(p.shape) for p in exported.parameters}
    session = OrtSession(exported.model, views)  # widens the graph in place
    checks = [compare(component, session, module, shape, "") for shape in tiny.shapes(name)]
    worst = max(checks, key=lambda check: check.relative_error)
    for key, value in {"like": tiny.TINY[name].like, "component": which, "parity": worst.relative_error}.items():
        record_property(key, value)  # bench/parity.py
    assert worst.relative_error < 1e-4, worst


def _parameters_are_inputs(component: Component, exported: Exported, module: Any) -> None:
    """Every parameter that the graph reads, with its dtype; none became a constant."""
    whole = random_module(component, component.config, "bf16")
    own = {n: (str(p.dtype)[6:], tuple(p.shape)) for n, p in whole.named_parameters()}
    table = {p.input: (p.dtype, p.module_shape) for p in exported.parameters}
    assert table.items() <= own.items()
    read = 0.6 if component.name == "image_encoder" else 0.8  # what lies after the layer that is asked for is not read
    assert len(table) > read * len(own), sorted(set(own) - set(table))
    assert all(v.const_value is None for v in exported.model.graph.inputs)
    largest = max((v.const_value.size for v in exported.model.graph.initializers.values() if v.const_value), default=0)
    assert largest <= 4096, "a weight was materialized"


def compiles(
    component: Component,
    exported: Exported,
    graph: Path,
    targets: tuple[str, ...],
    profile: Profile,
    cast: frozenset[str] = frozenset(),
) -> None:
    """Compiles, and but for `cast` no linear layer's weight of a transformer is moved when the engine runs."""
    names = [p.input for p in exported.parameters]
    for activation, report in compiled(graph, targets, profile.ranges(component), names):
        assert activation
        assert report.known
        if component.subfolder == "transformer":
            ranks = {p.input: len(p.module_shape) for p in exported.parameters}
            moved = [(kernel, name) for kernel, name in report.weight_moves if ranks[name] == 2 and name not in cast]
            assert not moved, "only convolutions and vectors may be laid out anew"
            assert report.gemms == report.linears


def _chained() -> list[tuple[str, str]]:
    """One component with repeated blocks for each class of network."""
    return list({(c.cls, c.name): case for case in CASES if (c := component_of(*case)).repeats}.values())


@pytest.mark.parametrize(("name", "which"), tiny.specimens(_chained(), ("tiny-ltx-0.9.1", "denoiser")))
def test_repeated_blocks_give_the_graph_of_the_plain_path(name: str, which: str, caplog: Any) -> None:
    component = component_of(name, which)
    fast = onnx_from_component(component, "bf16")
    assert "one by one" not in caplog.text
    plain = onnx_from_component(component, "bf16", shortcut=False)
    assert Counter(n.op_type for n in fast.model.graph) == Counter(n.op_type for n in plain.model.graph)
    assert {(p.input, p.shape, p.dtype) for p in fast.parameters} == {
        (p.input, p.shape, p.dtype) for p in plain.parameters
    }


DEPTHS = ("num_layers", "num_single_layers")


@pytest.mark.parametrize(("name", "which"), tiny.specimens(_chained(), ("tiny-ltx-0.9.1", "denoiser")))
def test_activation_memory_does_not_grow_with_depth(name: str, which: str, graphs: Graphs, tmp_path: Path) -> None:
    """A tensor kept alive for each layer would show: the video is large and the network narrow.

    Three blocks and more: the first and the last of a chain may hold less than one between them.
    """
    component = component_of(name, which)
    if component.subfolder != "transformer":
        pytest.skip("chains inside a VAE are a few blocks long")
    shape = replace(tiny.TINY[name].native, height=768, width=768, batch=2)
    figures = []
    for layers in (3, 5):
        variant = tiny.variant(name)
        depth = {field: layers for field in DEPTHS if field in component.config}
        configs = {**variant.configs, "transformer": {**component.config, **depth}}
        deep = components(replace(variant, configs=configs), (which,))[0]
        ir.save(graphs(deep, "bf16").model, tmp_path / "graph.onnx")
        ranges = Profile(tiny.TINY[name].minimum, shape, shape).ranges(deep)
        ((activation, _),) = compiled(tmp_path / "graph.onnx", ("sm_89",), ranges, [])
        figures.append(activation)
    assert abs(figures[1] / figures[0] - 1) < 0.001, figures
