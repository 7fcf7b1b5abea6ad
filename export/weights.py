"""A diffusers checkpoint's values, for engines that carry their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.errors import CheckpointError

if TYPE_CHECKING:
    import onnx_ir as ir

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the module: its input in the graph and its place in the checkpoint."""

    input: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    module_shape: tuple[int, ...]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component folder, complete ones only; a twin such as .fp16 if it lies there alone.

    Raises CheckpointError for a missing, truncated or unreadable file.
    """
    plain = [folder / f"{STEM}.safetensors.index.json", folder / f"{STEM}.safetensors"]
    others = sorted((*folder.glob(f"{STEM}.safetensors.index.*.json"), *folder.glob(f"{STEM}.*.safetensors")))
    first = next((file for file in (*plain, *others) if file.is_file()), None)
    if first is not None and first.suffix == ".json":
        try:
            names = sorted(set(json.loads(first.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{first} is no index of safetensors files; download it again.") from error
        files = tuple(folder / name for name in names)
    else:
        files = (first,) if first else ()
    if not files:
        raise CheckpointError(
            f"{folder} has no {STEM}.safetensors, whose weights are needed here; download the whole checkpoint."
        )
    for file in files:
        _check_complete(file)
    return files


def _check_complete(file: Path) -> None:
    """safetensors: 8 bytes of header length, a JSON header, then exactly the bytes it lists."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; download the checkpoint again.")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("the header is cut off")
            header: dict[str, Any] = json.loads(stream.read(length))
    except ValueError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again.") from error
    for name, entry in header.items():
        if name != "__metadata__" and 8 + length + entry["data_offsets"][1] > size:
            raise CheckpointError(
                f"{file} is truncated: tensor '{name}' ends at byte {8 + length + entry['data_offsets'][1]:,} "
                f"of {size:,}; download it again."
            )


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the content of the files, in order."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


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


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def mapped_tensors(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Any]]]:
    """Name → shape and a reader of every floating tensor in a safetensors file.

    Each reading maps its own bytes and no more, so that memory in use is that of the tensors
    alive; safetensors' own mapping keeps every page that was touched.
    """
    import numpy as np

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))

    def reader(entry: dict[str, Any]) -> Callable[[], Any]:
        def read() -> Any:
            import torch

            start, end = entry["data_offsets"]
            raw = np.memmap(file, np.uint8, "c", offset=8 + length + start, shape=(end - start,))
            return torch.from_numpy(raw).view(getattr(torch, _DTYPES[entry["dtype"]])).reshape(entry["shape"])

        return read

    known = {n: e for n, e in header.items() if n != "__metadata__" and e["dtype"] in _DTYPES}
    return {n: (tuple(e["shape"]), reader(e)) for n, e in known.items()}


def checkpoint_values(files: Iterable[Path], parameters: Iterable[Parameter]) -> Callable[[str], Any]:
    """A reader of the checkpoint's tensors, after checking that it has every parameter.

    Raises CheckpointError naming the first tensor that is missing or of another shape.
    """
    homes: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {}
    listed = list(files)
    for file in listed:
        homes |= mapped_tensors(file)
    for parameter in parameters:
        if parameter.name not in homes:
            raise CheckpointError(
                f"{listed[0].parent} has no tensor '{parameter.name}'; it is of another architecture."
            )
        shape = homes[parameter.name][0]
        if shape != parameter.module_shape:
            raise CheckpointError(
                f"{listed[0].parent}: tensor '{parameter.name}' is {list(shape)}, the architecture needs "
                f"{list(parameter.module_shape)}; check config.json."
            )
    return lambda name: homes[name][1]()
