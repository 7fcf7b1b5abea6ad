"""nvfp4 spelled out in operators that ONNX Runtime has, which has no arithmetic on four bits.

The weight's input becomes fp32 and takes `unpacked_fp4` of the pack; rounding of activations
is done in fp32 with scales rounded to e4m3, as TRT_FP4DynamicQuantize does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from overcrank.errors import present
from overcrank.export.quantization.formats import BLOCK

if TYPE_CHECKING:
    import onnx_ir as ir


def lower_nvfp4(model: ir.Model) -> ir.Model:
    """Replace what reads or makes four-bit values, in place; call it on a graph widened to fp32."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    graph = model.graph
    for node in list(graph):
        if node.op_type == "TRT_FP4DynamicQuantize":
            _Rounding(graph, node).replace()
        elif node.op_type == "DequantizeLinear" and _is_fp4(node.inputs[0]):
            _scale_outright(graph, node)
    common.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if str(v.name).endswith(".block_scale") and not v.uses()]:
        graph.inputs.remove(value)
    for value in graph.inputs:
        if _is_fp4(value):
            value.dtype = ir.DataType.FLOAT
    return model


def _is_fp4(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT4E2M1"


def _scale_outright(graph: ir.Graph, node: ir.Node) -> None:
    """A weight holds its values times their block scales: only the step is left to multiply by."""
    import onnx_ir as ir

    scale = present(node.inputs[1], "a weight's scale")
    inner = present(scale.producer(), "the product of a weight's scales")
    product = ir.node("Mul", [node.inputs[0], inner.inputs[1]])
    graph.insert_before(node, product)
    node.outputs[0].replace_all_uses_with(product.outputs[0])
    graph.remove(node, safe=True)


class _Rounding:
    """x → the nearest of e2m1, in blocks of 16 with scales of e4m3; the same x that TensorRT dequantizes."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def replace(self) -> None:
        import onnx_ir as ir

        x, step = self.node.inputs
        last = self._numbers(np.array([-1], np.int64))
        blocks = self._op("Reshape", x, self._numbers(np.array([0, 0, -1, BLOCK], np.int64)))
        largest = self._op("ReduceMax", self._op("Abs", blocks), last, keepdims=1)
        ratio = self._op("Div", self._op("Div", largest, self._number(6.0)), step)
        e4m3 = self._op("Cast", ratio, to=int(ir.DataType.FLOAT8E4M3FN))
        scale = self._op("Mul", self._op("Cast", e4m3, to=int(ir.DataType.FLOAT)), step)
        unit = self._op("Div", blocks, self._op("Max", scale, self._number(1e-30)))
        size = self._op("Abs", unit)
        grid = self._op("Where", self._op("Less", size, self._number(4.0)), self._number(1.0), self._number(2.0))
        grid = self._op("Where", self._op("Less", size, self._number(2.0)), self._number(0.5), grid)
        near = self._op("Min", self._op("Mul", self._op("Round", self._op("Div", size, grid)), grid), self._number(6.0))
        signed = self._op("Mul", self._op("Mul", near, self._op("Sign", unit)), scale)
        back = self._op("Reshape", signed, self._op("Shape", x))
        quantized, scales = self.node.outputs
        (dequantize,) = (use.node for use in quantized.uses())
        dequantize.outputs[0].replace_all_uses_with(back)
        self.graph.remove(dequantize, safe=True)
        self.graph.remove([use.node for use in scales.uses()], safe=True)
        self.graph.remove(self.node, safe=True)

    def _op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _number(self, value: float) -> ir.Value:
        return self._numbers(np.array(value, np.float32))

    def _numbers(self, array: Any) -> ir.Value:
        import onnx_ir as ir

        name = "fp4_" + "_".join(map(str, np.ravel(array)))
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]
