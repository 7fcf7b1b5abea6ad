"""The demo model on a processor: eager PyTorch against ONNX Runtime, which `--backend auto` uses where no card is.

    python bench/onnxruntime_demo.py [--pairs 15]

Both render the same request, one after the other in one process, in an order that alternates; of each pair the ratio
of seconds is taken, and of the pairs the median. Frames are compared. bench/results/onnxruntime-demo.json.
Predicted before the first run: 1.6, as an earlier benchmark had found; per denoiser call 2.1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from overcrank.models import components, resolve
from overcrank.models.base import VideoShape
from overcrank.runtime.pipeline.load import load
from overcrank.runtime.render.renderer import Outcome, Renderer, RenderJob, Silent
from overcrank.runtime.render.request import RenderRequest

RESULTS = Path(__file__).parent / "results"
MODEL, PROMPT = "ltx-demo", "a red circle moving right"
BACKENDS = ("eager", "auto")
PREDICTED = {"render": 1.6, "denoiser_call": 2.1}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(eager: Callable[[], Any], session: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Median, 10th and 90th percentile of the ratio of seconds over pairs, after one of each that does not count."""
    eager(), session()
    taken = []
    for pair in range(pairs):
        sides = (eager, session) if pair % 2 else (session, eager)
        each = {side: seconds(side) for side in sides}
        taken.append((each[eager], each[session]))
    ratios = [a / b for a, b in taken]
    low, high = np.percentile(ratios, [10, 90])
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_p10": round(float(low), 3),
        "ratio_p90": round(float(high), 3),
        "eager_ms": round(statistics.median(a for a, _ in taken) * 1000, 2),
        "onnxruntime_ms": round(statistics.median(b for _, b in taken) * 1000, 2),
    }


def denoiser_call(pipe: Any) -> Callable[[], Any]:
    """A call as one step of the demo with guidance makes it."""
    torch.manual_seed(0)
    component = components(resolve(MODEL), ("denoiser",))[0]
    variant = resolve(MODEL)
    sizes = component.sizes(VideoShape(variant.native.height, variant.native.width, variant.native.frames, 2))
    kwargs = {
        "hidden_states": torch.randn(2, sizes["tokens"], 32),
        "encoder_hidden_states": torch.randn(2, sizes["text"], 64),
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": torch.ones(2, sizes["text"]),
        "num_frames": (variant.native.frames - 1) // 4 + 1,
        "height": variant.native.height // 16,
        "width": variant.native.width // 16,
        "rope_interpolation_scale": (4 / 8, 16, 16),
        "return_dict": False,
    }

    def call() -> Any:
        with torch.no_grad():
            return pipe.transformer(**kwargs)[0]

    return call


def rendered(renderer: Renderer, request: RenderRequest) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """The frames, and who served how many calls of each component."""
    with renderer.acceleration.ledger.recording() as record:
        video, _ = renderer.made(Outcome(RenderJob(request, Path("video"))))
    return video.frames.astype(np.float64), record.backends()


def agreement(calls: dict[str, Callable[[], Any]], frames: dict[str, np.ndarray]) -> dict[str, float]:
    one, other = (calls[backend]() for backend in BACKENDS)
    difference = np.abs(frames["eager"] - frames["auto"])
    return {
        "denoiser_relative_error": float((one - other).abs().max() / one.abs().max()),
        "frames_largest_difference_of_255": float(difference.max()),
        "frames_psnr_db": round(float(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-12))), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    assert pairs >= 11
    request = RenderRequest(prompt=PROMPT).completed(resolve(MODEL))
    renderers = {backend: Renderer(load(MODEL, backend=backend), MODEL, Silent()) for backend in BACKENDS}
    both = {backend: rendered(renderer, request) for backend, renderer in renderers.items()}
    calls = {backend: denoiser_call(renderer.pipe) for backend, renderer in renderers.items()}
    eager, auto = renderers["eager"], renderers["auto"]
    result = {
        "model": MODEL,
        "prompt": PROMPT,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")}
        | {"onnxruntime": onnxruntime.__version__},
        "pairs": pairs,
        "predicted_ratio": PREDICTED,
        "calls_of_auto": both["auto"][1],
        "render": compared(lambda: rendered(eager, request), lambda: rendered(auto, request), pairs),
        "denoiser_call": compared(calls["eager"], calls["auto"], 20 * pairs),
        "agreement": agreement(calls, {backend: frames for backend, (frames, _) in both.items()}),
    }
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "onnxruntime-demo.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
