"""The names of tensorrt_rtx that a session calls, over a simulated card."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch

from tests.simulated_tensorrt.card import SCRIBBLE, Card
from tests.simulated_tensorrt.plans import TORCH, Plan, Plans


class DataType(Enum):
    FLOAT = ir.DataType.FLOAT
    HALF = ir.DataType.FLOAT16
    BF16 = ir.DataType.BFLOAT16
    INT64 = ir.DataType.INT64
    INT32 = ir.DataType.INT32
    BOOL = ir.DataType.BOOL
    INT8 = ir.DataType.INT8
    FP8 = ir.DataType.FLOAT8E4M3FN
    FP4 = ir.DataType.FLOAT4E2M1


ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
DynamicShapesKernelSpecializationStrategy = Enum("DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"])


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Any, message: str) -> None: ...


class IRuntimeCache:
    """One word for each shape that kernels were compiled for."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: Any) -> bool:
        words = bytes(memoryview(blob)).decode().split("\n")
        if words[0] != "simulated kernels":
            return False
        self.kernels |= set(words[1:])
        return True

    def serialize(self) -> bytes:
        return "\n".join(["simulated kernels", *sorted(self.kernels)]).encode()

    def reset(self) -> bool:
        self.kernels.clear()
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation, self._cache = ExecutionContextAllocationStrategy.STATIC, IRuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._allocation

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache:
        return self._cache


class Runtime:
    """Takes files of bundles that were registered."""

    def __init__(self, card: Card, plans: Plans, logger: Any) -> None:
        self._card, self._plans, self.logger = card, plans, logger

    def deserialize_cuda_engine(self, plan: Any) -> ICudaEngine | None:
        self._card.require_active()
        found = self._plans.of(plan)
        if found is None:
            self.logger.log(Severity.ERROR, "the plan is of no bundle that was registered")
            return None
        engine = ICudaEngine(self._card, found, self.logger)
        if not self._card.take(len(memoryview(plan)), engine):
            self.logger.log(Severity.ERROR, "CUDA error 2: out of memory")
            return None
        self._card.loads += 1
        return engine


class ICudaEngine:
    def __init__(self, card: Card, plan: Plan, logger: Any) -> None:
        self._card, self._plan, self._logger = card, plan, logger

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._plan.dtypes[name])

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, how: Any) -> IExecutionContext | None:
        self._card.require_active()
        config = how if isinstance(how, IRuntimeConfig) else IRuntimeConfig()
        if config.get_execution_context_allocation_strategy() != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise self._card.fault("a context that takes memory for activations of its own")
        context = IExecutionContext(self._card, self._plan, config, self._logger)
        if not self._card.take(256, context):
            self._logger.log(Severity.ERROR, "CUDA error 2: out of memory")
            return None
        self._card.latest_context = weakref.ref(context)
        return context


