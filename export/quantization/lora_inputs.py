"""LoRA beside the weights: a linear layer gets two more inputs, A and B, whose product is added behind its own.

A file's quantized bytes then stay as they are: y = quantized(x, W) + (x·Aᵀ)·Bᵀ (arXiv:2106.09685), where x is the
layer's input before it is rotated or rounded. Several LoRAs are stacked along the rank, their strengths multiplied into
B; of none, B is zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from overcrank.errors import present
from overcrank.export.quantization.formats import Editing, Packed
from overcrank.export.quantization.linear import IN_16_BIT, linear_layers
from overcrank.export.quantization.lora import LORA_A, LORA_B, LoraInputs

if TYPE_CHECKING:
    import onnx_ir as ir


TYPES = (*IN_16_BIT, "FLOAT")
"""A layer that its network keeps in fp32 takes LoRAs in fp32."""


def layers_with_lora(model: ir.Model, lora: LoraInputs, quantized: Collection[str]) -> list[str]:
    """Linear layers of a graph that take LoRAs where `quantized` ones of its layers are."""
    if not lora.rank:
        return []
    names = dict.fromkeys(linear.name for linear in linear_layers(model, TYPES))
    return [name for name in names if lora.layers == "all" or name in quantized]


def add_lora_inputs(model: ir.Model, rank: int, layers: Collection[str]) -> tuple[Packed, ...]:
    """Give these layers of a graph their inputs, in place, before any is rewritten as a quantized one."""
    editings: dict[str, _Beside] = {}
    for linear in list(linear_layers(model, TYPES)):
        if linear.name in layers:
            if linear.name not in editings:
                editings[linear.name] = _Beside(model.graph, linear.name, linear.weight, rank)
            editings[linear.name].add_to(linear.product)
    return tuple(packed for editing in editings.values() for packed in editing.packed)


class _Beside(Editing):
    """One layer: its A [1, R, K] and B [1, N, R], in the form of every weight that is an input (export/linear.py)."""

    def __init__(self, graph: ir.Graph, name: str, weight: ir.Value, rank: int) -> None:
        super().__init__(graph, name, present(weight.dtype, "a weight's type"))
        _, outputs, inner = (int(str(d)) for d in weight.shape or ())
        self.a = self.input(LORA_A, self.compute, (1, rank, inner))
        self.b = self.input(LORA_B, self.compute, (1, outputs, rank))

    def add_to(self, product: ir.Node) -> None:
        """Of one of its products, as a layer may be called several times."""
        self.at = product
        x, y = present(product.inputs[0], "a product's input"), product.outputs[0]
        within = self.node("MatMul", x, self.node("Transpose", self.a, perm=[0, 2, 1]))
        added = self.node("MatMul", within, self.node("Transpose", self.b, perm=[0, 2, 1]))
        self._put_behind(product, y, added)

    def _put_behind(self, product: ir.Node, y: ir.Value, added: ir.Value) -> None:
        """Whoever reads y reads the sum."""
        import onnx_ir as ir

        readers = list(y.uses())
        node = ir.node("Add", [y, added])
        self.graph.insert_after(product, node)
        total = node.outputs[0]
        total.shape, total.type = y.shape, y.type
        for reader, place in readers:
            reader.replace_input_with(place, total)
        if y.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(y)] = total
