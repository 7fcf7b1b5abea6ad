"""Who made a bundle: ed25519 signatures over its manifest, and the publishers that are trusted here.

A manifest holds the SHA-256 of every file that is read, so a signature over its bytes covers them.
Keys are in `$OVERCRANK_CONFIG`, else in overcrank's folder of the user's configuration: NAME.key is a
private key (PKCS 8, readable by its owner alone), trusted.json the allow-list.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock
from overcrank.engines.manifest import MANIFEST, read_small
from overcrank.errors import IntegrityError, UserError, quoted
from overcrank.files import atomic_write, write_errors
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE = "manifest.sig"
PULLED = "pulled.json"
"""In a bundle that came from elsewhere, and so must be signed."""
WORD = "overcrank-ed25519"
PURPOSE = b"overcrank bundle manifest 1\n"
"""Signed before the manifest: a signature serves for nothing else."""


class Publisher(BaseModel):
    """A public key on the allow-list; one that was revoked stays there, so that it is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    public: str  # base64 of the 32 bytes
    added: str
    revoked: str = ""

    def line(self) -> str:
        """What `keys trust` takes on another machine."""
        return f"{WORD} {self.public} {self.name}"


class Signature(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    key: str  # fingerprint
    name: str
    signature: str  # base64


_LIST = TypeAdapter(dict[str, Publisher])


class Keyring:
    """The keys of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()

    def publishers(self) -> dict[str, Publisher]:
        """By fingerprint; raises UserError for a list that cannot be read: a lost one must not pass for empty."""
        file = self.folder / "trusted.json"
        try:
            return _LIST.validate_json(file.read_bytes()) if file.is_file() else {}
        except (OSError, ValidationError) as error:
            raise UserError(f"{file} cannot be read as a list of trusted keys; fix or delete it.") from error

    def new(self, name: str) -> Publisher:
        """A key pair of one's own, trusted here; raises UserError if there is one of that name."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        _check_name(name)
        file = self.folder / f"{name}.key"
        with self._changing():
            if file.exists():
                raise UserError(f"{file} exists already; choose another name, or revoke and remove it first.")
            key = Ed25519PrivateKey.generate()
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with atomic_write(file) as part:
                part.touch(mode=0o600)
                part.write_bytes(pem)
        return self._add(name, _public(key))

    def trust(self, line: str) -> Publisher:
        """Put a public key, as `Publisher.line` writes it, on the allow-list."""
        words = line.split()
        if len(words) != 3 or words[0] != WORD or not _is_key(words[1]):
            raise UserError(f"'{line[:80]}' is no public key; it looks like '{WORD} BASE64 NAME'.")
        _check_name(words[2])
        return self._add(words[2], words[1])

    def revoke(self, which: str) -> Publisher:
        """By name or the beginning of its fingerprint; bundles it signed are refused from now on."""
        with self._changing():
            known = self.publishers()
            hits = [f for f, p in known.items() if which and (p.name == which or f.startswith(which)) and not p.revoked]
            if len(hits) != 1:
                what = "several trusted keys match" if hits else "no trusted key matches"
                raise UserError(f"{what} '{which}'; 'overcrank keys list' shows them with their fingerprints.")
            known[hits[0]] = known[hits[0]].model_copy(update={"revoked": _now()})
            self._write(known)
        return known[hits[0]]

    def sign(self, bundle: Path, name: str) -> Signature:
        """Write the bundle's signature with one's own key; raises UserError if there is no such key."""
        made = self.signature_of(PURPOSE + read_small(bundle / MANIFEST), name)
        with atomic_write(bundle / SIGNATURE) as part:
            part.write_text(made.model_dump_json(indent=1), "utf-8")
        return made

    def signature_of(self, content: bytes, name: str) -> Signature:
        """With one's own key; `content` begins with what it is signed for. Raises UserError without such a key."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        _check_name(name)
        file = self.folder / f"{name}.key"
        try:
            key = load_pem_private_key(file.read_bytes(), None)
        except OSError as error:
            raise UserError(f"there is no key {file}; make one with 'overcrank keys new {name}'.") from error
        except ValueError as error:
            raise UserError(f"{file} is no ed25519 private key: {error}.") from error
        return Signature(
            key=fingerprint(_public(key)),  # type: ignore[arg-type]
            name=name,
            signature=base64.b64encode(key.sign(content)).decode(),  # type: ignore[union-attr, call-arg, arg-type]
        )

    def check(self, bundle: Path) -> Publisher | None:
        """Who signed a bundle; None for one that was built here, or pulled with --allow-unsigned, and is not signed.

        Raises IntegrityError for a signature that is not valid or of nobody trusted, and for a bundle from
        elsewhere without one.
        """
        file, pulled = bundle / SIGNATURE, bundle / PULLED
        if pulled.exists() and _unsigned_allowed(pulled):
            return None
        if not file.is_file():
            if pulled.exists():
                raise IntegrityError(f"{bundle.name} came from elsewhere and is not signed; ask its publisher to sign.")
            return None
        try:
            found = Signature.model_validate_json(read_small(file))
        except ValidationError as error:
            raise IntegrityError(f"{file} is no signature; get the bundle again.") from error
        return self.who_signed(PURPOSE + read_small(bundle / MANIFEST), found, bundle.name)

    def who_signed(self, content: bytes, found: Signature, what: str) -> Publisher:
        """Raises IntegrityError, naming `what` it is of, for a signature that is not valid or of nobody trusted."""
        who = self.publishers().get(found.key)
        if who is None:
            raise IntegrityError(
                f"{what} is signed by '{quoted(found.name)}' ({quoted(found.key, 16)}), who is not trusted here; "
                f"overcrank keys trust the key that its publisher shows."
            )
        if who.revoked:
            raise IntegrityError(f"{what} is signed by '{who.name}', whose key was revoked {who.revoked}.")
        if not _verifies(who, found, content):
            raise IntegrityError(f"{what}: the signature of '{who.name}' is not of this content; get it again.")
        return who

    def _add(self, name: str, public: str) -> Publisher:
        made = Publisher(name=name, public=public, added=_now())
        with self._changing():
            self._write(self.publishers() | {fingerprint(public): made})
        return made

    def _write(self, known: dict[str, Publisher]) -> None:
        with atomic_write(self.folder / "trusted.json") as part:
            part.write_bytes(_LIST.dump_json(known, indent=1))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with write_errors(self.folder, "$OVERCRANK_CONFIG"):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self.folder / ".lock"):
            yield


def fingerprint(public: str) -> str:
    """SHA-256 of the public key's bytes, in hexadecimal."""
    return hashlib.sha256(base64.b64decode(public)).hexdigest()


def _unsigned_allowed(pulled: Path) -> bool:
    """What its user said when it was pulled."""
    try:
        return json.loads(read_small(pulled)).get("unsigned") is True
    except (ValueError, AttributeError):
        return False


def _verifies(who: Publisher, found: Signature, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(who.public))
    try:
        signature = base64.b64decode(found.signature, validate=True)
        key.verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return base64.b64encode(signature).decode() == found.signature  # one spelling, not several


def _is_key(text: str) -> bool:
    """Whether it is 32 bytes in base64."""
    try:
        return len(base64.b64decode(text, validate=True)) == 32
    except ValueError:
        return False


def _public(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise UserError(f"'{name[:80]}' is no name for a key: use letters, digits, '.', '_', '@' and '-'.")


def _default_folder() -> Path:
    where = os.environ.get("OVERCRANK_CONFIG")
    if where:
        return Path(where).expanduser()
    from platformdirs import user_config_path

    return Path(user_config_path("overcrank"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
