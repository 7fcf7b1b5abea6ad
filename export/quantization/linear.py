"""16-bit graph + formats of its linear layers → Q/DQ graph whose parameters are still inputs.

A scale that is an input of QuantizeLinear or DequantizeLinear compiles to a 16-bit GEMM. So
those keep a constant power of two, and what was measured goes into a multiplication before
(per input channel) and one behind (per output channel), whose factors are inputs: the
canonical quantized linear layer (docs/adr/0007). The factor behind, and a token's own, are in fp32, as files have their
scales: the kernel that multiplies with them computes in it anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from overcrank.errors import UserError, present
from overcrank.export.quantization.attention import ShapeRange, attentions, fusable, in_fp8
from overcrank.export.quantization.formats import BLOCK, NUMBERS, ROTATION, Packed, Rewriting
from overcrank.export.quantization.recipe import ATTENTION, ComponentRecipe, LayerFormat
from overcrank.export.quantization.rotation import hadamard
from overcrank.export.weights import Parameter

if TYPE_CHECKING:
    import onnx_ir as ir

NARROWEST = 32
"""Inner length of an 8-bit GEMM: on Turing the compiler has no kernel for 16."""


@dataclass(frozen=True)
class Linear:
    """One matrix product of the canonical linear layer (export/linear.py)."""

    name: str
    product: ir.Node
    weight: ir.Value  # [1, N, K]


IN_16_BIT = ("FLOAT16", "BFLOAT16")


def linear_layers(model: ir.Model, types: Collection[str] = IN_16_BIT) -> Iterator[Linear]:
    """Linear layers whose weight is a parameter in one of these types, and whose sizes GEMM kernels take."""
    for node in model.graph:
        moved = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if moved is None or moved.op_type != "Transpose" or moved.inputs[0] is None:
            continue
        weight = moved.inputs[0]
        name = str(weight.name)
        if weight.is_graph_input() and name.endswith(".weight") and str(weight.dtype) in types:
            _, outputs, inner = (int(str(d)) for d in weight.shape or ())
            if has_kernels(outputs, inner):
                yield Linear(name.removesuffix(".weight"), node, weight)


def has_kernels(outputs: int, inner: int) -> bool:
    """Whether a linear layer of this size is among `linear_layers`."""
    return outputs % BLOCK == inner % BLOCK == 0 and inner >= NARROWEST


def layout_in(
    model: ir.Model, recipe: ComponentRecipe, ranges: Mapping[str, ShapeRange] | None = None
) -> dict[str, LayerFormat]:
    """Layer → format, of the linear layers and attentions of a graph that `recipe` takes out of 16 bit.

    With the `ranges` of a profile, attentions that would not be fused there stay in 16 bit.
    """
    candidates = attentions(model) if ranges is None else fusable(model, ranges)
    return recipe.layout([x.name for x in linear_layers(model)], [x.name for x in candidates])


def quantize(
    model: ir.Model, parameters: tuple[Parameter, ...], layout: Mapping[str, LayerFormat]
) -> tuple[tuple[Parameter, ...], tuple[Packed, ...]]:
    """Rewrite the layers of `layout` in place; returns the parameters left to the module, and the pack's."""
    packed = in_fp8(model, {name for name, form in layout.items() if form.kind == ATTENTION})
    layers: dict[str, list[Linear]] = {}
    rotated: dict[tuple[str, int], ir.Value] = {}
    for linear in linear_layers(model):
        if linear.name in layout:
            layers.setdefault(linear.name, []).append(linear)
    for name, same in layers.items():
        packed += _Rewrite(model.graph, layout[name], same[0], rotated).every(same)
    gone = {f"{name}.weight" for name in layers}
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    return tuple(p for p in parameters if p.input not in gone), tuple(packed)


