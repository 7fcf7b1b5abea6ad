"""Rewrites of converted graphs, on small graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from overcrank.export.passes import products_in_fp16


def test_what_is_kept_in_fp32_is_multiplied_in_fp16() -> None:
    """Also where the product's type is not written down, and it has two readers."""
    full = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape([3, 8]), type=full)
    w = ir.Value(name="w", shape=ir.Shape([8, 4]), type=full)
    product = ir.node("MatMul", [x, w])
    last = ir.node("Add", [product.outputs[0], product.outputs[0]])
    y = last.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([3, 4]), full
    model = ir.Model(ir.Graph([x, w], [y], nodes=[product, last], opset_imports={"": 23}, name="g"), ir_version=10)
    products_in_fp16(model)
    assert [n.op_type for n in model.graph] == ["Cast", "Cast", "MatMul", "Cast", "Add"]
    given = {"x": np.full((3, 8), 1.0001, np.float32), "w": np.full((8, 4), 1.0, np.float32)}
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.full((3, 4), 16.0, np.float32))  # 1.0001 is 1 in fp16
    products_in_fp16(model)
    assert len(model.graph) == 5
