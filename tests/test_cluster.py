"""Builds and batches on a real Ray cluster of this machine, with workers killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
RAY = str(Path(sys.executable).with_name("ray"))
MEMORY = 4_000_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores that ends with the tests."""
    with socket.socket() as free, tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's sockets want short paths
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        words += [f"--memory={MEMORY}", "--object-store-memory=100000000", "--include-dashboard=false"]
        words += ["--disable-usage-stats", f"--temp-dir={folder}"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"127.0.0.1:{port}"
        try:
            _wait_for(lambda: _answers(port), 120)
            yield address
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            psutil.wait_procs(family, 10)
            for left in (p for p in family if p.is_running()):
                left.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing came in {seconds} s")


def _kill_one(named: str, killed: list[int], ready: Callable[[], Any]) -> threading.Thread:
    """Kill -9 a worker whose title has `named`, once `ready`."""

    def work() -> None:
        _wait_for(ready, 400)
        process = _wait_for(lambda: [p for p in psutil.process_iter() if named in _title(p)], 60)[0]
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_matrix_is_built_though_a_worker_is_killed(
    cluster: str, seeded: Callable[[Path], Path], run: Any, tmp_path: Path
) -> None:
    store = seeded(tmp_path / "store")
    words = ["--models", "ltx-demo", "--gpus", "sm_86", "--precisions", "bf16", "--store", store, "--yes"]
    killed: list[int] = []
    killer = _kill_one("ray::_in_task", killed, lambda: list(store.glob("bundles/.building-*/*.engine")))
    result = run("overcrank", "engines", "build", *words, "--ray", cluster)
    killer.join()
    assert killed
    assert result.exit_code == 0, result.output
    assert "\nbuilt  " in result.output
    checked = run("overcrank", "engines", "fsck", "--store", store)
    assert "OK: 1 bundles and their caches" in checked.output
    assert not list((store / "bundles").glob(".*"))
    again = run("overcrank", "engines", "build", *words, "--ray", cluster)
    assert "\ncached " in again.output


def test_a_batch_is_whole_though_a_worker_is_killed(cluster: str, run: Any, tmp_path: Path) -> None:
    jobs = [
        {"prompt": f"a {c} {s}", "output": f"{c}-{s}", "steps": 8} for c in ("red", "blue") for s in ("ring", "cross")
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, [*jobs, {"prompt": "x", "output": "taken"}])))
    out, killed = tmp_path / "out", list[int]()
    out.mkdir()
    (out / "taken.mp4").write_text("a user's")
    words = ["batch", tmp_path / "jobs.jsonl", "-o", out, "--backend", "eager", "--ray", cluster]
    killer = _kill_one("ray::_RemoteRenderer", killed, lambda: list(out.glob("*.json")))
    result = run("overcrank", *words, "--json")
    killer.join()
    assert killed
    assert result.exit_code == 3, result.output  # one job's result would take the place of a user's file
    outcomes = {o["name"]: o for o in json.loads(result.stdout)["jobs"]}
    assert [o["status"] for name, o in outcomes.items() if "-" in name] == ["done"] * 4
    assert "taken.mp4" in outcomes["taken"]["error"]
    assert (out / "taken.mp4").read_text() == "a user's"
    assert len(list(out.glob("*-*.mp4"))) == 4
    assert not list(out.glob(".*"))
    times = {f: f.stat().st_mtime_ns for f in out.glob("*.mp4")}
    again = run("overcrank", *words, "--json")
    assert [o["status"] for o in json.loads(again.stdout)["jobs"]] == ["skipped"] * 4 + ["failed"]
    assert {f: f.stat().st_mtime_ns for f in out.glob("*.mp4")} == times


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere:port"])
@pytest.mark.parametrize("command", ["engines build --models ltx-demo --yes", "batch JOBS -o out"])
def test_no_cluster(command: str, address: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("JOBS").write_text('{"prompt": "a red ring"}')
    result = run("overcrank", *command.split(), "--ray", address)
    assert result.exit_code == 2, result.output
    assert f"--ray {address}: " in result.output
    assert result.output.strip().endswith("'ray start --head' starts a cluster.")


def test_a_model_that_cannot_be_loaded_ends_the_batch(cluster: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a red ring"}')
    words = ["--device", "cuda", "--ray", cluster]
    result = run("overcrank", "batch", tmp_path / "jobs.jsonl", "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert "finds no NVIDIA GPU here" in result.output
    assert "Traceback" not in result.output


def test_jobs_bring_their_loras_to_a_cluster(cluster: str, run: Any, tmp_path: Path) -> None:
    from tests.test_job_loras import lora_file

    for seed, name in enumerate("ab"):
        lora_file(tmp_path / f"{name}.safetensors", seed)
    job = {"prompt": "a red ring", "steps": 2, "formats": ["gif"]}
    sets: dict[str, Any] = {"a1": ["a"], "b1": ["b"], "a2": ["a"], "none": []}
    jobs = [{**job, "output": n, "lora": [{"file": f"{x}.safetensors"} for x in own]} for n, own in sets.items()]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    words = ["batch", tmp_path / "jobs.jsonl", "--json", "--backend", "eager", "-o"]
    there, here = (run("overcrank", *words, tmp_path / name, *more) for name, more in
                   (("there", ("--ray", cluster)), ("here", ())))  # fmt: skip
    assert (there.exit_code, here.exit_code) == (0, 0), there.output + here.output
    pixels = {n: [json.loads((tmp_path / f / f"{n}.json").read_text())["frames_sha256"] for f in ("there", "here")]
              for n in sets}  # fmt: skip
    assert all(one == other for one, other in pixels.values())
    assert pixels["a1"] == pixels["a2"]
    assert len({one for one, _ in pixels.values()}) == 3
