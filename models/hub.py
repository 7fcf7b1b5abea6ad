"""The checkpoint of a model: which repositories, revisions and files, from the hub's cache or the network.

What is whole in the cache is used as it is, without any network access. What is missing is listed first, its size
told and the disk looked at, and then fetched, each file going on where it stopped. HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE mean what they mean to the hub's own client.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overcrank.errors import ModelError, RenderCancelled, StoreError
from overcrank.models import _hub_joined, _hub_transfer
from overcrank.models._hub_files import INDEX, OPTIONAL, part_files, parts_in, text_files
from overcrank.models._hub_transfer import Item, cache, storage
from overcrank.models.base import Repository, Variant
from overcrank.models.registry import family
from overcrank.options import option
from overcrank.units import human_bytes

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Called with what will be fetched, in words, and its bytes, before anything is; what it gives takes bytes done."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Wanted:
    """What is taken of a checkpoint's repositories."""

    parts: frozenset[str] = frozenset()
    """None being all."""
    elsewhere: frozenset[str] = frozenset()
    """Parts whose weights come from elsewhere: their configurations alone are taken."""


@dataclass
class Snapshot:
    """A repository at a commit: where it lies in the cache, and which files a render takes from it."""

    source: Repository
    folder: Path
    files: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    missing: list[Item] = field(default_factory=list)


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """On stderr, as diffusers has them."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=text) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


@contextmanager
def unwatched(text: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def hub_folder(
    variant: Variant, whole: bool = False, *, home: Path, watch: Watch = unwatched, elsewhere: Collection[str] = ()
) -> Path:
    """The variant's checkpoint as a diffusers folder.

    Holds the parts that become engines, or with `whole` all that a pipeline needs; of parts whose weights come from
    `elsewhere`, the configurations alone. A checkpoint that comes from several repositories is put together of links
    under `home`. Raises ModelError for what cannot be found or fetched, StoreError for a disk that is too small.
    """
    if variant.hub_file:
        raise ModelError(
            f"{variant.name} is published as one file ({variant.hub_id}: {variant.hub_file}); convert it with "
            f"diffusers (from_single_file, save_pretrained) and give the folder as {option('model')}."
        )
    if not variant.sources:
        raise ModelError(f"No repository of {variant.name} is known; give its diffusers folder as {option('model')}.")
    every = family(variant.family).components(variant) if not whole else ()
    parts = frozenset(name for c in every for name in (c.subfolder, *c.also_serves))
    wanted = Wanted(parts, frozenset(elsewhere))
    snapshots = [_cached(source, wanted) or _listed(variant, source, wanted) for source in variant.sources]
    _fetch_all(variant, snapshots, watch)
    if not variant.repositories or (len(snapshots) == 1 and not snapshots[0].source.parts):
        return snapshots[0].folder
    return _hub_joined.joined(variant, {s.folder: (s.source, s.parts) for s in snapshots}, home)


def hub_json(source: Repository, file: str) -> dict[str, Any]:
    """A JSON file of a repository, from the cache, else fetched alone."""
    return read_json(one_file(source, file))


def one_file(source: Repository, file: str) -> Path:
    """One file of a repository, from the cache, else fetched; raises ModelError saying why it cannot be."""
    from huggingface_hub import hf_hub_download

    for folder in _snapshots(source):
        if (folder / file).is_file():
            return folder / file
    _require_network(source, source.id)
    try:
        return Path(hf_hub_download(source.id, file, revision=source.revision))
    except Exception as error:
        raise _said(error, source, file) from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object.")
    return content


def published(variant: Variant) -> dict[str, Any]:
    """What is known of the variant's download: licence, gated, bytes, about (a computed size); empty for others."""
    checkpoints: dict[str, dict[str, Any]] = read_json(Path(__file__).parent / "checkpoints.json")
    return checkpoints.get(variant.name, {})


# ── what is in the cache ─────────────────────────────────────────────────────────────


