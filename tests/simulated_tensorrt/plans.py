"""What an engine of the simulated runtime computes: a bundle's graph in ONNX Runtime, in fp32."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from overcrank.engines.manifest import ComponentEntry, TensorEntry, read_manifest
from overcrank.export.quantization.packing import unpacked_fp4
from overcrank.runtime.sessions.ort import widen_to_fp32
from overcrank.runtime.sessions.ort_fp4 import lower_nvfp4

FP8 = 17  # ONNX's TensorProto.FLOAT8E4M3FN
Shapes = Mapping[str, tuple[int, ...]]


class Plan:
    """One component of a bundle; loaded when it is asked for."""

    def __init__(self, graph: Path, entry: ComponentEntry) -> None:
        self.graph, self.entry = graph, entry
        self.lock = threading.Lock()
        self._session: Any = None
        self._shapes: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, tuple[int, ...]]] = {}
        model = ir.load(graph)
        if entry.compute == "fp32":
            widen_to_fp32(model)
        self.dtypes = {v.name or "": v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
        self.dims = {v.name or "": tuple(v.shape or ()) for v in model.graph.inputs}
        self.outputs = [v.name or "" for v in model.graph.outputs]

    @property
    def inputs(self) -> list[TensorEntry]:
        """Those that a call gives; the others are parameters."""
        return self.entry.inputs

    def results(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for shapes of the inputs, as the graph itself gives them on zeros."""
        key = tuple(sorted(shapes.items()))
        if key not in self._shapes:
            zeros = {}
            for name, dims in self.dims.items():
                dtype = torch.uint8 if self.dtypes[name] == ir.DataType.FLOAT4E2M1 else TORCH[self.dtypes[name]]
                length = [d for d in dims if isinstance(d, int)]
                if dtype == torch.uint8 and name not in shapes:
                    length[-1] //= 2
                zeros[name] = torch.zeros(shapes.get(name, tuple(length)), dtype=dtype)
            self._shapes[key] = {name: tuple(t.shape) for name, t in self.run(zeros).items()}
        return self._shapes[key]

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of all inputs, parameters among them, the outputs in fp32 or their own type that is none of 16 bit."""
        with self.lock:
            if self._session is None:
                options = ort.SessionOptions()
                options.log_severity_level = 3
                options.intra_op_num_threads = 1
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                content = ir.to_proto(lower_nvfp4(widen_to_fp32(ir.load(self.graph)))).SerializeToString()
                self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        given = dict(tensors)
        for name, scale in tensors.items():
            layer, _, role = name.rpartition(".")
            if role == "block_scale":
                given[f"{layer}.weight"] = unpacked_fp4(tensors[f"{layer}.weight"], scale)
        wanted = {i.name for i in self._session.get_inputs()}
        feeds = {name: _fed(t) for name, t in given.items() if name in wanted}
        made = self._session.run_with_ort_values(self.outputs, feeds)
        return {name: torch.from_numpy(r.numpy()) for name, r in zip(self.outputs, made, strict=True)}

    def activations(self, shapes: Shapes) -> int:
        """Bytes at these shapes: the share that the inputs have of the profile's largest."""
        whole = sum(_count(spec.max or [d for d in spec.dims if isinstance(d, int)]) for spec in self.inputs)
        here = sum(_count(shapes[spec.name]) for spec in self.inputs)
        return -(-(self.entry.activation_bytes or 0) * here // max(whole, 1) // 256) * 256


def _count(shape: Any) -> int:
    return int(np.prod(list(shape), dtype=np.int64))


def _fed(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint8).numpy(), FP8)
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return ort.OrtValue.ortvalue_from_numpy(wide.detach().numpy())


TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT4E2M1: torch.uint8,
}

_READ: dict[tuple[str, str], Plan] = {}  # by graph and engine, for all tests of a process


class Plans:
    """Bundles whose engine files the simulated runtime takes, found by what is in them."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Path, ComponentEntry]] = {}

    def register(self, bundle: Path) -> Path:
        for entry in read_manifest(bundle).components:
            self.add(bundle, entry)
        return bundle

    def add(self, folder: Path, entry: ComponentEntry) -> None:
        self._known[entry.engine.sha256] = folder / entry.graph.name, entry

    def of(self, plan: Any) -> Plan | None:
        found = self._known.get(hashlib.sha256(memoryview(plan)).hexdigest())
        if found is None:
            return None
        key = found[1].graph.sha256, found[1].engine.sha256
        if key not in _READ:
            _READ[key] = Plan(*found)
        return _READ[key]
