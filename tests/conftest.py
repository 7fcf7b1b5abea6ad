from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from overcrank.models import components

from tests import compiling, quick, tiny
from tests.simulated_tensorrt.installed import simulated as simulated

# A shell that starts the tests in the background ignores SIGINT, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERCRANK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LTX checkpoint as diffusers saves it, at a path with a space and non-ASCII letters."""
    from overcrank.export.module import random_module

    folder = tmp_path_factory.mktemp("diffusers") / "tïny ltx 模型"
    parts: dict[str, Any] = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for component in components(tiny.variant("tiny-ltx-0.9.5")):
        if component.subfolder in parts:
            continue
        from dataclasses import replace

        whole: Any = random_module(replace(component, attribute=""), component.config, "fp32")
        whole.save_pretrained(folder / component.subfolder)
        parts[component.subfolder] = ["diffusers", component.cls]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline", **parts}))
    return folder


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> compiling.Graphs:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"
    folder.mkdir(exist_ok=True)
    return partial(compiling.exported_once, folder=folder)


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a real bundle of the demo's denoiser for sm_89; copy what you change."""
    from overcrank import cli

    store = tmp_path_factory.mktemp("demo_store")
    words = ["--model", "ltx-demo", "--gpu", "sm_89", "--components", "denoiser", "--quiet", "--store", str(store)]
    result = CliRunner().invoke(cli.build_engine, words)
    assert result.exit_code == 0, result.output
    return store


@pytest.fixture(scope="session")
def demo_bundle(demo_store: Path) -> Path:
    (found,) = (manifest.parent for manifest in demo_store.glob("bundles/*/manifest.json"))
    return found


SMALL = """--height 64 --width 64 --frames 17 --min-height 32 --min-width 32 --min-frames 1
--max-height 96 --max-width 96 --max-frames 33 -j 2""".split()  # noqa: SIM905


def files_under(folder: Path) -> set[str]:
    found = {str(Path(root) / f) for root, _, files in os.walk(folder) for f in files}
    return {f for f in found if not f.endswith(".lock")}
