"""Bundles that others have built: `overcrank engines push | pull | search` on any fsspec URL.

    URL/blobs/ab/abcdef…      files by SHA-256, so that none is there twice
    URL/entries/BUNDLE.json   one bundle's files: written once, never changed
    URL/index.json            all entries, signed, with a number that only grows

Every push writes its blobs, then its entry, then the index of all entries that are listed, and looks
again: two at a time end with an index that has both. Pulling checks the index's signature and that it
is no older than one seen before, each file's size and SHA-256 and the bundle's own signature, all in a
folder that nothing reads; then the folder gets its name. API: fsspec's AbstractFileSystem.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from overcrank.engines.manifest import LARGEST, MANIFEST, File, Manifest, check_files, file_entry, read_manifest
from overcrank.engines.store import Store
from overcrank.engines.targets import serves
from overcrank.engines.tensorrt import flavour_version
from overcrank.engines.trust import PULLED, SIGNATURE, Keyring, Signature
from overcrank.errors import IntegrityError, StoreError, UserError, quoted
from overcrank.files import atomic_write, write_errors
from pydantic import BaseModel, ConfigDict, ValidationError

CHUNK = 1_000_000
PURPOSE = b"overcrank index 1\n"
ROUNDS = 20
"""Attempts at an index that has every entry."""
PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between looks at an index that somebody is replacing."""
Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that are there and those in all."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listed(_Model):
    """A bundle as the index has it; `files` are all of it, manifest and signature among them."""

    name: str
    model: str
    family: str
    target: str
    precision: str
    flavour: str
    flavour_version: str
    created: str
    files: list[File]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class Index(_Model):
    schema_version: Literal[1] = 1
    serial: int
    updated: str
    bundles: dict[str, Listed]


class _Envelope(_Model):
    """Payload and signature in one file, so that no reader sees one without the other."""

    payload: str
    signature: Signature


@dataclass
class Remote:
    """A place where bundles are published."""

    url: str

    def __post_init__(self) -> None:
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{self.url}: {error}; file, http(s), s3, gs and hf URLs need their fsspec package."
            ) from error
        self.root = root.rstrip("/")

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def read(self, *parts: str) -> bytes | None:
        """A small file; None if there is none."""
        path = self.path(*parts)
        try:
            with self.fs.open(path, "rb") as stream:
                content: bytes = stream.read(LARGEST + 1)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, OSError):  # as fsspec calls a server that does not answer
                raise StoreError(f"{self.url} cannot be read: {error.__cause__}.") from error
            return None
        except Exception as error:  # every file system has its own
            raise StoreError(f"{self.url} cannot be read: {type(error).__name__}: {error}.") from error
        if len(content) > LARGEST:
            raise IntegrityError(f"{path} has more bytes than any such file; it is not what it should be.")
        return content

    def write(self, content: bytes | Path, *parts: str) -> None:
        """Whole or not at all: object stores write so, other file systems rename."""
        path, part = self.path(*parts), self.path(*parts[:-1], f".{parts[-1]}.{_token()}.part")
        try:
            self.fs.makedirs(self.path(*parts[:-1]), exist_ok=True)
            if isinstance(content, Path):
                self.fs.put_file(str(content), part)
            else:
                self.fs.pipe_file(part, content)
            self.fs.mv(part, path, recursive=False)
        except Exception as error:
            with suppress(Exception):  # the disk may be full, and should not stay so
                self.fs.rm_file(part)
            raise StoreError(f"{self.url} cannot be written: {type(error).__name__}: {error}.") from error

    def size(self, *parts: str) -> int | None:
        try:
            found = self.fs.info(self.path(*parts)).get("size")
        except (FileNotFoundError, OSError):
            return None
        return None if found is None else int(found)

    def chunks(self, start: int, *parts: str) -> Iterator[bytes]:
        """A file's bytes from `start` on."""
        with self.fs.open(self.path(*parts), "rb", block_size=CHUNK) as stream:
            if start:
                stream.seek(start)
            while content := stream.read(CHUNK):
                yield content


def _token() -> str:
    import secrets

    return secrets.token_hex(4)


def _blob(file: File) -> tuple[str, ...]:
    return ("blobs", file.sha256[:2], file.sha256)


# ── publish ──────────────────────────────────────────────────────────────────────────