def _snapshots(source: Repository) -> Iterator[Path]:
    """Folders of the revision in the cache, under its id or a former one, however they are spelled."""
    names = [storage(name).name.lower() for name in (source.id, *source.former)]
    exact = [storage(name).name for name in (source.id, *source.former)]
    there = sorted(f for f in cache().glob("models--*") if f.name.lower() in names)
    for folder in sorted(there, key=lambda f: (f.name not in exact, names.index(f.name.lower()))):
        commit = source.revision
        if not COMMIT.fullmatch(commit):
            try:
                commit = (folder / "refs" / commit).read_text("utf-8").strip()
            except OSError:
                continue
        if (folder / "snapshots" / commit).is_dir():
            yield folder / "snapshots" / commit


def _cached(source: Repository, wanted: Wanted) -> Snapshot | None:
    """The repository in the cache, if all that is wanted of it is there."""
    for folder in _snapshots(source):
        files = [str(f.relative_to(folder).as_posix()) for f in folder.rglob("*") if f.is_file()]
        with suppress(ModelError):
            return _chosen(source, folder, files, wanted, lambda name, at=folder: read_json(at / name))  # type: ignore[misc]
    return None


def _chosen(
    source: Repository, folder: Path, files: list[str], wanted: Wanted, read: Callable[[str], Mapping[str, Any]]
) -> Snapshot:
    """The files that a render takes."""
    snapshot = Snapshot(source, folder)
    parts = source.parts
    if not parts:
        if INDEX not in files:
            raise ModelError(
                f"{_named(source)} has no {INDEX}: it is not in diffusers' layout; give a diffusers folder as "
                f"{option('model')}."
            )
        parts = parts_in(read(INDEX))
    if INDEX in files:
        snapshot.files = (INDEX,)
    for part in parts:
        inside = part if part != source.top else ""
        absent = not any(f.startswith(f"{inside}/") for f in files) if inside else False
        if (wanted.parts and part not in wanted.parts) or (absent and part in OPTIONAL):
            continue
        if part in wanted.elsewhere:
            snapshot.files += text_files(_named(source), files, part, inside)
        else:
            snapshot.files += part_files(_named(source), files, part, inside, source.files, read)
        snapshot.parts += (part,)
    return snapshot


def _named(source: Repository) -> str:
    return f"'{source.id}'" + (f" at revision '{source.revision}'" if source.revision != "main" else "")


# ── what the hub has ─────────────────────────────────────────────────────────────────


