"""Operators whose stock conversion to ONNX is wrong or slow here: `torch.onnx.export(custom_translation_table=…)`.

onnxscript 0.7.2 expands a `repeat_interleave` along the wrong axis and squeezes axes that are
not 1, which PyTorch leaves alone; ONNX Runtime and TensorRT refuse both graphs.
"""

from __future__ import annotations

from typing import Any

from overcrank.export.linear import linear


def repeat_interleave(x: Any, repeats: Any, dim: int | None = None, output_size: int | None = None) -> Any:
    """Each slice along `dim`, `repeats` times in a row."""
    from onnxscript import opset23 as op

    if dim is None:
        x, dim = op.Reshape(x, op.Constant(value_ints=[-1])), 0
    rank = len(x.shape)
    axis = dim % rank
    count = (
        op.Constant(value_ints=[repeats])
        if isinstance(repeats, int)
        else op.Reshape(repeats, op.Constant(value_ints=[1]))
    )
    before, after = [1] * (axis + 1), [1] * (rank - axis - 1)
    sizes = [op.Constant(value_ints=before), count, *([op.Constant(value_ints=after)] if after else [])]
    spread = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[axis + 1])), op.Concat(*sizes, axis=0))
    parts = [op.Shape(x, start=0, end=axis)] if axis else []
    parts.append(op.Constant(value_ints=[-1]))
    parts += [op.Shape(x, start=axis + 1, end=rank)] if axis + 1 < rank else []
    return op.Reshape(spread, op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0])


def squeeze(x: Any, dim: int) -> Any:
    """PyTorch's: an axis that is not 1 stays."""
    from onnxscript import opset23 as op

    if x.shape is not None and x.shape[dim] != 1:
        return op.Identity(x)
    return op.Squeeze(x, op.Constant(value_ints=[dim]))


def translations() -> dict[Any, Any]:
    import torch

    aten = torch.ops.aten
    return {
        aten.linear.default: linear,
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.squeeze.dim: squeeze,
    }
