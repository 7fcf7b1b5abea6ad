"""TensorRT for RTX and TensorRT: an engine on the card, reading the module's own weights.

Parameters are bound where the module keeps them, and activations lie in an arena that all sessions
of a card share. Of an engine that steps call, inputs and outputs have buffers of its own at
addresses that stay, so that TensorRT for RTX can replay a call as a CUDA graph; an engine that is
called once or chunk by chunk, as a VAE's is, reads the caller's tensors where they are and hands
its outputs over. A call is enqueued with no host synchronization, and either completes or leaves
nothing behind. API: TensorRT's IRuntime, ICudaEngine, IRuntimeConfig and IExecutionContext.
"""

from __future__ import annotations

import logging
import mmap
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overcrank.engines.cards import Card
from overcrank.engines.compile import logger_of
from overcrank.engines.kernel_cache import Kernels, kernel_cache
from overcrank.engines.manifest import BundledEngine, Manifest, TensorEntry
from overcrank.engines.module_refusals import ParameterUnfit, Unfit
from overcrank.engines.refusals import (
    BrokenTensorRT,
    CannotServe,
    LoadFailed,
    LoadOutOfMemory,
    OtherTensorRT,
    OutputUnknown,
    OutsideProfile,
    RunFailed,
    ShapeRefused,
    TensorRefused,
)
from overcrank.engines.store import Store
from overcrank.engines.targets import FLAVOUR_TITLES
from overcrank.engines.tensorrt import DISTRIBUTIONS, flavour_version, install_command, load_flavour, too_old
from overcrank.errors import TargetError
from overcrank.runtime.sessions.device import Device, Stream
from overcrank.runtime.sessions.parameters import copied_layers
from overcrank.runtime.sessions.session import WithLoras
from overcrank.runtime.sessions.workspace import Workspace, arena_of, no_room

if TYPE_CHECKING:
    import torch

log = logging.getLogger("overcrank")
ACTIVATIONS = ""  # stands among the names of tensors for the memory that activations are in
NO_MEMORY = re.compile(r"out of memory|outofmemory|cudaErrorMemoryAllocation|bad_alloc", re.IGNORECASE)


class Loaded:
    """An engine on the card, which the sessions of twins share."""

    def __init__(self, trt: Any, file: Path, device: Device) -> None:
        """Raises CannotServe for a file that TensorRT cannot load here."""
        self.logger = logger_of(trt)
        self._file = file
        self._runtime = trt.Runtime(self.logger)  # host code in engines stays disallowed: the default
        device.give_back()
        self.engine = self._runtime.deserialize_cuda_engine(_mapped(file))
        if self.engine is None:
            raise self.refusal()

    def said(self, since: int = 0) -> str:
        """TensorRT's own words, of the errors after the first `since`."""
        errors = self.logger.errors[since:]
        return errors[-1].strip()[:300] if errors else ""

    def refusal(self) -> CannotServe:
        """Why there is no engine, or no context of it."""
        words = self.said()
        return CannotServe((LoadOutOfMemory if NO_MEMORY.search(words) else LoadFailed)(self._file.name, words))


