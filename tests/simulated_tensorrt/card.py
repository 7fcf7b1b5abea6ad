"""A card in host memory: `runtime.device.Device` with every byte, address and order looked at."""

from __future__ import annotations

import bisect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64
"""What PyTorch's allocator gives on a processor: what comes from it is aligned, as on a card, and a slice is not."""
POISON, SCRIBBLE = 0xCD, 0xA5
QUARANTINE = 128 * 2**20
"""Bytes of freed memory that are kept from being given out again, so that a stale address is found out."""
PLENTY = 2**40


class Fault(Exception):
    """What the real runtime would let pass, or crash at."""


Stamp = tuple[int, int]  # stream, and the number of what was enqueued there


class Stream:
    """A queue that runs what it is given at once, and knows what of other streams it has waited for."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.seen: dict[int, int] = {handle: 0}

    def enqueued(self) -> Stamp:
        self.seen[self.handle] += 1
        return self.handle, self.seen[self.handle]

    def mark(self) -> dict[int, int]:
        return dict(self.seen)

    def wait(self, event: dict[int, int]) -> None:
        for stream, number in event.items():
            self.seen[stream] = max(self.seen.get(stream, 0), number)

    def after(self, stamp: Stamp) -> bool:
        return self.seen.get(stamp[0], 0) >= stamp[1]


@dataclass
class Region:
    """Memory that has an owner: the card's, or a tensor of PyTorch's that somebody has told the address of."""

    start: int
    size: int
    owner: StorageWeakRef | None = None  # of PyTorch's own memory
    backing: Any = None  # of the card's
    stream: int = 0  # it was allocated on
    known: set[int] = field(default_factory=set)  # streams whoever frees it waits for
    written: Stamp | None = None
    read: dict[int, int] = field(default_factory=dict)  # stream → number of the last reading
    freed: bool = False

    @property
    def alive(self) -> bool:
        return not self.freed and (self.owner is None or not self.owner.expired())

    @property
    def end(self) -> int:
        return self.start + self.size


class Card:
    """Counts what is allocated; `fail_at` n lets the n-th allocation from now on fail, `fails_on` all after it too."""

    alignment = ALIGNMENT

    def __init__(self, capacity: int = PLENTY) -> None:
        self.capacity = capacity
        self.allocated = self.peak = self.cached = self.engines = 0
        """Bytes: of tensors now and at most, kept by PyTorch's allocator, taken by TensorRT itself."""
        self.allocations = 0
        self.fail_at: int | None = None
        self.fails_on = False
        self.loads = 0
        """Engines that were deserialized."""
        self.faults: list[str] = []
        self.latest_context: Callable[[], Any] = lambda: None
        """The context that was made last, while somebody holds it."""
        self._lock = threading.RLock()
        self._regions: dict[int, Region] = {}
        self._starts: list[int] = []
        self._host: dict[int, StorageWeakRef] = {}
        self._quarantine: list[Region] = []
        self._default = Stream(0)
        self._handles = itertools.count(1)
        self.streams: dict[int, Stream] = {0: self._default}
        self._local = threading.local()

    def fault(self, sentence: str) -> Fault:
        self.faults.append(sentence)
        return Fault(sentence)

    # ── Device ───────────────────────────────────────────────────────────────────────

    @contextmanager
    def active(self) -> Iterator[None]:
        self._local.active = getattr(self._local, "active", 0) + 1
        try:
            yield
        finally:
            self._local.active -= 1

    def require_active(self) -> None:
        """On a machine with several cards TensorRT works on the one that is current."""
        if not getattr(self._local, "active", 0):
            raise self.fault("TensorRT is called while another card may be the current one")

    def stream(self) -> Stream:
        return getattr(self._local, "stream", self._default)

    def new_stream(self) -> Stream:
        with self._lock:
            made = Stream(next(self._handles))
            self.streams[made.handle] = made
            return made

    @contextmanager
    def over(self, stream: Any) -> Iterator[None]:
        before = self.stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def holds(self, tensor: torch.Tensor) -> bool:
        there = self._host.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None
        return tensor.device.type == "cpu" and (there is None or there.expired())

    def address(self, tensor: torch.Tensor) -> int:
        with self._lock:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            known = self._regions.get(start)
            if known is None or not known.alive:
                self._add(Region(start, storage.nbytes(), StorageWeakRef(storage)))
            return tensor.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self._lock:
            size = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            self._counted(size, "PyTorch")
            backing = np.full(size + ALIGNMENT, POISON, np.uint8)
            offset = -backing.ctypes.data % ALIGNMENT
            view = backing[offset : offset + size]
            region = Region(view.ctypes.data, size, backing=backing, stream=self.stream().handle)
            region.known.add(region.stream)
            self._add(region)
            weakref.finalize(view, self._freed, region)
            self.allocated += size
            self.peak = max(self.peak, self.allocated + self.engines)
            return torch.from_numpy(view)[: size - size % dtype.itemsize].view(dtype).view(shape)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            self.touched(self.address(target), target.nbytes, self.stream(), writes=True, what="the target of a copy")
            if self.holds(source):
                self.touched(self.address(source), 1, self.stream(), writes=False, what="the source of a copy")
            target.copy_(source)

    def used(self, tensor: torch.Tensor, stream: Any) -> None:
        with self._lock:
            region = self._regions.get(tensor.untyped_storage().data_ptr())
            if region is not None:
                region.known.add(stream.handle)

    def memory(self) -> tuple[int, int]:
        return self.capacity - self.allocated - self.cached - self.engines, self.capacity

    def give_back(self) -> None:
        self.cached = 0

    # ── what the runtime asks ────────────────────────────────────────────────────────

    def take(self, size: int, owner: object) -> bool:
        """Memory of TensorRT's own, which what PyTorch keeps is not free for; returned with `owner`."""
        with self._lock:
            try:
                self._counted(size, "TensorRT")
            except torch.OutOfMemoryError:
                return False
            self.engines += size
            self.peak = max(self.peak, self.allocated + self.engines)
            weakref.finalize(owner, self._returned, size)
            return True

    def touched(self, address: int, size: int, stream: Stream, *, writes: bool, what: str) -> None:
        """`stream` reads or writes there; raises Fault where it may not."""
        with self._lock:
            region = self._at(address, size, what)
            stamp = stream.enqueued()
            if region.written is not None and not stream.after(region.written):
                done = "overwrites" if writes else "reads"
                raise self.fault(f"stream {stream.handle} {done} {what} before stream {region.written[0]} wrote it")
            if writes:
                for reader in region.read.items():
                    if not stream.after(reader):
                        raise self.fault(f"stream {stream.handle} overwrites {what} while stream {reader[0]} reads it")
                region.written, region.read = stamp, {}
            else:
                region.read[stamp[0]] = stamp[1]

    def _at(self, address: int, size: int, what: str) -> Region:
        there = self._host.get(address)
        if there is not None and not there.expired():
            raise self.fault(f"{what} is in host memory")
        at = bisect.bisect_right(self._starts, address) - 1
        region = self._regions[self._starts[at]] if at >= 0 else None
        if region is None or address >= region.end:
            raise self.fault(f"{what} has an address that nobody was given: {address}")
        if not region.alive:
            raise self.fault(f"{what} has been freed")
        if address + size > region.end:
            raise self.fault(f"{what} has {region.end - address} bytes and is taken for {size}")
        return region

    # ── bookkeeping ──────────────────────────────────────────────────────────────────

    def _counted(self, size: int, who: str) -> None:
        """One allocation; raises OutOfMemoryError where there is no room, or it is to fail."""
        self.allocations += 1
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at == 0 or (self.fail_at < 0 and self.fails_on):
                raise torch.OutOfMemoryError(f"simulated: {who} has no {size} bytes")
        kept = self.cached if who == "TensorRT" else 0  # PyTorch's allocator gives its own back when it must
        if self.allocated + self.engines + kept + size > self.capacity:
            raise torch.OutOfMemoryError(f"simulated: {who} has no {size} bytes")
        if who == "PyTorch":
            self.cached = max(0, min(self.cached - size, self.capacity - self.allocated - self.engines - size))

    def _add(self, region: Region) -> None:
        at = bisect.bisect_left(self._starts, region.start)
        while at < len(self._starts) and self._starts[at] < region.end:  # expired ones that it lies on
            del self._regions[self._starts.pop(at)]
        self._starts.insert(at, region.start)
        self._regions[region.start] = region
        at -= 1
        if at >= 0 and self._regions[self._starts[at]].end > region.start:
            del self._regions[self._starts.pop(at)]

    def _freed(self, region: Region) -> None:
        with self._lock:
            stream = self.streams[region.stream]
            users = {*([region.written] if region.written else []), *region.read.items()}
            for user in users:
                if user[0] not in region.known and not stream.after(user):
                    self.faults.append(f"memory of stream {region.stream} is freed while stream {user[0]} may use it")
            region.backing[:] = POISON
            region.freed = True
            self.allocated -= region.size
            self.cached += region.size
            self._quarantine.append(region)
            while sum(r.size for r in self._quarantine) > QUARANTINE:
                old = self._quarantine.pop(0)
                if self._regions.get(old.start) is old:
                    del self._regions[old.start]
                    self._starts.remove(old.start)

    def _returned(self, size: int) -> None:
        with self._lock:
            self.engines -= size

    # ── moves of modules ─────────────────────────────────────────────────────────────

    def send_away(self, module: torch.nn.Module) -> None:
        """As `.to("cpu")` does on a machine with a card."""
        for tensor in (*module.parameters(), *module.buffers()):
            if self.holds(tensor):
                tensor.data = self.sent_away(tensor.data)

    def bring(self, module: torch.nn.Module) -> None:
        """As `.to("cuda")` does: each parameter into memory of its own on the card."""
        for tensor in (*module.parameters(), *module.buffers()):
            here = self._regions.get(tensor.untyped_storage().data_ptr())
            if here is None or here.backing is None or not here.alive:
                tensor.data = self.brought(tensor.data)

    def sent_away(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self._host[storage.data_ptr()] = StorageWeakRef(storage)
        return copy

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the card."""
        own = self.empty(tuple(tensor.shape), tensor.dtype)
        self.copy(own, tensor)
        return own
