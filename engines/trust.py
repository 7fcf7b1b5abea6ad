"""Who made a bundle: ed25519 signatures over its manifest, and the publishers that are trusted here.

A manifest holds the SHA-256 of every file that is read, so a signature of its own SHA-256 covers them.
Keys are in `$OVERCRANK_CONFIG`, else in overcrank's folder of the user's configuration: NAME.key is a
private key (PKCS 8), trusted.json the allow-list, seen.json the newest index seen of each place; only their
owner may read or write them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from filelock import FileLock
from overcrank.engines import envelope
from overcrank.engines.envelope import Signed
from overcrank.engines.manifest import (
    MANIFEST,
    PULLED,
    SIGNATURE,
    Count,
    Label,
    Manifest,
    check_files,
    manifest_of,
    read_manifest,
    read_small,
)
from overcrank.errors import IntegrityError, UserError
from overcrank.files import atomic_write, user_path, write_errors
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

WORD = "overcrank-ed25519"
SIGNATURE_BYTES = 1_000_000
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
OWN = 0o600
"""Mode of every file here."""
P = 2**255 - 19
LOW_ORDER = (0, 1, 0x5FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826)
"""Heights (y) of ed25519's points of order 1 to 8, up to their sign, under which signatures of nobody verify."""
T = TypeVar("T")


