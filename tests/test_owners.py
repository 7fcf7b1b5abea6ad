"""What is temporary is its owner's: another process, PID namespace or machine removes it only when that one is gone.
And what gets its name was synced before: content, then the name, then the folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from overcrank.engines.maintenance import DAY, find_problems, removable, remove, stale_files, unknown_owners
from overcrank.engines.place import Remote
from overcrank.engines.remote import push
from overcrank.engines.store import Store, pull_lock
from overcrank.engines.trust import Keyring
from overcrank.errors import StoreError
from overcrank.files import REMOVING, atomic_write
from overcrank.owners import Owner, owner_in, part_name, this_process

WRITING = """
import sys, time
from pathlib import Path
from overcrank.files import atomic_write
with atomic_write(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
LOOKING = """
import sys
from overcrank.engines.maintenance import removable, stale_files
from overcrank.engines.store import Store
store = Store(sys.argv[1])
print([i.path.name for i in stale_files(store)] + [i.path.name for i in removable(store)])
"""
OWN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@contextmanager
def writing(file: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has half a file, and goes on."""
    words = [*before, sys.executable, "-c", WRITING, str(file)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def seen_from(store: Store, *before: str) -> str:
    words = [*before, sys.executable, "-c", LOOKING, str(store.root)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    (store.root / "packs").mkdir()
    return store


def aged(path: Path) -> None:
    """As the clock of another machine may have written it."""
    when = time.time() - 40 * DAY
    for file in [path, *path.rglob("*")]:
        os.utime(file, (when, when))


def test_a_living_process_keeps_its_file_and_a_killed_one_does_not(store: Store) -> None:
    with writing(store.root / "packs" / "x.safetensors") as process:
        (part,) = (store.root / "packs").iterdir()
        aged(part)
        assert list(stale_files(store)) == []
        process.kill()
        process.wait()
        assert [item.path for item in stale_files(store)] == [part]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="PID namespaces need root and unshare")
def test_two_pid_namespaces_on_one_store(store: Store) -> None:
    """In its own, each process has number 1 or 2, and sees none of the other's."""
    with writing(store.root / "packs" / "x.safetensors", *OWN_NAMESPACE) as process:
        (part,) = (store.root / "packs").iterdir()
        owner = owner_in(part.name)
        assert owner is not None
        assert owner.pid < 5
        assert owner.space != this_process().space
        assert list(stale_files(store)) == []
        assert seen_from(store, *OWN_NAMESPACE) == "[]"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while not list(stale_files(store)) and time.monotonic() < deadline:
            time.sleep(0.05)  # the kernel ends the namespace after its first process
        assert [item.path for item in stale_files(store)] == [part]
        assert part.name in seen_from(store, *OWN_NAMESPACE)


def test_of_another_machine_nothing_goes_until_its_user_says_so(store: Store, run: Any) -> None:
    far = Owner("render-7-abcdef", "01234567", 0xEFFFFFFC, os.getpid(), 1)
    part = store.root / "packs" / part_name("x").replace(this_process().tag(), far.tag())
    part.write_text("half")
    pulling = store.pulling("ltx")
    pulling.mkdir()
    (store.root / "locks" / f"{pull_lock('ltx')}.owner").write_text(far.tag())
    for path in (part, pulling):
        aged(path)
    assert list(find_problems(store)) == []
    assert removable(store) == []
    assert unknown_owners(store) == {"render-7-abcdef": 2}
    words = ["engines", "gc", "--yes", "--store", store.root]
    result = run("overcrank", *words)
    assert "2 unfinished of render-7-abcdef stay" in result.output
    assert part.exists()
    assert run("overcrank", *words, "--gone-host", "another").exit_code == 0
    assert part.exists()
    assert "removed 2" in run("overcrank", *words, "--gone-host", "render-7-abcdef").output
    assert not part.exists()
    assert not pulling.exists()


def test_this_machine_before_it_was_started_again_is_gone() -> None:
    here = this_process()
    before = here._replace(boot="00000000")
    assert before.gone() is (True if here.space == 0xEFFFFFFC else None)
    assert before._replace(host="another").gone() is None
    assert here.gone() is False
    assert here._replace(started=here.started + 1).gone() is True, "the number was given to another process"


@pytest.mark.parametrize("clock", ["old", "new"])
def test_gc_leaves_a_running_pull_whatever_its_clock(store: Store, clock: str) -> None:
    pulling, building = store.pulling("ltx-demo-sm_89-bf16-0123456789abcdef"), store.staging("ab" * 32)
    for folder in (pulling, building):
        folder.mkdir()
        (folder / "denoiser.engine").write_text("half")
        if clock == "old":
            aged(folder)
    with store.lock(pull_lock(pulling.name.removeprefix(".pulling-"))), store.lock(("ab" * 32)[:16]):
        assert removable(store) == []
        assert seen_from(store) == "[]"
    listed = removable(store)
    with store.lock(pull_lock(pulling.name.removeprefix(".pulling-"))):  # taken up while gc asked whether it may
        remove(listed, store)
        assert pulling.exists()
        assert building.exists() is (clock == "new")
    names = {item.path for item in listed}
    assert names == ({pulling, building} if clock == "old" else set())


def test_a_removal_that_was_killed_is_run_again(demo_store: Path, tmp_path: Path, run: Any) -> None:
    store = Store(shutil.copytree(demo_store, tmp_path / "store"))
    ((bundle, _),) = store.list()
    code = """
import shutil, os, signal, sys
from overcrank.engines.store import Store
shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
store = Store(sys.argv[1])
store.remove(store.removal(sys.argv[2]))
"""
    for _ in range(2):  # built again, and killed again
        subprocess.run([sys.executable, "-c", code, str(store.root), bundle.name], check=False)
        assert not bundle.exists()
        shutil.copytree(demo_store / "bundles" / bundle.name, bundle)
    assert len(list(store.bundles.glob(f"{REMOVING}*"))) == 2
    subprocess.run([sys.executable, "-c", code, str(store.root), bundle.name], check=False)
    words = ["engines", "rm", bundle.name, "--store", store.root]
    again = run("overcrank", *words)
    assert again.exit_code == 0, again.output
    assert again.output == f"removed {bundle}\n"
    assert not list(store.bundles.iterdir())
    assert "no bundle matches" in run("overcrank", *words).output


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as one, atomic_write(tmp_path / "x") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_long_name_has_a_neighbour(tmp_path: Path) -> None:
    file = tmp_path / ("é" * 127)
    with atomic_write(file) as part:
        part.write_text("x")
    assert file.read_text() == "x"
    with pytest.raises(StoreError, match="File name too long"), atomic_write(tmp_path / ("x" * 256)) as part:
        part.write_text("x")


PULL = """
import sys
from overcrank.engines.download import pull
from overcrank.engines.place import Remote
from overcrank.engines.remote import fitting, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
remote, ring = Remote(sys.argv[1]), Keyring()
pull(remote, fitting(read_index(remote, ring), "ltx-demo", "sm_89", "bf16"), Store(sys.argv[2]), ring, lambda *a: None)
"""
EXPORT = """
import sys
import onnx_ir as ir
from pathlib import Path
from types import SimpleNamespace
from overcrank.export import cache, graph
small = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
graph.onnx_from_component = lambda *a: SimpleNamespace(model=small, parameters=())
cache.cached_graph(None, "bf16", Path(sys.argv[1]))
"""


def synced_before_renamed(words: list[str], below: Path, tmp_path: Path) -> dict[str, str]:
    """Run it under strace; each rename below a folder → its source, after a look at the order of calls."""
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2"
    done = subprocess.run(["strace", "-f", "-y", "-s", "4096", "-e", calls, "-o", trace, *words], check=False)
    if done.returncode and not trace.read_text(errors="replace").strip():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0
    synced: list[str] = []
    renamed: dict[str, str] = {}
    waiting: dict[str, str] = {}  # folder that is still to be synced → what was named in it
    for line in trace.read_text(errors="replace").splitlines():
        if match := re.search(r"f(?:data)?sync\(\d+<([^>]+)>\) += 0", line):
            synced.append(match[1])
            waiting.pop(match[1], None)
        elif (match := re.search(r'rename\w*\((?:[^"]*)"([^"]+)",[^"]*"([^"]+)"[^)]*\) += 0', line)) and str(
            below
        ) in match[2]:
            source, target = match[1], match[2]
            if Path(target).name.startswith(REMOVING):
                continue
            assert source in synced, f"{target} was named before its content was synced"
            if Path(target).is_dir():
                for file in Path(target).iterdir():
                    assert any(s in synced for s in (f"{source}/{file.name}", f"{target}/{file.name}")), file
            renamed[target] = source
            waiting[str(Path(target).parent)] = target
    assert not waiting, "a folder was not synced after a name in it"
    return renamed


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_what_is_pulled_is_synced_before_it_has_its_name(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "config"))
    ring = Keyring()
    ring.new("studio")
    own = shutil.copytree(demo_bundle, tmp_path / "own" / demo_bundle.name)
    push(Remote(str(tmp_path / "place")), [own], "studio", ring, lambda *a: None)
    store = tmp_path / "store"
    words = [sys.executable, "-c", PULL, str(tmp_path / "place"), str(store)]
    renamed = synced_before_renamed(words, store, tmp_path)
    bundle = store / "bundles" / demo_bundle.name
    assert str(bundle) in renamed
    names = {Path(target).name for target in renamed}
    assert {"denoiser.engine", "denoiser.onnx", "manifest.json", "manifest.sig", "pulled.json"} <= names


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_an_exported_graph_is_synced_before_it_has_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "graphs" / "0123456789abcdef"
    renamed = synced_before_renamed([sys.executable, "-c", EXPORT, str(folder)], folder, tmp_path)
    assert list(renamed) == [str(folder)]
    assert {p.name for p in folder.iterdir()} == {"graph.onnx", "graph.json"}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_the_order_of_calls_is_seen_when_it_is_wrong(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; p = Path(sys.argv[1]); p.with_name('y').write_text('y'); "
    words = [sys.executable, "-c", code + "p.with_name('y').rename(p)", str(tmp_path / "x")]
    with pytest.raises(AssertionError, match="was named before its content was synced"):
        synced_before_renamed(words, tmp_path / "x", tmp_path)
