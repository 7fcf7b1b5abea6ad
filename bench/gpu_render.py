"""`bench-gpu`, whole renders: a model with weights of its own, with and without the step cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_part import Setting, _layers, _recipe
from gpu_ways import Case, Way
from overcrank.export.quantization.recipe import QUANTIZED
from overcrank.models import resolve
from overcrank.runtime.pipeline.accelerate import main_module
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.render.renderer import Outcome, Renderer, RenderJob, Silent
from overcrank.runtime.render.request import RenderRequest
from overcrank.runtime.render.sidecar import timing
from overcrank.runtime.render.stepcache import BACKEND, threshold_of
from skimage.metrics import peak_signal_noise_ratio

BACKENDS = {"eager": "eager", "compile": "eager", "onnxruntime": "onnxruntime", "engine": "tensorrt"}
PROMPT = "a red circle moving right on a black background"
LEVELS = ("off", "safe", "fast")


def rendered(case: Case, way: Way, at: Setting, reference: Path) -> dict[str, Any]:
    """For each level of the cache: seconds, steps, and how far from `reference`, which the eager way writes."""
    layers: dict[str, Any] = {}
    if way.precision in QUANTIZED:
        form = _layers(way)
        layers = {"precision": form.format, "activations": form.activations, "recipe": _recipe(case, way)}
    pipe = load(
        case.model,
        backend=BACKENDS[way.kind],
        device=at.device.type,
        store=at.store,
        slow_engines=True,
        **layers,
    )
    if way.kind == "compile":
        module = main_module(pipe)
        module.forward = torch.compile(module.forward, mode=way.mode, dynamic=False)  # under the step cache
    return {level: _one(case, pipe, level, at, reference) for level in LEVELS}


def _one(case: Case, pipe: Any, level: str, at: Setting, reference: Path) -> dict[str, Any]:
    variant, shape = pipe.overcrank.variant, case.shape
    threshold = threshold_of(level, resolve(case.model))
    driver = Renderer(pipe, variant.name, Silent(), cache=level, lanes=1)
    size = {"height": shape.height, "width": shape.width, "frames": shape.frames}
    request = RenderRequest(prompt=PROMPT, formats=("latents",), **size).completed(variant)
    if level == LEVELS[0]:
        driver.video(request)  # compiles what is to be compiled
    outcome = Outcome(RenderJob(request, Path("video")))
    at.wait()
    start = time.perf_counter()
    with pipe.overcrank.ledger.recording() as record:
        video, _ = driver.made(outcome)
    at.wait()
    seconds = time.perf_counter() - start
    calls = record.backends()
    if not reference.is_file():
        np.savez(reference, latents=video.latents, frames=video.frames)
    kept = np.load(reference)
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) for x in (video.latents, kept["latents"]))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    same = bool((video.frames == kept["frames"]).all())
    return {
        "threshold": threshold,
        "seconds": round(seconds, 3),
        "steps": request.steps,
        "skipped": calls.get("denoiser", {}).get(BACKEND, 0),
        "calls": calls,
        **{f"step_{k}": v for k, v in timing(outcome.steps).items()},
        "lowest_cosine": round(float(cosines.min()), 6),
        "psnr_db": None if same else round(float(peak_signal_noise_ratio(kept["frames"], video.frames)), 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if at.device.type == "cuda" else None,
    }