class IExecutionContext:
    def __init__(self, card: Card, plan: Plan, config: IRuntimeConfig, logger: Any) -> None:
        self._card, self.plan, self.config, self.logger = card, plan, config, logger
        self.busy = threading.Lock()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._needed: int | None = None  # None: shapes have changed since it was asked
        self._captured: Any = None
        self.tally = SimpleNamespace(runs=0, captures=0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.busy.acquire(blocking=False):
            raise self._card.fault("two threads are in one context")
        try:
            yield
        finally:
            self.busy.release()

    def _require(self, good: bool, sentence: str) -> None:
        if not good:
            raise self._card.fault(f"{self.plan.entry.name}: {sentence}")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._alone():
            self._require(memory % self._card.alignment == 0, f"{name} is bound at the misaligned address {memory}")
            if name not in self.plan.dtypes:
                self.logger.log(Severity.ERROR, f"there is no tensor {name}")
                return False
            self.addresses[name] = memory
            return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        with self._alone():
            spec = next(s for s in self.plan.inputs if s.name == name)
            low, high = (b or [d for d in spec.dims if isinstance(d, int)] for b in (spec.min, spec.max))
            inside = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            self._require(inside, f"{name} {list(shape)} is outside {low} … {high}")
            if self.shapes.get(name) != tuple(shape):
                self.shapes[name], self._needed, self._memory = tuple(shape), None, None
            return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        with self._alone():
            if name in self.shapes:
                return self.shapes[name]
            self._require_shapes()
            return self.plan.results(self.shapes)[name]

    def _require_shapes(self) -> None:
        for spec in self.plan.inputs:
            self._require(spec.name in self.shapes, f"the shape of {spec.name} is not set")

    def update_device_memory_size_for_shapes(self) -> int:
        with self._alone():
            self._require_shapes()
            self._needed = self.plan.activations(self.shapes)
            return self._needed

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._alone():
            self._require(memory % self._card.alignment == 0, "activations are at a misaligned address")
            self._memory = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._card.require_active()
        with self._alone():
            return self._run(stream_handle)

    def _run(self, handle: int) -> bool:
        card, plan = self._card, self.plan
        stream = card.streams[handle]
        self._require_shapes()
        self._require(self._needed is not None, "shapes have changed and nobody has asked for the memory they need")
        self._require(self._memory is not None, "no memory for activations was given since shapes were set")
        (address, size), needed = self._memory or (0, 0), self._needed or 0
        self._require(size >= needed, f"{size} bytes were given for activations, and {needed} are needed")
        results = plan.results(self.shapes)
        for name in plan.dtypes:
            self._require(name in self.addresses, f"no address is set for {name}")
        if not self._compiled():
            return False
        self._capture(handle)
        card.touched(address, max(size, 1), stream, writes=True, what="the memory for activations")
        _at(address, (max(size, 1),), torch.uint8).fill_(SCRIBBLE)
        given = {}
        for name, dims in plan.dims.items():
            shape = self.shapes.get(name) or tuple(d for d in dims if isinstance(d, int))
            given[name] = self._tensor(name, shape, stream, writes=False)
        made = plan.run(given)
        for name, shape in results.items():
            target = self._tensor(name, shape, stream, writes=True)
            target.copy_(made[name])
        self.tally.runs += 1
        return True

    def _tensor(self, name: str, shape: tuple[int, ...], stream: Any, *, writes: bool) -> torch.Tensor:
        dtype = TORCH[self.plan.dtypes[name]]
        if self.plan.dtypes[name] == ir.DataType.FLOAT4E2M1:
            shape = (*shape[:-1], shape[-1] // 2)
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        what = f"{name} of {self.plan.entry.name}"
        self._card.touched(self.addresses[name], count, stream, writes=writes, what=what)
        return _at(self.addresses[name], shape, dtype)

    def _compiled(self) -> bool:
        """Kernels of a shape that is new, into memory of TensorRT's own."""
        word = str(sorted(self.shapes.items()))
        cache = self.config.get_runtime_cache()
        if word in cache.kernels:
            return True
        if not self._card.take(1, self):
            self.logger.log(Severity.ERROR, "CUDA error 2: out of memory")
            return False
        cache.kernels.add(word)
        return True

    def _capture(self, handle: int) -> None:
        if self.config.cuda_graph_strategy != CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            return
        self._require(handle != 0, "the default stream cannot be captured")
        now = (dict(self.shapes), dict(self.addresses), self._memory)
        if now != self._captured:
            self._captured = now
            self.tally.captures += 1


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies there; nothing is copied."""
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    content = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return content.view(dtype).view(shape)


def module(card: Card, plans: Plans) -> Any:
    """What stands in the place of `import tensorrt_rtx`."""

    def runtime(logger: Any) -> Runtime:
        return Runtime(card, plans, logger)

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=runtime,
        IRuntimeCache=IRuntimeCache,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        CudaGraphStrategy=CudaGraphStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
        float32=DataType.FLOAT,
        float16=DataType.HALF,
        bfloat16=DataType.BF16,
        int64=DataType.INT64,
        int32=DataType.INT32,
        bool=DataType.BOOL,
        int8=DataType.INT8,
        fp8=DataType.FP8,
        fp4=DataType.FP4,
    )
