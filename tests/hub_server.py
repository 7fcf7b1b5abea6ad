"""A server on 127.0.0.1 that speaks enough of the hub's protocol for its real client, over a tree of repositories.

`root/OWNER/NAME` is a repository, `root/OWNER/NAME@REVISION` another revision of it (a "/" in its name is written
"%2F"). Files of LARGE bytes and more are served as the hub serves large files: from another address, with Range.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

LARGE, CHUNK = 4096, 65536


@dataclass
class Hub:
    """What is served, and what was asked for. A moved repository is answered with its new address."""

    root: Path
    gated: set[str] = field(default_factory=set)
    moved: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # path in a repository → bytes after which its line breaks, once
    stall: set[str] = field(default_factory=set)  # paths that stop coming half-way, and stay open
    down: bool = False
    asked: list[str] = field(default_factory=list)  # METHOD path [range]
    sent: dict[str, int] = field(default_factory=dict)  # path in a repository → bytes sent
    url: str = ""
    store: str = ""  # address of large files: another host, to the client
    stalled: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> set[str]:
        """owner/name/path of the files whose bytes were sent."""
        return set(self.sent)

    def environment(self, home: Path) -> dict[str, str]:
        """Of a client that uses this server and an empty cache under `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def folder(self, repository: str, revision: str) -> Path | None:
        """Of a repository at a revision or commit."""
        plain = self.root / repository
        others = plain.parent.glob(f"{plain.name}@*") if plain.parent.is_dir() else ()
        for folder in (plain, *others):
            name = unquote(folder.name.partition("@")[2]) or "main"
            if folder.is_dir() and revision in (name, commit_of(folder)):
                return folder
        return None

    def exists(self, repository: str) -> bool:
        plain = self.root / repository
        return plain.is_dir() or (plain.parent.is_dir() and any(plain.parent.glob(f"{plain.name}@*")))


def commit_of(folder: Path) -> str:
    """The same for the same content and place."""
    files = [f"{f.relative_to(folder)} {f.stat().st_size}" for f in sorted(folder.rglob("*")) if f.is_file()]
    return hashlib.sha1("\n".join([str(folder), *files]).encode()).hexdigest()


def tag_of(file: Path) -> str:
    """SHA-256 of a large file, git's hash of another."""
    data = file.read_bytes()
    return (
        hashlib.sha256(data).hexdigest()
        if len(data) >= LARGE
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


def described(folder: Path) -> list[dict[str, Any]]:
    made = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        size, tag = file.stat().st_size, tag_of(file)
        entry: dict[str, Any] = {"type": "file", "path": str(file.relative_to(folder)), "size": size, "oid": tag[:40]}
        if size >= LARGE:
            entry["lfs"] = {"oid": tag, "size": size, "pointerSize": 134}
        made.append(entry)
    return made


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *about: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        asked = self.headers.get("Range")
        hub.asked.append(f"{self.command} {path}" + (f" {asked}" if asked else ""))
        if hub.down:
            return self._refuse(503, "", "the hub is down")
        if self.headers.get("authorization") == "Bearer hf_wrong":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        words = path.strip("/").split("/")
        if words[0] == "blob":
            return self._send(hub.root / unquote("/".join(words[1:])), body)
        api = words[:2] == ["api", "models"]
        repository = "/".join(words[2:4] if api else words[:2])
        rest = words[4:] if api else words[2:]
        if repository in hub.moved:
            return self._redirect(307, path.replace(repository, hub.moved[repository]))
        if not hub.exists(repository):
            return self._refuse(401, "RepoNotFound", "Repository not found")
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        folder = hub.folder(repository, revision)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._json(described(folder) if rest[:1] == ["tree"] else self._about(repository, folder))
        if repository in hub.gated and self.headers.get("authorization") != "Bearer hf_granted":
            return self._refuse(401, "GatedRepo", "Access to this model is restricted")
        return self._file(folder, folder / unquote("/".join(rest[2:])), body)

    def _about(self, repository: str, folder: Path) -> dict[str, Any]:
        return {"id": repository, "modelId": repository, "sha": commit_of(folder), "siblings": [], "private": False}

    def _file(self, folder: Path, file: Path, body: bool) -> None:
        about = {"X-Repo-Commit": commit_of(folder)}
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", about)
        about |= {"ETag": f'"{tag_of(file)}"'}
        if file.stat().st_size < LARGE:
            return self._send(file, body, about)
        about |= {"X-Linked-Etag": about["ETag"], "X-Linked-Size": str(file.stat().st_size)}
        return self._redirect(302, f"{self.hub.store}/blob/{quote(str(file.relative_to(self.hub.root)))}", about)

    def _send(self, file: Path, body: bool, headers: dict[str, str] | None = None) -> None:
        size, key = file.stat().st_size, str(file.relative_to(self.hub.root))
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        about = {"Content-Length": str(size - start), **(headers or {})}
        if start:
            about["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._bytes(file, key, start)

    def _bytes(self, file: Path, key: str, start: int) -> None:
        end = start + self.hub.cut.pop(key) if key in self.hub.cut else file.stat().st_size
        half = file.stat().st_size // 2
        with file.open("rb") as stream:
            stream.seek(start)
            while (at := stream.tell()) < end:
                if key in self.hub.stall and at >= half:
                    self.hub.stalled.set()
                    threading.Event().wait(60)
                chunk = stream.read(min(CHUNK, end - at))
                self.hub.sent[key] = self.hub.sent.get(key, 0) + len(chunk)
                self.wfile.write(chunk)
        if end < file.stat().st_size:
            self.close_connection = True

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _redirect(self, status: int, to: str, headers: dict[str, str] | None = None) -> None:
        self._refuse(status, "", "", {"Location": to, **(headers or {})})

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        about = {"Content-Length": "0", "X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        for name, value in about.items():
            if value:
                self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve the repositories under `root` while the block runs."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.store = hub.url.replace("127.0.0.1", "localhost")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