class Publisher(BaseModel):
    """A public key on the allow-list; one that was revoked stays there, so that it is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=NAME)]
    public: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]  # base64 of the 32 bytes
    added: Label
    revoked: Label = ""

    def line(self) -> str:
        """What `keys trust` takes on another machine."""
        return f"{WORD} {self.public} {self.name}"


_LIST: TypeAdapter[dict[str, Publisher]] = TypeAdapter(dict[str, Publisher])
_SEEN: TypeAdapter[dict[str, int]] = TypeAdapter(dict[Label, Count])


class Keyring:
    """The keys of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()

    def publishers(self) -> dict[str, Publisher]:
        """By fingerprint; raises UserError for a list that cannot be read: a lost one must not pass for empty."""
        return self._read("trusted.json", _LIST.validate_json, "a list of trusted keys")

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
            publisher = self._with(name, _public(key))
            with atomic_write(file, OWN) as part:
                part.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            self._write(self.publishers() | publisher)
        return publisher[fingerprint(_public(key))]

    def trust(self, line: str) -> Publisher:
        """Put a public key, as `Publisher.line` writes it, on the allow-list.

        Raises UserError for what is no key, or one under which anybody's signature verifies; for one that was
        revoked here; for a name that another key has.
        """
        words = line.split()
        if len(words) != 3 or words[0] != WORD or not _is_key(words[1]):
            raise UserError(f"'{line[:80]}' is no public key; it looks like '{WORD} BASE64 NAME'.")
        if _is_weak(words[1]):
            raise UserError(f"the key of '{words[2][:80]}' is of low order: signatures of nobody verify under it.")
        _check_name(words[2])
        with self._changing():
            publisher = self._with(words[2], words[1])
            self._write(self.publishers() | publisher)
        return publisher[fingerprint(words[1])]

    def revoke(self, which: str) -> Publisher:
        """By name or the beginning of its fingerprint; bundles it signed are refused from now on."""
        with self._changing():
            publishers = self.publishers()
            trusted = {f: p for f, p in publishers.items() if not p.revoked}
            hits = [f for f, p in trusted.items() if which and (p.name == which or f.startswith(which))]
            if len(hits) != 1:
                what = "several trusted keys match" if hits else "no trusted key matches"
                raise UserError(f"{what} '{which}'; 'overcrank keys list' shows them with their fingerprints.")
            publishers[hits[0]] = publishers[hits[0]].model_copy(update={"revoked": _now()})
            self._write(publishers)
        return publishers[hits[0]]

    def sign(self, bundle: Path, name: str) -> str:
        """Write the bundle's signature with one's own key, whose fingerprint is returned.

        Raises UserError if there is no such key, IntegrityError for what is no bundle.
        """
        content = read_small(bundle / MANIFEST)
        files = manifest_of(content, bundle.name, str(bundle / MANIFEST)).files()
        sealed, keyid = self.seal(envelope.STATEMENT, envelope.statement(content, files), name)
        with atomic_write(bundle / SIGNATURE) as part:
            part.write_bytes(sealed)
        return keyid

    def seal(self, kind: str, payload: bytes, name: str) -> tuple[bytes, str]:
        """`payload` of a type in an envelope signed with one's own key, and that key's fingerprint.

        Raises UserError without such a key.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        _check_name(name)
        file = self.folder / f"{name}.key"
        try:
            key = load_pem_private_key(file.read_bytes(), None)
        except FileNotFoundError as error:
            raise UserError(f"there is no key {file}; make one with 'overcrank keys new {name}'.") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); it must be a key of your own.") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is no ed25519 private key: {error}.") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise UserError(
                f"{file} is a private key of another kind than ed25519; make one with 'overcrank keys new'."
            )
        keyid = fingerprint(_public(key))
        return envelope.envelope(kind, payload, keyid, key.sign(envelope.signing_bytes(kind, payload))), keyid

    def check(self, bundle: Path) -> Publisher | None:
        """Who signed a bundle; None for one that was built here, or pulled with --allow-unsigned, and is not signed.

        Raises IntegrityError for a signature that is not valid or of nobody trusted, and for a bundle from
        elsewhere without one.
        """
        if is_unsigned(bundle):
            return None
        file = bundle / SIGNATURE
        if not os.path.lexists(file):
            if from_elsewhere(bundle):
                raise IntegrityError(f"{bundle.name} came from elsewhere and is not signed; ask its publisher to sign.")
            return None
        try:
            content, manifest = read_small(file, SIGNATURE_BYTES), read_small(bundle / MANIFEST)
        except OSError as error:
            raise IntegrityError(f"{bundle}: its signature cannot be read ({error.strerror}).") from error
        return self.check_content(content, manifest, bundle.name)

    def check_content(self, signature: bytes, manifest: bytes, name: str) -> Publisher:
        """As `check`, of what was read of a bundle called `name`, which must be signed."""
        signed = envelope.read_bundle_signature(signature, manifest, f"{name}/{SIGNATURE}")
        publisher = self.who_signed(signed, name)
        if signed.payload:
            envelope.require_statement_of(signed.payload, manifest, name)
        return publisher

    def whole(self, bundle: Path) -> Manifest:
        """The manifest of a bundle of which every file and the signature were checked, as before it is read at all.

        Raises IntegrityError with the first thing that is wrong.
        """
        manifest = read_manifest(bundle)
        if wrong := check_files(bundle, manifest):
            raise IntegrityError(f"{bundle}: {'; '.join(wrong)}; rebuild it.")
        self.check(bundle)
        return manifest

    def who_signed(self, signed: Signed, what: str) -> Publisher:
        """The first trusted publisher whose signature verifies.

        Raises IntegrityError, naming `what` it is of, if there is none.
        """
        publishers = self.publishers()
        signers = [(publishers[s.keyid], s.sig) for s in signed.signatures if s.keyid in publishers]
        if not signers:
            raise IntegrityError(
                f"{what} is signed by the key {signed.signatures[0].keyid[:16]}, which is not trusted here; "
                f"overcrank keys trust the key that its publisher shows."
            )
        for publisher, sig in signers:
            if not publisher.revoked and _verifies(publisher, sig, signed.message):
                return publisher
        publisher = signers[0][0]
        if publisher.revoked:
            raise IntegrityError(f"{what} is signed by '{publisher.name}', whose key was revoked {publisher.revoked}.")
        raise IntegrityError(f"{what}: the signature of '{publisher.name}' is not of this content; get it again.")

    def require_newer(self, place: str, serial: int, remember: bool) -> None:
        """Refuse an index that is older than one that was seen at a place, whichever store it was read for.

        `place`: its normalized URL. Without `remember` the number is only compared: nobody vouches for it.
        """
        with self._changing():
            serials = self._read("seen.json", _SEEN.validate_json, "the numbers of the indexes that were seen")
            newest = serials.get(place, 0)
            if serial < newest:
                raise IntegrityError(
                    f"the index of {place} is number {serial} and number {newest} was seen before: someone shows an "
                    f"old one, or it was made anew; remove its line in {self.folder / 'seen.json'} if its publisher "
                    f"says so."
                )
            if remember and serial > newest:
                with atomic_write(self.folder / "seen.json", OWN) as part:
                    part.write_text(json.dumps(serials | {place: serial}, indent=1), "utf-8")

    def _read(self, name: str, parse: Callable[[bytes], dict[str, T]], what: str) -> dict[str, T]:
        """One of the lists here; empty if there is none."""
        file = self.folder / name
        try:
            content = file.read_bytes()
            _require_private(file)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}); set $OVERCRANK_CONFIG to a folder of your own."
            ) from error
        try:
            return parse(content)
        except ValidationError as error:
            raise UserError(f"{file} cannot be read as {what}; fix or delete it.") from error

    def _with(self, name: str, public: str) -> dict[str, Publisher]:
        """The entry of a key; raises UserError for one that was revoked, or a name that another key has."""
        publishers, own = self.publishers(), fingerprint(public)
        if own in publishers and publishers[own].revoked:
            raise UserError(
                f"the key {own[:16]} of '{publishers[own].name}' was revoked here {publishers[own].revoked}, and is "
                f"not trusted again; ask its publisher for a new one."
            )
        for other, publisher in publishers.items():
            if other != own and not publisher.revoked and publisher.name.casefold() == name.casefold():
                raise UserError(
                    f"'{publisher.name}' is the name of another key that is trusted here ({other[:16]}); revoke that "
                    f"one, or put another name at the end of the line."
                )
        return {own: publishers[own] if own in publishers else Publisher(name=name, public=public, added=_now())}

    def _write(self, publishers: dict[str, Publisher]) -> None:
        with atomic_write(self.folder / "trusted.json", OWN) as part:
            part.write_bytes(_LIST.dump_json(publishers, indent=1))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with ExitStack() as stack:
            with write_errors(self.folder, "$OVERCRANK_CONFIG"):
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                stack.enter_context(FileLock(self.folder / ".lock", mode=OWN))
            yield


def fingerprint(public: str) -> str:
    """SHA-256 of the public key's bytes, in hexadecimal."""
    return hashlib.sha256(base64.b64decode(public)).hexdigest()


