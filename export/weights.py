"""A diffusers checkpoint's values, for engines that carry their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError
from overcrank.export.headers import Entry, tensors_in

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Parameter:
    """One parameter of the module: its input in the graph and its place in the checkpoint."""

    input: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    module_shape: tuple[int, ...]


def embed(model: ir.Model, parameters: Iterable[Parameter], values: Callable[[str], Any]) -> None:
    """Turn parameter inputs into initializers whose values are read when the model is saved."""
    import onnx_ir as ir

    inputs = {v.name: v for v in model.graph.inputs}
    for parameter in parameters:
        value = inputs[parameter.input]
        model.graph.inputs.remove(value)
        dtype = ir.DataType[{"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT"}[parameter.dtype]]

        def read(parameter: Parameter = parameter, dtype: ir.DataType = dtype) -> ir.TensorProtocol:
            import torch

            tensor = values(parameter.name).to(getattr(torch, parameter.dtype))
            raw = tensor.flatten().view(torch.uint8).numpy().view(dtype.numpy())
            return ir.Tensor(raw.reshape(parameter.shape), dtype, name=parameter.input)

        value.const_value = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(parameter.shape), name=parameter.input)
        model.graph.register_initializer(value)


TORCH = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
"""safetensors' name of a type whose values are a parameter's own → torch's."""


def checkpoint_values(files: Iterable[Path], parameters: Iterable[Parameter]) -> Callable[[str], Any]:
    """A reader of the checkpoint's tensors, after checking that it has every parameter.

    Each reading maps its own bytes and no more, so that memory in use is that of the tensors alive; safetensors' own
    mapping keeps every page that was touched. Raises CheckpointError naming the first tensor that is missing, of
    another shape, or quantized, as the reader does for one that holds NaN.
    """
    import numpy as np

    listed = list(files)
    tensors = tensors_in(listed)
    shapes = {p.name: p.module_shape for p in parameters}
    if shapes:
        require_values(listed[0].parent, shapes, tensors)

    def read(name: str) -> Any:
        import torch

        entry = tensors[name]
        raw = np.memmap(entry.file, np.uint8, "c", offset=entry.start, shape=(entry.end - entry.start,))
        tensor = torch.from_numpy(raw).view(getattr(torch, TORCH[entry.dtype])).reshape(entry.shape)
        if not bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all()):
            raise CheckpointError(f"{entry.file}: tensor '{name}' holds NaN or infinities; download it again.")
        return tensor

    return read


def require_values(folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Entry]) -> None:
    """Raise CheckpointError naming the first of the tensors in `shapes` that the files do not hold as it is."""
    for name, needed in shapes.items():
        entry = tensors.get(name)
        if entry is None:
            more = sum(other not in tensors for other in shapes) - 1
            others = f" nor {more} others" if more else ""
            raise CheckpointError(
                f"{folder} has no tensor '{name}'{others}, which its config.json asks for; it is of another "
                f"architecture, or was not saved whole{_prefixed(shapes, tensors)}."
            )
        if entry.dtype not in TORCH:
            raise CheckpointError(_quantized(folder, name, entry.dtype, ""))
        if entry.shape != tuple(needed):
            raise CheckpointError(
                f"{folder}: tensor '{name}' is {list(entry.shape)}, the architecture needs {list(needed)}; check "
                f"config.json."
            )
    require_unscaled(folder, shapes, tensors)


def require_unscaled(folder: Path, wanted: Iterable[str], tensors: Mapping[str, Entry]) -> None:
    """Raise CheckpointError for a quantized tensor whose scale lies beside it: its values are not the weight's."""
    names = dict.fromkeys(wanted)
    layers = {n.rpartition(".")[0]: n for n in names if n in tensors and tensors[n].dtype.startswith("F8")}
    for name in tensors:
        if name in names or not layers:
            continue
        beside = next((layers[layer] for layer in _owners(name) if layer in layers), "")
        if beside or _SCALES.search(name):
            weight = beside or next(iter(layers.values()))
            raise CheckpointError(_quantized(folder, weight, tensors[weight].dtype, name))


def _owners(name: str) -> tuple[str, ...]:
    """Layers that a tensor of this name may be about: a.b.scale_weight and a.b.weight.scale are of a.b."""
    layer = name.rpartition(".")[0]
    return (layer, layer.rpartition(".")[0]) if layer.endswith(".weight") else (layer,)


_SCALES = re.compile(r"(^|[._])scaled?([._]|$)|quant|absmax|zero_?point")


def _quantized(folder: Path, name: str, dtype: str, scale: str) -> str:
    scaled = f", with its scale in '{scale}'" if scale else ""
    return (
        f"{folder}: tensor '{name}' is quantized ({dtype}{scaled}); such checkpoints are not read here: take the one "
        f"in bf16 or fp16, and let engines quantize it."
    )


def _prefixed(wanted: Iterable[str], tensors: Iterable[str]) -> str:
    """What is the matter where all names begin with something more, as a trainer or another program writes them."""
    here, names = set(tensors), list(wanted)
    longer = (n.removesuffix(names[0]) for n in here if n.endswith(f".{names[0]}"))
    prefix = next((p for p in longer if all(f"{p}{name}" in here for name in names)), "")
    if not prefix:
        return ""
    return f": all its names begin with '{prefix}'; save it again without that, or with diffusers (save_pretrained)"
