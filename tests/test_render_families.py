"""A pipeline of every family through `overcrank render`: ONNX Runtime on the engines' graphs against eager PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import pipelines, without_torchvision

STEPS = 3


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of exported graphs for all tests here."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _what_cannot_be_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's guardrail fetches its models; the pipeline takes a checker that lets everything pass."""
    from diffusers.pipelines.cosmos import pipeline_cosmos_text2world as stock

    without_torchvision.install()
    monkeypatch.setattr(stock, "CosmosSafetyChecker", _PassesAll)


class _PassesAll:
    def to(self, *device: Any) -> _PassesAll:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())]) / 255.0


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_engines_graphs_render_what_eager_renders(name: str, run: Any, tmp_path: Path, store: Path) -> None:
    folder = pipelines.saved(name, tmp_path)
    height, width, frames = pipelines.SIZES.get(name, (64, 64, 9))
    options = ["--model", folder, "--steps", STEPS, "--height", height, "--width", width, "--frames", frames]
    options += ["--formats", "png", "--quiet", "--store", store]
    options += ["--prompt", pipelines.PROMPT] if name != "svd" else []
    Image.effect_noise((width, height), 90).convert("RGB").save(tmp_path / "picture.png")
    options += ["--image", tmp_path / "picture.png"] if name in pipelines.IMAGES else []
    if name in pipelines.VIDEOS:
        assert run("overcrank", "render", *options, "--backend", "eager", "-o", tmp_path / "clip.mp4").exit_code == 0
        options += ["--video", tmp_path / "clip.mp4", "--strength", 0.7]
    for backend in ("eager", "onnxruntime"):
        result = run("overcrank", "render", *options, "--backend", backend, "-o", tmp_path / f"{backend}.png")
        assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "onnxruntime.json").read_text())
    assert not about["fallbacks"]
    for component, backends in about["calls"].items():
        assert set(backends) == {"onnxruntime"}, component
    assert any(c.startswith("denoiser") for c in about["calls"])
    assert any(c.startswith("vae_decoder") for c in about["calls"])
    eager, engines = (frames_of(tmp_path / f"{b}-frames") for b in ("eager", "onnxruntime"))
    assert eager.std() > 0.005, "a picture of one colour would agree with anything"
    error = np.square(eager - engines).mean()
    assert error < 1e-5, f"{-10 * np.log10(error):.1f} dB"
