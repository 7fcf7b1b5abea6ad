from __future__ import annotations

from collections import Counter
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


@pytest.mark.parametrize("content", [b"", b"ftrt" + bytes(range(256)) * 40, b"  unknown={ name=x }\n"])
def test_an_unknown_plan_is_not_guessed_at(content: bytes) -> None:
    report = read_plan(content, ["w"])
    assert not report.known
    assert "nothing is claimed" in report.verdict()
    assert "cannot be compared" in report.difference(PlanReport(known=True))
