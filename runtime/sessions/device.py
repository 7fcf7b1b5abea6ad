"""What a TensorRT session asks of a card: the one place between it and CUDA.

Addresses, memory, streams and events. A session has one code path over `Device`; `Cuda` is a thin
layer on torch.cuda, and the tests' simulated runtime has another over host memory, which checks
every address, lifetime and order it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from overcrank.engines.refusals import CannotServe, NoCard

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256
"""Bytes: of an address that TensorRT reads or writes. PyTorch's allocator gives 512."""


class Stream(Protocol):
    """A queue of work on the card; `handle` 0 is the default one, which cannot be captured."""

    @property
    def handle(self) -> int: ...

    def mark(self) -> Any:
        """An event: all that was enqueued so far."""

    def wait(self, event: Any) -> None:
        """What is enqueued from now on runs after the event."""


class Device(Protocol):
    """One card."""

    @property
    def alignment(self) -> int:
        """Bytes that an address must be a multiple of."""

    def active(self) -> AbstractContextManager[None]:
        """Calls of TensorRT within are for this card."""

    def stream(self) -> Stream:
        """The one that this thread enqueues on."""

    def new_stream(self) -> Stream:
        """One that can be captured into a CUDA graph."""

    def over(self, stream: Stream) -> AbstractContextManager[None]:
        """What this thread enqueues within goes to `stream`, and what it allocates belongs to it."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this card's memory."""

    def address(self, tensor: torch.Tensor) -> int:
        """Of its first element, to be told to TensorRT."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the current stream; raises torch.OutOfMemoryError."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy, from another device or type too."""

    def used(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`stream` uses memory of another one: who frees it waits for what is enqueued there until then."""

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all there are."""

    def give_back(self) -> None:
        """What PyTorch keeps for later goes back to the card, where TensorRT takes its own memory from."""


@dataclass(frozen=True)
class CudaStream:
    raw: Any  # a torch.cuda.Stream

    @property
    def handle(self) -> int:
        return int(self.raw.cuda_stream)

    def mark(self) -> Any:
        return self.raw.record_event()

    def wait(self, event: Any) -> None:
        self.raw.wait_event(event)


class Cuda:
    """A card through torch.cuda."""

    alignment = ALIGNMENT

    def __init__(self, index: int) -> None:
        """`index`: in PyTorch's order."""
        import torch

        self._place = torch.device("cuda", index)

    @contextmanager
    def active(self) -> Iterator[None]:
        import torch

        with torch.cuda.device(self._place):
            yield

    def stream(self) -> Stream:
        import torch

        return CudaStream(torch.cuda.current_stream(self._place))

    def new_stream(self) -> Stream:
        import torch

        return CudaStream(torch.cuda.Stream(self._place))

    @contextmanager
    def over(self, stream: Stream) -> Iterator[None]:
        import torch

        with torch.cuda.stream(stream.raw):  # type: ignore[attr-defined]
            yield

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self._place

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=dtype, device=self._place)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def used(self, tensor: torch.Tensor, stream: Stream) -> None:
        tensor.record_stream(stream.raw)  # type: ignore[attr-defined]

    def memory(self) -> tuple[int, int]:
        import torch

        free, total = torch.cuda.mem_get_info(self._place)
        return int(free), int(total)

    def give_back(self) -> None:
        import torch

        torch.cuda.empty_cache()


@cache
def device_of(index: int) -> Device:
    """The card with PyTorch's number; one object for it, so that all that runs there shares its arena.

    Raises CannotServe where PyTorch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise CannotServe(NoCard(torch.__version__))
    return Cuda(index)
