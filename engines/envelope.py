"""Signed documents as DSSE envelopes, and what is said of a bundle as an in-toto statement: others' tools verify both.

DSSE: github.com/secure-systems-lab/dsse, v1. Statement: in-toto.io/Statement/v1, whose subjects are the bundle's files.
`keyid` is the SHA-256 of the 32 bytes of the ed25519 public key.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from overcrank.engines.manifest import MANIFEST, Digest, File, FileName
from overcrank.errors import IntegrityError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

STATEMENT = "application/vnd.in-toto+json"
INDEX = "application/vnd.overcrank.index+json"
PREDICATE = "urn:overcrank:bundle:1"
OLD_INDEX, OLD_BUNDLE = b"overcrank index 1\n", b"overcrank bundle manifest 1\n"
"""Stood before what was signed, until overcrank 0.2."""
SIG = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
"""The 64 bytes of an ed25519 signature in base64, in its one spelling."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Signature(_Model):
    keyid: Digest
    sig: SIG


class Signed(NamedTuple):
    """A document, the bytes that were signed for it, and by whom it is said to be signed."""

    payload: bytes
    message: bytes
    signatures: Sequence[Signature]


class _Envelope(_Model):
    payloadType: Annotated[str, StringConstraints(max_length=100)]
    payload: str
    signatures: Annotated[list[Signature], Field(min_length=1, max_length=16)]


class _OldSignature(_Model):
    schema_version: Literal[1]
    key: Digest
    signature: SIG

    def plain(self) -> Signature:
        return Signature(keyid=self.key, sig=self.signature)


class _OldEnvelope(_Model):
    payload: str
    signature: _OldSignature


def signing_bytes(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: a signature of one type of document serves for no other."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)


def envelope(kind: str, payload: bytes, keyid: str, signature: bytes) -> bytes:
    """`signature`: of `signing_bytes(kind, payload)`."""
    by = {"keyid": keyid, "sig": base64.b64encode(signature).decode()}
    document = {"payloadType": kind, "payload": base64.b64encode(payload).decode(), "signatures": [by]}
    return json.dumps(document, indent=1).encode()


def read_envelope(content: bytes, kind: str, what: str) -> Signed:
    """Of what nobody has verified yet; raises IntegrityError, naming `what` it is, for anything else."""
    try:
        document = _Envelope.model_validate_json(content)
        payload = base64.b64decode(document.payload, validate=True)
    except ValueError as error:  # of pydantic, and of base64
        raise IntegrityError(f"{what} is no signed document (DSSE): {_reason(error)}.") from error
    if document.payloadType != kind:
        raise IntegrityError(f"{what} has payloadType '{document.payloadType}', and not '{kind}'.")
    return Signed(payload, signing_bytes(kind, payload), document.signatures)


def read_index_envelope(content: bytes, what: str) -> Signed:
    """As `read_envelope`; one of overcrank 0.2 is read too."""
    try:
        old = _OldEnvelope.model_validate_json(content)
    except ValidationError:
        return read_envelope(content, INDEX, what)
    payload = old.payload.encode()
    return Signed(payload, OLD_INDEX + payload, (old.signature.plain(),))


def read_bundle_signature(content: bytes, manifest: bytes, what: str) -> Signed:
    """As `read_envelope`; of overcrank 0.2's, which was of the manifest itself, the payload is empty."""
    try:
        old = _OldSignature.model_validate_json(content)
    except ValidationError:
        return read_envelope(content, STATEMENT, what)
    return Signed(b"", OLD_BUNDLE + manifest, (old.plain(),))


# ── what is said of a bundle ─────────────────────────────────────────────────────────


class _Sha256(_Model):
    sha256: Digest


class _Subject(_Model):
    name: FileName
    digest: _Sha256


class _Statement(_Model):
    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=200)]
    predicateType: Literal["urn:overcrank:bundle:1"]


def statement(manifest: bytes, files: Sequence[File]) -> bytes:
    """That these files are one bundle, the manifest first; tools of in-toto compare them with those on disk."""
    digests = {MANIFEST: hashlib.sha256(manifest).hexdigest()} | {file.name: file.sha256 for file in files}
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]
    about = {"_type": "https://in-toto.io/Statement/v1", "subject": subject}
    return json.dumps({**about, "predicateType": PREDICATE, "predicate": {}}).encode()


def require_statement_of(payload: bytes, manifest: bytes, what: str) -> None:
    """Raise IntegrityError for a statement, verified already, that is not of this manifest."""
    try:
        document = _Statement.model_validate_json(payload)
    except ValidationError as error:
        raise IntegrityError(f"{what}: what is signed is no statement of a bundle: {_reason(error)}.") from error
    digest = hashlib.sha256(manifest).hexdigest()
    if [s.digest.sha256 for s in document.subject if s.name == MANIFEST] != [digest]:
        raise IntegrityError(f"{what}: its signature is of another {MANIFEST}; get the bundle again.")


def _reason(error: ValueError) -> str:
    from overcrank.engines.manifest import first_of

    return first_of(error) if isinstance(error, ValidationError) else str(error)
