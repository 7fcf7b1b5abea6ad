"""Bundles that others have built: `overcrank engines push | search`, and the index, on any fsspec URL.

    URL/blobs/ab/abcdef…      files by SHA-256, so that none is there twice
    URL/entries/BUNDLE.json   one bundle's files: written once, never changed
    URL/index.json            all entries, signed, with a number that only grows

Every push writes its blobs, then its entry, then the index of all entries that are listed, and looks
again: two at a time end with an index that has both. download.py fetches what is published.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from overcrank.engines import envelope
from overcrank.engines.envelope import Signed, read_index_envelope
from overcrank.engines.manifest import (
    LARGEST,
    MANIFEST,
    SIGNATURE,
    Count,
    File,
    FileName,
    Label,
    Manifest,
    check_files,
    file_entry,
    first_of,
    read_manifest,
)
from overcrank.engines.place import SILENCE, SLOWEST, Remote, said
from overcrank.engines.targets import serves
from overcrank.engines.tensorrt import flavour_version
from overcrank.engines.trust import Keyring
from overcrank.errors import IntegrityError, ModelError, StoreError, UserError
from overcrank.models import resolve
from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger("overcrank")
ENTRY_BYTES = 1_000_000
ROUNDS = 20
"""Attempts at an index that has every entry."""
PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between looks at an index that somebody is replacing."""
Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that are there and those in all."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Listed(_Model):
    """A bundle as the index has it; `files` are all of it, manifest and signature among them."""

    name: FileName
    model: Label
    family: Label
    target: Label
    precision: Label
    flavour: Label
    flavour_version: Label
    created: Label
    files: Annotated[list[File], Field(max_length=200)]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def file(self, name: str) -> File:
        """Raises IntegrityError for one that is not there."""
        for file in self.files:
            if file.name == name:
                return file
        raise IntegrityError(f"{self.name} in the index has no {name}.")


class Index(_Model):
    schema_version: Literal[1] = 1
    serial: Count
    updated: Label
    bundles: dict[FileName, Listed]


def blob_path(file: File) -> tuple[str, ...]:
    return ("blobs", file.sha256[:2], file.sha256)


def patience(size: int) -> float:
    """Seconds that so many bytes may take."""
    return 2 * SILENCE + size / SLOWEST


# ── publish ──────────────────────────────────────────────────────────────────────────


def push(remote: Remote, bundles: Sequence[Path], key: str, ring: Keyring, progress: Progress) -> list[Listed]:
    """Sign and publish bundles; raises IntegrityError for one whose files are not what its manifest says.

    What is there already is read, and replaced where its SHA-256 is another.
    """
    published = []
    for bundle in bundles:
        manifest = read_manifest(bundle)
        if wrong := check_files(bundle, manifest):
            raise IntegrityError(f"{bundle.name} is not published: {wrong[0]}; rebuild it.")
        ring.sign(bundle, key)
        listed = listed_as(bundle, manifest)
        for file in listed.files:
            if not _is_whole(remote, file):
                remote.write(bundle / file.name, *blob_path(file))
            progress(f"{bundle.name}/{file.name}", file.bytes, file.bytes)
        remote.write(listed.model_dump_json(indent=1).encode(), "entries", f"{bundle.name}.json")
        published.append(listed)
    _write_index(remote, key, ring)
    return published


def _is_whole(remote: Remote, file: File) -> bool:
    """Whether a blob is there, byte for byte."""
    if remote.size(*blob_path(file)) != file.bytes:
        return False
    digest = hashlib.sha256()
    try:
        for content in remote.open(0, file.bytes, patience(file.bytes), *blob_path(file)).chunks:
            digest.update(content)
    except Exception as error:  # every file system has its own
        log.warning("%s: a blob cannot be read, and is written anew: %s", remote.url, said(error))
        return False
    return digest.hexdigest() == file.sha256


