"""Bytes from the hub into its cache: each file goes on where it stopped, also in a later run.

The client of the hub (huggingface_hub) begins a file anew when its process was killed; with files of 10 GB that is
hours. So the bytes are fetched here, to where the client looks for them, and the client puts the name on them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError
from overcrank.files import user_path

WORKERS, ATTEMPTS, PAUSE, TIMEOUT = 4, 5, 1.0, 20.0  # seconds; attempts are counted anew when bytes came
CHUNK = 1 << 20


@dataclass(frozen=True)
class Item:
    """A file to fetch; `tag` names its bytes in the cache: SHA-256 of a large file, git's hash of another."""

    repository: str
    commit: str
    path: str
    size: int
    tag: str

    def blob(self) -> Path:
        return storage(self.repository) / "blobs" / self.tag

    def partial(self) -> Path:
        return self.blob().with_name(f"{self.tag}.overcrank.incomplete")

    def missing(self) -> int:
        """Bytes that are not here yet."""
        if self.blob().is_file():
            return 0
        there = self.partial().stat().st_size if self.partial().is_file() else 0
        return max(0, self.size - there)


class Stopped(Exception):
    """Another file's failure, or Ctrl-C, ended this one."""


def cache() -> Path:
    from huggingface_hub import constants

    return user_path(constants.HF_HUB_CACHE)


def storage(repository: str) -> Path:
    """The cache's folder of a repository."""
    return cache() / f"models--{repository.replace('/', '--')}"


def fetch(items: Sequence[Item], advance: Callable[[int], None]) -> None:
    """Fetch all, several at a time; `advance` is told of bytes as they come. Errors are the client's own."""
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        work = [pool.submit(_fetch, item, advance, stop) for item in items]
        try:
            for done in as_completed(work):
                done.result()
        except BaseException:
            stop.set()
            for each in work:
                each.cancel()
            raise


def _fetch(item: Item, advance: Callable[[int], None], stop: threading.Event) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    lock = cache() / ".locks" / storage(item.repository).name / f"{item.tag}.lock"  # the client's own
    for folder in (lock.parent, item.blob().parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(str(lock)):
        if not item.blob().exists():
            _fill(item, advance, stop)
    hf_hub_download(item.repository, item.path, revision=item.commit)


def _fill(item: Item, advance: Callable[[int], None], stop: threading.Event) -> None:
    """The file's bytes, complete, at `item.blob()`."""
    part, resumed, failures = item.partial(), item.partial().exists(), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _stream(item, part, advance, stop)
            break
        except Exception as error:
            came = part.exists() and part.stat().st_size > before
            failures, resumed = (1 if came else failures + 1), True
            if not transient(error) or failures >= ATTEMPTS or stop.is_set():
                raise
            stop.wait(PAUSE)
    size = part.stat().st_size
    if size != item.size or (resumed and len(item.tag) == 64 and _sha256(part) != item.tag):
        part.unlink()
        raise ModelError(
            f"{item.repository}: {item.path} did not arrive as it was sent ({size:,} bytes of {item.size:,}); "
            f"what came was removed: run the same command again."
        )
    part.replace(item.blob())


def _stream(item: Item, part: Path, advance: Callable[[int], None], stop: threading.Event) -> None:
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(item.repository, item.path, revision=item.commit)
    place: Any = get_hf_file_metadata(url).location  # anew each time: addresses of large files expire
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if place.partition("://")[2].partition("/")[0] != url.partition("://")[2].partition("/")[0]:
        headers.pop("authorization", None)  # another host has no business with the token
    there = part.stat().st_size if part.exists() else 0
    if there >= item.size:
        return
    if there:
        headers["Range"] = f"bytes={there}-"
    with get_session().stream("GET", place, headers=headers, timeout=TIMEOUT) as answer:
        hf_raise_for_status(answer)
        again = there and answer.status_code != 206  # the server sends it from the start
        with part.open("wb" if again else "ab") as file:
            if again:
                advance(-there)
            for chunk in answer.iter_bytes(CHUNK):
                if stop.is_set():
                    raise Stopped
                file.write(chunk)
                advance(len(chunk))


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the line or the server failed, not the request."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return status in (408, 429) or status >= 500 or unreachable(error)


def unreachable(error: BaseException) -> bool:
    """Whether no answer came, or it broke off; the client's library of HTTP has its own tree of errors."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    own = any(c.__name__ == "TransportError" for c in type(error).__mro__)
    return own or isinstance(error, ConnectionError | TimeoutError)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