def push(remote: Remote, bundles: Sequence[Path], key: str, ring: Keyring, progress: Progress) -> list[Listed]:
    """Sign and publish bundles; raises IntegrityError for one whose files are not what its manifest says."""
    published = []
    for bundle in bundles:
        manifest = read_manifest(bundle)
        if wrong := check_files(bundle, manifest):
            raise IntegrityError(f"{bundle.name} is not published: {wrong[0]}; rebuild it.")
        ring.sign(bundle, key)
        listed = listed_as(bundle, manifest)
        for file in listed.files:
            if remote.size(*_blob(file)) != file.bytes:
                remote.write(bundle / file.name, *_blob(file))
            progress(f"{bundle.name}/{file.name}", file.bytes, file.bytes)
        remote.write(listed.model_dump_json(indent=1).encode(), "entries", f"{bundle.name}.json")
        published.append(listed)
    _write_index(remote, key, ring)
    return published


def listed_as(bundle: Path, manifest: Manifest) -> Listed:
    files = [file for entry in manifest.components for file in (entry.engine, entry.graph)]
    files += [manifest.recipe] if manifest.recipe else []
    files += [file_entry(bundle / name) for name in (MANIFEST, SIGNATURE)]
    about = ("model", "family", "target", "precision", "flavour", "flavour_version", "created")
    return Listed(name=bundle.name, files=files, **{name: getattr(manifest, name) for name in about})


def _write_index(remote: Remote, key: str, ring: Keyring) -> None:
    for _ in range(ROUNDS):
        entries = _entries(remote)
        known = _settled_index(remote)
        before = known.serial if known else 0
        index = Index(serial=before + 1, updated=datetime.now(UTC).isoformat(timespec="seconds"), bundles=entries)
        payload = index.model_dump_json()
        envelope = _Envelope(payload=payload, signature=ring.signature_of(PURPOSE + payload.encode(), key))
        remote.write(envelope.model_dump_json(indent=1).encode(), "index.json")
        written = _settled_index(remote)
        if written and set(written.bundles) >= set(_entries(remote)):
            return
    raise StoreError(f"{remote.url}: the index kept changing; push again.")


def _settled_index(remote: Remote) -> Index | None:
    """The index, whoever signed it; on a store that does not replace a file at once, when it is whole again."""
    for pause in PAUSES:
        try:
            envelope = _read_envelope(remote)
            return Index.model_validate_json(envelope.payload) if envelope else None
        except (IntegrityError, ValidationError):
            time.sleep(pause)
    raise IntegrityError(f"{remote.url}/index.json is no index of bundles; remove it, and the next push makes it anew.")


def _entries(remote: Remote) -> dict[str, Listed]:
    """Every entry; one that is no entry is left out, so that it cannot keep others from publishing."""
    remote.fs.invalidate_cache()
    try:
        paths = remote.fs.ls(remote.path("entries"), detail=False)
    except FileNotFoundError:
        return {}
    found = {}
    for path in sorted(paths):
        name = path.rpartition("/")[2]
        content = remote.read("entries", name) if name.endswith(".json") and not name.startswith(".") else None
        try:
            listed = Listed.model_validate_json(content or b"")
        except ValidationError:
            continue
        found[listed.name] = listed
    return found


def _read_envelope(remote: Remote) -> _Envelope | None:
    content = remote.read("index.json")
    try:
        return _Envelope.model_validate_json(content) if content is not None else None
    except ValidationError as error:
        raise IntegrityError(f"{remote.url}/index.json is no index of bundles.") from error


# ── find and fetch ───────────────────────────────────────────────────────────────────


def read_index(remote: Remote, ring: Keyring, store: Store, unsigned: bool = False) -> Index:
    """The index, signed by a trusted publisher (not if `unsigned`) and no older than one that was seen before."""
    envelope = _read_envelope(remote)
    if envelope is None:
        raise StoreError(f"{remote.url} has no index.json: nothing is published there.")
    if not unsigned:
        ring.who_signed(PURPOSE + envelope.payload.encode(), envelope.signature, f"the index of {remote.url}")
    try:
        index = Index.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise IntegrityError(f"{remote.url}/index.json is signed and is no index; tell its publisher.") from error
    name = hashlib.sha256(remote.url.rstrip("/").encode()).hexdigest()[:32]
    seen = store.root / "remotes" / name
    store.prepare()
    with write_errors(seen.parent):
        seen.parent.mkdir(exist_ok=True)
    with store.lock(f"remote-{name}"):
        newest = int(seen.read_text()) if seen.is_file() else 0
        if index.serial < newest:
            raise IntegrityError(
                f"the index of {remote.url} is number {index.serial} and number {newest} was seen before: someone "
                f"shows an old one, or it was made anew; remove {seen} if its publisher says so."
            )
        with atomic_write(seen) as part:
            part.write_text(str(index.serial), "utf-8")
    return index


