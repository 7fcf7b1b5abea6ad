"""What ONNX Runtime's attention takes on a processor: every score of a layer at once, which PyTorch's does not."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from overcrank.engines.graph_refusals import ScoresTooLarge
from overcrank.engines.refusals import CannotServe

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

FP32_BYTES = 4
LITTLE = 1 << 30
"""Bytes that no render fails for; the free memory is not even looked up."""
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class Scores:
    """Of a graph: the bytes of the largest attention's scores, by the lengths of the inputs."""

    def __init__(self, model: ir.Model) -> None:
        shapes = {value.name: value.shape for value in model.graph.inputs if value.shape is not None}
        self._inputs = {name: [_parsed(_text(dim)) for dim in shape] for name, shape in shapes.items()}
        self._scores = [list(map(_parsed, dims)) for dims in dict.fromkeys(_scores(model))]
        self._refused: dict[int, ScoresTooLarge | None] = {}  # by bytes, so that one size has one answer

    def bytes(self, inputs: Mapping[str, Tensor]) -> int:
        """0 where the graph does not say."""
        lengths: dict[str, int] = {}
        for name, tensor in inputs.items():
            for dim, length in zip(self._inputs.get(name, ()), tensor.shape, strict=False):
                _solve(dim, length, lengths)
        sizes = (_product(dims, lengths) for dims in self._scores)
        return FP32_BYTES * max((size for size in sizes if size), default=0)

    def require_room(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise CannotServe for a call whose scores this machine has no memory for."""
        import psutil

        needed = self.bytes(inputs)
        if needed < LITTLE:
            return
        if needed not in self._refused:
            free = int(psutil.virtual_memory().available)
            self._refused[needed] = ScoresTooLarge(needed, free) if needed > free else None
        if refusal := self._refused[needed]:
            raise CannotServe(refusal)


def _scores(model: ir.Model) -> Iterator[tuple[str, ...]]:
    """Lengths of each attention's scores, as the graph writes them: [batch, heads, queries, keys]."""
    for node in model.graph:
        shapes = [value.shape if value is not None else None for value in node.inputs]
        if node.op_type == "Attention" and shapes[0] is not None and shapes[1] is not None and len(shapes[0]) == 4:
            yield (*map(_text, shapes[0][:3]), _text(shapes[1][2]))
        elif node.op_type == "Softmax" and shapes[0] is not None:  # of an attention that is written out
            yield tuple(map(_text, shapes[0]))


def _text(dim: Any) -> str:
    return str(dim if isinstance(dim, int) else dim.value)


def _parsed(dim: str) -> ast.expr | None:
    try:
        return ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _solve(dim: ast.expr | None, length: int, lengths: dict[str, int]) -> None:
    """Note the one symbol of a dimension a * symbol + b, which has this length."""
    names = {node.id for node in ast.walk(dim) if isinstance(node, ast.Name)} if dim is not None else set()
    if dim is None or len(names) != 1 or names <= lengths.keys():
        return
    (name,) = names
    first, second = (_value(dim, {name: n}) for n in (0, 1))
    if first is not None and second is not None and second != first:
        lengths[name] = (length - first) // (second - first)


def _product(dims: Sequence[ast.expr | None], lengths: Mapping[str, int]) -> int:
    """0 where a dimension is not told by the inputs."""
    return prod(_value(dim, lengths) or 0 for dim in dims)


def _value(expression: ast.expr | None, lengths: Mapping[str, int]) -> int | None:
    """Of sums, differences, products and whole quotients, all that exported graphs have; None for another."""
    match expression:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return lengths.get(name)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            a, b = _value(left, lengths), _value(right, lengths)
            if a is None or b is None or (isinstance(sign, ast.FloorDiv) and not b):
                return None
            return _OPERATORS[type(sign)](a, b)
        case _:
            return None
