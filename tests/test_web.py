"""Pulling from web servers that misbehave: each is refused with its reason, within bounds; some are merely poor."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines import place as places
from overcrank.engines.download import pull
from overcrank.engines.manifest import PULLED, check_files, read_manifest
from overcrank.engines.place import Remote
from overcrank.engines.remote import fitting, push, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
from overcrank.errors import IntegrityError, OvercrankError, StoreError

from tests.servers import free_port, started


def silent(name: str, there: int, size: int) -> None: ...


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keyring:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    ring = Keyring()
    ring.new("studio")
    return ring


@pytest.fixture
def published(demo_bundle: Path, tmp_path: Path, ring: Keyring) -> Path:
    own = shutil.copytree(demo_bundle, tmp_path / "own" / demo_bundle.name)
    push(Remote(str(tmp_path / "place")), [own], "studio", ring, silent)
    return tmp_path / "place"


class Server:
    """Serves a folder; `ways` are what it does wrong, by path."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ways, self.asked = folder, dict[str, str](), list[tuple[str, dict[str, str]]]()
        self.other, self.done = "", threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, dict(self.headers)))
                server.answer(self, server.ways.get("index" if "index" in self.path else "blob", ""))

            def log_message(self, *words: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, way: str) -> None:
        file = self.folder / request.path.lstrip("/")
        content = file.read_bytes() if file.is_file() else b""
        status = {"error": 500, "forbidden": 403, "": 200 if file.is_file() else 404}.get(way, 200)
        if way in ("away", "around", "down"):
            status = 302
        if way == "another part":
            status = 206
        if way == "no headers":
            self.done.wait(30)
            return
        request.send_response(status)
        where = {"away": self.other + request.path, "around": request.path, "down": "ftp://127.0.0.1/x"}
        for name, value in {
            "Location": where.get(way, ""),
            "Content-Encoding": "gzip" if way == "compressed" else "",
            "Content-Range": "bytes 7-8/9" if way == "another part" else "",
            "Content-Length": "" if way == "endless" else str(len(content) + (9 if way == "cut" else 0)),
        }.items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        try:
            self._body(request, way, content)
        except OSError:  # the client has gone, as it should
            self.done.set()

    def _body(self, request: BaseHTTPRequestHandler, way: str, content: bytes) -> None:
        if way == "endless":
            while True:
                request.wfile.write(b" " * 2**20)
        if way == "silent":
            request.wfile.write(content[:10])
            self.done.wait(30)
        elif way == "dripping":
            for byte in content:
                request.wfile.write(bytes([byte]))
                request.wfile.flush()
                time.sleep(0.02)
        elif way == "other bytes":
            request.wfile.write(bytes(len(content)))
        else:
            request.wfile.write(content)
            if way == "cut":
                request.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(published: Path) -> Iterator[Server]:
    server = Server(published)
    yield server
    server.done.set()
    server.http.shutdown()


def fetched(url: str, store: Path, ring: Keyring, follow: bool = False) -> Path:
    remote = Remote(url, follow)
    listed = fitting(read_index(remote, ring), "ltx-demo", "sm_89", "bf16")
    return pull(remote, listed, Store(store), ring, silent)


