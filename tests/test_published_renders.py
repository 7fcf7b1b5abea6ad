"""Every variant by its name, from its published layout on a hub, with every default, against diffusers by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overcrank.models import families, family, resolve
from overcrank.models.base import VideoShape
from overcrank.runtime.render.media import fitted_image, fitted_video

from tests import by_hand, checkpoints, hub_server, pipelines, tiny
from tests.test_render_families import _what_cannot_be_installed_here, frames_of, media_of, store  # noqa: F401

RENDER = """
from tests import without_torchvision
without_torchvision.install()
without_torchvision.pass_guardrail()
from overcrank.cli import main
main()
"""
NAMES = [v.name for name in families() for v in family(name).variants if not v.packaged]


def command(hub: hub_server.Hub, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    own = os.environ | hub.environment(tmp_path / "hf") | {"OVERCRANK_HOME": str(tmp_path / "home")}
    own["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = [sys.executable, "-c", RENDER, *map(str, words)]
    return subprocess.run(done, env=own, capture_output=True, text=True, check=False, timeout=900)


def test_every_variant_has_its_publishers_call() -> None:
    assert set(by_hand.WAYS) == set(NAMES)


@pytest.mark.parametrize("name", tiny.thinned(NAMES, every=30))
def test_defaults_are_the_publishers_render(name: str, tmp_path: Path, store: Path, record_property: Any) -> None:  # noqa: F811
    root, way, variant = tmp_path / "root", by_hand.WAYS[name], resolve(name)
    checkpoints.published(root, name)
    prompt = [] if way.media and way.width == 128 else ["--prompt", pipelines.PROMPT]
    case = pipelines.Case(pipelines.ltx, way.media, way.width, way.width, way.frames)
    where = checkpoints.at(root, variant) if variant.hub_file else name
    words = ["render", "--model", where, *prompt, *media_of(case, tmp_path), "--height", way.width, "--width"]
    words += [way.width, "--frames", way.frames, "--backend", "onnxruntime", "--store", store, "--formats", "png"]
    words += ["--steps", way.steps] if way.steps else []
    with hub_server.serve(root) as hub:
        done = command(hub, tmp_path, *words, "--quiet", "-o", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "a.json").read_text())
    assert not about["fallbacks"]
    assert {backend for calls in about["calls"].values() for backend in calls} == {"onnxruntime"}
    ours = frames_of(tmp_path / "a-frames")
    wanted = np.asarray(by_hand.rendered(root, name, *_asked(case, bool(prompt), tmp_path)))
    assert wanted.std() > 0.005, "a picture of one colour would agree with anything"
    error = float(np.square(ours - wanted).mean())
    decibels = -10 * math.log10(max(error, 1e-20))
    record_property("psnr", decibels)
    assert decibels >= 50


def _asked(case: pipelines.Case, prompt: bool, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Size, and media as the pipelines take them."""
    shape = VideoShape(case.height, case.width, case.frames)
    sizes = {"height": case.height, "width": case.width, "num_frames": case.frames}
    media: dict[str, Any] = {"prompt": pipelines.PROMPT} if prompt else {}
    if case.media == "video":
        half = {"height": case.height // 2, "width": case.width // 2}
        return half, {"video": fitted_video(folder / "clip.mp4", shape, case.frames, False)}
    if case.media:
        media["image"] = fitted_image(folder / "first.png", shape)  # which has this size already
    if case.media == "ends":
        media["last_image"] = fitted_image(folder / "last.png", shape)
    return sizes, media
