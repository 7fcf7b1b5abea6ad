"""ONNX Runtime on CPU as a session for the very graph TensorRT compiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from overcrank.errors import OvercrankError
from overcrank.export.quantization.packing import unpacked_fp4
from overcrank.runtime.sessions.ort_fp4 import lower_nvfp4
from overcrank.runtime.sessions.ort_memory import Scores
from overcrank.runtime.sessions.session import WithLoras

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


def widen_to_fp32(model: ir.Model) -> ir.Model:
    """Turn a 16-bit graph into the same graph in fp32, in place.

    1. Inputs, outputs and constants of 16-bit types become fp32; casts to them, casts to fp32.
    2. Attention masks are expanded over the query axis, which ONNX Runtime's CPU kernel needs.
    """
    import onnx_ir as ir

    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    graph = model.graph
    for value in graph.inputs:
        if value.dtype in narrow:
            value.dtype = ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in narrow:
            wide = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(wide, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in {int(d) for d in narrow}:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in narrow:
                value.dtype = ir.DataType.FLOAT
        if node.op_type == "Attention" and len(node.inputs) > 3 and node.inputs[3] is not None:
            _expand_mask(graph, node)
    return model


def _expand_mask(graph: ir.Graph, node: ir.Node) -> None:
    """[B, 1, 1, L] → [B, 1, S, L], S being the query length."""
    import onnx_ir as ir

    one = graph.initializers.get("overcrank_one")
    if one is None:
        one = ir.Value(name="overcrank_one", const_value=ir.tensor(np.array([1], np.int64), name="overcrank_one"))
        graph.register_initializer(one)
    bounds = [ir.AttrInt64("start", 2), ir.AttrInt64("end", 3)]
    length = ir.Node("", "Shape", [node.inputs[0]], bounds)
    target = ir.Node("", "Concat", [one, one, length.outputs[0], one], [ir.AttrInt64("axis", 0)])
    expand = ir.Node("", "Expand", [node.inputs[3], target.outputs[0]])
    graph.insert_before(node, [length, target, expand])
    node.replace_input_with(3, expand.outputs[0])


FLOAT8E4M3FN = 17
"""ONNX's TensorProto.DataType."""
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class OrtSession(WithLoras):
    """Runs one graph in fp32; on CPU its parameters share the memory of the tensors they come from.

    It has as many threads as PyTorch has when it is made (torch.set_num_threads, OMP_NUM_THREADS).

    With a GPU provider inputs and outputs pass through host memory: this backend is for
    checking numbers, TensorRT is the fast one.
    """

    backend, engine = "onnxruntime", ""
    replaced: tuple[str, ...] = ()  # in host memory there is nothing to gain
    copies = True

    def __init__(self, model: ir.Model | Path, parameters: Mapping[str, torch.Tensor], device: str = "cpu") -> None:
        """`parameters`: graph input → tensor of the shape the graph declares, or of two fp4 values in a byte."""
        import onnx_ir as ir
        import onnxruntime as ort
        import torch

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # PyTorch's threads work between calls
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # it makes integer products of fp8
        graph = ir.load(model) if isinstance(model, Path) else model
        wide = lower_nvfp4(widen_to_fp32(graph))
        self._scores = Scores(wide) if device == "cpu" else None
        content = ir.to_proto(wide).SerializeToString()
        providers = [p for p in PROVIDERS[device] if p in ort.get_available_providers()]
        try:
            self._session: Any = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:
            raise OvercrankError(f"ONNX Runtime {ort.__version__} cannot load the graph: {error}") from error
        self.outputs = [o.name for o in self._session.get_outputs()]
        self._wanted = {i.name for i in self._session.get_inputs()}
        self._bound = {k: _value(v) for k, v in _unpacked(parameters).items() if k in self._wanted}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named tensors in, named tensors out on the device of the inputs; 16-bit inputs are widened.

        Raises CannotServe for a call that needs more memory on a processor than there is.
        """
        import torch

        if self._scores is not None:
            self._scores.require_room(inputs)
        feeds = self._bound | {k: _value(v) for k, v in inputs.items() if k in self._wanted}
        results = self._session.run_with_ort_values(self.outputs, feeds)
        device = next(iter(inputs.values())).device
        return {name: torch.from_numpy(r.numpy()).to(device) for name, r in zip(self.outputs, results, strict=True)}

    def rebind(self, written: bool) -> bool:
        """What it holds of the module's weights is of when it was made."""
        return False

    def _bind_loras(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._bound = self._bound | {k: _value(v) for k, v in tensors.items() if k in self._wanted}

    def save_kernels(self) -> None:
        """Nothing is compiled."""


def _unpacked(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of four bits widened to fp32, times their block scales."""
    tensors = dict(parameters)
    for name, scale in parameters.items():
        layer, _, role = name.rpartition(".")
        if role == "block_scale":
            tensors[f"{layer}.weight"] = unpacked_fp4(tensors[f"{layer}.weight"], scale)
    return tensors


def _value(tensor: torch.Tensor) -> Any:
    """Shares memory with a tensor on CPU that is not in 16 bit."""
    import onnxruntime as ort
    import torch

    here = tensor.detach().contiguous().cpu()
    if here.dtype == torch.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(here.view(torch.uint8).numpy(), FLOAT8E4M3FN)
    if here.dtype in (torch.float16, torch.bfloat16):
        here = here.float()
    return ort.OrtValue.ortvalue_from_numpy(here.numpy())