def from_elsewhere(bundle: Path) -> bool:
    """Whether it was pulled, and so must be signed."""
    return os.path.lexists(bundle / PULLED)


def is_unsigned(bundle: Path) -> bool:
    """Whether it was pulled with --allow-unsigned."""
    try:
        about: Any = json.loads(read_small(bundle / PULLED, SIGNATURE_BYTES))
    except (OSError, ValueError, RecursionError, IntegrityError):
        return False
    return isinstance(about, dict) and about.get("unsigned") is True


def _verifies(publisher: Publisher, sig: str, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if _is_weak(publisher.public):  # put on the list by hand, or by an older overcrank
        return False
    try:
        signature = base64.b64decode(sig, validate=True)
        Ed25519PublicKey.from_public_bytes(base64.b64decode(publisher.public)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return base64.b64encode(signature).decode() == sig  # one spelling, not several


def _is_key(text: str) -> bool:
    """Whether it is 32 bytes in base64, in their one spelling."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return len(content) == 32 and base64.b64encode(content).decode() == text


def _is_weak(public: str) -> bool:
    """Whether a key is a point of low order, or spelled as none is."""
    y = int.from_bytes(base64.b64decode(public), "little") & (2**255 - 1)
    return y >= P or y in LOW_ORDER or P - y in LOW_ORDER


def _require_private(file: Path) -> None:
    """Raise UserError for a file that others may have written."""
    about = file.stat()
    if os.name == "posix" and (about.st_mode & stat.S_IWOTH or about.st_uid not in (os.geteuid(), 0)) and os.geteuid():
        raise UserError(f"{file} may be written by others; make it yours alone: chown it to you and chmod 600 it.")


def _public(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise UserError(f"'{name[:80]}' is no name for a key: use letters, digits, '.', '_', '@' and '-'.")


def _default_folder() -> Path:
    where = os.environ.get("OVERCRANK_CONFIG")
    if where:
        return user_path(where, "OVERCRANK_CONFIG")
    from platformdirs import user_config_path

    return Path(user_config_path("overcrank"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
