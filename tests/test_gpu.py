"""On an NVIDIA card: the same render through TensorRT engines. Nothing here has run without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")]


def test_engines_render_what_eager_renders_on_the_card(run: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    names = "denoiser,denoiser_conditioned,vae_decoder,vae_encoder"
    built = run("build-engine", "--model", "ltx-demo", "--gpu", "auto", "--components", names, "--store", store)
    assert built.exit_code == 0, built.output
    options = ["--prompt", "a red circle moving right", "--formats", "latents,sheet", "--quiet", "--store", store]
    for backend in ("tensorrt", "eager"):
        result = run("overcrank", "render", *options, "--backend", backend, "-o", tmp_path / f"{backend}.mp4")
        assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "tensorrt.json").read_text())
    assert set(about["calls"]["denoiser"]) == {"tensorrt_rtx"}
    assert not about["fallbacks"]
    ours, theirs = (load_file(tmp_path / f"{b}.latents.safetensors")["latents"] for b in ("tensorrt", "eager"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.99  # both in 16 bit
