"""Where bundles and cached graphs live, and how files come into being: whole or not at all."""

from __future__ import annotations

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
from overcrank.files import write_errors
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

    def __init__(self, root: Store | Path | str | None = None, bundles: Path | None = None) -> None:
        """`root`: its folder, or another store for the same one [default: $OVERCRANK_HOME, else the user's cache]."""
        if isinstance(root, Store):
            bundles = bundles or root.bundles
        folder = root.root if isinstance(root, Store) else Path(root or default_root()).expanduser()
        self.root: Path = folder.absolute()
        self.bundles: Path = (bundles or self.root / "bundles").absolute()
        self.graphs = self.root / "graphs"

    def prepare(self) -> None:
        """Make the folders; raises StoreError if one cannot be written."""
        for folder in (self.bundles, self.graphs, self.root / "locks"):
            with write_errors(folder):
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
        with self.lock(f"graph-{folder.name}"), write_errors(self.graphs):
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
        with write_errors(bundle):
            gone = bundle.with_name(f".removing-{bundle.name}")
            bundle.rename(gone)
            shutil.rmtree(gone)
