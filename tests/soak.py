"""Kill -9 at random points of build, push, pull and batch, many times, with a look at everything after each.

    python -m tests.soak [--kills 200] [--seed 0]

Half the time a second process works on the same store, place or folder, as another machine would. Stops by itself;
writes bench/results/soak.json, or raises AssertionError at the first thing that is not as it must be.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from overcrank.engines.maintenance import find_problems, removable, remove
from overcrank.engines.manifest import check_files, file_entry, read_manifest
from overcrank.engines.remote import Remote, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
from overcrank.export.cache import load_cached

from tests.servers import Nginx

RESULT = Path(__file__).parent.parent / "bench" / "results" / "soak.json"
MOST = 4
"""Kills of one piece of work before it may end."""
CLI = "from overcrank.cli import main, build_engine"


class Kind:
    """Commands of one kind, and what holds whenever they are killed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fresh(self, rng: random.Random) -> None:
        """New work to do."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def other(self) -> list[str]:
        """What a second process does meanwhile."""
        return self.command()

    def begun(self) -> bool:
        """Whether something was written already."""
        raise NotImplementedError

    def kept(self) -> dict[str, Any]:
        """Work that a kill must not undo: name → what must not change, or a number that must not fall."""
        raise NotImplementedError

    def check(self) -> None:
        """Everything that is visible is whole."""
        raise NotImplementedError

    def whole(self) -> None:
        """The work is done."""
        raise NotImplementedError


def overcrank(*words: object) -> list[str]:
    return [sys.executable, "-c", f"{CLI}; main()", *map(str, words)]


def _verified(store: Path) -> set[str]:
    found = [p.parent for p in store.glob("bundles/[!.]*/manifest.json")]
    for bundle in found:
        assert check_files(bundle, read_manifest(bundle)) == [], bundle
    assert {p.name for p in store.glob("bundles/[!.]*")} == {p.name for p in found}, "a bundle without its manifest"
    return {p.name for p in found}


class Build(Kind):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.store = root / "built"

    def fresh(self, rng: random.Random) -> None:
        self.gpu = rng.choice(["sm_80", "sm_86", "sm_89", "sm_120"])
        shutil.rmtree(self.store / "bundles", ignore_errors=True)
        if rng.random() < 0.3:
            shutil.rmtree(self.store / "graphs", ignore_errors=True)

    def command(self) -> list[str]:
        words = ["--model", "ltx-demo", "--gpu", self.gpu, "--components", "denoiser,vae_decoder", "--store"]
        return [sys.executable, "-c", f"{CLI}; build_engine()", *words, str(self.store)]

    def begun(self) -> bool:
        return any(self.store.glob("bundles/.building-*/*.onnx"))

    def kept(self) -> dict[str, Any]:
        graphs = {g.name: file_entry(g / "graph.onnx").sha256 for g in self.store.glob("graphs/[!.]*")}
        staged = {p.name: p.stat().st_mtime_ns for p in self.store.glob("bundles/.building-*/[!.]*.json")}
        return graphs | ({} if list(self.store.glob("bundles/[!.]*")) else staged)

    def check(self) -> None:
        _verified(self.store)
        for folder in self.store.glob("graphs/[!.]*"):
            assert load_cached(folder) is not None, folder

    def whole(self) -> None:
        (name,) = _verified(self.store)
        assert self.gpu in name
        assert not list(self.store.glob("bundles/.building-*"))


class Push(Kind):
    def __init__(self, root: Path, bundle: Path) -> None:
        super().__init__(root)
        self.bundle, self.place, self.count = bundle, root / "place", 0

    def fresh(self, rng: random.Random) -> None:
        for _ in range(2):
            self.count += 1
            copy = shutil.copytree(self.bundle, self.root / "own" / f"bundle{self.count}")
            with (copy / "denoiser.engine").open("r+b") as file:  # other bytes, so that they are sent
                file.write(self.count.to_bytes(8, "big"))
            manifest = json.loads((copy / "manifest.json").read_text())
            entry = next(c for c in manifest["components"] if c["name"] == "denoiser")
            entry["engine"]["sha256"] = file_entry(copy / "denoiser.engine").sha256
            (copy / "manifest.json").write_text(json.dumps(manifest))

    def _of(self, number: int) -> list[str]:
        return overcrank("engines", "push", self.place, self.root / "own" / f"bundle{number}", "--key", "studio")

    def command(self) -> list[str]:
        return self._of(self.count)

    def other(self) -> list[str]:
        return self._of(self.count - 1)

    def begun(self) -> bool:
        return (self.root / "own" / f"bundle{self.count}" / "manifest.sig").exists()

    def kept(self) -> dict[str, Any]:
        blobs = {p.name: p.stat().st_size for p in self.place.glob("blobs/*/[!.]*")}
        index = json.loads((self.place / "index.json").read_text()) if (self.place / "index.json").exists() else {}
        return (
            blobs | {f"listed {n}": True for n in json.loads(base64.b64decode(index["payload"]))["bundles"]}
            if index
            else blobs
        )

    def check(self) -> None:
        for blob in self.place.glob("blobs/*/[!.]*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        if not (self.place / "index.json").exists():
            return
        index = read_index(Remote(str(self.place)), Keyring())
        for file in (file for listed in index.bundles.values() for file in listed.files):
            blob = self.place / "blobs" / file.sha256[:2] / file.sha256
            assert blob.stat().st_size == file.bytes, "the index lists what is not there"

    def whole(self) -> None:
        index = read_index(Remote(str(self.place)), Keyring())
        assert f"bundle{self.count}" in index.bundles


class Pull(Kind):
    def __init__(self, root: Path, url: str, name: str) -> None:
        super().__init__(root)
        self.url, self.name, self.store = url, name, root / "pulled"

    def fresh(self, rng: random.Random) -> None:
        shutil.rmtree(self.store / "bundles", ignore_errors=True)

    def command(self) -> list[str]:
        return overcrank(*f"engines pull {self.url} --model ltx-demo --gpu sm_89 --store {self.store}".split())

    def begun(self) -> bool:
        return any(self.store.glob("bundles/.pulling-*/.*.part"))

    def kept(self) -> dict[str, Any]:
        files = [p for p in self.store.glob("bundles/.pulling-*/*") if p.is_file() and p.name != "pulled.json"]
        return {"bytes fetched": sum(f.stat().st_size for f in files)} if files else {}

    def check(self) -> None:
        _verified(self.store)

    def whole(self) -> None:
        assert _verified(self.store) == {self.name}
        assert not list(self.store.glob("bundles/.pulling-*"))


class Batch(Kind):
    JOBS = 5

    def fresh(self, rng: random.Random) -> None:
        self.out = self.root / "videos"
        shutil.rmtree(self.out, ignore_errors=True)
        jobs = [{"prompt": f"a red circle {i}", "steps": 6, "formats": ["mp4", "png"]} for i in range(self.JOBS)]
        (self.root / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))

    def command(self) -> list[str]:
        return overcrank("batch", self.root / "jobs.jsonl", "-o", self.out, "--backend", "eager", "--quiet")

    def other(self) -> list[str]:
        return []  # a batch has its folder to itself

    def begun(self) -> bool:
        return any(self.out.glob("*.json"))

    def kept(self) -> dict[str, Any]:
        return {p.name: p.stat().st_mtime_ns for p in self.out.glob("[!.]*.json")}

    def check(self) -> None:
        for sidecar in self.out.glob("[!.]*.json"):
            about = json.loads(sidecar.read_text())
            for file in about["files"]:
                path = self.out / file["name"]
                assert path.is_dir() or path.stat().st_size == file["bytes"], path

    def whole(self) -> None:
        assert len(list(self.out.glob("*.mp4"))) == len(list(self.out.glob("[!.]*.json"))) == self.JOBS
        assert not [p for p in self.out.iterdir() if p.name.startswith(".")]


def _retained(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if name == "bytes fetched":
            assert not after or after[name] >= value, "a download began anew"
        else:
            assert after.get(name) == value, f"{name} was lost or made twice"


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def _killed(kind: Kind, process: subprocess.Popen[bytes], longest: float, rng: random.Random) -> bool:
    """Kill -9 at a random moment, every other time one after something was written; False if it ended before."""
    end = time.monotonic() + rng.uniform(0, longest)
    if rng.random() < 0.5:
        while process.poll() is None and not kind.begun():
            time.sleep(0.005)
        end = time.monotonic() + rng.uniform(0, longest / 3)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def soak(kind: Kind, kills: int, rng: random.Random) -> dict[str, Any]:
    """Work that is killed up to MOST times before it may end, until there were `kills`."""
    count, pieces, together = {"first": 0, "after writing": 0}, 0, 0
    kind.fresh(rng)
    start = time.monotonic()
    _finished(_start(kind.command()))
    longest = time.monotonic() - start
    while sum(count.values()) < kills:
        kind.fresh(rng)
        beside = _start(kind.other()) if kind.other() and rng.random() < 0.5 else None
        together += beside is not None
        for _ in range(MOST):
            before = kind.kept()
            process = _start(kind.command())
            if not _killed(kind, process, longest, rng):
                _finished(process)
                longest *= 0.8  # so that kills come while there is work
                break
            longest *= 1.1
            count["after writing" if kind.begun() else "first"] += 1
            kind.check()
            if beside is None:
                _retained(before, kind.kept())
        if beside is not None:
            _finished(beside)
        _finished(_start(kind.command()))
        kind.check()
        kind.whole()
        pieces += 1
    return {"kills": sum(count.values()), "after_something_was_written": count["after writing"]} | {
        "pieces_of_work": pieces,
        "with_a_second_process": together,
        "seconds": round(time.monotonic() - start),
    }


@contextmanager
def published(root: Path, bundle: Path) -> Iterator[Nginx]:
    """The bundle in a place that nginx serves slowly, so that downloads are killed in the middle."""
    place = root / "served"
    subprocess.run(
        overcrank("engines", "push", place, bundle, "--key", "studio"), check=True, stdout=subprocess.DEVNULL
    )
    server = Nginx(place, root / "nginx")
    server.start(rate="4m")
    try:
        yield server
    finally:
        server.kill()


def main(kills: int, seed: int, root: Path) -> dict[str, Any]:
    rng, share = random.Random(seed), -(-kills // 7)  # a build takes longest, and gets one share of seven
    os.environ["OVERCRANK_CONFIG"], os.environ["OVERCRANK_HOME"] = str(root / "config"), str(root / "home")
    Keyring().new("studio")
    build = Build(root)
    found = {"build": soak(build, share, rng)}
    print("build", found["build"], flush=True)
    (bundle,) = build.store.glob("bundles/[!.]*")
    found["push"] = soak(Push(root, bundle), 2 * share, rng)
    print("push", found["push"], flush=True)
    build.gpu = "sm_89"
    _finished(_start(build.command()))
    (own,) = build.store.glob("bundles/*sm_89*")
    with published(root, own) as server:
        found["pull"] = soak(Pull(root, server.url, own.name), 2 * share, rng)
    print("pull", found["pull"], flush=True)
    found["batch"] = soak(Batch(root), 2 * share, rng)
    print("batch", found["batch"], flush=True)
    for store in (Store(build.store), Store(root / "pulled")):
        remove(removable(store), store)
        assert not list(find_problems(store)), "fsck finds something after gc"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = main(asked.kills, asked.seed, Path(folder))
    about = {"command": f"python -m tests.soak --kills {asked.kills}", "date": date.today().isoformat()}
    RESULT.write_text(json.dumps(about | table, indent=1) + "\n")