class TrtSession(WithLoras):
    """One component's engine with its execution context; calls of two threads take turns."""

    def __init__(
        self,
        bundled: BundledEngine,
        parameters: Mapping[str, torch.Tensor],
        workspace: Workspace,
        store: Store,
        card: Card,
        measuring: bool = False,
    ) -> None:
        """`parameters`: engine input → a module's parameter or packed tensor.

        `measuring`: kernels for a shape are compiled before its first call returns, not meanwhile. Raises
        CannotServe, naming what this machine lacks, and not lastingly where it is memory.
        """
        entry = bundled.entry
        self.backend, self.engine = bundled.manifest.flavour, entry.key.digest()
        self.replaced = copied_layers(parameters)
        self.copies = bool(self.replaced)
        self._entry, self._workspace = entry, workspace
        trt = _flavour_of(bundled.manifest, card)
        self._device = workspace.device_of(card)
        self._arena = arena_of(self._device)
        self._dtypes = _torch_dtypes(trt)
        self._parameters = dict(parameters)
        self._sizes = {name: tensor.numel() for name, tensor in self._parameters.items()}
        self._steady = not entry.attribute  # a whole module is what steps call; a part of a VAE, once or in chunks
        self._kernels: Kernels | None = None
        with self._device.active():
            self._loaded = workspace.engine(self.engine, lambda: Loaded(trt, bundled.plan, self._device))
            self._context = self._made_context(trt, kernel_cache(store, self.engine, card.name, card.driver), measuring)
            if self._context is None:
                raise self._loaded.refusal()
            self._ready = self._device.stream().mark()  # other streams wait for what this thread has enqueued
        self._lock = threading.RLock()
        self._streams: set[int] = set()  # that wait for it, and are known to use what it reads
        self._last: int | None = None  # stream of the last call
        self._kept: dict[str, torch.Tensor] = {}  # buffers of inputs and outputs whose addresses stay
        self._shapes: dict[str, tuple[int, ...]] = {}  # of inputs, as the context was told
        self._results: dict[str, tuple[int, ...]] = {}  # shapes of outputs that follow from them
        self._needed = 0  # bytes of activations at these shapes
        self._bound: dict[str, tuple[int, int]] = {}  # address and elements that the context was told
        workspace.add(self)

    def _made_context(self, trt: Any, cache: Any, measuring: bool) -> Any:
        """Activations in memory that is given; on TensorRT for RTX also CUDA graphs and kept kernels."""
        engine, managed = self._loaded.engine, trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._device.give_back()
        if not hasattr(trt, "IRuntimeCache"):
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        graphs = trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._steady else graphs.DISABLED
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if measuring else kinds.LAZY
        self._kernels = Kernels(config, cache)
        if not self._kernels.known:
            log.info("compiling the kernels of %s for this card, which later renders find kept", self._entry.name)
        return engine.create_execution_context(config)

    def rebind(self, written: bool) -> bool:
        """Addresses are told at every call; packed weights are of the values that were packed."""
        return not (written and self.copies)

    def _bind_loras(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with self._lock:
            self._parameters |= tensors  # told at the next call, like all that has moved

    def save_kernels(self) -> None:
        """Keep the kernels that were compiled."""
        if self._kernels is not None:
            self._kernels.keep()

    # ── a call ───────────────────────────────────────────────────────────────────────

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named tensors in, named tensors on the card out, enqueued on the current stream.

        Raises CannotServe for a shape outside the profile, parameters that are elsewhere or otherwise than the engine
        takes them, memory that runs out though all that can be is given back, and what TensorRT refuses.
        """
        with self._lock, self._device.active():
            current = self._device.stream()
            stream = current
            if not current.handle:
                stream = self._workspace.side(self._device)
                stream.wait(current.mark())
            try:
                with self._device.over(stream):
                    outputs = self._with_room(inputs, stream)
            except CannotServe as refusal:
                self._forget()
                raise refusal.with_traceback(None) from None  # whose frames would keep what was made for the call
            except BaseException:
                self._forget()
                raise
            finally:
                if stream is not current:
                    current.wait(stream.mark())  # before the caller's tensors can be freed
            if stream is not current:
                for tensor in outputs.values():
                    self._device.used(tensor, current)
            return outputs

    def _with_room(self, inputs: Mapping[str, torch.Tensor], stream: Stream) -> dict[str, torch.Tensor]:
        """When memory runs out, once more with all that can be given back.

        What is raised holds no frame in which tensors were made, so that PyTorch has their memory.
        """
        import torch

        for _ in range(2):
            try:
                return self._run(inputs, stream)
            except torch.OutOfMemoryError:
                needed = self._needed
            self._forget()
            self._workspace.make_room()
        raise CannotServe(no_room(self._entry.name, needed, self._device))

    def _run(self, inputs: Mapping[str, torch.Tensor], stream: Stream) -> dict[str, torch.Tensor]:
        self._follow(stream)
        self._take_shapes(inputs)
        with self._arena.lent(self._needed, stream) as memory:
            self._tell(ACTIVATIONS, memory)
            sources = [self._given(spec.name, inputs[spec.name]) for spec in self._entry.inputs]
            outputs = {name: self._buffer(name, shape) for name, shape in self._results.items()}
            for name, tensor in outputs.items():
                self._tell(name, tensor)
            self._execute(stream)
            del sources  # copies the engine has been told to read, in the order of this stream
            self._last = stream.handle
            return {name: self._copied(t) for name, t in outputs.items()} if self._steady else outputs

    def _execute(self, stream: Stream) -> None:
        import torch

        before = len(self._loaded.logger.errors)
        if self._context.execute_async_v3(stream.handle):
            return
        words = self._loaded.said(before)
        if NO_MEMORY.search(words):
            raise torch.OutOfMemoryError(words)
        raise CannotServe(RunFailed(self._entry.name, words))

    def _take_shapes(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Tell the shapes that are others than before, and learn those of outputs and the bytes for activations."""
        specs = self._entry.inputs
        shapes = {spec.name: tuple(inputs[spec.name].shape) for spec in specs}
        if shapes == self._shapes:
            return
        for spec in specs:
            check_shape(self._entry.name, spec, shapes[spec.name])
        self._forget(parameters=False)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise CannotServe(ShapeRefused(self._entry.name, self._loaded.said(), name, shape))
        for out in self._entry.outputs:
            shape = tuple(self._context.get_tensor_shape(out.name))
            if min(shape, default=0) < 0:
                raise CannotServe(OutputUnknown(self._entry.name, self._loaded.said(), out.name))
            self._results[out.name] = shape
        self._needed = int(self._context.update_device_memory_size_for_shapes())
        self._shapes = shapes

    def _given(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where the engine reads an input: the caller's tensor if it is as the engine takes it, else a copy."""
        device = self._device
        as_it_is = (
            not self._steady
            and device.holds(tensor)
            and tensor.dtype == self._dtype(name)
            and tensor.is_contiguous()
            and tensor.data_ptr() % device.alignment == 0
        )
        source = tensor if as_it_is else self._buffer(name, tuple(tensor.shape))
        if not as_it_is:
            device.copy(source, tensor)
        self._tell(name, source)
        return source

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """New memory; for addresses that stay, that of the last call."""
        if not self._steady:
            return self._device.empty(shape, self._dtype(name))
        if name not in self._kept:
            self._kept[name] = self._device.empty(shape, self._dtype(name))
            self._streams.clear()  # those known do not know it
        return self._kept[name]

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = self._device.empty(tuple(tensor.shape), tensor.dtype)
        self._device.copy(copy, tensor)
        return copy

    def _forget(self, parameters: bool = True) -> None:
        """Free what is kept, and know of nothing that the context has been told."""
        self._kept, self._shapes, self._results, self._needed = {}, {}, {}, 0
        self._bound = {} if parameters else {n: a for n, a in self._bound.items() if n in self._parameters}

    def let_go(self, stream: int | None = None) -> None:
        """Free buffers, unless a call is running or another than `stream` made the last one."""
        if stream not in (None, self._last) or not self._lock.acquire(blocking=False):
            return
        try:
            for name in self._kept:
                self._bound.pop(name, None)
            self._kept.clear()
        finally:
            self._lock.release()

    # ── addresses ────────────────────────────────────────────────────────────────────

    def bind(self) -> None:
        """Tell the context where the module keeps its parameters now.

        Raises CannotServe for one that is elsewhere, in another type, layout or size than the engine takes.
        """
        with self._lock:
            for name, tensor in self._parameters.items():
                self._check(name, tensor)
                self._tell(name, tensor)
            stream = self._device.stream()
            stream.wait(self._ready)
            self._ready = stream.mark()  # what has put them there was enqueued here
            self._streams.clear()

    def _follow(self, stream: Stream) -> None:
        """Bind anew what has moved, and let a stream that is new here wait for what others have enqueued."""
        addresses = self._bound
        if any(name not in addresses or t.data_ptr() != addresses[name][0] for name, t in self._parameters.items()):
            self.bind()
        if stream.handle not in self._streams:
            stream.wait(self._ready)
            for tensor in (*self._parameters.values(), *self._kept.values()):
                self._device.used(tensor, stream)
            self._streams.add(stream.handle)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        """A parameter as the engine takes it; what is not may be later, such as when its module is moved back."""
        dtype, alignment = self._dtype(name), self._device.alignment
        if not self._device.holds(tensor):
            why = ParameterUnfit(Unfit.PLACE, name, str(tensor.device))
        elif not tensor.is_contiguous():
            why = ParameterUnfit(Unfit.LAYOUT, name)
        elif tensor.dtype != dtype and (tensor.dtype.is_floating_point or dtype.itemsize != tensor.itemsize):
            why = ParameterUnfit(Unfit.TYPE, name, str(tensor.dtype), str(dtype))
        elif tensor.numel() != self._sizes[name]:
            why = ParameterUnfit(Unfit.SIZE, name, str(tensor.numel()), str(self._sizes[name]))
        elif tensor.data_ptr() % alignment:
            why = ParameterUnfit(Unfit.ADDRESS, name, wanted=str(alignment))
        else:
            return
        raise CannotServe(why)

    def _tell(self, name: str, tensor: torch.Tensor) -> None:
        """An address that the context does not know yet."""
        address = self._device.address(tensor)
        told = address, tensor.numel()
        if self._bound.get(name) == told:
            return
        self._bound.pop(name, None)
        if name == ACTIVATIONS:
            self._context.set_device_memory(address, tensor.numel())
        elif not self._context.set_tensor_address(name, address):
            raise CannotServe(TensorRefused(self._entry.name, self._loaded.said(), name))
        self._bound[name] = told

    def _dtype(self, name: str) -> torch.dtype:
        return self._dtypes[self._loaded.engine.get_tensor_dtype(name)]


def _flavour_of(manifest: Manifest, card: Card) -> Any:
    """The module of the flavour the bundle was built with, in that very version, on a driver that it runs on."""
    flavour, built_with = manifest.flavour, manifest.flavour_version
    if why := too_old(flavour, card.driver):
        raise CannotServe(why)
    version = flavour_version(flavour)
    if version != built_with:
        title, install = FLAVOUR_TITLES.get(flavour, flavour), install_command(flavour, built_with)
        raise CannotServe(OtherTensorRT(title, built_with, version or "", install))
    try:
        return load_flavour(flavour)
    except TargetError as error:
        raise CannotServe(BrokenTensorRT(DISTRIBUTIONS[flavour], built_with, str(error).rstrip("."))) from error


def _mapped(file: Path) -> mmap.mmap:
    """The file as a buffer that the system reads page by page: the plan is never a copy in RAM."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def check_shape(component: str, spec: TensorEntry, shape: tuple[int, ...]) -> None:
    """Raise CannotServe when an input's shape lies outside the engine's profile."""
    if spec.min is None or spec.max is None:
        return
    inside = len(shape) == len(spec.min) and all(
        low <= n <= high for low, n, high in zip(spec.min, shape, spec.max, strict=True)
    )
    if not inside:
        raise CannotServe(OutsideProfile(component, spec.name, shape, tuple(spec.min), tuple(spec.max)))


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
