"""Where bundles and cached graphs live, and who works on them."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from overcrank.engines.manifest import MANIFEST, Manifest, read_manifest
from overcrank.errors import IntegrityError, StoreError
from overcrank.export.cache import CachedGraph, cached_graph, graph_digest
from overcrank.files import REMOVING, remove_tree, user_path, write_errors
from overcrank.models.base import Component
from overcrank.options import option
from overcrank.owners import is_abandoned, this_process

PULLING = ".pulling-"


def default_root() -> Path:
    """$OVERCRANK_HOME, or overcrank's folder in the user's cache."""
    home = os.environ.get("OVERCRANK_HOME")
    if home:
        return user_path(home)
    from platformdirs import user_cache_path

    return Path(user_cache_path("overcrank"))


class Store:
    """A folder of bundles, cached graphs and work in progress."""

    def __init__(self, root: Store | Path | str | None = None, bundles: Path | None = None) -> None:
        """`root`: its folder, or another store for the same one [default: $OVERCRANK_HOME, else the user's cache]."""
        if isinstance(root, Store):
            bundles = bundles or root.bundles
        folder = root.root if isinstance(root, Store) else user_path(root or default_root(), option("store"))
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
        """Held by one process at a time, which is noted beside it for machines that do not see its lock."""
        with FileLock(self._lock_file(name)):
            owner = self._owner_file(name)
            with write_errors(owner):
                owner.write_text(this_process().tag(), "ascii")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)

    def _lock_file(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def _owner_file(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.owner"

    def is_worked_on(self, path: Path, gone_hosts: frozenset[str] = frozenset()) -> bool:
        """Whether a process builds, exports, packs or pulls it, or may do so on another machine.

        `gone_hosts`: machines of which the user says that they are gone.
        """
        name = self._lock_of(path)
        lock, owner = self._lock_file(name), self._owner_file(name)
        try:
            text = owner.read_text("ascii", errors="replace")
        except FileNotFoundError:
            text = ""
        if text and not is_abandoned(lock, text, gone_hosts):
            return True
        return lock.is_file() and _is_held(lock)

    def _lock_of(self, path: Path) -> str:
        """Name of the lock under which something in the store comes into being."""
        if path.name.startswith(PULLING):
            return pull_lock(path.name.removeprefix(PULLING))
        if path.parent == self.graphs:
            return f"graph-{path.name.removeprefix('.').removesuffix('.part')}"
        if path.suffix == ".safetensors":
            return f"pack-{path.stem}"
        return path.name.rpartition("-")[2]  # of a bundle, finished or not

    def graph(self, component: Component, precision: str) -> CachedGraph:
        """The component's graph from the cache, exported into it the first time."""
        self.prepare()
        folder = self.graphs / graph_digest(component, precision)[:16]
        with self.lock(f"graph-{folder.name}"), write_errors(self.graphs):
            return cached_graph(component, precision, folder)

    def staging(self, key: str) -> Path:
        """Work in progress of one bundle; survives a kill, so the next run resumes from it."""
        return self.bundles / f".building-{key[:16]}"

    def pulling(self, name: str) -> Path:
        """As `staging`, of a download."""
        return self.bundles / f"{PULLING}{name}"

    def find(self, key: str) -> Path | None:
        for path in self.bundles.glob(f"*-{key[:16]}"):
            if (path / MANIFEST).is_file():
                return path
        return None

    def list(self) -> list[tuple[Path, Manifest | IntegrityError]]:
        """Every bundle with its manifest, or with what is wrong with it.

        Raises StoreError for a store whose bundles this user may not look at.
        """
        listed: list[tuple[Path, Manifest | IntegrityError]] = []
        for path in self._bundle_folders():
            try:
                listed.append((path, read_manifest(path)))
            except IntegrityError as error:
                listed.append((path, error))
        return listed

    def _bundle_folders(self) -> Iterator[Path]:
        try:
            names = sorted(os.listdir(self.bundles))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(
                f"{self.bundles} cannot be read ({error.strerror}); give another {option('store')}."
            ) from error
        for path in (self.bundles / name for name in names if not name.startswith(".")):
            try:
                (path / MANIFEST).lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:  # which reading the manifest will name
                pass
            yield path

    def resolve(self, name: str) -> Path:
        """A bundle by path, by name, or by a part of its name or a pattern (*, ?) that only one bundle fits."""
        path = user_path(name, option("bundle"))
        if _is_file(path / MANIFEST):
            return path
        if os.sep in name and path.is_dir():
            raise StoreError(f"{path} is not a bundle: it has no {MANIFEST}.")
        hits = [p for p, _ in self.list() if name in p.name or fnmatch.fnmatchcase(p.name, name)]
        exact = [p for p in hits if p.name == name]
        if len(exact or hits) == 1:
            return (exact or hits)[0]
        what = "several bundles match" if hits else "no bundle matches"
        listed = ", ".join(p.name for p in hits) if hits else "'overcrank engines list' shows what there is"
        raise StoreError(f"{what} '{name[:200]}' in {self.bundles}: {listed}.")

    def removal(self, name: str) -> Sequence[Path]:
        """A bundle, as `resolve` names it, which may be gone; then what killed removals left of that very name.

        Raises StoreError where there is neither.
        """
        hidden = re.compile(rf"{re.escape(REMOVING)}([0-9a-f]{{8}}-|\d+-)?{re.escape(name)}")
        left = [p for p in self.bundles.glob(f"{REMOVING}*") if hidden.fullmatch(p.name)]
        bundle = self.bundles / name
        return [bundle if left and not _is_file(bundle / MANIFEST) else self.resolve(name), *left]

    def remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with write_errors(path):
                if os.path.lexists(path):
                    remove_tree(path)


def pull_lock(name: str) -> str:
    """Name of the lock under which a bundle is pulled."""
    return f"pull-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long for one, or that its user may not look at
        return False
