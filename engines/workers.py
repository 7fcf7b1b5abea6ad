"""Who does the work of a build: processes of this machine, one for each task."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, Protocol

from overcrank.engines.worker import BuildJob, Report
from overcrank.errors import CompileError
from overcrank.options import flags_in_use, use_flags

RAM_PER_WORKER = 1_500_000_000
Work = Callable[[BuildJob, Report], None]


class Workers(Protocol):
    count: int
    """How much is done at a time."""

    def submit(self, work: Work, job: BuildJob) -> Future[None]:
        """Do it somewhere; the future raises what the work raised, CompileError if its worker died."""

    def said(self) -> Iterator[tuple[str, str]]:
        """What jobs reported since the last call: title, and what is done."""

    def ram(self) -> int:
        """Bytes in use now; 0 where nobody can tell."""

    def stop(self) -> None:
        """End all work at once."""


def default_workers() -> int:
    """Worker processes by cores and by RAM that is free."""
    import psutil

    fitting = int(psutil.virtual_memory().available // RAM_PER_WORKER)
    return max(1, min(os.cpu_count() or 1, fitting))


class LocalWorkers:
    """`count` processes at a time [default: by cores and RAM].

    Each task has a process of its own: an export's memory is gone before the next compilation
    needs it, and one that dies takes no other with it.
    """

    def __init__(self, count: int | None = None) -> None:
        import psutil

        self.count = count or default_workers()
        self._threads = ThreadPoolExecutor(self.count, "build")
        self._context = multiprocessing.get_context("spawn")
        self._messages = self._context.Queue()
        self._lock, self._pools, self._stopped = threading.Lock(), set[ProcessPoolExecutor](), False
        self._me = psutil.Process()

    def submit(self, work: Work, job: BuildJob) -> Future[None]:
        return self._threads.submit(self._in_own_process, work, job)

    def _in_own_process(self, work: Work, job: BuildJob) -> None:
        setup = (self._messages, flags_in_use())
        pool = ProcessPoolExecutor(1, mp_context=self._context, initializer=_start_worker, initargs=setup)
        try:
            with self._lock:
                if self._stopped:
                    return
                self._pools.add(pool)
                future = pool.submit(_in_worker, work, job)
            future.result()
        except BrokenProcessPool as error:
            raise died(job) from error
        finally:
            pool.shutdown()
            self._pools.discard(pool)

    def said(self) -> Iterator[tuple[str, str]]:
        with suppress(queue.Empty):
            while True:
                yield self._messages.get_nowait()

    def ram(self) -> int:
        """Of the process tree, pages that processes share counted once (PSS)."""
        import psutil

        total = 0
        for p in [self._me, *self._me.children(recursive=True)]:
            try:
                full = p.memory_full_info()
                total += getattr(full, "pss", full.uss)
            except psutil.Error:
                continue
        return total

    def stop(self) -> None:
        """Workers are in native code that no exception reaches, so they are killed."""
        with self._lock:
            self._stopped = True
            alive = [p for pool in self._pools for p in dict(pool._processes or {}).values()]
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in alive:
            process.kill()
        self._threads.shutdown(wait=True)


def died(job: BuildJob) -> CompileError:
    return CompileError(f"{job.title}: its worker died (out of memory?); the same command resumes what is finished.")


_messages: Any = None


def _start_worker(messages: Any, flags: bool) -> None:
    global _messages
    _messages = messages
    use_flags(flags)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _die_with_parent()


def _die_with_parent() -> None:
    """A killed build must not leave workers running (Linux; elsewhere they end with their job)."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        pass


def _in_worker(work: Work, job: BuildJob) -> None:
    work(job, lambda doing: _messages.put((job.title, doing)))
