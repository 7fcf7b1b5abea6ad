"""The graph of a bundle, read as what somebody else wrote: its bytes are those of the manifest, and it reaches nothing
outside of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.manifest import File
from overcrank.errors import IntegrityError

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAINS = ("", "ai.onnx", "trt")
"""Of the operators that exported graphs have: ONNX's own, and TensorRT's quantization to four bits."""
LARGEST = 2**31 - 1
"""Bytes that protobuf reads."""


def bundled_graph(bundle: Path, file: File) -> ir.Model:
    """A bundle's graph; the bundle's signature, if it needs one, was checked before.

    Raises IntegrityError where the bytes are not those of the manifest, before they are parsed, and for a graph that
    names other files, operators that are not ONNX's, functions, or control flow: exported graphs have none of them.
    """
    import onnx
    import onnx_ir as ir

    with (bundle / file.name).open("rb") as stream:
        content = stream.read(min(file.bytes, LARGEST) + 1)
    if len(content) != file.bytes or hashlib.sha256(content).hexdigest() != file.sha256:
        raise IntegrityError(f"{bundle.name}: {file.name} does not match the manifest; get the bundle again.")
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's, whichever implementation it has
        raise IntegrityError(f"{bundle.name}: {file.name} is no ONNX graph; rebuild it.") from error
    for reason in _reaches_out(model):
        raise IntegrityError(f"{bundle.name}: {file.name} is refused: it {reason}, which no graph built here does.")
    return ir.serde.deserialize_model(model)


def _reaches_out(model: Any) -> Iterator[str]:
    if model.functions:
        yield f"defines a function '{model.functions[0].domain[:80]}:{model.functions[0].name[:80]}'"
    graph = model.graph
    sparse = [tensor for pair in graph.sparse_initializer for tensor in (pair.values, pair.indices)]
    if any(map(_is_external, [*graph.initializer, *sparse])):
        yield "reads weights from another file (external data)"
    for node in graph.node:
        if node.domain not in DOMAINS:
            yield f"has an operator '{node.domain[:80]}:{node.op_type[:80]}'"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                yield f"has control flow ({node.op_type[:80]})"
            tensors = [attribute.t, *attribute.tensors, attribute.sparse_tensor.values, attribute.sparse_tensor.indices]
            if any(map(_is_external, tensors)):
                yield "reads a constant from another file (external data)"


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location or tensor.external_data)