def fitting(index: Index, model: str, card: str, precision: str) -> Listed:
    """The newest bundle that serves a card and this TensorRT, one of the card's own before a portable one.

    Raises UserError with the nearest there is, and the command that builds one.
    """
    build = f"build-engine --model {shlex.quote(model)} --gpu {card} --precision {precision}"
    alike = [b for b in index.bundles.values() if model in (b.model, b.family)]
    if not alike:
        have = ", ".join(sorted({quoted(b.model) for b in index.bundles.values()})) or "nothing"
        raise UserError(f"no engine of {model} is published there, but {have}; build it: {build}")
    here = [b for b in alike if serves(b.target, b.precision, card) and b.precision == precision]
    if not here:
        have = ", ".join(sorted({quoted(f"{b.target} {b.precision}") for b in alike}))
        raise UserError(f"{model} is published for {have}, not for {card} {precision}; build it: {build}")
    usable = [b for b in here if b.flavour_version == flavour_version(b.flavour)]
    if not usable:
        have = ", ".join(sorted({quoted(f"{b.flavour} {b.flavour_version}") for b in here}))
        raise UserError(f"{model} for {card} is published for {have}, which is not installed here; build it: {build}")
    return max(usable, key=lambda b: (b.target == card, b.created))


def pull(
    remote: Remote, listed: Listed, store: Store, ring: Keyring, progress: Progress, unsigned: bool = False
) -> Path:
    """The bundle in the store, downloaded as far as it is not there; raises IntegrityError for anything that is off.

    `unsigned`: the store's user vouches for the place, and takes what nobody trusted has signed.
    """
    _check_listed(listed)
    store.prepare()
    path = store.bundles / listed.name
    with store.lock(f"pull-{hashlib.sha256(listed.name.encode()).hexdigest()[:16]}"):
        if (path / MANIFEST).is_file():
            return path
        staging = store.bundles / f".pulling-{listed.name}"
        with write_errors(staging):
            staging.mkdir(exist_ok=True)
            for file in listed.files:
                _download(remote, file, staging, lambda there, f=file: progress(f.name, there, f.bytes))  # type: ignore[misc]
            with atomic_write(staging / PULLED) as part:
                part.write_text(json.dumps({"url": remote.url} | ({"unsigned": True} if unsigned else {})), "utf-8")
        try:
            manifest = read_manifest(staging)
            wrong = check_files(staging, manifest)
            ring.check(staging)
            if wrong or listed_as(staging, manifest).model_copy(update={"name": listed.name}) != listed:
                raise IntegrityError(f"{listed.name}: {wrong[0] if wrong else 'the index describes another bundle'}.")
        except IntegrityError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        with write_errors(store.bundles):
            staging.rename(path)
    return path


def _check_listed(listed: Listed) -> None:
    names = [listed.name, *(file.name for file in listed.files)]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}", name):
            raise IntegrityError(f"the index has a name that is not allowed: '{quoted(name)}'.")
    if len(set(names)) != len(names) or not {MANIFEST, SIGNATURE} <= set(names):
        raise IntegrityError(f"{listed.name} in the index lacks its manifest or signature, or has a file twice.")
    for file in listed.files:
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256) or file.bytes < 0:
            raise IntegrityError(f"{listed.name}: {file.name} has no SHA-256 or size in the index.")


def _download(remote: Remote, file: File, folder: Path, progress: Callable[[int], None]) -> None:
    """A file by its SHA-256, going on where an earlier try ended; never more bytes than the index says."""
    whole, part = folder / file.name, folder / f".{file.sha256}.part"
    if whole.is_file() and file_entry(whole) == file:
        progress(file.bytes)
        return
    if not part.is_file() or part.stat().st_size > file.bytes:
        part.write_bytes(b"")
    free = shutil.disk_usage(folder).free
    if free < file.bytes - part.stat().st_size:
        raise StoreError(
            f"{folder.parent} has {free:,} bytes free and {file.name} has {file.bytes:,}; free some space."
        )
    try:
        with part.open("ab") as stream:
            there = stream.tell()
            chunks = remote.chunks(there, *_blob(file)) if there < file.bytes else iter(())
            for content in chunks:
                there += len(content)
                if there > file.bytes:
                    raise IntegrityError(f"{file.name} is longer than the index says.")
                stream.write(content)
                progress(there)
    except IntegrityError:
        part.unlink()
        raise
    except FileNotFoundError as error:
        raise IntegrityError(f"{remote.url} lacks {file.name}, which its index lists; tell its publisher.") from error
    except Exception as error:  # every file system has its own
        raise StoreError(
            f"{file.name}: {type(error).__name__}: {error}; the same command goes on from there."
        ) from error
    if there < file.bytes:
        raise StoreError(f"{file.name} ended early; the same command goes on from there.")
    if file_entry(part).sha256 != file.sha256:
        part.unlink()
        raise IntegrityError(f"{file.name} from {remote.url} does not match its SHA-256.")
    part.rename(whole)
