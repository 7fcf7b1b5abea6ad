"""A place where bundles are published, at any fsspec URL: what is read there is bounded in bytes and in time.

Web servers are asked with aiohttp, through fsspec's session: so redirects can be refused, and each request has its own
limits. API: fsspec's AbstractFileSystem; aiohttp's ClientSession.
"""

from __future__ import annotations

import asyncio
import base64
import posixpath
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from overcrank.errors import IntegrityError, StoreError, UserError
from overcrank.files import atomic_write
from overcrank.options import option

CHUNK = 1_000_000
SILENCE = 30.0
"""Seconds without a byte after which a server is given up."""
SLOWEST, WINDOW = 2_000, 30.0
"""Bytes a second that must come, in each of so many seconds."""
DOCUMENT = 600.0
"""Seconds that a manifest or an index may take as a whole."""
REDIRECTS = 5
WEB = ("http", "https")
SCHEMES = ("", "file", "local", *WEB, "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "sftp", "ssh", "webdav")
"""fsspec has more: archives, caches and files of references, at which nothing is published."""
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Body:
    """A file as it comes; `start` is where, 0 from a place that cannot begin where it was asked to."""

    chunks: Iterator[bytes]
    start: int = 0
    resumes: bool = True


@dataclass
class Remote:
    """A place where bundles are published; `url` without a password is all of it that is shown or stored.

    Raises UserError for a URL that is none, or whose fsspec package is missing.
    """

    url: str
    follow: bool = False  # redirects to other hosts
    root: str = field(init=False)
    place: str = field(init=False)  # one spelling of the URL, for what is remembered of it
    fs: Any = field(init=False, repr=False)
    local: bool = field(init=False)
    _secret: dict[str, str] = field(init=False, repr=False, default_factory=dict)  # a header

    def __post_init__(self) -> None:
        import fsspec

        scheme, _, rest = self.url.rpartition("://")
        scheme = scheme.lower()
        address = f"{scheme}://{rest}" if scheme else self.url
        self.url = shown(address)
        if scheme not in SCHEMES:  # or several, with :: between them
            raise UserError(
                f"{self.url} is no place for engines: give a folder, or an http(s), s3, gs, hf, az or sftp URL."
            )
        try:
            self.place, self._secret = _place_of(address)
            self.fs, root = fsspec.core.url_to_fs(self.url if scheme in WEB else address)
        except Exception as error:  # every file system has its own
            raise UserError(
                f"{self.url} cannot be used: {said(error)}; s3, gs and others need their package."
            ) from error
        self.root, self.local = root.rstrip("/"), "file" in self.fs.protocol
        if self.local:
            self.url = self.root if not scheme else self.url
            self.place = f"file://{Path(self.root).resolve()}"

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def read(self, largest: int, *parts: str) -> bytes | None:
        """A document, held in memory; None if there is none. Raises IntegrityError for one that is larger."""
        try:
            body = self.open(0, largest, DOCUMENT, *parts)
            return b"".join(body.chunks)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, OSError):  # as fsspec calls a server that does not answer
                raise StoreError(f"{self.url} cannot be read: {said(error.__cause__)}.") from error
            return None
        except (IntegrityError, StoreError):
            raise
        except Exception as error:  # every file system has its own
            raise StoreError(f"{self.url} cannot be read: {said(error)}.") from error

    def open(self, start: int, largest: int, seconds: float, *parts: str) -> Body:
        """A file from `start` on, or from its beginning where that cannot be.

        Of its chunks, IntegrityError is raised at the byte after `largest` of the whole file, StoreError when they
        come too slowly or take longer than `seconds`; FileNotFoundError if there is none.
        """
        path = self.path(*parts)
        body = self._from_web(path, start) if self.fs.protocol[0] in WEB else Body(self._from_fs(path, start), start)
        what, deadline = f"{self.url}: {parts[-1]}", time.monotonic() + seconds
        return Body(_bounded(body, what, largest, deadline), body.start, body.resumes)

    def _from_fs(self, path: str, start: int) -> Iterator[bytes]:
        with self.fs.open(path, "rb", block_size=CHUNK) as stream:
            if start:
                stream.seek(start)
            while content := stream.read(CHUNK):
                yield content

    def _from_web(self, url: str, start: int) -> Body:
        from fsspec.asyn import sync

        session = sync(self.fs.loop, self.fs.set_session)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {}) | self._secret
        for _ in range(REDIRECTS):
            answer = sync(self.fs.loop, _asked, session, url, headers)
            if answer.status not in (301, 302, 303, 307, 308):
                break
            self.fs.loop.call_soon_threadsafe(answer.close)
            url = self._redirected(url, answer.headers.get("Location", ""), headers)
        else:
            raise StoreError(f"{self.url} redirects without end.")

        def chunks() -> Iterator[bytes]:
            try:
                while content := sync(self.fs.loop, answer.content.readany):
                    yield content
            finally:
                self.fs.loop.call_soon_threadsafe(answer.close)

        reason = _wrong_with(answer, start)
        if reason:
            self.fs.loop.call_soon_threadsafe(answer.close)
            if answer.status in (404, 410):
                raise FileNotFoundError(shown(url))
            raise StoreError(f"{shown(url)}: {reason}.")
        partial = answer.status == 206
        return Body(chunks(), start if partial else 0, partial or answer.headers.get("Accept-Ranges") == "bytes")

    def _redirected(self, url: str, location: str, headers: dict[str, str]) -> str:
        """Where a redirect leads; raises StoreError where it may not."""
        old, new = urlsplit(url), urlsplit(urljoin(url, location))
        if new.scheme not in WEB or (old.scheme, new.scheme) == ("https", "http"):
            raise StoreError(f"{self.url} redirects to {shown(location)[:200]}, which is not followed.")
        if old.hostname != new.hostname or _port(old) != _port(new):
            upgraded = old.hostname == new.hostname and (_port(old), _port(new)) == (80, 443)
            if not upgraded and not self.follow:
                raise StoreError(
                    f"{self.url} redirects to another host, {new.hostname}; add "
                    f"{option('follow', True)} if its publisher says so."
                )
            if not upgraded:
                headers.pop("Authorization", None)
        return urlunsplit(new)

    def write(self, content: bytes | Path, *parts: str) -> None:
        """Whole or not at all: object stores write so, other file systems rename."""
        path, part = self.path(*parts), self.path(*parts[:-1], f".{parts[-1]}.{_token()}.part")
        try:
            self.fs.makedirs(self.path(*parts[:-1]), exist_ok=True)
            if self.local:
                _write_local(content, Path(path))
                return
            if isinstance(content, Path):
                self.fs.put_file(str(content), part)
            else:
                self.fs.pipe_file(part, content)
            self.fs.mv(part, path, recursive=False)
        except Exception as error:
            with suppress(Exception):  # the disk may be full, and should not stay so
                if not self.local:
                    self.fs.rm_file(part)
            cause = error.__cause__ if isinstance(error, StoreError) and error.__cause__ else error
            raise StoreError(f"{self.url} cannot be written: {said(cause)}.") from error

    def size(self, *parts: str) -> int | None:
        try:
            size = self.fs.info(self.path(*parts)).get("size")
        except (FileNotFoundError, OSError):
            return None
        return None if size is None else int(size)


