"""Cleaning of a freshly converted graph, with every parameter left alone.

1. Constant folding of shape arithmetic (parameters are inputs, so none is folded).
2. Reshape targets that need no arithmetic become constants, the rest are read once from
   the graph's inputs. A block of a transformer otherwise computes some thirty of them,
   and the compiler turns each into a dozen layers.
3. Constants, identities and unused nodes tidied; later, common subexpressions merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def clean(model: ir.Model) -> ir.Model:
    """Clean in place and return the model; parameters keep their names."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants

    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=False)
    reshapes_without_arithmetic(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=2**24)(model)  # a norm of a wide block has a constant as wide
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def deduplicate(model: ir.Model) -> ir.Model:
    """Merge common subexpressions, in place; last, since it joins what repeated blocks share."""
    import onnx_ir.passes.common as common

    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def products_in_fp16(model: ir.Model) -> None:
    """What a module keeps in fp32 is multiplied in fp16, in place: for a target that has no fp32 products.

    Parameters stay fp32 inputs and are cast in the graph.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    def cast(value: ir.Value, to: ir.DataType) -> ir.Node:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)])
        node.outputs[0].dtype = to
        return node

    graph = model.graph
    common.ShapeInferencePass()(model)  # a converted graph does not say every type
    for node in list(graph):
        out = node.outputs[0]
        if node.op_type not in PRODUCTS or out.dtype != ir.DataType.FLOAT:
            continue
        for position, value in enumerate(node.inputs):
            if value is not None:
                narrow = cast(value, ir.DataType.FLOAT16)
                graph.insert_before(node, narrow)
                node.replace_input_with(position, narrow.outputs[0])
        out.dtype = ir.DataType.FLOAT16
        wide = cast(out, ir.DataType.FLOAT)
        for user, position in [(u.node, u.idx) for u in out.uses() if u.node is not wide]:
            user.replace_input_with(position, wide.outputs[0])
        graph.insert_after(node, wide)


def reshapes_without_arithmetic(model: ir.Model) -> bool:
    """Rewrite Reshape targets; returns whether any changed.

    A target dimension that the input has at the same place is 0 (copied), one unknown is
    -1 (inferred), and further unknowns are dimensions of graph inputs.
    """
    graph = model.graph
    sources = _symbol_sources(graph)
    targets: dict[tuple[int | str, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Reshape" or node.attributes.get_int("allowzero"):
            continue
        target = _target(node)
        if target is None or any(isinstance(d, str) and d not in sources for d in target):
            continue
        if target not in targets:
            targets[target] = _target_value(graph, target, sources)
        node.replace_input_with(1, targets[target])
    return bool(targets)


def _target(node: ir.Node) -> tuple[int | str, ...] | None:
    """The Reshape's target as numbers and, where neither 0 nor -1 serves, symbol names."""
    data, out = node.inputs[0], node.outputs[0].shape
    if data is None or out is None or any(d == 0 for d in out):
        return None
    dims = list(data.shape) if data.shape is not None else []
    copied = [i < len(dims) and not isinstance(d, int) and dims[i] == d for i, d in enumerate(out)]
    target: list[int | str] = [
        0 if same else d if isinstance(d, int) else str(d.value) for d, same in zip(out, copied, strict=True)
    ]
    unknown = [i for i, d in enumerate(target) if isinstance(d, str)]
    if unknown:
        target[unknown[-1]] = -1
    return tuple(target)


def _symbol_sources(graph: ir.Graph) -> dict[str, tuple[ir.Value, int]]:
    """Where each symbolic dimension can be read: (graph input, axis)."""
    sources: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, d in enumerate(value.shape or ()):
            if not isinstance(d, int) and d.value is not None:
                sources.setdefault(str(d.value), (value, axis))
    return sources


def _target_value(graph: ir.Graph, target: tuple[int | str, ...], sources: dict[str, tuple[ir.Value, int]]) -> ir.Value:
    """A constant where the target is all numbers, else a Concat placed first in the graph."""
    import onnx_ir as ir

    def constant(*numbers: int) -> ir.Value:
        name = "shape_" + "_".join(str(n).replace("-", "m") for n in numbers)
        if name not in graph.initializers:
            graph.register_initializer(
                ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            )
        return graph.initializers[name]

    if all(isinstance(d, int) for d in target):
        return constant(*(d for d in target if isinstance(d, int)))
    nodes, parts = [], []
    for d in target:
        if isinstance(d, int):
            parts.append(constant(d))
        else:
            value, axis = sources[d]
            attributes = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
            nodes.append(ir.Node("", "Shape", [value], attributes))
            parts.append(nodes[-1].outputs[0])
    nodes.append(ir.Node("", "Concat", parts, [ir.AttrInt64("axis", 0)]))
    graph.insert_before(graph[0], nodes)
    out = nodes[-1].outputs[0]
    out.name = "shape_" + "_".join(str(d).replace("-", "m") for d in target)
    return out
