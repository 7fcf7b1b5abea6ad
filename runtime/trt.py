"""TensorRT for RTX and TensorRT: an engine on the card, reading the module's own weights.

Inputs are copied into buffers whose addresses are bound once, parameters are bound where
the module keeps them, and everything runs on PyTorch's current stream with no host
synchronization. API: TensorRT's IRuntime, ICudaEngine and IExecutionContext.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.flavours import flavour_version, load_flavour
from overcrank.engines.manifest import ComponentEntry, TensorEntry
from overcrank.engines.targets import FLAVOUR_TITLES
from overcrank.errors import TargetError
from overcrank.runtime.session import CannotServe

if TYPE_CHECKING:
    import torch


class TrtSession:
    """One component's engine with its execution context; not for two threads at once."""

    def __init__(
        self,
        flavour: str,
        built_with: str,
        bundle: Path,
        entry: ComponentEntry,
        parameters: Mapping[str, torch.Tensor],
        rebuild: str,
    ) -> None:
        """`parameters`: engine input → a module's parameter or packed tensor; `rebuild`: the command that fixes."""
        self.backend, self.engine = flavour, entry.key.digest()
        self._entry, self._rebuild = entry, rebuild
        found = flavour_version(flavour)
        if found != built_with:
            installed = f"{found} is installed" if found else "it is not installed"
            raise CannotServe(
                f"the engine was built with {FLAVOUR_TITLES[flavour]} {built_with} and {installed}", rebuild
            )
        try:
            trt = load_flavour(flavour)
        except TargetError as error:
            raise CannotServe(str(error).rstrip("."), "repair the installation with pip") from error
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)  # host code in engines stays disallowed: the default
        self._engine = self._runtime.deserialize_cuda_engine((bundle / entry.engine.name).read_bytes())
        self._context = self._engine and self._engine.create_execution_context()
        if self._context is None:
            raise CannotServe(f"{entry.engine.name} could not be loaded on this card", rebuild)
        self._dtypes = _torch_dtypes(trt)
        self._parameters = dict(parameters)
        self._bound: dict[str, int] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._check_dtypes()

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named CUDA tensors in, named CUDA tensors out, enqueued on the current stream."""
        import torch

        self._bind_parameters()
        for spec in self._entry.inputs:
            self._bind_input(spec, inputs[spec.name])
        outputs = {}
        for out in self._entry.outputs:
            shape = tuple(self._context.get_tensor_shape(out.name))
            device = next(iter(inputs.values())).device
            outputs[out.name] = torch.empty(shape, dtype=self._dtype(out.name), device=device)
            self._context.set_tensor_address(out.name, outputs[out.name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise CannotServe(f"the engine of {self._entry.name} failed while running", self._rebuild)
        return outputs

    def _bind_input(self, spec: TensorEntry, tensor: torch.Tensor) -> None:
        import torch

        shape = tuple(tensor.shape)
        buffer = self._buffers.get(spec.name)
        if buffer is None or tuple(buffer.shape) != shape or buffer.device != tensor.device:
            check_shape(self._entry.name, spec, shape, self._rebuild)
            buffer = torch.empty(shape, dtype=self._dtype(spec.name), device=tensor.device)
            if not self._context.set_input_shape(spec.name, shape):
                raise CannotServe(f"the engine of {self._entry.name} refuses {spec.name} {list(shape)}", self._rebuild)
            self._context.set_tensor_address(spec.name, buffer.data_ptr())
            self._buffers[spec.name] = buffer
        buffer.copy_(tensor)

    def _bind_parameters(self) -> None:
        """The engine reads the module's storage; its address changes only when the module is moved."""
        for name, tensor in self._parameters.items():
            address = tensor.data_ptr()
            if self._bound.get(name) != address:
                self._context.set_tensor_address(name, address)
                self._bound[name] = address

    def _check_dtypes(self) -> None:
        for name, tensor in self._parameters.items():
            wanted = self._dtype(name)
            if not tensor.is_contiguous():
                raise CannotServe(f"the pipeline holds {name} in another memory format", "keep it contiguous")
            if tensor.dtype != wanted:
                raise CannotServe(
                    f"the engine takes {name} as {wanted} and the pipeline holds it as {tensor.dtype}",
                    f"load the pipeline with dtype={wanted}",
                )

    def _dtype(self, name: str) -> torch.dtype:
        return self._dtypes[self._engine.get_tensor_dtype(name)]


def check_shape(component: str, spec: TensorEntry, shape: tuple[int, ...], rebuild: str) -> None:
    """Raise CannotServe when an input's shape lies outside the engine's profile."""
    if spec.min is None or spec.max is None:
        return
    inside = len(shape) == len(spec.min) and all(
        low <= n <= high for low, n, high in zip(spec.min, shape, spec.max, strict=True)
    )
    if not inside:
        raise CannotServe(
            f"{component}: {spec.name} {list(shape)} lies outside the engine's profile {spec.min} … {spec.max}",
            f"{rebuild} with --max-height, --max-width or --max-frames large enough",
            lasting=False,
        )


def _torch_dtypes(trt: Any) -> dict[Any, torch.dtype]:
    import torch

    return {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int64: torch.int64,
        trt.int32: torch.int32,
        trt.bool: torch.bool,
        trt.int8: torch.int8,
        trt.fp8: torch.float8_e4m3fn,
        trt.fp4: torch.uint8,  # two values in a byte
    }
