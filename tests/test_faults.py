"""Disks that are full or read-only, and the soak and the fuzzing in small, so that they keep running."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fuzz, soak

Disk = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Disk]]:
    """A small disk, and a function that mounts it anew with options."""
    folder = tmp_path / "small disk"
    folder.mkdir()

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a disk needs root: {done.stderr.strip()}")

    mount("size=2m")
    yield folder, mount
    subprocess.run(["umount", folder], check=False)


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    assert run("overcrank", "keys", "new", "studio").exit_code == 0


def visible(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.parts)]


def test_push_to_a_full_disk(disk: tuple[Path, Disk], keys: None, demo_bundle: Path, tmp_path: Path, run: Any) -> None:
    folder, mount = disk
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    words = ["engines", "push", folder / "place", bundle, "--key", "studio"]
    refused = run("overcrank", *words)
    assert refused.exit_code == 2
    assert refused.output.count("\n") == 1
    assert "cannot be written" in refused.output
    assert "No space left on device" in refused.output
    assert not (folder / "place" / "index.json").exists()
    assert not list(folder.rglob(".*.part")), "what fits on no disk is left on it"
    mount("remount,size=100m")
    assert run("overcrank", *words).exit_code == 0
    assert "ltx-demo" in run("overcrank", "engines", "search", folder / "place").output


def test_pull_to_a_full_disk(disk: tuple[Path, Disk], keys: None, demo_bundle: Path, tmp_path: Path, run: Any) -> None:
    folder, mount = disk
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    assert run("overcrank", "engines", "push", tmp_path / "place", bundle, "--key", "studio").exit_code == 0
    words = ["engines", "pull", tmp_path / "place", "--model", "ltx-demo", "--gpu", "sm_89", "--store", folder / "s"]
    refused = run("overcrank", *words)
    assert refused.exit_code == 2
    assert "bytes free, and bundle needs" in refused.output
    assert "free some space" in refused.output
    assert not visible(folder / "s" / "bundles")
    mount("remount,size=100m")
    assert run("overcrank", *words).exit_code == 0


def test_batch_to_a_full_disk(disk: tuple[Path, Disk], tmp_path: Path, run: Any) -> None:
    folder, mount = disk
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a red ring", "steps": 1}\n{"prompt": "a blue cross", "steps": 1}')
    mount("remount,size=16k")
    words = ["batch", tmp_path / "jobs.jsonl", "-o", folder / "out", "--backend", "eager", "--json"]
    full = json.loads(run("overcrank", *words).stdout)["jobs"]
    assert all("is full; free space or give --out elsewhere" in outcome["error"] for outcome in full)
    assert not list((folder / "out").iterdir())
    mount("remount,size=10m")
    assert [o["status"] for o in json.loads(run("overcrank", *words).stdout)["jobs"]] == ["done", "done"]


def test_a_read_only_store(disk: tuple[Path, Disk], keys: None, demo_bundle: Path, tmp_path: Path, run: Any) -> None:
    """What is there can be used; what would write says that it cannot."""
    folder, mount = disk
    mount("remount,size=100m")
    bundle = shutil.copytree(demo_bundle, folder / "bundles" / demo_bundle.name)
    assert run("overcrank", "engines", "push", tmp_path / "place", bundle, "--key", "studio").exit_code == 0
    mount("remount,ro")
    store = ["--store", folder]
    assert demo_bundle.name[:12] in run("overcrank", "engines", "list", *store).output
    assert run("overcrank", "engines", "show", bundle.name, *store).exit_code == 0
    assert "OK: 1 bundles and their caches" in run("overcrank", "engines", "fsck", *store).output
    words = [
        "--prompt",
        "x",
        "--steps",
        1,
        "--backend",
        "onnxruntime",
        "--bundle",
        bundle.name,
        "-o",
        tmp_path / "a.mp4",
    ]
    rendered = run("overcrank", "render", *words, *store)
    assert rendered.exit_code == 0, rendered.output
    for command in (
        ["engines", "build", "--models", "ltx-demo", "--gpus", "sm_86", "--yes"],
        ["engines", "pull", tmp_path / "place", "--model", "ltx-demo", "--gpu", "sm_89"],
        ["engines", "rm", bundle.name],
    ):
        refused = run("overcrank", *command, *store)
        assert refused.exit_code == 2, command
        assert "cannot be written (Read-only file system)" in refused.output, command
        assert "Traceback" not in refused.output


@pytest.mark.parametrize("name", ["manifest", "index", "envelope", "signature"])
def test_documents_of_an_attacker(name: str, demo_bundle: Path, tmp_path: Path) -> None:
    targets = fuzz.Targets(tmp_path, (demo_bundle / "manifest.json").read_bytes())
    assert fuzz.by_hypothesis(targets, name, 200, 60) >= 200
    assert targets.refused > 20
    assert targets.taken or name in ("index", "envelope")  # whose files are nowhere


def test_a_little_of_the_soak(keys: None, demo_bundle: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    bundle = shutil.copytree(demo_bundle, tmp_path / demo_bundle.name)
    assert soak.soak(soak.Push(tmp_path, bundle), 4, rng)["kills"] >= 4
    with soak.published(tmp_path, bundle) as server:
        assert soak.soak(soak.Pull(tmp_path, server.url, bundle.name), 4, rng)["kills"] >= 4
