"""Work on a Ray cluster (docs.ray.io) in place of processes of this machine.

Every machine has overcrank installed and sees the store at the same path.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from overcrank.engines.worker import BuildJob
from overcrank.engines.workers import RAM_PER_WORKER, Work, died
from overcrank.errors import OvercrankError, UserError
from overcrank.options import flags_in_use, use_flags

log = logging.getLogger("overcrank")
RETRIES = 3
"""Times that work is done again whose worker was lost."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The `ray` module, connected to the cluster at `address` ("auto": the one that this machine is in).

    Raises UserError when Ray is not installed or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # its notes on lost workers go to stdout, where results go
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray; pip install 'overcrank[ray]' adds it.") from error
    _probe(address)
    try:
        ray.init(address=address, namespace="overcrank", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"--ray {address}: {first}; 'ray start --head' starts a cluster.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Ray itself asks a machine that does not answer for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"--ray {address}: {error}; 'ray start --head' starts a cluster.") from error


class RayWorkers:
    """Builds as tasks of one core and RAM_PER_WORKER each, of a process of their own, done again when that is lost."""

    def __init__(self, ray: Any, count: int | None = None) -> None:
        """`count`: tasks at a time [default: what the cluster has room for]."""
        from ray.util.queue import Queue

        there = ray.cluster_resources()
        if there.get("CPU", 0) < 1 or there.get("memory", 0) < RAM_PER_WORKER:
            have = f"{there.get('CPU', 0):.0f} cores and {there.get('memory', 0) / 1e9:.1f} GB"
            raise UserError(
                f"--ray: the cluster has {have} for work, and a build takes 1 and {RAM_PER_WORKER / 1e9:.1f} GB; "
                f"start its machines with more."
            )
        self._ray, self._messages = ray, Queue(actor_options={"num_cpus": 0})
        self._task = ray.remote(
            num_cpus=1, memory=RAM_PER_WORKER, max_calls=1, max_retries=RETRIES, retry_exceptions=False
        )(_in_task)
        self.count = count or int(there["CPU"])
        self._threads = ThreadPoolExecutor(self.count, "build")
        self._lock, self._refs, self._stopped = threading.Lock(), set[Any](), False

    def submit(self, work: Work, job: BuildJob) -> Future[None]:
        return self._threads.submit(self._on_cluster, work, job)

    def _on_cluster(self, work: Work, job: BuildJob) -> None:
        failed = self._ray.exceptions
        with self._lock:
            if self._stopped:
                return
            ref = self._task.remote(work, job, self._messages, flags_in_use())
            self._refs.add(ref)
        try:
            self._ray.get(ref)
        except failed.RayTaskError as error:
            raise error.cause if isinstance(error.cause, OvercrankError) else error from None
        except (failed.WorkerCrashedError, failed.OutOfMemoryError, failed.TaskCancelledError) as error:
            raise died(job) from error
        finally:
            self._refs.discard(ref)

    def said(self) -> Iterator[tuple[str, str]]:
        return heard(self._messages)

    def ram(self) -> int:
        return 0

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            refs = list(self._refs)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for ref in refs:
            self._ray.cancel(ref, force=True)
        self._threads.shutdown(wait=True)


def heard(messages: Any) -> Iterator[Any]:
    """What was put into a Ray queue since the last call; nothing when it is lost, as progress is no reason to stop."""
    try:
        return iter(messages.get_nowait_batch(messages.qsize()))
    except Exception as error:  # of Ray or of the network
        log.debug("progress is lost: %s", error)
        return iter(())


def _in_task(work: Work, job: BuildJob, messages: Any, flags: bool) -> None:
    use_flags(flags)
    work(job, lambda doing: messages.put((job.title, doing)))
