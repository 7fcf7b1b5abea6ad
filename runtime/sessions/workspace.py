"""Device memory that sessions share: activations in one arena for each card, engines, and what lies between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

from overcrank.engines.cards import Card
from overcrank.engines.refusals import OutOfMemory
from overcrank.runtime.sessions import device as devices
from overcrank.runtime.sessions.device import Device, Stream

if TYPE_CHECKING:
    import torch


class Arena:
    """One buffer for the activations of whatever runs on a card, as large as the largest needs.

    Jobs take turns: who gets the buffer enqueues behind an event of whoever had it before. So a
    denoiser and a VAE, of one job or of two, need the larger of their activations, not the sum.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._buffer: torch.Tensor | None = None
        self._streams: set[int] = set()  # that use the buffer
        self._last: tuple[int, Any] | None = None  # stream that had it last, and the event when it was done

    @contextmanager
    def lent(self, size: int, stream: Stream) -> Iterator[torch.Tensor]:
        """At least `size` bytes for what is enqueued on `stream` within; raises torch.OutOfMemoryError."""
        with self._lock:
            if self._last is not None and self._last[0] != stream.handle:
                stream.wait(self._last[1])
            buffer = self._sized(max(size, 1))
            if stream.handle not in self._streams:
                self._device.used(buffer, stream)
                self._streams.add(stream.handle)
            try:
                yield buffer
            finally:
                self._last = stream.handle, stream.mark()

    def _sized(self, size: int) -> torch.Tensor:
        import torch

        if self._buffer is None or self._buffer.numel() < size:
            self._drop()  # freed before the larger one is taken
            self._buffer = self._device.empty((size,), torch.uint8)
        return self._buffer

    def _drop(self) -> None:
        self._buffer = None
        self._streams.clear()

    def release(self, stream: int | None = None) -> None:
        """Back to PyTorch, unless another than `stream` had it last and may want it again [default: in any case]."""
        with self._lock:
            if stream is None or (self._last is not None and self._last[0] == stream):
                self._drop()


_ARENAS: WeakKeyDictionary[Device, ref[Arena]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def arena_of(device: Device) -> Arena:
    """The card's, whichever pipeline asks; it lasts as long as a session has it."""
    with _LOCK:
        reference = _ARENAS.get(device)
        arena = reference() if reference is not None else None
        if arena is None:
            arena = Arena(device)
            _ARENAS[device] = ref(arena)
        return arena


class Holder(Protocol):
    """A session, as the workspace sees it."""

    def let_go(self, stream: int | None = None) -> None:
        """Free what it keeps between calls, unless another than `stream` called it last."""


class Workspace:
    """What the sessions of one pipeline share besides the card's arena."""

    def __init__(self, device: Device | None = None) -> None:
        """`device` [default: that of the card its sessions are made for]."""
        self._device = device
        self._side: Stream | None = None
        self._lock = threading.Lock()
        self._engines: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._sessions: WeakSet[Holder] = WeakSet()

    def device_of(self, card: Card) -> Device:
        if self._device is None:
            self._device = devices.device_of(card.index)
        return self._device

    def side(self, device: Device) -> Stream:
        """In the place of the default stream, which cannot be captured into a CUDA graph."""
        with self._lock:
            if self._side is None:
                self._side = device.new_stream()
            return self._side

    def engine(self, digest: str, load: Callable[[], Any]) -> Any:
        """The engine that another session has loaded, such as its twin's; kept while one uses it."""
        with self._lock:
            engine = self._engines.get(digest)
            if engine is None:
                engine = self._engines[digest] = load()
            return engine

    def add(self, session: Holder) -> None:
        self._sessions.add(session)

    def release(self) -> None:
        """A stage has ended: what only this thread's job used goes back to PyTorch."""
        if self._device is not None:
            current = self._device.stream()
            handle = current.handle if current.handle or self._side is None else self._side.handle
            self._release(handle)

    def make_room(self) -> None:
        """All that can be made again goes back to the card, whoever used it last."""
        if self._device is not None:
            self._release(None)
            self._device.give_back()

    def _release(self, stream: int | None) -> None:
        if self._device is None:
            return
        for session in list(self._sessions):
            session.let_go(stream)
        arena_of(self._device).release(stream)


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, now that PyTorch has given back what it had kept, and all there are."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


def out_of_memory(component: str, device: torch.device) -> OutOfMemory:
    """Of a call outside TensorRT; a later, smaller one may be served."""
    return OutOfMemory(component, 0, *memory_of(device))


def no_room(component: str, needed: int, device: Device) -> OutOfMemory:
    """As `out_of_memory`, told by a session; `needed`: bytes for activations."""
    device.give_back()
    return OutOfMemory(component, needed, *device.memory())
