"""A matrix of engines from its build to a render elsewhere: pushed, served by nginx, pulled, verified, rendered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import pipelines
from tests.servers import Nginx

FAMILIES = ("wan", "cogvideox")
"""Beside the demo: small networks with random weights."""
GPUS = ("sm_80", "sm_86", "sm_89", "sm_120")
QUALITY = {"bf16": 50, "int8": 25}
"""Decibels against eager fp32; random weights have outliers that trained ones lack."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nginx]:
    (tmp_path / "place").mkdir()
    made = Nginx(tmp_path / "place", tmp_path / "nginx")
    made.start()
    yield made
    made.kill()


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())]) / 255.0


@pytest.mark.sweep
def test_a_matrix_is_published_pulled_and_rendered(
    server: Nginx, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(*words: object) -> str:
        result = run("overcrank", *words)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    models = {"ltx-demo": "ltx-demo"} | {name: str(pipelines.saved(name, tmp_path)) for name in FAMILIES}
    own, other = ["--store", tmp_path / "own"], ["--store", tmp_path / "other"]
    lists = ["--models", ",".join(models.values()), "--gpus", ",".join(GPUS), "--precisions", ",".join(QUALITY)]
    built = json.loads(done("engines", "build", *lists, *own, "--json"))["built"]
    assert len(built) == 24
    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "publisher"))
    line = done("keys", "new", "studio").strip().splitlines()[-1]
    done("engines", "push", server.folder, *(Path(b["path"]).name for b in built), "--key", "studio", *own)

    monkeypatch.setenv("OVERCRANK_CONFIG", str(tmp_path / "customer"))
    done("keys", "trust", *line.split())
    assert len(done("engines", "search", server.url, *other).splitlines()) == 24
    pulled = {}
    for b in built:
        manifest = json.loads((Path(b["path"]) / "manifest.json").read_text())
        words = ["--model", models[manifest["model"]], "--gpu", b["gpu"], "--precision", b["precision"]]
        pulled[b["model"], b["gpu"], b["precision"]] = Path(done("engines", "pull", server.url, *words, *other).strip())
    assert len(set(pulled.values())) == 24
    assert "OK: 24 bundles and their caches" in done("engines", "fsck", *other)

    for name, model in models.items():
        size = [] if name == "ltx-demo" else ["--height", 64, "--width", 64, "--frames", pipelines.CASES[name].frames]
        words = ["--model", model, "--prompt", "a red circle", "--steps", 2, "--formats", "png", *size, *other]
        done("render", *words, "--backend", "eager", "-o", tmp_path / f"{name}-eager.png")
        eager = frames_of(tmp_path / f"{name}-eager-frames")
        for precision, least in QUALITY.items():
            bundle = pulled[model, "sm_89", precision]
            done("verify", bundle, "--tolerance", 1e-3)  # norms over two random channels amplify fp32's rounding
            quantized = ["--precision", precision, "--activations", "dynamic"] if precision == "int8" else []
            out = tmp_path / f"{name}-{precision}"
            done("render", *words, "--backend", "onnxruntime", "--bundle", bundle, *quantized, "-o", f"{out}.png")
            about = json.loads(Path(f"{out}.json").read_text())
            assert set(about["bundles"].values()) == {bundle.name}
            assert not about["fallbacks"]
            error = np.square(frames_of(Path(f"{out}-frames")) - eager).mean()
            assert -10 * np.log10(max(error, 1e-12)) > least, (name, precision)
    assert not list((tmp_path / "other" / "graphs").glob("*")), "a graph was exported in place of the bundle's"
    assert re.search(r"/blobs/\S+ 20[06]", "\n".join(server.served()))
