"""A published bundle into the store: `overcrank engines pull`.

No more is read than what has been authenticated so far vouches for: the index, whose signature and number were
checked; then the bundle's manifest and signature; then the files that the manifest lists, all in a folder that
nothing reads. Then the folder gets its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from overcrank.engines.manifest import (
    LARGEST,
    MANIFEST,
    PULLED,
    SIGNATURE,
    File,
    Manifest,
    check_files,
    file_entry,
    read_manifest,
)
from overcrank.engines.place import CHUNK, Remote, said
from overcrank.engines.remote import Listed, Progress, blob_path, listed_as, patience
from overcrank.engines.store import Store, pull_lock
from overcrank.engines.trust import SIGNATURE_BYTES, Keyring, is_unsigned
from overcrank.errors import IntegrityError, StoreError
from overcrank.files import atomic_write, commit, remove_tree, write_errors

log = logging.getLogger("overcrank")


def pull(
    remote: Remote, listed: Listed, store: Store, ring: Keyring, progress: Progress, unsigned: bool = False
) -> Path:
    """The bundle in the store, downloaded as far as it is not there whole; raises IntegrityError for anything wrong.

    `unsigned`: the store's user vouches for the place, and takes what nobody trusted has signed.
    """
    _check_listed(listed)
    store.prepare()
    path = store.bundles / listed.name
    with store.lock(pull_lock(listed.name)):
        if _is_usable(path, ring, unsigned):
            return path
        staging = store.pulling(listed.name)
        with write_errors(staging):
            staging.mkdir(exist_ok=True)
        download = _Download(remote, listed, staging, path, progress)
        manifest = download.authenticate(ring, unsigned)
        download.fetch(manifest.files())
        with atomic_write(staging / PULLED) as part:
            part.write_text(json.dumps({"url": remote.url} | ({"unsigned": True} if unsigned else {})), "utf-8")
        if wrong := check_files(staging, manifest):
            shutil.rmtree(staging, ignore_errors=True)
            raise IntegrityError(f"{listed.name}: {wrong[0]}.")
        _replace(path, staging, {MANIFEST, SIGNATURE, PULLED, *(file.name for file in manifest.files())})
    return path


def _is_usable(path: Path, ring: Keyring, unsigned: bool) -> bool:
    """Whether the store has the bundle whole, and as authentic as it is asked for."""
    if not os.path.lexists(path / MANIFEST):
        return False
    try:
        ring.whole(path)
    except IntegrityError as error:
        log.warning("the bundle in the store is fetched anew: %s", error)
        return False
    return unsigned or not is_unsigned(path)


def _replace(path: Path, staging: Path, names: set[str]) -> None:
    """The staged bundle, with these files alone, in place of what is there."""
    with write_errors(path):
        for file in staging.iterdir():
            if file.name not in names:
                file.unlink()
        if os.path.lexists(path):
            remove_tree(path)
        commit(staging, path)


def _check_listed(listed: Listed) -> None:
    names = [file.name for file in listed.files]
    if len(set(names)) != len(names) or not {MANIFEST, SIGNATURE} <= set(names):
        raise IntegrityError(f"{listed.name} in the index lacks its manifest or signature, or has a file twice.")
    if listed.file(MANIFEST).bytes > LARGEST or listed.file(SIGNATURE).bytes > SIGNATURE_BYTES:
        raise IntegrityError(f"{listed.name} in the index has a manifest or signature larger than there are.")


class _Download:
    """One bundle on its way into a folder that nothing reads."""

    def __init__(self, remote: Remote, listed: Listed, staging: Path, earlier: Path, progress: Progress) -> None:
        """`earlier`: a bundle of that name which is damaged or not signed: what is whole of it is not fetched again."""
        self.remote, self.listed, self.staging, self.earlier = remote, listed, staging, earlier
        self.progress, self.resumes = progress, True

    def authenticate(self, ring: Keyring, unsigned: bool) -> Manifest:
        """Fetch manifest and signature alone, and check both against each other and the index."""
        name = self.listed.name
        self.fetch([self.listed.file(MANIFEST), self.listed.file(SIGNATURE)])
        content = (self.staging / MANIFEST).read_bytes()
        try:
            if not unsigned:
                ring.check_content((self.staging / SIGNATURE).read_bytes(), content, name)
            manifest = read_manifest(self.staging)
            if listed_as(self.staging, manifest, name) != self.listed:
                raise IntegrityError(f"{name}: the index describes another bundle than the manifest.")
        except IntegrityError:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        return manifest

    def fetch(self, files: Sequence[File]) -> None:
        """Those that are not there yet; raises StoreError before the first byte where they do not fit on the disk."""
        missing = [file for file in files if not self._is_there(file)]
        needed = sum(file.bytes - self._there(file) for file in missing)
        free = shutil.disk_usage(self.staging).free
        if free < needed:
            raise StoreError(
                f"{self.staging.parent} has {free:,} bytes free, and {self.listed.name} needs {needed:,} more; free "
                f"some space."
            )
        for file in missing:
            self._fetch(file)

    def _part(self, file: File) -> Path:
        return self.staging / f".{file.sha256}.part"

    def _there(self, file: File) -> int:
        part = self._part(file)
        size = part.stat().st_size if part.is_file() else 0
        return size if size <= file.bytes else 0

    def _is_there(self, file: File) -> bool:
        """Whether it is staged, or could be taken from the bundle that is replaced."""
        whole, old = self.staging / file.name, self.earlier / file.name
        if not (whole.is_file() and file_entry(whole) == file):
            if not (old.is_file() and not old.is_symlink() and old.stat().st_size == file.bytes):
                return False
            if file_entry(old) != file:
                return False
            with atomic_write(whole) as part:
                shutil.copyfile(old, part)
        self.progress(file.name, file.bytes, file.bytes)
        return True

    def _fetch(self, file: File) -> None:
        """By its SHA-256, going on where an earlier try ended; never more bytes than are vouched for."""
        whole, part = self.staging / file.name, self._part(file)
        try:
            self._write(file, part)
        except IntegrityError:
            part.unlink(missing_ok=True)
            raise
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{self.remote.url} lacks {file.name}, which its index lists; tell its publisher."
            ) from error
        except Exception as error:  # every file system has its own
            reason = str(error).rstrip(".") if isinstance(error, StoreError) else said(error)
            raise StoreError(f"{file.name}: {reason}; {self._again()}.") from error
        if part.stat().st_size < file.bytes:
            raise StoreError(f"{file.name} ended early; {self._again()}.")
        if file_entry(part).sha256 != file.sha256:
            part.unlink()
            raise IntegrityError(f"{file.name} from {self.remote.url} does not match its SHA-256.")
        commit(part, whole)

    def _again(self) -> str:
        if self.resumes:
            return "the same command goes on from there"
        return "the server cannot resume, so that the same command begins this file anew"

    def _write(self, file: File, part: Path) -> None:
        there = self._there(file)
        if there == file.bytes > 0:
            return
        with write_errors(part):
            part.touch()
        body = self.remote.open(there, file.bytes, patience(file.bytes), *blob_path(file))
        if not body.resumes and self.resumes and file.bytes > CHUNK:
            self.resumes = False
            log.warning("%s cannot resume: a download that is interrupted begins anew", self.remote.url)
        with part.open("r+b") as stream:
            stream.truncate(body.start)
            stream.seek(body.start)
            for content in body.chunks:
                stream.write(content)
                self.progress(file.name, stream.tell(), file.bytes)
