from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from overcrank.engines.store import Store
from overcrank.models import components, resolve

from tests import compiling, quick, tiny
from tests.simulated_tensorrt.installed import simulated as simulated

Once = Callable[[str, Callable[[Path], object]], Path]

os.environ["HF_HUB_OFFLINE"] = "1"  # which the hub's client reads when it is imported
# A shell that starts the tests in the background ignores SIGINT, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCRANK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def _kept_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    in_tier = request.node.get_closest_marker("quick") and not request.node.get_closest_marker("heavy")
    with quick.kept_quick() if in_tier else nullcontext():
        yield


@pytest.fixture
def run() -> Any:
    """Call a console script in process; returns click's Result."""

    def call(script: str, *arguments: object) -> Result:
        from overcrank import cli

        command = {"build-engine": cli.build_engine, "overcrank": cli.main}[script]
        return CliRunner().invoke(command, [str(a) for a in arguments])

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run's, the same in every worker."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared: Path) -> Once:
    """Runs a function that fills a folder in the first worker that asks for it; the folder, for all. Copy what you
    change."""

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        whole = shared / name
        with FileLock(shared / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.once"):
            if not whole.exists():
                part = whole.with_name(f"{whole.name}.part")
                part.mkdir(parents=True)
                fill(part)
                part.rename(whole)
        return whole

    return folder


@pytest.fixture(scope="session")
def shared_store(shared: Path) -> Path:
    """A store for every test to export graphs into: the product's cache has each once, by all it is made from."""
    store = Store(shared / "store")
    store.prepare()
    return store.root


@pytest.fixture(scope="session")
def seeded(shared_store: Path) -> Callable[[Path], Path]:
    """Makes a store without bundles, whose cache of graphs is the shared one's."""

    def store(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for part in ("graphs", "locks"):
            (path / part).symlink_to(shared_store / part)
        return path

    return store


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    """A tiny LTX checkpoint as diffusers saves it, at a path with a space and non-ASCII letters."""
    return once("tïny ltx 模型", _save_tiny_ltx)


def _save_tiny_ltx(folder: Path) -> None:
    from overcrank.export.module import random_module

    parts: dict[str, Any] = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for component in components(tiny.variant("tiny-ltx-0.9.5")):
        if component.subfolder in parts:
            continue
        from dataclasses import replace

        whole: Any = random_module(replace(component, attribute=""), component.config, "fp32")
        whole.save_pretrained(folder / component.subfolder)
        parts[component.subfolder] = ["diffusers", component.cls]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline", **parts}))


@pytest.fixture(scope="session")
def graphs(shared_store: Path) -> compiling.Graphs:
    return partial(compiling.exported_once, store=Store(shared_store))


@pytest.fixture(scope="session")
def demo_store(once: Once, shared_store: Path) -> Path:
    """A store with a real bundle of the demo's denoiser for sm_89."""

    def build(store: Path) -> None:
        from overcrank import cli

        graph = Store(shared_store).graph(components(resolve("ltx-demo"), ("denoiser",))[0], "bf16").onnx.parent
        shutil.copytree(graph, store / "graphs" / graph.name)
        words = ["--model", "ltx-demo", "--gpu", "sm_89", "--components", "denoiser", "--quiet", "--store", str(store)]
        result = CliRunner().invoke(cli.build_engine, words)
        assert result.exit_code == 0, result.output

    return once("demo_store", build)


@pytest.fixture(scope="session")
def demo_bundle(demo_store: Path) -> Path:
    (found,) = (manifest.parent for manifest in demo_store.glob("bundles/*/manifest.json"))
    return found


SMALL = """--height 64 --width 64 --frames 17 --min-height 32 --min-width 32 --min-frames 1
--max-height 96 --max-width 96 --max-frames 33 -j 2""".split()  # noqa: SIM905


def files_under(folder: Path) -> set[str]:
    found = {str(Path(root) / f) for root, _, files in os.walk(folder) for f in files}
    return {f for f in found if not f.endswith(".lock")}