def listed_as(bundle: Path, manifest: Manifest, name: str = "") -> Listed:
    """As an index lists the bundle in a folder, under the folder's name or another.

    Raises UserError for a bundle whose name is none that can be published.
    """
    files = [*manifest.files(), *(file_entry(bundle / name) for name in (MANIFEST, SIGNATURE))]
    about = ("model", "family", "target", "precision", "flavour", "flavour_version", "created")
    try:
        return Listed(name=name or bundle.name, files=files, **{field: getattr(manifest, field) for field in about})
    except ValidationError as error:
        raise UserError(
            f"{bundle.name} cannot be published: {first_of(error)}; give its folder a name of ASCII letters and digits."
        ) from error


def _write_index(remote: Remote, key: str, ring: Keyring) -> None:
    for _ in range(ROUNDS):
        entries = _entries(remote)
        current = _settled_index(remote)
        before = current.serial if current else 0
        index = Index(serial=before + 1, updated=datetime.now(UTC).isoformat(timespec="seconds"), bundles=entries)
        sealed, _keyid = ring.seal(envelope.INDEX, index.model_dump_json().encode(), key)
        remote.write(sealed, "index.json")
        written = _settled_index(remote)
        if written and set(written.bundles) >= set(_entries(remote)):
            return
    raise StoreError(f"{remote.url}: the index kept changing; push again.")


def _settled_index(remote: Remote) -> Index | None:
    """The index, whoever signed it; on a store that does not replace a file at once, when it is whole again."""
    for pause in PAUSES:
        try:
            signed = _read_index(remote)
            return Index.model_validate_json(signed.payload) if signed else None
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
    entries = {}
    for path in sorted(paths):
        name = path.rpartition("/")[2]
        if not name.endswith(".json") or name.startswith("."):
            continue
        with suppress(IntegrityError, ValidationError):
            listed = Listed.model_validate_json(remote.read(ENTRY_BYTES, "entries", name) or b"")
            entries[listed.name] = listed
    return entries


def _read_index(remote: Remote) -> Signed | None:
    content = remote.read(LARGEST, "index.json")
    return None if content is None else read_index_envelope(content, f"{remote.url}/index.json")


# ── find and fetch ───────────────────────────────────────────────────────────────────


def read_index(remote: Remote, ring: Keyring, unsigned: bool = False) -> Index:
    """The index, signed by a trusted publisher (not if `unsigned`) and no older than one that was seen before."""
    signed = _read_index(remote)
    if signed is None:
        raise StoreError(f"{remote.url} has no index.json: nothing is published there.")
    if not unsigned:
        ring.who_signed(signed, f"the index of {remote.url}")
    try:
        index = Index.model_validate_json(signed.payload)
    except ValidationError as error:
        who = "is" if unsigned else "is signed and is"
        raise IntegrityError(
            f"{remote.url}/index.json {who} no index ({first_of(error)}); tell its publisher."
        ) from error
    ring.require_newer(remote.place, index.serial, remember=not unsigned)
    return index


def published_names(model: str) -> set[str]:
    """What `--model` means, as everywhere: the variant that a family's or a variant's name, a folder or an id stands
    for; a name that is none of them is a publisher's own."""
    try:
        return {resolve(model).name}
    except ModelError:
        return {model}


def fitting(index: Index, model: str, card: str, precision: str) -> Listed:
    """The newest bundle that serves a card and this TensorRT, one of the card's own before a portable one.

    Raises UserError with the nearest there is, and the command that builds one.
    """
    build = f"build-engine --model {shlex.quote(model)} --gpu {card} --precision {precision}"
    names = published_names(model)
    alike = [b for b in index.bundles.values() if b.model in names]
    if not alike:
        have = ", ".join(sorted({b.model for b in index.bundles.values()})) or "nothing"
        raise UserError(f"no engine of {' '.join(names)} is published there, but {have}; build it: {build}")
    here = [b for b in alike if serves(b.target, b.precision, card) and b.precision == precision]
    if not here:
        have = ", ".join(sorted({f"{b.target} {b.precision}" for b in alike}))
        raise UserError(f"{model} is published for {have}, not for {card} {precision}; build it: {build}")
    usable = [b for b in here if b.flavour_version == flavour_version(b.flavour)]
    if not usable:
        have = ", ".join(sorted({f"{b.flavour} {b.flavour_version}" for b in here}))
        raise UserError(f"{model} for {card} is published for {have}, which is not installed here; build it: {build}")
    return max(usable, key=lambda b: (b.target == card, b.created))