WAYS: list[tuple[str, str, type[OvercrankError], str]] = [
    ("index", "endless", IntegrityError, r"index\.json is longer than the 1,000,000 bytes it may have"),
    ("index", "silent", StoreError, r"cannot be read: .*[Tt]imeout"),
    ("index", "no headers", StoreError, r"cannot be read: .*[Tt]imeout"),
    ("index", "dripping", StoreError, r"index\.json comes slower than 2,000 bytes a second"),
    ("index", "error", StoreError, "the server answers 500"),
    ("index", "forbidden", StoreError, "the server answers 403"),
    ("index", "away", StoreError, r"redirects to another host, localhost; add follow=True if its publisher says so"),
    ("index", "around", StoreError, "redirects without end"),
    ("index", "down", StoreError, r"redirects to ftp://127\.0\.0\.1/x, which is not followed"),
    ("index", "compressed", StoreError, "the server compresses, which was not asked for"),
    ("index", "another part", StoreError, r"the server sends another part of the file \(bytes 7-8/9\)"),
    ("index", "cut", StoreError, "cannot be read: ClientPayloadError"),
    ("index", "other bytes", IntegrityError, r"index\.json is no signed document \(DSSE\)"),
    ("blob", "endless", IntegrityError, "is longer than the .* bytes it may have"),
    ("blob", "silent", StoreError, "[Tt]imeout.*begins this file anew|[Tt]imeout.*goes on from there"),
    ("blob", "dripping", StoreError, "comes slower than 2,000 bytes a second"),
    ("blob", "error", StoreError, "the server answers 500"),
    ("blob", "away", StoreError, "redirects to another host, localhost; add follow=True"),
    ("blob", "compressed", StoreError, "the server compresses"),
    ("blob", "cut", StoreError, "ClientPayloadError"),
    ("blob", "other bytes", IntegrityError, r"manifest\.json from .* does not match its SHA-256"),
]


@pytest.mark.parametrize(("what", "way", "kind", "says"), WAYS, ids=[f"{w[0]} {w[1]}" for w in WAYS])
def test_a_server_that_misbehaves(
    what: str,
    way: str,
    kind: type[OvercrankError],
    says: str,
    server: Server,
    tmp_path: Path,
    ring: Keyring,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from overcrank.engines import remote as remotes

    monkeypatch.setattr(remotes, "LARGEST", 1_000_000)
    monkeypatch.setattr(places, "SILENCE", 0.5)
    monkeypatch.setattr(places, "WINDOW", 0.2)
    server.ways[what] = way
    server.other = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(kind, match=says) as refused:
        fetched(server.url, tmp_path / "store", ring)
    assert type(refused.value) is kind
    assert not list((tmp_path / "store").glob("bundles/[!.]*"))
    sizes = [p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file()]
    assert sum(sizes) < 200_000, "more was written than the manifest and its signature have"


def test_redirects_are_followed_when_asked_and_passwords_stay(server: Server, tmp_path: Path, ring: Keyring) -> None:
    """To another host neither the password nor anything made of it is sent; it is stored and shown nowhere."""
    behind = Server(server.folder)
    server.ways |= {"index": "away", "blob": "away"}
    server.other = behind.url.replace("127.0.0.1", "localhost")
    url = server.url.replace("://", "://somebody:geheim@")
    with pytest.raises(StoreError, match="add follow=True") as refused:
        fetched(url, tmp_path / "store", ring)
    assert "geheim" not in str(refused.value)
    path = fetched(url, tmp_path / "store", ring, follow=True)
    assert check_files(path, read_manifest(path)) == []
    assert all("Authorization" in headers for _, headers in server.asked)
    assert behind.asked
    assert not any("Authorization" in headers for _, headers in behind.asked)
    assert server.url in (path / PULLED).read_text()
    for file in (*tmp_path.glob("store/**/*"), *tmp_path.glob("config/**/*")):
        assert not file.is_file() or b"geheim" not in file.read_bytes(), file
    behind.http.shutdown()


def test_a_server_without_ranges_is_pulled_from_and_it_is_said(
    published: Path, tmp_path: Path, ring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    """python -m http.server; what an interrupted download left is of no use, and does no harm."""
    port = free_port()
    words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(published), str(port)]
    process = started(words, port)
    try:
        url, store = f"http://127.0.0.1:{port}", Store(tmp_path / "store")
        listed = fitting(read_index(Remote(url), ring), "ltx-demo", "sm_89", "bf16")
        store.prepare()
        staging = store.pulling(listed.name)
        staging.mkdir()
        (staging / f".{listed.file('denoiser.engine').sha256}.part").write_bytes(b"not its beginning")
        path = pull(Remote(url), listed, store, ring, silent)
        assert check_files(path, read_manifest(path)) == []
        assert f"{url} cannot resume: a download that is interrupted begins anew" in caplog.text
    finally:
        process.kill()
        subprocess.Popen.wait(process)
