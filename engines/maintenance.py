"""`overcrank engines fsck` and `gc`: what is wrong in a store, and what can go.

A store holds bundles, and what is made again when it is missing: exported graphs, weight packs, runtime
caches, measurements. "Last used" is the latest access or change of any file, as the file system tells.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from overcrank.engines.kernel_cache import kept_caches
from overcrank.engines.manifest import Manifest, check_files
from overcrank.engines.store import Store
from overcrank.engines.tensorrt import flavour_version
from overcrank.errors import IntegrityError
from overcrank.export.cache import load_cached
from overcrank.files import REMOVING, remove_tree, write_errors
from overcrank.owners import is_abandoned, owner_in

DAY = 86_400.0
UNFINISHED = 1 * DAY
"""Age at which a build that nobody resumed may go, in seconds."""


@dataclass(frozen=True)
class Item:
    """Something in the store, and why it is wrong or can go."""

    path: Path
    why: str

    @property
    def bytes(self) -> int:
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        return sum(f.stat().st_size for f in files)


# ── what is wrong ────────────────────────────────────────────────────────────────────


def find_problems(store: Store) -> Iterator[Item]:
    """Everything that is not what it should be; a build that can be resumed is no flaw."""
    for path, manifest in store.list():
        wrong = [str(manifest)] if isinstance(manifest, IntegrityError) else check_files(path, manifest)
        if wrong:
            yield Item(path, "; ".join(wrong))
    for folder in _folders(store.graphs):
        if load_cached(folder) is None or not _parses(_read_graph, folder / "graph.onnx"):
            yield Item(folder, "its graph cannot be read")
    for file in _files(store.root / "packs", ".safetensors"):
        if not _parses(_read_pack, file):
            yield Item(file, "it is no whole safetensors file")
    for cache, size in kept_caches(store):
        if not size:
            yield Item(cache.path, "it does not match its SHA-256")
    yield from stale_files(store)


def stale_files(store: Store, gone_hosts: frozenset[str] = frozenset()) -> Iterator[Item]:
    """What a killed process left: nothing of it is ever read. What another machine may be writing is no such thing."""
    for path in store.bundles.glob(f"{REMOVING}*"):
        yield Item(path, "its removal was interrupted")
    for part in _parts(store):
        if not _is_written(store, part, gone_hosts):
            yield Item(part, "the process that wrote it is gone")


def _parts(store: Store) -> Iterator[Path]:
    for folder in {store.bundles, *_folders(store.root)}:  # bundles may be elsewhere
        yield from folder.glob(".*.part")


def _is_written(store: Store, part: Path, gone_hosts: frozenset[str]) -> bool:
    if owner_in(part.name) is not None:
        return not is_abandoned(part, part.name, gone_hosts)
    if part.parent == store.graphs:
        return store.is_worked_on(part, gone_hosts)
    return time.time() - _last_used(part) < UNFINISHED  # of a version of overcrank that noted no owner


def unknown_owners(store: Store) -> dict[str, int]:
    """Machine → how many unfinished files of its processes are here, of which nothing can be told from this one."""
    tags = [part.name for part in _parts(store)]
    tags += [file.read_text("ascii", "replace") for file in (store.root / "locks").glob("*.owner")]
    owners = [owner for owner in map(owner_in, tags) if owner is not None and owner.gone() is None]
    return dict(Counter(owner.host for owner in owners))


def _parses(read: Callable[[Path], None], file: Path) -> bool:
    try:
        read(file)
    except Exception:  # whatever a parser makes of damage
        return False
    return True


def _read_graph(file: Path) -> None:
    import onnx

    onnx.load(str(file), load_external_data=False)


def _read_pack(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        opened.keys()


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[!.]*") if p.is_dir())


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"[!.]*{suffix}"))


# ── what can go ──────────────────────────────────────────────────────────────────────


def removable(
    store: Store,
    older: float | None = None,
    size: int | None = None,
    other_versions: bool = False,
    gone_hosts: frozenset[str] = frozenset(),
) -> list[Item]:
    """Leavings, caches of engines that are gone, builds nobody resumed; and what the options name.

    `older`: seconds since it was last used; `size`: bytes that the store may keep, the longest unused going
    first; `other_versions`: bundles that another TensorRT than the installed one made; `gone_hosts`: machines whose
    unfinished work may go, as the user knows that they work no more. Never what a process works on.
    """
    now = time.time()
    items = {item.path: item for item in stale_files(store, gone_hosts)}
    for path in [*store.bundles.glob(".building-*"), *store.bundles.glob(".pulling-*")]:
        if now - _last_used(path) > UNFINISHED:
            items[path] = Item(path, "a build or a download that nobody resumed for a day")
    bundles = [(p, m) for p, m in store.list() if isinstance(m, Manifest)]
    engines = {entry.key.digest()[:16] for _, m in bundles for entry in m.components}
    for cache, _ in kept_caches(store):
        if cache.name.partition("-")[0] not in engines:
            items[cache.path] = Item(cache.path, "its engine is gone")
    if other_versions:
        for path, manifest in bundles:
            if flavour_version(manifest.flavour) != manifest.flavour_version:
                items[path] = Item(path, f"made by {manifest.flavour} {manifest.flavour_version}")
    paths = [p for p in _kept(store) if p not in items]
    if older is not None:
        items |= {p: Item(p, "not used for longer") for p in paths if now - _last_used(p) > older}
    if size is not None:
        rest = sorted((Item(p, "to make room") for p in paths if p not in items), key=lambda i: _last_used(i.path))
        total = sum(item.bytes for item in rest)
        for item in rest:
            if total <= size:
                break
            total -= item.bytes
            items[item.path] = item
    return [item for item in items.values() if not store.is_worked_on(item.path, gone_hosts)]


def _kept(store: Store) -> list[Path]:
    bundles = [path for path, _ in store.list()]
    return [*bundles, *_folders(store.graphs), *_files(store.root / "packs", ".safetensors")]


def _last_used(path: Path) -> float:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(max(f.stat().st_mtime, f.stat().st_atime if f.is_file() else 0.0) for f in files)


def remove(items: Sequence[Item], store: Store, gone_hosts: frozenset[str] = frozenset()) -> int:
    """Bytes that are free now; a folder goes out of sight before it is deleted.

    What a process began to work on since it was listed, which may be a while ago, stays.
    """
    freed = 0
    for item in items:
        if store.is_worked_on(item.path, gone_hosts):
            continue
        size = item.bytes
        with write_errors(item.path):
            if item.path.is_dir() and not item.path.is_symlink():
                remove_tree(item.path)
            else:
                item.path.unlink(missing_ok=True)
        freed += size
    return freed
