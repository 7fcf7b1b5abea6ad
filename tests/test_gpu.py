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


NAMES = "denoiser,denoiser_conditioned,vae_decoder,vae_encoder"
PROMPT = ["--prompt", "a red circle moving right", "--formats", "latents,sheet", "--quiet"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With engines of the demo for this card."""
    from click.testing import CliRunner
    from overcrank import cli

    folder = tmp_path_factory.mktemp("store")
    words = ["--model", "ltx-demo", "--gpu", "auto", "--components", NAMES, "--store", str(folder)]
    built = CliRunner().invoke(cli.build_engine, words)
    assert built.exit_code == 0, built.output
    return folder


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Kernels that fit any shape and those made for this one add up in another order; a wrong address is far off."""
    return bool(((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) > 0.9999)


def rendered(run: Any, out: Path, *options: object) -> tuple[np.ndarray, dict[str, Any]]:
    """Latents of every step, and the sidecar."""
    result = run("overcrank", "render", *PROMPT, *options, "-o", out)
    assert result.exit_code == 0, result.output
    latents = load_file(out.with_suffix(".latents.safetensors"))["latents"]
    return latents, json.loads(out.with_suffix(".json").read_text())


def test_engines_render_what_eager_renders_on_the_card(run: Any, tmp_path: Path, store: Path) -> None:
    options = [*PROMPT, "--store", store]
    for backend in ("tensorrt", "eager"):
        result = run("overcrank", "render", *options, "--backend", backend, "-o", tmp_path / f"{backend}.mp4")
        assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "tensorrt.json").read_text())
    assert set(about["calls"]["denoiser"]) == {"tensorrt_rtx"}
    assert not about["fallbacks"]
    ours, theirs = (load_file(tmp_path / f"{b}.latents.safetensors")["latents"] for b in ("tensorrt", "eager"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) > 0.99  # both in 16 bit


def test_kernels_are_kept_for_the_next_render(run: Any, tmp_path: Path, store: Path) -> None:
    first, _ = rendered(run, tmp_path / "a.mp4", "--backend", "tensorrt", "--store", store)
    kept = {f: f.stat().st_mtime_ns for f in (store / "runtime").iterdir()}
    assert kept
    again, _ = rendered(run, tmp_path / "b.mp4", "--backend", "tensorrt", "--store", store)
    assert {f: f.stat().st_mtime_ns for f in (store / "runtime").iterdir()} == kept
    assert alike(first, again)


@pytest.mark.parametrize("vram", ["low", "balanced"])
def test_parts_that_move_change_nothing(vram: str, run: Any, tmp_path: Path, store: Path) -> None:
    options = ["--backend", "tensorrt", "--store", store]
    here, _ = rendered(run, tmp_path / "here.mp4", *options, "--vram", "high")
    moved, about = rendered(run, tmp_path / "moved.mp4", *options, "--vram", vram)
    assert alike(here, moved)
    assert set(about["calls"]["denoiser"]) == {"tensorrt_rtx"}


def test_the_step_cache_skips_on_the_card(run: Any, tmp_path: Path, store: Path) -> None:
    _, about = rendered(run, tmp_path / "a.mp4", "--backend", "tensorrt", "--store", store, "--cache", "fast")
    assert set(about["calls"]["denoiser"]) == {"tensorrt_rtx", "step-cache"}


def test_an_engine_call_does_not_wait_for_the_card(store: Path) -> None:
    """PyTorch's own debug mode raises where a call synchronizes."""
    from overcrank.models import components, resolve
    from overcrank.runtime.pipeline.load import load

    pipe = load("ltx-demo", backend="tensorrt", store=store)
    (component,) = components(resolve("ltx-demo"), ("denoiser",))
    module = pipe.transformer
    sizes = {**component.free_axes, **component.trace_sizes}
    call = component.sample(module, sizes, torch.Generator().manual_seed(0))
    call = {k: v.to(module.device, module.dtype) if torch.is_tensor(v) else v for k, v in call.items()}
    with torch.no_grad():
        module(**call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(**call)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_portable_engine_renders(run: Any, tmp_path: Path) -> None:
    built = run("build-engine", "--model", "ltx-demo", "--gpu", "rtx", "--components", NAMES, "--store", tmp_path)
    assert built.exit_code == 0, built.output
    latents, about = rendered(run, tmp_path / "a.mp4", "--backend", "tensorrt", "--store", tmp_path)
    assert set(about["calls"]["denoiser"]) == {"tensorrt_rtx"}
    assert np.isfinite(latents).all()


def test_parked_weights_come_back() -> None:
    from overcrank.runtime.sessions.parked import Parked

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).cuda()
    before = module[1].weight.detach().clone()
    parked = Parked(module)
    parked.park(["0", "1"])
    assert (module[0].weight.device.type, module[1].weight.device.type) == ("cuda", "cpu")
    parked.fetch()
    assert torch.equal(module[1].weight, before)


def test_moved_parts_make_room() -> None:
    from types import SimpleNamespace

    from overcrank.runtime.pipeline.placement import place

    parts = {name: torch.nn.Linear(4, 4) for name in ("text_encoder", "vae", "transformer")}
    place(SimpleNamespace(components=parts), ["text_encoder", "vae"], torch.device("cuda"))
    x = torch.ones(1, 4, device="cuda")
    for called, here in (("text_encoder", "text_encoder"), ("vae", "vae"), ("transformer", "")):
        parts[called](x)
        moved = {n for n in ("text_encoder", "vae") if parts[n].weight.device.type == "cuda"}
        assert moved == ({here} if here else set())
