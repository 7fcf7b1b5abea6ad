"""What comes from strangers, from manifests to pictures: each is read, or refused with one of our errors.

    python -m tests.fuzz [--minutes 10]

Half the time hypothesis edits valid documents; the other half libFuzzer (atheris, if it is installed) changes their
bytes, led by coverage. Stops by itself; writes bench/results/fuzz.json, or raises at the first other error.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from inspect import getmembers, isclass, isfunction
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from overcrank.engines import envelope, manifest, remote, trust
from overcrank.engines.download import _check_listed
from overcrank.engines.envelope import INDEX as INDEX_TYPE
from overcrank.engines.manifest import SIGNATURE, check_files, read_manifest
from overcrank.engines.place import Remote
from overcrank.engines.remote import fitting, read_index
from overcrank.engines.store import Store
from overcrank.engines.trust import Keyring
from overcrank.errors import CONTROLS, OvercrankError
from overcrank.models import variant_from_manifest

from tests.fuzz_checkpoints import CheckpointTargets
from tests.fuzz_inputs import JobTargets, PictureTargets

RESULT = Path(__file__).parent.parent / "bench" / "results" / "fuzz.json"
FILES = [
    {"name": name, "bytes": 3, "sha256": "ab" * 32}
    for name in ("denoiser.engine", "denoiser.onnx", "manifest.json", SIGNATURE)
]
INDEX: dict[str, Any] = {
    "schema_version": 1,
    "serial": 1,
    "updated": "2026-01-01T00:00:00+00:00",
    "bundles": {
        "one": {
            "name": "one",
            "files": FILES,
            "model": "ltx-demo",
            "family": "ltx",
            "target": "sm_89",
            "precision": "bf16",
            "flavour": "tensorrt_rtx",
            "flavour_version": "1.7.1",
            "created": "2026-01-01T00:00:00+00:00",
        }
    },
}


class Fuzzed(Protocol):
    """Names of what is fuzzed → a function of bytes; documents to begin with; modules whose coverage leads."""

    all: dict[str, Callable[[bytes], None]]
    valid: dict[str, bytes]
    followed: tuple[ModuleType, ...]


class Targets:
    """Of published bundles."""

    followed = (manifest, remote, envelope, trust)

    def __init__(self, folder: Path, manifest: bytes) -> None:
        self.taken = self.refused = 0
        self.folder, self.ring, self.store = folder, Keyring(folder / "keys"), Store(folder / "store")
        self.ring.new("studio")
        (folder / "place").mkdir()
        (folder / "bundle").mkdir()
        self.valid = {"manifest": manifest, "index": json.dumps(INDEX).encode()}
        self.valid["envelope"] = self._signed(self.valid["index"])
        (folder / "bundle" / "manifest.json").write_bytes(manifest)
        self.valid["signature"] = self._signature()
        self.all: dict[str, Callable[[bytes], None]] = {
            "manifest": self.manifest,
            "index": lambda payload: self.envelope(self._signed(payload)),
            "envelope": self.envelope,
            "signature": self.signature,
        }

    def manifest(self, content: bytes) -> None:
        (self.folder / "bundle" / "manifest.json").write_bytes(content)
        with self._refused("manifest.json", "bundle"):
            found = read_manifest(self.folder / "bundle")
            check_files(self.folder / "bundle", found)
            variant_from_manifest(found)

    def _signed(self, payload: bytes) -> bytes:
        return self.ring.seal(INDEX_TYPE, payload, "studio")[0]

    def _signature(self) -> bytes:
        self.ring.sign(self.folder / "bundle", "studio")
        return (self.folder / "bundle" / SIGNATURE).read_bytes()

    def envelope(self, content: bytes) -> None:
        (self.folder / "place" / "index.json").write_bytes(content)
        (self.ring.folder / "seen.json").unlink(missing_ok=True)
        place = Remote(str(self.folder / "place"))
        with self._refused("index", "published", "bytes free", place.url):
            index = read_index(place, self.ring)
            for listed in index.bundles.values():
                _check_listed(listed)
            fitting(index, "ltx-demo", "sm_89", "bf16")

    def signature(self, content: bytes) -> None:
        (self.folder / "bundle" / SIGNATURE).write_bytes(content)
        with self._refused("bundle", SIGNATURE):
            self.ring.check(self.folder / "bundle")

    @contextmanager
    def _refused(self, *names: str) -> Iterator[None]:
        """What is refused is refused in one line, that names what it is of."""
        said = ""
        try:
            yield
            self.taken += 1
        except OvercrankError as error:
            said = str(error)
            self.refused += 1
        assert not CONTROLS.search(said), repr(said)
        assert not said or any(name in said for name in names), said


# ── edits of valid documents ─────────────────────────────────────────────────────────

NUMBERS = [0, -1, 2**31, 2**63, 10**30, 10**5000, 1e308, 1.5]
WORDS = ["", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\x00", ".hidden", "x" * 5000, "manifest.json", "é", "\ud800"]
VALUES = st.one_of(
    st.sampled_from([None, True, *NUMBERS, *WORDS, [], {}, [[]], {"": {}}]),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)),
)


def _places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    inner = [(key, document[key]) for key in keys]
    return [here, *(p for key, value in inner for p in _places(value, (*here, key)))]


@st.composite
def edited(draw: st.DrawFn, valid: bytes) -> bytes:
    """The document with one to four values replaced, removed or added, or some of its bytes changed."""
    if not valid.startswith(b"{") or draw(st.booleans()):
        content = bytearray(valid)
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, len(content) - 1))
            content[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
        return bytes(content)
    document = json.loads(valid)
    for _ in range(draw(st.integers(1, 4))):
        places = [p for p in _places(document) if p]
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        owner = document
        for key in path:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            owner[last] = copy.deepcopy(draw(VALUES))
        elif action == "remove":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=8))] = copy.deepcopy(draw(VALUES))
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)


def by_hypothesis(targets: Fuzzed, name: str, examples: int, seconds: float) -> int:
    """Runs until either is used up; returns the number of documents tried."""
    end, count = time.monotonic() + seconds, 0

    @settings(
        max_examples=min(examples, 200),  # a round; the clock is looked at between rounds
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(edited(targets.valid[name]))
    def tried(content: bytes) -> None:
        nonlocal count
        count += 1
        targets.all[name](content)

    while time.monotonic() < end and count < examples:
        tried()
    return count


# ── bytes, led by coverage ───────────────────────────────────────────────────────────


def by_atheris(folder: Path, name: str, seconds: int) -> int:
    """In a process of its own, which ends with libFuzzer; returns the number of documents tried."""
    words = [sys.executable, "-m", "tests.fuzz", "--one", name, "--folder", str(folder), "--seconds", str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{name}: {done.stdout[-3000:]}{done.stderr[-6000:]}")
    return next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("Done "))


def _one(name: str, folder: Path, seconds: int) -> None:
    import atheris

    kind, _, name = name.partition("/")
    targets = _targets(kind, folder)
    corpus = Path(tempfile.mkdtemp(dir=folder))
    (corpus / "valid").write_bytes(targets.valid[name])
    for function in chain.from_iterable(map(_functions, targets.followed)):
        atheris.instrument_func(function)
    limits = [f"-max_total_time={seconds}", "-max_len=100000", "-timeout=60", "-rss_limit_mb=6000"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={folder}/"], targets.all[name])
    atheris.Fuzz()


def _functions(module: ModuleType) -> Iterator[Callable[..., Any]]:
    """Its own, and those of its classes."""
    for owner in (module, *(c for _, c in getmembers(module, isclass) if c.__module__ == module.__name__)):
        yield from (f for _, f in getmembers(owner, isfunction) if f.__module__ == module.__name__)


def _manifest() -> bytes:
    """Of a bundle that is built for it."""
    words = ["--model", "ltx-demo", "--gpu", "sm_89", "--components", "denoiser", "--quiet", "--store"]
    with tempfile.TemporaryDirectory() as store:
        code = "from overcrank.cli import build_engine; build_engine()"
        subprocess.run([sys.executable, "-c", code, *words, store], check=True, stdout=subprocess.DEVNULL)
        (manifest,) = Path(store).glob("bundles/*/manifest.json")
        return manifest.read_bytes()


KINDS = ("published", "checkpoint", "jobs", "pictures")


def _targets(kind: str, folder: Path) -> Fuzzed:
    own = Path(tempfile.mkdtemp(dir=folder))
    if kind == "published":
        return Targets(own, (folder / "manifest.json").read_bytes())
    return {"checkpoint": CheckpointTargets, "jobs": JobTargets, "pictures": PictureTargets}[kind](own)


def main(minutes: float, manifest: bytes) -> dict[str, Any]:
    """Each kind has the same time; half of it is hypothesis's."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "manifest.json").write_bytes(manifest)
        with_atheris = find_spec("atheris") is not None
        for kind in KINDS:
            targets = _targets(kind, folder)
            seconds = minutes * 60 / len(KINDS) / len(targets.all) / (2 if with_atheris else 1)
            for name in targets.all:
                found[name] = {"hypothesis": by_hypothesis(targets, name, 10**9, seconds)}
                if with_atheris:
                    found[name]["atheris"] = by_atheris(folder, f"{kind}/{name}", round(seconds))
                print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    for hidden in ("--one", "--folder", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    faulthandler.enable()
    logging.disable()  # a thousand words on each picture
    warnings.simplefilter("ignore")
    if asked.one:
        _one(asked.one, Path(asked.folder), int(asked.seconds))
    else:
        whole, began = _manifest(), time.monotonic()
        table = main(asked.minutes, whole)
        minutes = round((time.monotonic() - began) / 60)
        command = f"python -m tests.fuzz --minutes {asked.minutes:g}"
        about = {"command": command, "date": date.today().isoformat(), "minutes": minutes, "documents": table}
        RESULT.write_text(json.dumps(about, indent=1) + "\n")