class _Rewrite(Rewriting):
    """One linear layer: its inputs, made once, and its products, rewritten each.

    With 16-bit activations the GEMM widens the weight as it reads it, if the weight need not
    be turned, and if no other layer multiplies the same tokens: the compiler merges those
    into one product of a weight it widens beforehand. Hence [1, K, N], and a factor before.
    """

    def __init__(
        self, graph: ir.Graph, form: LayerFormat, linear: Linear, rotated: dict[tuple[str, int], ir.Value]
    ) -> None:
        """`rotated`: input and group → the input rotated, which layers that multiply the same tokens share."""
        import onnx_ir as ir

        weight = linear.weight
        super().__init__(graph, linear.name, NUMBERS[form.format], present(weight.dtype, "a weight's type"))
        self.form, self.turned, self.rotated = form, form.activations == "16bit", rotated
        _, self.outputs, self.inner = (int(str(d)) for d in weight.shape or ())
        shape = (1, self.outputs, self.inner)
        if self.turned:
            shape = (1, self.inner, self.outputs)
        if form.rotation and self.inner % form.rotation:
            raise UserError(
                f"the recipe rotates groups of {form.rotation} inputs of {self.name}, which has {self.inner}; use one "
                f"that divides them."
            )
        self.weight = self.input("weight", ir.DataType[self.number.onnx], shape, replaces=weight)
        if form.format == "nvfp4":
            blocks = (1, self.outputs, self.inner // BLOCK)
            self.block_scale = self.input("block_scale", ir.DataType.FLOAT8E4M3FN, blocks)
        self.before = self.input("before", self.compute, (1, 1, self.inner))
        self.behind = self.input("behind", ir.DataType.FLOAT, (1, 1, self.outputs))

    def every(self, products: list[Linear]) -> list[Packed]:
        for i, linear in enumerate(products):
            self._one(linear.product, f"{self.name}/{i}" if i else self.name)
        return self.packed

    def _one(self, product: ir.Node, called: str) -> None:
        """`called` names the product in the plan, where the lint looks for it."""
        import onnx_ir as ir

        x = present(product.inputs[0], "a product's input")
        token = None
        if self.form.rotation:
            x = self._rotated(x, self.form.rotation)
        self.at = product
        x = self.node("Mul", x, self.before)
        if self.form.activations == "dynamic":
            x, token = self._by_token(x)
        if self.form.activations != "16bit":
            x = self._rounded(x)
        y = self.node("MatMul", x, self._dequantized_weight())
        self.last_node.name = called
        y = self.node("Cast", y, to=int(ir.DataType.FLOAT))
        if token is not None:
            y = self.node("Mul", y, token)
        y = self.node("Cast", self.node("Mul", y, self.behind), to=int(self.compute))
        self.replace(product, y)

    def _rotated(self, x: ir.Value, size: int) -> ir.Value:
        """Each group of `size` inputs times a Hadamard matrix, as the layer's weights are in the file.

        Once for all layers that read them: the compiler merges equal products of one input into a wide one, that
        computes each.
        """
        known = self.rotated.get((str(x.name), size))
        if known is not None:
            return known
        producer = x.producer()  # behind which any layer can read it
        self.at = self.graph[0] if producer is None else self.graph[self.graph.index(producer) + 1]
        matrix = self.array(f"hadamard_{size}", hadamard(size).numpy().astype(self.compute.numpy()))
        grouped = self.node("Reshape", x, self.array(f"quant_groups_{size}", np.array([0, 0, -1, size], np.int64)))
        whole = self.array(f"quant_joined_{self.inner}", np.array([0, 0, self.inner], np.int64))
        product = self.node("MatMul", grouped, matrix)
        self.last_node.name = f"{ROTATION}{self.name}"
        self.rotated[str(x.name), size] = self.node("Reshape", product, whole)
        return self.rotated[str(x.name), size]

    def _by_token(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x over each token's largest value, times the format's; and that value, for behind the product."""
        import onnx_ir as ir

        wide = self.node("Cast", x, to=int(ir.DataType.FLOAT))
        axis = self.array("quant_last_axis", np.array([-1], np.int64))
        largest = self.node("ReduceMax", self.node("Abs", wide), axis, keepdims=1)
        largest = self.node("Max", largest, self.array("quant_tiny", np.array(1e-12, np.float32)))
        unit = self.node("Div", wide, largest)
        reach = self.array(f"quant_reach_{self.form.format}", np.array(self.number.reach, np.float32))
        return self.node("Cast", self.node("Mul", unit, reach), to=int(self.compute)), largest

    def _rounded(self, x: ir.Value) -> ir.Value:
        step = self._step()
        if self.form.format != "nvfp4":
            return self.rounded(x, step)
        q, scale = self.nodes(
            "TRT_FP4DynamicQuantize", 2, x, step, domain="trt", axis=-1, block_size=BLOCK, scale_type=17
        )
        return self.node("DequantizeLinear", q, self.node("DequantizeLinear", scale, step), axis=2, block_size=BLOCK)

    def _dequantized_weight(self) -> ir.Value:
        step = self._step()
        if self.form.format == "nvfp4":
            scale = self.node("DequantizeLinear", self.block_scale, step)
            weight = self.node("DequantizeLinear", self.weight, scale, axis=2, block_size=BLOCK)
        else:
            weight = self.node("DequantizeLinear", self.weight, step)
        return weight if self.turned else self.node("Transpose", weight, perm=[0, 2, 1])

    def _step(self) -> ir.Value:
        return self.constant(f"quant_step_{self.form.format}", self.number.step)
