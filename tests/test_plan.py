from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from overcrank.engines.compile import engine_from_graph
from overcrank.engines.lint import compared
from overcrank.engines.plan import PlanReport, read_plan
from overcrank.engines.targets import BY_NAME
from overcrank.export import operators
from overcrank.export.graph import onnx_from_component
from overcrank.models import components, resolve

from tests import tiny

pytestmark = pytest.mark.quick

NAME = "tiny-ltx-0.9.5"


@pytest.mark.heavy
def test_ltx_runs_the_gemms_of_the_embedded_network() -> None:
    """True widths, traced depth: no weight work, and no epilogue lost to weights being inputs."""
    from overcrank.engines.profiles import profile_for

    variant = resolve("ltx")
    result = compared(components(variant)[0], "bf16", BY_NAME["sm_89"], profile_for(variant))
    assert result.inputs.weight_moves == ()
    assert result.inputs.linears == result.embedded.linears
    assert result.inputs.attentions == result.embedded.attentions == 6
    assert result.inputs.lost(result.embedded) == Counter()


@pytest.mark.heavy
def test_a_weight_that_is_transposed_at_run_time_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain form of a linear layer, [N, K] and a Transpose, is what the lint exists to catch."""

    def plain(x: Any, weight: Any, bias: Any = None) -> Any:
        from onnxscript import opset23 as op

        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return y if bias is None else op.Add(y, bias)

    import torch

    monkeypatch.setattr(operators, "translations", lambda: {torch.ops.aten.linear.default: plain})
    component = components(tiny.variant(NAME), ("denoiser",))[0]
    exported = onnx_from_component(component, "bf16")
    ir.save(exported.model, tmp_path / "g.onnx")
    made = engine_from_graph(tmp_path / "g.onnx", BY_NAME["sm_89"], tiny.profile(NAME).ranges(component))
    report = read_plan(bytes(memoryview(made.plan)), [p.input for p in exported.parameters])
    assert any("Tran" in kernel for kernel, _ in report.weight_moves)
    assert "weights transposed at every call" in report.verdict()


STORED = {
    # tanh(x @ w + b) in bf16 with the bias laid out anew; the same in fp8 without a bias; a fused attention
    "linear": (
        PlanReport(
            True, kernels=1, epilogues=Counter(AddTanh=1), gemms=1, linears=1, weight_moves=(("__myl_Resh", "b"),)
        ),
        "1 generated kernels, 1 GEMMs (1 with fused epilogue, 0 without); 1 weights copied at every call",
    ),
    "fp8": (
        PlanReport(True, kernels=2, gemms=1, linears=1, formats={"node_4": "fp8"}),
        "2 generated kernels, 1 GEMMs (0 with fused epilogue, 1 without), 1 GEMMs in fp8; no weight transposed, "
        "cast or moved",
    ),
    "attention": (
        PlanReport(True, kernels=1, attentions=1),
        "1 generated kernels, 1 fused attentions; no weight transposed, cast or moved",
    ),
}
"""The programs of plans that TensorRT for RTX 1.7.1 compiled for sm_89 (tests/plans), as counted by hand."""


@pytest.mark.parametrize("name", STORED)
def test_a_stored_plan_is_read(name: str) -> None:
    report, verdict = STORED[name]
    program = (Path(__file__).parent / "plans" / f"{name}.txt").read_bytes()
    assert read_plan(program, ["w", "b"]) == report
    assert report.verdict() == verdict
    assert read_plan(program, []).weight_moves == (), "only weights are"


def test_what_constant_weights_would_have_gained_is_said() -> None:
    linear, fp8 = STORED["linear"][0], STORED["fp8"][0]
    assert fp8.difference(linear) == "1 × GEMM+AddTanh only when embedded"
    assert linear.difference(fp8) == "1 × GEMM+AddTanh only with weights as inputs"
    merged = replace(linear, linears=3)
    assert linear.difference(merged) == "2 projections merged into a neighbour's GEMM only when embedded"
    assert linear.difference(linear) == "the same GEMM kernels"


@pytest.mark.parametrize("content", [b"", b"ftrt" + bytes(range(256)) * 40, b"  unknown={ name=x }\n"])
def test_an_unknown_plan_is_not_guessed_at(content: bytes) -> None:
    report = read_plan(content, ["w"])
    assert not report.known
    assert "nothing is claimed" in report.verdict()
    assert "cannot be compared" in report.difference(PlanReport(known=True))
