"""A pipeline of every family through TrtSession over the simulated runtime, against eager PyTorch."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overcrank.engines.profiles import Profile
from overcrank.engines.store import Store
from overcrank.models.base import Variant, VideoShape

from tests import pipelines, tiny, without_torchvision
from tests.simulated_tensorrt import Simulated, bundle_of
from tests.simulated_tensorrt.installed import every_component
from tests.test_render_families import STEPS, frames_of, media_of

OF_PICTURES = 640  # pixels a side, where the pipeline makes the size of the picture's shape
PARTLY = {"framepack": {"vae_decoder"}, "framepack-ends": {"vae_decoder"}}
"""Cases → components of which engines do not serve every call: FramePack first decodes one latent frame alone."""


@pytest.fixture(scope="session")
def bundles(shared_store: Path) -> Path:
    """The store in which test_render_families.py has graphs exported, those of other workers included."""
    return shared_store


@pytest.fixture(autouse=True)
def _what_cannot_be_installed_here() -> None:
    without_torchvision.install()
    without_torchvision.pass_guardrail()


def profile_of(variant: Variant, case: pipelines.Case) -> Profile:
    """The layout's own, wide enough for what the case renders, also where that has the size of its picture's shape."""
    layout = tiny.layout(variant.like)
    largest = [max(getattr(layout.maximum, a), getattr(case, a)) for a in ("height", "width", "frames")]
    if not all(rendering.sized for rendering in variant.renders.values()):
        largest[:2] = OF_PICTURES, OF_PICTURES
    return Profile(layout.minimum, replace(layout.native, batch=2), VideoShape(*largest, batch=2))


def options_of(name: str, folder: Path, media: Path) -> list[object]:
    case = pipelines.CASES[name]
    options: list[object] = ["--model", folder, "--height", case.height, "--width", case.width]
    options += ["--frames", case.frames, "--formats", "png", "--quiet", "--device", "cpu", *media_of(case, media)]
    options += ["--steps", STEPS] if name != "ltx-upsampler" else []
    return options + (["--prompt", pipelines.PROMPT] if case.prompt else [])


def built(name: str, folder: Path, store: Path, simulated: Simulated) -> Path:
    from overcrank.runtime.pipeline.load import load

    pipe = load(str(folder), backend="eager", device="cpu")
    variant, case = pipe.overcrank.variant, pipelines.CASES[name]
    # An encoder's graph takes as long to export as all others, and a video of words alone does not call it.
    names = [c.name for c in every_component(variant) if case.media or not c.name.startswith("vae_encoder")]
    return simulated.plans.register(bundle_of(variant, profile_of(variant, case), Store(store), *names))


@pytest.mark.parametrize("name", tiny.specimens(pipelines.CASES, "ltx-upsampler", "wan", "modelscope"))
def test_sessions_render_what_eager_renders(
    name: str, run: Any, tmp_path: Path, bundles: Path, simulated: Simulated, record_property: Any
) -> None:
    folder = pipelines.saved(name, tmp_path)
    bundle = built(name, folder, bundles, simulated)
    options = [*options_of(name, folder, tmp_path), "--store", bundles]
    for backend, more in (("eager", []), ("auto", ["--bundle", bundle.name])):
        result = run("overcrank", "render", *options, *more, "--backend", backend, "-o", tmp_path / f"{backend}.png")
        assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "auto.json").read_text())
    reasons = {fallback["component"]: fallback["kind"] for fallback in about["fallbacks"]}
    assert set(reasons) == PARTLY.get(name, set()), reasons
    assert set(reasons.values()) <= {"OutsideProfile"}
    for component, backends in about["calls"].items():
        assert set(backends) == {"tensorrt_rtx", *(["eager"] if component in reasons else [])}, component
    assert simulated.card.loads == len(about["calls"]), "twins do not share their engine"
    eager, engines = (frames_of(tmp_path / f"{b}-frames") for b in ("eager", "auto"))
    decibels = -10 * float(np.log10(max(float(np.square(eager - engines).mean()), 1e-20)))
    record_property("psnr", decibels)
    record_property("allocations", simulated.card.allocations)
    assert decibels >= 50
    del result
    gc.collect()
    assert not simulated.card.allocated, "memory of sessions outlives the pipeline"
    assert not simulated.card.engines


def test_a_streamed_vae_holds_its_caches_twice(tmp_path: Path, bundles: Path, simulated: Simulated) -> None:
    """Those that came in and those that go out; and the planner knows it."""
    import torch
    from overcrank.engines.manifest import read_manifest
    from overcrank.runtime.pipeline import placement as memory
    from overcrank.runtime.pipeline.load import load

    folder, card = pipelines.saved("wan", tmp_path), simulated.card
    variant = load(str(folder), backend="eager", device="cpu").overcrank.variant
    largest = VideoShape(96, 96, 33, batch=2)
    profile = Profile(VideoShape(32, 32, 1), replace(largest, batch=1), largest)
    names = ("vae_decoder_first", "vae_decoder")
    simulated.plans.register(path := bundle_of(variant, profile, Store(bundles), *names))
    pipe = load(str(folder), backend="auto", device="cpu", store=bundles, bundle=str(path))
    latents = torch.randn(1, 4, 9, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with pipe.overcrank.ledger.recording() as record:
            made = pipe.vae.decode(latents).sample
        weights, card.peak = card.allocated, 0  # with the arena at its size
        again = pipe.vae.decode(latents).sample
        with pipe.overcrank.ledger.eagerly():
            eager = pipe.vae.decode(latents).sample
    assert record.backends() == {"vae_decoder": {"tensorrt_rtx": 8}, "vae_decoder_first": {"tensorrt_rtx": 1}}
    assert torch.allclose(made, eager, atol=1e-4)
    assert torch.equal(made, again)
    context = simulated.context
    assert context.plan.entry.name == "vae_decoder"
    caches = sum(4 * int(np.prod(shape)) for name, shape in context.shapes.items() if name != "x")
    pixels = 4 * int(np.prod(context.get_tensor_shape("out")))
    taken = card.peak - card.engines - weights
    assert caches > 4 * pixels
    assert 2 * caches <= taken <= 2 * caches + 3 * pixels
    manifest = read_manifest(path)
    planned = memory.working_bytes([(entry, manifest.max) for entry in manifest.components])
    arena = max(entry.activation_bytes or 0 for entry in manifest.components)
    assert taken + arena <= planned <= 3 * (taken + arena)
