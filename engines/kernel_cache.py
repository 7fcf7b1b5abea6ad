"""TensorRT for RTX's runtime cache on disk: kernels compiled for one card and driver, kept from one run to the next.

One file for each engine, major version of the driver and card in the store's `runtime` folder: a SHA-256, then what
IRuntimeCache serializes. TensorRT refuses what another driver or card made; a damaged file is
refused here, since what it holds is code. Either way the kernels are compiled again.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overcrank.engines.store import Store
from overcrank.files import atomic_write, write_errors

SUFFIX = ".kernels"
DIGEST = 32  # bytes of a SHA-256


@dataclass(frozen=True)
class KernelCache:
    store: Store
    name: str

    @property
    def path(self) -> Path:
        return self.store.root / "runtime" / f"{self.name}{SUFFIX}"

    def read(self) -> bytes:
        """What was kept; empty when there is nothing, or it is damaged."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return b""
        digest, blob = content[:DIGEST], content[DIGEST:]
        return blob if hashlib.sha256(blob).digest() == digest else b""

    def write(self, blob: bytes) -> bool:
        """Keep `blob` unless as much is kept already, by this process or another; returns whether it was."""
        self.store.prepare()
        with write_errors(self.path.parent):
            self.path.parent.mkdir(exist_ok=True)
        with self.store.lock(f"runtime-{self.name}"):
            if len(blob) <= len(self.read()):
                return False
            with atomic_write(self.path) as part:
                part.write_bytes(hashlib.sha256(blob).digest() + blob)
        return True


def kept_caches(store: Store) -> list[tuple[KernelCache, int]]:
    """Every runtime cache of the store with its size in bytes, 0 for one that is damaged."""
    names = sorted(p.name.removesuffix(SUFFIX) for p in (store.root / "runtime").glob(f"*{SUFFIX}"))
    return [(file, len(file.read())) for file in (KernelCache(store, name) for name in names)]


def kernel_cache(store: Store, engine: str, card: str, driver: str) -> KernelCache:
    """`engine`: digest of its EngineKey; `card`: its name, as two cards of one architecture share no kernels."""
    return KernelCache(
        store, "-".join((engine[:16], *(re.sub(r"\W+", "_", w) for w in (driver.partition(".")[0], card))))
    )


class Kernels:
    """One session's runtime cache: filled from disk before the context is made, kept when it has grown."""

    def __init__(self, config: Any, file: KernelCache) -> None:
        """`config`: an IRuntimeConfig."""
        self._file, self._config, self._cache = file, config, config.create_runtime_cache()
        content = file.read()
        self.known = bool(content) and bool(self._cache.deserialize(content))
        """Whether kernels of this card and driver were there."""
        if content and not self.known:
            self._file.path.unlink(missing_ok=True)  # another driver's: what comes now may be shorter
        config.set_runtime_cache(self._cache)
        self._size = len(content) if self.known else 0

    def keep(self) -> None:
        """Write what has been compiled since."""
        blob = self._cache.serialize()
        content = b"" if blob is None else bytes(memoryview(blob))
        if len(content) > self._size and self._file.write(content):
            self._size = len(content)
