"""The canonical linear layer: how `aten.linear` becomes ONNX.

A weight that is a network input is multiplied without a transpose or cast kernel only as
rank 3 [1, N, K] against tokens flattened to [1, B·S, K]; then TensorRT launches the GEMM,
epilogue fused, that it launches for a constant weight (measured: docs/adr/0001).
"""

from __future__ import annotations

from typing import Any

SHAPE_KEY = "overcrank.shape"


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x [..., K], weight [N, K], bias [N] → [..., N]; the parameters become rank 3 views."""
    from onnxscript import opset23 as op

    outputs, inner = weight.shape
    tokens = op.Reshape(x, op.Constant(value_ints=[1, -1, inner]))
    y = op.MatMul(tokens, op.Transpose(_viewed(op, weight, (1, outputs, inner)), perm=[0, 2, 1]))
    if bias is not None:
        y = op.Add(y, _viewed(op, bias, (1, 1, outputs)))
    shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[outputs]), axis=0)
    return op.Reshape(y, shape)


def _viewed(op: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """A parameter is declared with `shape`; anything computed is reshaped to it."""
    if value.producer() is not None:
        return op.Reshape(value, op.Constant(value_ints=list(shape)))
    value.metadata_props[SHAPE_KEY] = ",".join(map(str, shape))
    return value