def shown(url: str) -> str:
    """A URL without user, password, query and fragment, which may hold secrets."""
    return re.sub(r"://[^/@]*@", "://", re.split(r"[?#]", url)[0] if url.lower().startswith("http") else url)


def said(error: BaseException) -> str:
    """An error in a sentence, with no password of a URL in it."""
    return f"{type(error).__name__}: {re.sub(r'://[^/@ ]*@', '://', str(error))}"[:500]


def _place_of(url: str) -> tuple[str, dict[str, str]]:
    """One spelling of a URL, and the header that its user and password make; raises ValueError for what is none."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in WEB)):
        return shown(url).rstrip("/"), {}
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ValueError("it has a query or a fragment, and files are looked for below it")
    if not parts.hostname:
        raise ValueError("it names no host")
    secret = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        secret["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    path = posixpath.normpath(f"/{quote(unquote(parts.path))}").lstrip("/")
    port = _port(parts)
    host = parts.hostname.rstrip(".") + ("" if port == PORTS[parts.scheme] else f":{port}")
    return f"https://{host}/{path}".rstrip("/"), secret  # one place, over either scheme


def _port(parts: Any) -> int:
    return int(parts.port or PORTS[parts.scheme])


async def _asked(session: Any, url: str, headers: dict[str, str]) -> Any:
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    request = session.get(url, headers=headers, allow_redirects=False, timeout=limits)
    return await asyncio.wait_for(request, 2 * SILENCE)


def _wrong_with(answer: Any, start: int) -> str:
    """Why an answer is not what was asked for; empty if it is."""
    if answer.status not in (200, 206):
        return f"the server answers {answer.status} {str(answer.reason)[:80]}"
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return "the server compresses, which was not asked for"
    span = answer.headers.get("Content-Range", "")
    if answer.status == 206 and not span.startswith(f"bytes {start}-"):
        return f"the server sends another part of the file ({span[:80]}) than it was asked for"
    return ""


def _bounded(body: Body, what: str, largest: int, deadline: float) -> Iterator[bytes]:
    there, window, recent = body.start, time.monotonic(), 0
    for content in body.chunks:
        there, recent, now = there + len(content), recent + len(content), time.monotonic()
        if there > largest:
            raise IntegrityError(f"{what} is longer than the {largest:,} bytes it may have.")
        if now > deadline:
            raise StoreError(f"{what} takes too long.")
        if now - window >= WINDOW:
            if recent < SLOWEST * WINDOW:
                raise StoreError(f"{what} comes slower than {SLOWEST:,} bytes a second.")
            window, recent = now, 0
        yield content


def _write_local(content: bytes | Path, path: Path) -> None:
    with atomic_write(path) as part:
        if isinstance(content, Path):
            shutil.copyfile(content, part)
        else:
            part.write_bytes(content)


def _token() -> str:
    import secrets

    return secrets.token_hex(4)
