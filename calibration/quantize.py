"""16-bit graph + formats of its linear layers → Q/DQ graph whose parameters are still inputs.

A scale that is an input of QuantizeLinear or DequantizeLinear compiles to a 16-bit GEMM. So
those keep a constant power of two, and what was measured goes into a multiplication before
(per input channel) and one behind (per output channel), whose factors are inputs: the
canonical quantized linear layer (docs/adr/0007).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from overcrank.calibration.recipe import LayerFormat
from overcrank.export.weights import Parameter

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK = 16
"""Values of nvfp4 that share a scale."""


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


NUMBERS = {
    "fp8": Number("FLOAT8E4M3FN", "float8_e4m3fn", 448.0, 2.0**-9),
    "int8": Number("INT8", "int8", 127.0, 2.0**-7),
    "nvfp4": Number("FLOAT4E2M1", "uint8", 6.0 * 448.0, 2.0**-11),
}


@dataclass(frozen=True)
class Packed:
    """A graph input that the weight pack fills, instead of the module."""

    input: str
    layer: str
    role: str  # "weight", "block_scale", "before" or "behind"
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """One matrix product of the canonical linear layer (export/linear.py)."""

    name: str
    product: ir.Node
    weight: ir.Value  # [1, N, K]


def linear_layers(model: ir.Model) -> Iterator[Linear]:
    """Linear layers whose weight is a parameter in the graph's 16-bit type, and whose sizes GEMM kernels take."""
    for node in model.graph:
        moved = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if moved is None or moved.op_type != "Transpose" or moved.inputs[0] is None:
            continue
        weight = moved.inputs[0]
        name = str(weight.name)
        if weight.is_graph_input() and name.endswith(".weight") and str(weight.dtype) in ("FLOAT16", "BFLOAT16"):
            _, outputs, inner = (int(str(d)) for d in weight.shape or ())
            if outputs % BLOCK == inner % BLOCK == 0:
                yield Linear(name.removesuffix(".weight"), node, weight)


def quantized(
    model: ir.Model, parameters: tuple[Parameter, ...], layout: Mapping[str, LayerFormat]
) -> tuple[tuple[Parameter, ...], tuple[Packed, ...]]:
    """Rewrite the layers of `layout` in place; returns the parameters left to the module, and the pack's."""
    layers: dict[str, list[Linear]] = {}
    for linear in linear_layers(model):
        if linear.name in layout:
            layers.setdefault(linear.name, []).append(linear)
    packed: list[Packed] = []
    for name, same in layers.items():
        packed += _Rewrite(model, name, layout[name], same[0].weight).every(same)
    gone = {f"{name}.weight" for name in layers}
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    return tuple(p for p in parameters if p.input not in gone), tuple(packed)


class _Rewrite:
    """One layer: its inputs, made once, and its products, rewritten each.

    With 16-bit activations the GEMM widens the weight as it reads it, if the weight need not
    be turned, and if no other layer multiplies the same tokens: the compiler merges those
    into one product of a weight it widens beforehand. Hence [1, K, N], and a factor before.
    """

    def __init__(self, model: ir.Model, name: str, form: LayerFormat, weight: ir.Value) -> None:
        import onnx_ir as ir

        self.graph, self.name, self.form, self.number = model.graph, name, form, NUMBERS[form.format]
        assert weight.dtype is not None
        self.compute, self.turned = weight.dtype, form.activations == "16bit"
        _, self.outputs, self.inner = (int(str(d)) for d in weight.shape or ())
        self.packed: list[Packed] = []
        shape = (1, self.outputs, self.inner)
        if self.turned:
            shape = (1, self.inner, self.outputs)
        self.weight = self._input("weight", ir.DataType[self.number.onnx], shape, replaces=weight)
        if form.format == "nvfp4":
            blocks = (1, self.outputs, self.inner // BLOCK)
            self.block_scale = self._input("block_scale", ir.DataType.FLOAT8E4M3FN, blocks)
        self.before = self._input("before", self.compute, (1, 1, self.inner))
        self.behind = self._input("behind", self.compute, (1, 1, self.outputs))

    def every(self, products: list[Linear]) -> list[Packed]:
        for i, linear in enumerate(products):
            self._one(linear.product, f"{self.name}/{i}" if i else self.name)
        return self.packed

    def _one(self, product: ir.Node, called: str) -> None:
        """`called` names the product in the plan, where the lint looks for it."""
        self.at = product
        x = product.inputs[0]
        assert x is not None
        token = None
        x = self._node("Mul", x, self.before)
        if self.form.activations == "dynamic":
            x, token = self._by_token(x)
        if self.form.activations != "16bit":
            x = self._rounded(x)
        y = self._node("MatMul", x, self._dequantized_weight())
        self.made.name = called
        if token is not None:
            y = self._node("Mul", y, token)
        y = self._node("Mul", y, self.behind)
        old = product.outputs[0]
        y.shape, y.type = old.shape, old.type
        old.replace_all_uses_with(y)
        if old.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(old)] = y
        self.graph.remove(product, safe=True)

    def _by_token(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x over each token's largest value, times the format's; and that value, for behind the product."""
        import onnx_ir as ir

        wide = self._node("Cast", x, to=int(ir.DataType.FLOAT))
        axis = self._constant("quant_last_axis", np.array([-1], np.int64))
        largest = self._node("ReduceMax", self._node("Abs", wide), axis, keepdims=1)
        largest = self._node("Max", largest, self._constant("quant_tiny", np.array(1e-12, np.float32)))
        unit = self._node("Div", wide, largest)
        reach = self._constant(
            f"quant_reach_{self.form.format}", np.array(self.number.largest * self.number.step, np.float32)
        )
        scaled = self._node("Cast", self._node("Mul", unit, reach), to=int(self.compute))
        return scaled, self._node("Cast", largest, to=int(self.compute))

    def _rounded(self, x: ir.Value) -> ir.Value:
        import onnx_ir as ir

        step = self._step()
        if self.form.format != "nvfp4":
            q = self._node("QuantizeLinear", x, step, output_dtype=int(ir.DataType[self.number.onnx]))
            return self._node("DequantizeLinear", q, step)
        q, scale = self._nodes(
            "TRT_FP4DynamicQuantize", 2, x, step, domain="trt", axis=-1, block_size=BLOCK, scale_type=17
        )
        return self._node("DequantizeLinear", q, self._node("DequantizeLinear", scale, step), axis=2, block_size=BLOCK)

    def _dequantized_weight(self) -> ir.Value:
        step = self._step()
        if self.form.format == "nvfp4":
            scale = self._node("DequantizeLinear", self.block_scale, step)
            weight = self._node("DequantizeLinear", self.weight, scale, axis=2, block_size=BLOCK)
        else:
            weight = self._node("DequantizeLinear", self.weight, step)
        return weight if self.turned else self._node("Transpose", weight, perm=[0, 2, 1])

    def _step(self) -> ir.Value:
        return self._constant(f"quant_step_{self.form.format}", np.array(self.number.step, self.compute.numpy()))

    def _input(
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

    def _constant(self, name: str, value: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(value, name=name)))
        return self.graph.initializers[name]

    def _node(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self._nodes(kind, 1, *inputs, **attributes)[0]

    def _nodes(self, kind: str, outputs: int, *inputs: ir.Value, domain: str = "", **attributes: Any) -> list[ir.Value]:
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.at, made)
        self.made = made
        return list(made.outputs)