def _listed(variant: Variant, source: Repository, wanted: Wanted) -> Snapshot:
    """The repository as the hub lists it; what decides which weights are taken is fetched here."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    _require_network(source, f"The checkpoint of {variant.name} ({_named(source)})")
    try:
        commit = HfApi().model_info(source.id, revision=source.revision, timeout=_hub_transfer.TIMEOUT).sha
        tree = HfApi().list_repo_tree(source.id, recursive=True, revision=commit)
        files = {f.path: f for f in tree if isinstance(f, RepoFile)}

        def read(name: str) -> Mapping[str, Any]:
            return read_json(Path(hf_hub_download(source.id, name, revision=commit)))

        folder = storage(source.id) / "snapshots" / str(commit)
        snapshot = _chosen(source, folder, list(files), wanted, read)
    except ModelError:
        raise
    except Exception as error:
        raise _said(error, source, INDEX) from error
    for path in snapshot.files:
        if not (folder / path).exists():
            tag = files[path].lfs.sha256 if files[path].lfs else files[path].blob_id
            snapshot.missing.append(Item(source.id, str(commit), path, files[path].size, tag))
    return snapshot


def _fetch_all(variant: Variant, snapshots: list[Snapshot], watch: Watch) -> None:
    """Fetch what is missing of all repositories: configurations first, so that weights mean a whole part."""
    lacking = [s for s in snapshots if s.missing]
    items = {(i.repository, i.tag): i for s in lacking for i in s.missing}
    left = sum(i.missing() for i in items.values())
    if lacking:
        _require_room(variant, left)
        here = sum(i.size for i in items.values()) - left
        told = f" ({human_bytes(here)} of it are here already)" if here else ""
        where = " and ".join(_named(s.source) for s in lacking)
        done = [0]

        def advance(count: int) -> None:
            done[0] += count
            told_of(count)

        whole = human_bytes(left + here)
        with watch(f"{variant.name}: {whole} in {len(items)} files from {where}{told}", left) as told_of:
            for snapshot in lacking:
                _fetch_one(snapshot, advance, lambda: f"{human_bytes(here + done[0])} of {whole}")
    for snapshot in lacking:
        _remember(snapshot)


def _fetch_one(snapshot: Snapshot, advance: Callable[[int], None], progress: Callable[[], str]) -> None:
    light = [i for i in snapshot.missing if i.path.endswith((".json", ".txt"))]
    try:
        _hub_transfer.fetch(light, advance)
        _hub_transfer.fetch([i for i in snapshot.missing if i not in light], advance)
    except ModelError:
        raise
    except KeyboardInterrupt as error:
        raise RenderCancelled(
            f"the download of {_named(snapshot.source)} was cancelled; the same command goes on from there."
        ) from error
    except Exception as error:
        if _hub_transfer.transient(error):
            raise ModelError(
                f"The download of {_named(snapshot.source)} broke off after {progress()} ({_reason(error)}); "
                f"run the same command again: it goes on from there."
            ) from error
        raise _said(error, snapshot.source, "its files") from error


def _remember(snapshot: Snapshot) -> None:
    """Write which commit the revision is, for later runs without a network."""
    if COMMIT.fullmatch(snapshot.source.revision):
        return
    ref = snapshot.folder.parent.parent / "refs" / snapshot.source.revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(snapshot.folder.name, "utf-8")
    except OSError as error:
        raise StoreError(f"{ref} cannot be written: {error.strerror}; correct its permissions.") from error


def _require_room(variant: Variant, needed: int) -> None:
    there = next(folder for folder in (cache(), *cache().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise StoreError(
            f"The checkpoint of {variant.name} needs {human_bytes(needed)} more in {cache()}, where "
            f"{human_bytes(free)} are free; make room there, or set HF_HOME to a folder on a larger disk."
        )


# ── what can go wrong, in a sentence ─────────────────────────────────────────────────


def _require_network(source: Repository, what: str) -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ModelError(
            f"{what} is not in the local hub cache ({cache()}), or not all of it, and HF_HUB_OFFLINE is set: it cannot "
            f"be fetched; unset that, or give a diffusers folder as {option('model')}. {_without(source)}"
        )


def _without(source: Repository) -> str:
    """What works with no download at all."""
    from overcrank.models import closest_family

    nearest = closest_family(source.id)
    build = f"To build engines, {option('model', nearest)} needs no download"
    return f"{build}; to render the demo, leave {option('model')} out."


def _said(error: Exception, source: Repository, file: str) -> ModelError | StoreError:
    """The client's error as what was wrong and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source.id}"
    if _of_token(error):
        return ModelError(
            f"The Hugging Face token cannot be used ({_reason(error)}): set HF_TOKEN anew, or log in with "
            f"`hf auth login`."
        )
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"{_named(source)} is gated: accept its licence at {page}, log in with `hf auth login`, and run the same "
            f"command again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"'{source.id}' has no revision '{source.revision}' at {constants.ENDPOINT}; see its branches at "
            f"{page}/tree/main, or give a diffusers folder as {option('model')}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"There is no repository '{source.id}' at {constants.ENDPOINT}, or it is private: check the name, or log "
            f"in with `hf auth login`. {_without(source)}"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return ModelError(f"{_named(source)} lacks {file}: it is not in diffusers' layout.")
    if isinstance(error, OSError) and error.errno is not None and not _hub_transfer.unreachable(error):
        return StoreError(f"{error.filename or cache()} cannot be written: {error.strerror}; see to that folder.")
    return ModelError(
        f"{_named(source)} is not in the local hub cache, or not all of it, and cannot be fetched from "
        f"{constants.ENDPOINT} ({_reason(error)}); try again later. {_without(source)}"
    )


def _of_token(error: BaseException) -> bool:
    """Whether the token is what is wrong: not text, not readable, or not one that the hub knows."""
    from huggingface_hub import constants, errors

    unreadable = isinstance(error, OSError) and str(error.filename) == str(constants.HF_TOKEN_PATH)
    unknown = "invalid credentials" in str(error).lower() or isinstance(error, errors.LocalTokenNotFoundError)
    return isinstance(error, UnicodeError) or unreadable or unknown


def _reason(error: BaseException) -> str:
    """The cause's first line: the client wraps what happened."""
    inner = error.__cause__ or error
    lines = [line for line in str(inner).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(inner).__name__
