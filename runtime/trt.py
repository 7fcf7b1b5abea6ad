"""TensorRT for RTX and TensorRT: an engine on the card, reading the module's own weights.

Inputs and outputs have buffers whose addresses are bound once, so that TensorRT for RTX can
replay a call as a CUDA graph; parameters are bound where the module keeps them; activations
are in a workspace that sessions share. A call is enqueued with no host synchronization.
API: TensorRT's IRuntime, ICudaEngine, IRuntimeConfig and IExecutionContext.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.calibration.recipe import ATTENTION
from overcrank.engines.cards import Card
from overcrank.engines.compile import logger_of
from overcrank.engines.flavours import flavour_version, load_flavour
from overcrank.engines.manifest import ComponentEntry, Manifest, TensorEntry
from overcrank.engines.store import Store
from overcrank.engines.targets import FLAVOUR_TITLES
from overcrank.errors import TargetError
from overcrank.runtime.kernel_cache import Kernels, kernel_cache
from overcrank.runtime.session import CannotServe
from overcrank.runtime.workspace import Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger("overcrank")


class TrtSession:
    """One component's engine with its execution context; not for two threads at once."""

    def __init__(
        self,
        manifest: Manifest,
        bundle: Path,
        entry: ComponentEntry,
        parameters: Mapping[str, torch.Tensor],
        workspace: Workspace,
        rebuild: str,
        store: Store,
        card: Card,
    ) -> None:
        """`parameters`: engine input → a module's parameter or packed tensor; `rebuild`: the command that fixes."""
        self.backend, self.engine = manifest.flavour, entry.key.digest()
        self.replaced = tuple(name for name, form in entry.formats.items() if form.kind != ATTENTION)
        self.copies = bool(self.replaced)
        self._entry, self._rebuild, self._workspace = entry, rebuild, workspace
        trt = _flavour_of(manifest, rebuild)
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)  # host code in engines stays disallowed: the default
        self._engine = self._runtime.deserialize_cuda_engine(_mapped(bundle / entry.engine.name))
        if self._engine is None:
            raise CannotServe(f"{entry.engine.name} could not be loaded on this card{self._reason()}", rebuild)
        self._kernels: Kernels | None = None
        self._context = self._made_context(trt, store, card)
        if self._context is None:
            raise CannotServe(f"{entry.engine.name} could not be prepared on this card{self._reason()}", rebuild)
        self._dtypes = _torch_dtypes(trt)
        self._parameters = dict(parameters)
        self._bound: dict[str, int] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._needed = 0  # bytes of activations at the shapes bound now
        self._side: Any = None
        self._check_dtypes()

    def _made_context(self, trt: Any, store: Store, card: Card) -> Any:
        """Activations in memory that is given; on TensorRT for RTX also CUDA graphs and kept kernels."""
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "IRuntimeCache"):
            return self._engine.create_execution_context(managed)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels = Kernels(config, kernel_cache(store, self.engine, card.name, card.driver))
        if not self._kernels.known:
            log.info("compiling the kernels of %s for this card, which later renders find kept", self._entry.name)
        return self._engine.create_execution_context(config)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named CUDA tensors in, named CUDA tensors out, enqueued on the current stream."""
        import torch

        device = next(iter(inputs.values())).device
        current = torch.cuda.current_stream(device)
        stream = current
        if current.cuda_stream == 0:  # the default stream cannot be captured into a CUDA graph
            self._side = self._side or torch.cuda.Stream(device)
            stream = self._side
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._bind_parameters(device)
            reshaped = [self._bind_input(spec, inputs[spec.name]) for spec in self._entry.inputs]
            if any(reshaped):
                self._bind_outputs(device)
            memory = self._workspace.take(self._needed, device, stream.cuda_stream, self._entry.name)
            self._bind("", memory)
            if not self._context.execute_async_v3(stream.cuda_stream):
                what = f"the engine of {self._entry.name} failed while running{self._reason()}"
                raise CannotServe(what, "overcrank doctor tests the card")
            made = {name: buffer.clone() for name, buffer in self._outputs.items()}
        if stream is not current:
            current.wait_stream(stream)
            for tensor in made.values():
                tensor.record_stream(current)
        return made

    def _reason(self) -> str:
        """TensorRT's own words."""
        return f" ({self._logger.errors[-1].strip()[:300]})" if self._logger.errors else ""

    def rebind(self, written: bool) -> bool:
        """Addresses are told at every call; packed weights are of the values that were packed."""
        return not (written and self.copies)

    def settle(self) -> None:
        """Keep the kernels that were compiled."""
        if self._kernels is not None:
            self._kernels.keep()

    def _bind_input(self, spec: TensorEntry, tensor: torch.Tensor) -> bool:
        """Copy into the input's buffer; returns whether its shape is another than before."""
        import torch

        shape = tuple(tensor.shape)
        buffer = self._inputs.get(spec.name)
        new = buffer is None or tuple(buffer.shape) != shape or buffer.device != tensor.device
        if new:
            check_shape(self._entry.name, spec, shape, self._rebuild)
            buffer = torch.empty(shape, dtype=self._dtype(spec.name), device=tensor.device)
            if not self._context.set_input_shape(spec.name, shape):
                raise CannotServe(f"the engine of {self._entry.name} refuses {spec.name} {list(shape)}", self._rebuild)
            self._bind(spec.name, buffer)
            self._inputs[spec.name] = buffer
        assert buffer is not None
        buffer.copy_(tensor)
        return new

    def _bind_outputs(self, device: torch.device) -> None:
        """Buffers of the shapes that follow from the inputs', and how much memory activations now need."""
        import torch

        for out in self._entry.outputs:
            shape = tuple(self._context.get_tensor_shape(out.name))
            self._outputs[out.name] = torch.empty(shape, dtype=self._dtype(out.name), device=device)
            self._bind(out.name, self._outputs[out.name])
        self._needed = int(self._context.update_device_memory_size_for_shapes())
        self._bound.pop("", None)

    def _bind_parameters(self, device: torch.device) -> None:
        """The engine reads the module's storage; its address changes only when the module is moved."""
        for name, tensor in self._parameters.items():
            if tensor.data_ptr() != self._bound.get(name) and tensor.device != device:
                raise CannotServe(
                    f"the pipeline holds {name} on {tensor.device} and runs on {device}",
                    "keep the whole part on the card, or let it come and go with --vram low",
                    lasting=False,
                )
            self._bind(name, tensor)

    def _bind(self, name: str, tensor: torch.Tensor) -> None:
        """Tell the context an address that it does not know yet; "" is the activations' memory."""
        address = tensor.data_ptr()
        if self._bound.get(name) == address:
            return
        if name:
            self._context.set_tensor_address(name, address)
        else:
            self._context.set_device_memory(address, tensor.numel())
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


def _flavour_of(manifest: Manifest, rebuild: str) -> Any:
    """The module of the flavour the bundle was built with, in that very version."""
    flavour, built_with = manifest.flavour, manifest.flavour_version
    found = flavour_version(flavour)
    if found != built_with:
        installed = f"{found} is installed" if found else "it is not installed"
        raise CannotServe(
            f"the engine was built with {FLAVOUR_TITLES.get(flavour, flavour)} {built_with} and {installed}", rebuild
        )
    try:
        return load_flavour(flavour)
    except TargetError as error:
        raise CannotServe(str(error).rstrip("."), "repair the installation with pip") from error


def _mapped(file: Path) -> mmap.mmap:
    """The file as a buffer that the system reads page by page: the plan is never a copy in RAM."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


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
