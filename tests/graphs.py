"""Small graphs written as text, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator


def graph_of(text: str, functions: str = "", imports: str = "") -> ir.Model:
    """From ONNX's text form; a node's name is in brackets before it."""
    head = f'<ir_version: 10, opset_import: ["" : 23{imports}]>'
    model = onnx.parser.parse_model(f"{head} {text} {functions}")
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def computed(model: ir.Model, **inputs: Any) -> list[np.ndarray]:
    """By the specification's reference; the graph is checked against the specification first."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    results: list[np.ndarray] = ReferenceEvaluator(proto).run(None, inputs)
    return results


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
