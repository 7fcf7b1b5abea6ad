"""Where bundles and cached graphs live, and how files come into being: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from overcrank.engines.manifest import MANIFEST, Manifest, read_manifest
from overcrank.errors import IntegrityError, StoreError
from overcrank.export.cache import CachedGraph, cached_graph, graph_digest
from overcrank.models.base import Component


def default_root() -> Path:
    """$OVERCRANK_HOME, or overcrank's folder in the user's cache."""
    home = os.environ.get("OVERCRANK_HOME")
    if home:
        return Path(home).expanduser()
    from platformdirs import user_cache_path

    return Path(user_cache_path("overcrank"))


class Store:
    """A folder of bundles, cached graphs and work in progress."""

    def __init__(self, root: Path | None = None, bundles: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()
        self.bundles = (bundles or self.root / "bundles").absolute()
        self.graphs = self.root / "graphs"

    def prepare(self) -> None:
        """Make the folders; raises StoreError if one cannot be written."""
        for folder in (self.bundles, self.graphs, self.root / "locks"):
            with store_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        with FileLock(self.root / "locks" / f"{name}.lock"):
            yield

    def graph(self, component: Component, precision: str) -> CachedGraph:
        """The component's graph from the cache, exported into it the first time."""
        self.prepare()
        folder = self.graphs / graph_digest(component, precision)[:16]
        with self.lock(f"graph-{folder.name}"), store_errors(self.graphs):
            return cached_graph(component, precision, folder)

    def staging(self, key: str) -> Path:
        """Work in progress of one bundle; survives a kill, so the next run resumes from it."""
        return self.bundles / f".building-{key[:16]}"

    def find(self, key: str) -> Path | None:
        for path in self.bundles.glob(f"*-{key[:16]}"):
            if (path / MANIFEST).is_file():
                return path
        return None

    def list(self) -> list[tuple[Path, Manifest | IntegrityError]]:
        """Every bundle with its manifest, or with what is wrong with it."""
        found: list[tuple[Path, Manifest | IntegrityError]] = []
        for path in sorted(p.parent for p in self.bundles.glob(f"[!.]*/{MANIFEST}")):
            try:
                found.append((path, read_manifest(path)))
            except IntegrityError as error:
                found.append((path, error))
        return found

    def resolve(self, name: str) -> Path:
        """A bundle by path, by name, or by a part of its name that only one bundle has."""
        path = Path(name).expanduser()
        if (path / MANIFEST).is_file():
            return path
        if path.is_dir() and os.sep in name:
            raise StoreError(f"{path} is not a bundle: it has no {MANIFEST}.")
        hits = [p for p, _ in self.list() if name in p.name]
        exact = [p for p in hits if p.name == name]
        if len(exact or hits) == 1:
            return (exact or hits)[0]
        what = "several bundles match" if hits else "no bundle matches"
        listed = ", ".join(p.name for p in hits) if hits else "'overcrank engines list' shows what there is"
        raise StoreError(f"{what} '{name}' in {self.bundles}: {listed}.")

    def remove(self, bundle: Path) -> None:
        """Out of sight first, then deleted: a killed removal leaves no half bundle."""
        with store_errors(bundle):
            gone = bundle.with_name(f".removing-{bundle.name}")
            bundle.rename(gone)
            shutil.rmtree(gone)


@contextmanager
def store_errors(path: Path, instead: str = "--store or --out") -> Iterator[None]:
    """An OSError while writing becomes one sentence about `path`; `instead` is the option that moves it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(f"The disk that holds {path} is full; free space or give {instead} elsewhere.") from error
        if error.errno == errno.EEXIST:
            raise StoreError(
                f"{path} cannot be a folder: a file of that name is in the way; give another {instead}."
            ) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"{path} cannot be written ({reason}); give a writable {instead}.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that is synced and renamed to it on success, else removed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with store_errors(path):
        try:
            yield part
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
