"""What rewritings of a graph share: number formats, inputs that something else than the module fills, and new nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK = 16
"""Values of nvfp4 that share a scale."""
ROTATION = "rotation/"
"""Begins the name of a product in a graph that rotates a quantized layer's input, and multiplies no weight."""


@dataclass(frozen=True)
class Number:
    """A quantized format: its ONNX type, its largest value, and the constant step of its Q and DQ.

    With the step, quantized values lie within ±1 (fp4 with its block scales, within ±1.32), so
    that sums over a layer's inputs stay far from fp16's end.
    """

    onnx: str
    torch: str
    largest: float
    step: float
    bytes: float
    """Of a weight, block scales included."""

    @property
    def reach(self) -> float:
        """The largest value that Q and DQ represent."""
        return self.largest * self.step


NUMBERS = {
    "fp8": Number("FLOAT8E4M3FN", "float8_e4m3fn", 448.0, 2.0**-9, 1.0),
    "int8": Number("INT8", "int8", 127.0, 2.0**-7, 1.0),
    "nvfp4": Number("FLOAT4E2M1", "uint8", 6.0 * 448.0, 2.0**-11, 0.5 + 1 / BLOCK),
}


@dataclass(frozen=True)
class Packed:
    """A graph input that the weight pack fills, instead of the module."""

    input: str
    layer: str
    role: str
    """Of a linear layer "weight", "block_scale", "before" or "behind", or, which no pack holds, "lora_a" and "lora_b";
    of an attention, attention.FACTORS."""
    dtype: str
    shape: tuple[int, ...]


class Editing:
    """One layer being changed in `graph`: new nodes are put before the node `at`, new inputs are kept in `packed`."""

    def __init__(self, graph: ir.Graph, name: str, compute: ir.DataType) -> None:
        self.graph, self.name, self.compute = graph, name, compute
        self.packed: list[Packed] = []
        self.at: ir.Node
        self.last_node: ir.Node

    def constant(self, name: str, value: float) -> ir.Value:
        """A scalar in the 16-bit type of the graph."""
        return self.array(name, np.array(value, self.compute.numpy()))

    def array(self, name: str, value: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(value, name=name)))
        return self.graph.initializers[name]

    def input(
        self, role: str, dtype: ir.DataType, shape: tuple[int, ...], replaces: ir.Value | None = None
    ) -> ir.Value:
        import onnx_ir as ir

        value = ir.Value(name=f"{self.name}.{role}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        inputs = self.graph.inputs
        if replaces is None:
            inputs.append(value)
        else:
            inputs[inputs.index(replaces)] = value
        self.packed.append(Packed(str(value.name), self.name, role, dtype.name.lower(), shape))
        return value

    def node(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.nodes(kind, 1, *inputs, **attributes)[0]

    def nodes(self, kind: str, outputs: int, *inputs: ir.Value, domain: str = "", **attributes: Any) -> list[ir.Value]:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.at, node)
        self.last_node = node
        return list(node.outputs)

    def replace(self, node: ir.Node, y: ir.Value) -> None:
        """`y` stands where the node's output stood."""
        old = node.outputs[0]
        y.shape, y.type = old.shape, old.type
        old.replace_all_uses_with(y)
        if old.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(old)] = y
        self.graph.remove(node, safe=True)


class Rewriting(Editing):
    """One layer becoming a quantized one."""

    def __init__(self, graph: ir.Graph, name: str, number: Number, compute: ir.DataType) -> None:
        super().__init__(graph, name, compute)
        self.number = number

    def rounded(self, x: ir.Value, step: ir.Value) -> ir.Value:
        """Q and DQ."""
        import onnx_ir as ir

        q = self.node("QuantizeLinear", x, step, output_dtype=int(ir.DataType[self.number.onnx]))
        return self.node("DequantizeLinear", q, step)
