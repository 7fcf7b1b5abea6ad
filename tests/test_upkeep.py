"""`overcrank engines fsck` and `gc` on stores with every kind of damage and every kind of waste."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock
from overcrank.engines.kernel_cache import kernel_cache
from overcrank.engines.maintenance import DAY, find_problems, removable
from overcrank.engines.manifest import read_manifest
from overcrank.engines.store import Store
from overcrank.owners import part_name, this_process
from safetensors.numpy import save_file

GONE = this_process()._replace(pid=2**22 + 1)
"""A process number that Linux never gives."""


@pytest.fixture
def store(demo_store: Path, tmp_path: Path) -> Store:
    """That bundle, and one of everything else a store keeps."""
    import shutil

    shutil.copytree(demo_store, tmp_path / "store")
    made = Store(tmp_path / "store")
    (bundle,) = (path for path, _ in made.list())
    key = read_manifest(bundle).components[0].key.digest()
    kernel_cache(made, key, "580", "a card").write(b"kernels")
    (made.root / "packs").mkdir()
    save_file({"w": np.zeros(1000, np.float32)}, made.root / "packs" / "abcd.safetensors")
    return made


def bundle_of(store: Store) -> Path:
    return store.list()[0][0]


def test_a_whole_store_has_no_flaws(store: Store, run: Any) -> None:
    assert list(find_problems(store)) == []
    result = run("overcrank", "engines", "fsck", "--store", store.root)
    assert result.exit_code == 0, result.output
    assert "OK: 1 bundles and their caches" in result.output


def damaged(store: Store, what: str) -> Path:
    """Do the damage; returns what should be named."""
    bundle = bundle_of(store)
    engine = bundle / "denoiser.engine"
    graph = next(store.graphs.iterdir())
    pack, cache = (next((store.root / n).iterdir()) for n in ("packs", "runtime"))
    if what == "byte":
        content = bytearray(engine.read_bytes())
        content[len(content) // 2] ^= 1
        engine.write_bytes(content)
    if what == "engine gone":
        engine.unlink()
    if what == "manifest":
        (bundle / "manifest.json").write_text('{"schema_version": 1}')
    if what == "graph":
        (graph / "graph.onnx").write_bytes((graph / "graph.onnx").read_bytes()[:1000])
    if what == "table":
        (graph / "graph.json").write_text("{")
    if what == "pack":
        pack.write_bytes(pack.read_bytes()[:-100])
    if what == "kernels":
        cache.write_bytes(cache.read_bytes()[:-1])
    left = {
        "removal": store.bundles / ".removing-a-bundle",
        "part": store.root / "packs" / f".x.safetensors.{GONE.tag()}~aa.part",
        "export": store.graphs / ".0123456789abcdef.part",
    }
    if what in ("removal", "export"):
        left[what].mkdir()
    if what == "part":
        left[what].write_text("half")
    places = {"graph": graph, "table": graph, "pack": pack, "kernels": cache}
    return left.get(what) or places.get(what) or bundle


KINDS = ["byte", "engine gone", "manifest", "graph", "table", "pack", "kernels", "removal", "part", "export"]


@pytest.mark.parametrize("what", KINDS)
def test_every_damage_is_named_and_repaired(what: str, store: Store, run: Any) -> None:
    place = damaged(store, what)
    assert [flaw.path for flaw in find_problems(store)] == [place]
    result = run("overcrank", "engines", "fsck", "--store", store.root)
    assert result.exit_code == 1
    assert str(place.relative_to(store.root)) in result.output
    assert place.exists()
    assert run("overcrank", "engines", "fsck", "--repair", "--store", store.root).exit_code == 0
    assert not place.exists()
    assert list(find_problems(store)) == []


def test_what_a_living_process_writes_is_left_alone(store: Store) -> None:
    (store.root / "packs" / part_name("x.safetensors")).write_text("half")
    (store.graphs / ".0123456789abcdef.part").mkdir()
    with FileLock(store.root / "locks" / "graph-0123456789abcdef.lock"):
        found = subprocess.run(
            [sys.executable, "-c", "from overcrank.cli import main; main()", "engines", "fsck", "--store", store.root],
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.returncode == 0, found.stdout


def age(path: Path, days: float) -> None:
    when = time.time() - days * DAY
    for file in [path, *path.rglob("*")]:
        os.utime(file, (when, when))


def test_gc_removes_what_nobody_needs(store: Store, run: Any) -> None:
    orphan = kernel_cache(store, "ff" * 32, "580", "a card")
    orphan.write(b"kernels of an engine that was removed")
    unfinished, fresh = store.bundles / ".building-0123456789abcdef", store.bundles / ".building-fedcba9876543210"
    download = store.bundles / ".pulling-ltx-sm_89-bf16-0123456789abcdef"
    for folder in (unfinished, fresh, download):
        folder.mkdir()
    age(unfinished, 2)
    age(download, 2)
    assert {item.path for item in removable(store)} == {orphan.path, unfinished, download}
    result = run("overcrank", "engines", "gc", "--dry-run", "--store", store.root)
    assert "3 items would be removed" in result.output
    assert orphan.path.exists()
    result = run("overcrank", "engines", "gc", "--yes", "--store", store.root)
    assert "removed 3" in result.output
    assert not orphan.path.exists()
    assert not unfinished.exists()
    assert fresh.exists()
    assert len(store.list()) == 1
    assert "nothing to remove" in run("overcrank", "engines", "gc", "--yes", "--store", store.root).output


def test_gc_asks(store: Store) -> None:
    from click.testing import CliRunner
    from overcrank import cli

    words = ["engines", "gc", "--older-than", "0m", "--store", str(store.root)]
    result = CliRunner().invoke(cli.main, words, input="n\n")
    assert "nothing was removed" in result.output
    assert len(store.list()) == 1


def test_gc_by_age_size_and_version(store: Store) -> None:
    bundle, pack = bundle_of(store), store.root / "packs" / "abcd.safetensors"
    graph = next(store.graphs.iterdir())
    assert removable(store, older=DAY) == []
    age(pack, 40)
    age(graph, 20)
    assert [item.path for item in removable(store, older=30 * DAY)] == [pack]
    total = sum(f.stat().st_size for p in (bundle, graph) for f in p.rglob("*")) + pack.stat().st_size
    assert removable(store, size=total) == []
    assert [item.path for item in removable(store, size=total - 1)] == [pack]
    assert [item.path for item in removable(store, size=0)] == [pack, graph, bundle]
    assert removable(store, other_versions=True) == []
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"flavour_version": "0.1"}))
    (item,) = removable(store, other_versions=True)
    assert (item.path, item.why) == (bundle, "made by tensorrt_rtx 0.1")
    with FileLock(store.root / "locks" / f"{bundle.name.rpartition('-')[2]}.lock"):
        code = "import sys; from pathlib import Path; from overcrank.engines.store import Store\n"
        code += "from overcrank.engines.maintenance import removable\n"
        code += "print(len(removable(Store(Path(sys.argv[1])), other_versions=True)))"
        command = [sys.executable, "-c", code, str(store.root)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"


def test_the_graph_that_is_kept_is_a_graph(store: Store) -> None:
    """What fsck reads it with would see a broken one; the tests above break it."""
    assert onnx.load(str(next(store.graphs.iterdir()) / "graph.onnx")).graph.node
