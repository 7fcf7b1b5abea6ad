"""A pipeline of every family through `overcrank render`: ONNX Runtime on the engines' graphs against eager PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overcrank.runtime.render.output import Video, write_mp4
from PIL import Image

from tests import pipelines, tiny, without_torchvision

STEPS, CLIP_RATE = 3, 9.0


@pytest.fixture(scope="session")
def store(shared_store: Path) -> Path:
    """One cache of exported graphs for all tests here, those of other workers included."""
    return shared_store


@pytest.fixture(autouse=True)
def _what_cannot_be_installed_here() -> None:
    without_torchvision.install()
    without_torchvision.pass_guardrail()


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())]) / 255.0


def media_of(case: pipelines.Case, folder: Path) -> list[object]:
    """Options for what the case is rendered from, drawn here."""
    frames = [Image.effect_noise((case.width, case.height), 90).convert("RGB") for _ in range(case.frames)]
    frames[0].save(folder / "first.png")
    frames[-1].save(folder / "last.png")
    if case.media == "video":
        pixels = np.stack([np.asarray(f) for f in frames])
        write_mp4(Video(pixels, CLIP_RATE, np.empty(0)), folder / "clip.mp4", {}, None)
        return ["--video", folder / "clip.mp4", "--strength", 0.7]
    first = ["--image", folder / "first.png"] if case.media else []
    return first + (["--last-image", folder / "last.png"] if case.media == "ends" else [])


@pytest.mark.parametrize("name", tiny.thinned(pipelines.CASES, every=8))
def test_engines_graphs_render_what_eager_renders(
    name: str, run: Any, tmp_path: Path, store: Path, record_property: Any
) -> None:
    folder, case = pipelines.saved(name, tmp_path), pipelines.CASES[name]
    options = ["--model", folder, "--height", case.height, "--width", case.width, "--frames", case.frames]
    options += ["--formats", "png", "--quiet", "--store", store, *media_of(case, tmp_path)]
    options += ["--steps", STEPS] if name != "ltx-upsampler" else []
    options += ["--prompt", pipelines.PROMPT] if case.prompt else []
    for backend in ("eager", "onnxruntime"):
        result = run("overcrank", "render", *options, "--backend", backend, "-o", tmp_path / f"{backend}.png")
        assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "onnxruntime.json").read_text())
    assert not about["fallbacks"]
    assert (about["request"]["fps"] == CLIP_RATE) == (case.media == "video")
    for component, backends in about["calls"].items():
        assert set(backends) == {"onnxruntime"}, component
    assert any(c.startswith(("denoiser", "latent_upsampler")) for c in about["calls"])
    assert any(c.startswith("vae_decoder") for c in about["calls"])
    eager, engines = (frames_of(tmp_path / f"{b}-frames") for b in ("eager", "onnxruntime"))
    assert eager.std() > 0.005, "a picture of one colour would agree with anything"
    error = np.square(eager - engines).mean()
    decibels = -10 * math.log10(max(float(error), 1e-20))
    for key, value in {"pipeline": about["pipeline"], "media": case.media, "psnr": decibels}.items():
        record_property(key, value)  # bench/parity.py
    assert decibels >= 50


@pytest.mark.parametrize("name", tiny.specimens(("wan", "skyreels-forcing", "cosmos"), "wan", "skyreels-forcing"))
def test_guidance_ends_before_the_steps_do(name: str, run: Any, tmp_path: Path, store: Path) -> None:
    """A pipeline that makes two calls for each guided step makes one for each that is not."""
    folder, case = pipelines.saved(name, tmp_path), pipelines.CASES[name]
    options = ["--model", folder, "--steps", 4, "--height", case.height, "--width", case.width, "--guidance", 4]
    options += ["--frames", case.frames, "--formats", "png", "--quiet", "--store", store, "--prompt", pipelines.PROMPT]
    calls = {}
    for until in (1, 0.5):
        out = ["--guidance-until", until, "--backend", "onnxruntime", "-o", tmp_path / f"{until}.png"]
        result = run("overcrank", "render", *options, *out)
        assert result.exit_code == 0, result.output
        made = json.loads((tmp_path / f"{until}.json").read_text())["calls"]
        calls[until] = next(by["onnxruntime"] for name, by in made.items() if name.startswith("denoiser"))
    assert calls[0.5] == calls[1] * 3 / 4


def test_guidance_in_one_call_has_no_end(run: Any, tmp_path: Path) -> None:
    result = run("overcrank", "render", "--prompt", "x", "--guidance-until", 0.5, "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert "error: guidance_until: ltx-demo computes both sides of guidance in one call" in result.output
